"""Writes ticks without what the database can never take, so that this does not hold up all that comes after."""

from __future__ import annotations

import logging
from dataclasses import replace

from sqlalchemy.exc import DBAPIError, OperationalError

from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.recording.counters import LiveCounters
from gpumon_core.store import database
from gpumon_core.store.lock import LockLost
from gpumon_core.store.writer import Attributed, ContentReplaced, Writer

log = logging.getLogger(__name__)

# PostgreSQL's class of "syntax error or access rule violation": a missing column or table, or a missing right.
SCHEMA_ERRORS = "42"


class Refusals:
    """What the database refuses of ticks and processes."""

    def __init__(self, counters: LiveCounters) -> None:
        self._counters = counters
        # The processes with texts that the database does not take.
        self._refused: set[ProcessIdentity] = set()

    def write(self, writer: Writer, batch: list[Attributed]) -> list[Attributed]:
        """Write some ticks; what was written. Raises what may pass: SQLAlchemyError, LockLost, ContentReplaced."""
        batch = [self._without_refused(tick) for tick in batch]
        try:
            writer.write_all(batch)
            return batch
        except (OperationalError, LockLost, ContentReplaced):
            # The database is locked, full or away, which passes; or it is another recorder's, or another database.
            raise
        except Exception as error:
            if database.is_damage(error) or (isinstance(error, DBAPIError) and error.connection_invalidated):
                raise
            if (getattr(getattr(error, "orig", None), "sqlstate", None) or "").startswith(SCHEMA_ERRORS):
                # Every tick would be refused: the tables are of another gpumon, or this user has no right to them.
                raise
            if len(batch) > 1:
                # One of them is refused; the others are good.
                return [written for tick in batch for written in self.write(writer, [tick])]
            return self._write_without(writer, batch[0], str(getattr(error, "orig", None) or repr(error)))

    def _without_refused(self, tick: Attributed) -> Attributed:
        snapshot, identities = tick
        if not self._refused or self._refused.isdisjoint(identities.values()):
            return tick
        return snapshot, {
            pid: _nameless(identity) if identity in self._refused else identity
            for pid, identity in identities.items()
        }

    def _write_without(self, writer: Writer, tick: Attributed, why: str) -> list[Attributed]:
        """Write a tick that was refused: without the texts that are refused, without processes, or not at all."""
        snapshot, identities = tick
        named = {identity for identity in identities.values() if identity != _nameless(identity)}
        refused = {identity for identity in named if writer.refuses(identity)}
        if refused:
            # Processes that have ended are forgotten.
            self._refused = refused | self._refused.intersection(identities.values())
            pids = ", ".join(str(identity.pid) for identity in refused)
            reason = f"the texts of process {pids} cannot be written: {why}; its numbers are recorded without them"
            self._say(reason, tick=False)
            return self.write(writer, [tick])
        if not snapshot.processes:
            # The database would never take it, and the ticks behind it must not wait.
            self._say(f"a tick cannot be written: {why}; it is lost, and the next ones are recorded", tick=True)
            return []
        bare: list[Attributed] = [(replace(snapshot, processes=()), {})]
        try:
            writer.write_all(bare)
        except (OperationalError, LockLost, ContentReplaced):
            raise
        except Exception as error:
            if database.is_damage(error):
                raise
            self._say(f"a tick cannot be written: {why}; it is lost, and the next ones are recorded", tick=True)
            return []
        self._say(
            f"the processes of a tick cannot be written: {why}; the GPUs are recorded without them", tick=False
        )
        return bare

    def _say(self, reason: str, tick: bool) -> None:
        log.error("%s", reason)
        self._counters.failed(reason, tick=tick)


def _nameless(identity: ProcessIdentity) -> ProcessIdentity:
    """The same process without its texts, which the database does not take."""
    return ProcessIdentity(identity.pid, identity.start_key)
