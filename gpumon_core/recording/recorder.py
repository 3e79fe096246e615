"""Carries telemetry through attribution into the store, tick after tick.

Two threads share the work: one samples and never waits, one writes. What the database does not take waits between
them, and on disk while no recorder runs. What was committed is handed to the consumers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping

from sqlalchemy.exc import SQLAlchemyError

from gpumon_core.recording import roles
from gpumon_core.recording.allocator import give_back_memory
from gpumon_core.recording.buffer import FileFailed
from gpumon_core.recording.clockwork import Clockwork
from gpumon_core.recording.collector import Observer, SimulatedObserver
from gpumon_core.recording.consumers import Consumer, ConsumerHealth, Consumers
from gpumon_core.recording.counters import Counters, LiveCounters
from gpumon_core.recording.latest_tick import LatestTick
from gpumon_core.recording.sampler import Sampler
from gpumon_core.recording.session import Session
from gpumon_core.recording.state import LiveState, State
from gpumon_core.safety import private_files
from gpumon_core.settings import Settings, mask_password
from gpumon_core.store import database
from gpumon_core.store.lock import LockLost

log = logging.getLogger(__name__)

# How often the thread that writes looks for work, and whether its file is still there.
LOOK_S = 5.0
HOUSEKEEPING_S = 3600.0
ROLLUP_S = 60.0
REHEARSAL_S = 3600.0
# How long the end waits for what is being written. With jobs, source and consumers it is 10 s at the most.
WRITING_ENDS_S = 3.0
BREAKING_OFF_S = 1.0


class Recorder:
    """Runs in the background from `start` to `stop`. Errors of a tick never end it."""

    def __init__(self, settings: Settings, consumers: Iterable[Consumer] = ()) -> None:
        self._settings = settings
        self._counters = LiveCounters()
        self._state = LiveState(
            State(
                role="recording" if settings.record else "viewing",
                source="demo" if settings.source == "demo" else "nvml",
                database_url=settings.database_of(settings.source),
            )
        )
        self._sampler = Sampler(self._state, self._counters)
        memory = Consumer("the latest tick", self._sampler.memory.take, is_immediate=True)
        self._consumers = Consumers((memory, *consumers), self._show_consumers)
        self._due = threading.Event()
        self._ending = threading.Event()
        self._stopping = threading.Event()
        self._roles = roles.Roles(
            settings, self._state, self._counters, self._sampler, self._consumers, self._due, self._stopping
        )
        self._clockwork: Clockwork | None = None
        self._writing: threading.Thread | None = None

    @property
    def counters(self) -> Counters:
        """What was done so far, in numbers."""
        return self._counters.now

    @property
    def age_s(self) -> float | None:
        """The age of the newest tick in the database, in seconds by a clock that cannot be set; None where this
        recorder has written none."""
        return self._counters.age_s

    @property
    def latest_tick(self) -> LatestTick | None:
        """The latest tick, as long as this recorder samples; a new object whenever there is another."""
        return self._sampler.latest_tick

    @property
    def state(self) -> State:
        """The newest state; a new object whenever it changes."""
        return self._state.now

    @property
    def consumers(self) -> Mapping[str, ConsumerHealth]:
        """The state of what is handed each tick, by name."""
        return self._consumers.health

    @property
    def observer(self) -> Observer | None:
        """The source that is sampled now."""
        return self._sampler.observer

    @property
    def session(self) -> Session | None:
        """The database that is written now."""
        return self._roles.session

    def start(self, patient: bool = False) -> None:
        """Take the first tick at once and the following at the interval.

        A database that cannot be opened raises database.DatabaseError. If `patient`, it is a problem in the state
        instead, and tried again. A database that is only away is always waited for.
        """
        if not self._settings.record:
            log.info(
                "nothing is recorded, because GPUMON_RECORD is false; pages show %s",
                mask_password(self._state.now.database_url),
            )
            return
        exposed = private_files.exposed(database.files_of(self._settings), self._settings.log_file)
        for reason, remedy in private_files.sentences(exposed):
            log.warning("%s. %s", reason, remedy)
        try:
            self._roles.open()
        except database.DatabaseError as error:
            if not patient and not isinstance(error, database.DatabaseAway):
                self._sampler.use(None, None)
                raise
            self._state.fail("database", str(error))
        # Each job has a thread of its own: a tick waits for no other job.
        self._consumers.start()
        clockwork = Clockwork(("ticks", "retries", "rollups", "housekeeping"), self._count_skipped)
        interval_s = self._settings.interval
        clockwork.add("tick", self._tick, interval_s, 0.0, "ticks")
        clockwork.add("retry", self._roles.retry, roles.RETRY_S, roles.RETRY_S, "retries")
        clockwork.add("rollups", self._every_minute, ROLLUP_S, min(ROLLUP_S, 2 * interval_s), "rollups")
        clockwork.add("housekeeping", self._keep_house, HOUSEKEEPING_S, 60.0, "housekeeping")
        clockwork.start()
        self._clockwork = clockwork
        self._writing = threading.Thread(target=self._write_forever, name="writing", daemon=True)
        self._writing.start()

    def _count_skipped(self, job: str) -> None:
        """A job was due while it still ran."""
        if job == "tick":
            self._counters.skipped(1)

    def stop(self) -> None:
        """Let the running tick commit, then close everything, within 10 s. Doing it twice is fine."""
        if self._clockwork is not None:
            self._stopping.set()
            for name in self._clockwork.stop():
                log.warning("the job of %s does not end; gpumon does not wait for it", name)
            self._clockwork = None
            self._ending.set()
            self._due.set()
            if self._writing is not None:
                self._writing.join(WRITING_ENDS_S)
                if self._writing.is_alive():
                    log.warning("the database does not answer; gpumon does not wait for it")
                    if self.session is not None:
                        database.break_off(self.session.engine)
                        self._writing.join(BREAKING_OFF_S)
                self._writing = None
            self._save_waiting()
            self._consumers.stop()
            self._sampler.use(None, None)
            log.info("recorder stopped")
        self._state.set(role="stopped")

    def _save_waiting(self) -> None:
        """Store what could not be written for the next recorder."""
        for target in self._roles.targets.values():
            waiting = len(target.buffer)
            if not waiting:
                continue
            try:
                target.buffer.save(self._settings.data_dir, target.name)
                log.warning(
                    "%d ticks could not be written; they are stored in a file, and the next recorder writes them",
                    waiting,
                )
            except FileFailed as error:
                reason = f"{waiting} ticks could not be written, and are lost: {error}"
                log.error("%s", reason)
                self._counters.dropped(waiting, reason)

    def _show_consumers(self) -> None:
        self._state.set(consumers=self._consumers.problems)

    def _tick(self) -> None:
        if self._sampler.tick():
            self._due.set()

    # ---- Writing -------------------------------------------------------------------------------------

    def _write_forever(self) -> None:
        while not self._ending.is_set():
            # Also where ticks are rare, a file that was replaced is noticed soon.
            self._due.wait(LOOK_S)
            self._due.clear()
            try:
                self._close_leaving()
                self._write()
            except Exception:
                # Nothing may end this thread: the ticks that wait are tried again.
                log.exception(
                    "ticks could not be written, for an unforeseen reason; they wait, and are tried again"
                )
        # What was sampled last.
        self._write()
        self._close_leaving()
        session = self._roles.end()
        if session is not None:
            session.close()

    def _write(self) -> None:
        """Write what waits."""
        session = self.session
        if session is None or not (len(session.target.buffer) or session.is_elsewhere()):
            return
        began = time.monotonic()
        try:
            self._rehearse(session)
            session.write()
        except LockLost:
            self._roles.regain_lock(session)
        except database.DatabaseError as error:
            self._counters.failed(str(error), tick=False)
            self._state.fail("database", str(error))
        except SQLAlchemyError as error:
            self._database_failed(session, error)
        except Exception as error:
            # An unforeseen reason; the ticks wait, and are tried again with the next one.
            if not self._state.has_problem("database"):
                log.exception("ticks could not be written; they wait in memory")
            reason = f"ticks could not be written, and wait in memory: {error!r}"
            self._counters.failed(reason, tick=False)
            self._state.fail("database", reason)
        else:
            self._state.solve("database")
            self._counters.took(self._sampler.took_ms + 1000 * (time.monotonic() - began))
        if session.notice is not None:
            self._state.set(notice=session.notice)

    def _database_failed(self, session: Session, error: SQLAlchemyError) -> None:
        """Let the ticks wait in memory; a damaged file is replaced."""
        cause = getattr(error, "orig", None) or error
        reason = f"the database does not take ticks, which wait in memory: {cause}"
        if database.is_damage(error):
            try:
                # Damage beyond the first page, which was read when the file was opened.
                session.replace_damaged()
                return
            except database.DatabaseError as refused:
                reason = str(refused)
        self._counters.failed(reason, tick=False)
        self._state.fail("database", reason)
        self._look_at_version(session)

    def _look_at_version(self, session: Session) -> None:
        """Report a database that a newer gpumon has brought to its own revision."""
        try:
            newer = database.newer_revision(session.engine)
        except (SQLAlchemyError, LockLost) as error:
            # The next minute asks again.
            log.debug("the revision of the database cannot be read: %s", error)
            return
        if newer is None:
            self._state.solve("version")
            return
        self._state.fail(
            "version",
            f"A newer gpumon has migrated the database {mask_password(session.target.url)} to revision {newer}; "
            f"this one knows revision {database.head()}, and records as long as that works",
            "Update this gpumon.",
        )

    def _rehearse(self, session: Session) -> None:
        """Give a new demo an hour of history, so that there is something to see."""
        waiting = session.target.buffer.seconds()
        if not isinstance(self.observer, SimulatedObserver) or not waiting or not session.is_new():
            return
        now, interval_s = waiting[0], self._settings.interval
        past = self._sampler.past(now - REHEARSAL_S, now - interval_s, interval_s)
        session.write_past(past, self._stopping)

    def _close_leaving(self) -> None:
        """Close the sessions that have ended, and open the next one at once."""
        leaving = self._roles.leaving()
        for session in leaving:
            try:
                session.write()
            except (SQLAlchemyError, database.DatabaseError, LockLost) as error:
                log.debug("the ticks still wait: %s", error)
            session.close()
        if leaving and not self._ending.is_set():
            self._roles.retry()

    # ---- Beside the ticks ----------------------------------------------------------------------------

    def _every_minute(self) -> None:
        """Rollups, the recorder's counters, and whether the lock is still this recorder's."""
        session = self.session
        if session is None or not session.is_open():
            return
        try:
            if not session.lock.is_held():
                # The thread that writes takes it again.
                self._due.set()
                return
            self._look_at_version(session)
            session.roll_up(self._stopping)
            session.note_health()
            give_back_memory()
        except LockLost:
            self._due.set()
        except (SQLAlchemyError, OSError) as error:
            # It is done a minute later.
            self._break_off(session, "rollups", error)

    def _keep_house(self) -> None:
        session = self.session
        if session is None or not session.is_open():
            return
        try:
            session.forget(self._stopping)
        except LockLost:
            self._due.set()
        except SQLAlchemyError as error:
            # It is done an hour later.
            self._break_off(session, "retention", error)

    def _break_off(self, session: Session, what: str, error: Exception) -> None:
        if database.is_damage(error):
            session.doubt()
        # Another program writes just now: that is normal, and ticks report it where it lasts.
        level = logging.INFO if database.is_busy(error) else logging.WARNING
        log.log(
            level,
            "%s stopped early: %s. The next run goes on from there",
            what,
            getattr(error, "orig", None) or error,
        )


def run_until(settings: Settings, stopped: threading.Event, consumers: Iterable[Consumer] = ()) -> None:
    """Record alone, without a server, until `stopped` is set. Raises database.DatabaseError."""
    recorder = Recorder(settings, consumers)
    recorder.start()
    try:
        # A signal that another thread gets does not wake this one, and only this one acts on it.
        while not stopped.wait(timeout=2.0):
            pass
    finally:
        recorder.stop()
