"""One recorder's work on one database: while it has the lock, ticks go from the buffer into it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from gpumon_core.recording import buffer
from gpumon_core.recording.buffer import TickBuffer
from gpumon_core.recording.consumers import Consumers
from gpumon_core.recording.counters import LiveCounters
from gpumon_core.recording.lost_files import WORDS, open_database, prepare, set_aside
from gpumon_core.recording.refusals import Refusals
from gpumon_core.recording.state import Problem
from gpumon_core.settings import Settings, mask_password
from gpumon_core.store import database, database_file, recorder_stats, retention, rollups
from gpumon_core.store.database_file import OpenFile
from gpumon_core.store.lock import Lock, LockLost
from gpumon_core.store.writer import Attributed, ContentReplaced, Writer
from gpumon_core.telemetry.records import elapsed

log = logging.getLogger(__name__)

# So many ticks are written in one transaction where many wait.
CATCH_UP_TICKS = 50
# How long this program's readers may still use a file that was removed or replaced.
READERS_CLOSE_S = 2.0
# How long the end brings the coarser resolutions up to date. Usually it takes some hundredths of a second.
LAST_ROLLUPS_S = 1.0


@dataclass(slots=True)
class Target:
    """Where ticks go as long as the program runs: the database, the ticks that wait for it, and the file as it was
    when it was opened last. `name`: of the files in which ticks wait while no recorder runs."""

    url: str
    name: str
    buffer: TickBuffer
    file: OpenFile | None = None


class Session:
    """An open database with its lock. `write` belongs to one thread; the others may be called meanwhile."""

    def __init__(
        self,
        target: Target,
        settings: Settings,
        source: str,
        lock: Lock,
        counters: LiveCounters,
        consumers: Consumers,
        engine: Engine,
    ) -> None:
        self.target = target
        self.lock = lock
        self.engine = engine
        # What has happened to the database, for the state; None where nothing has.
        self.notice: Problem | None = None
        self._settings = settings
        self._source = source
        self._counters = counters
        self._consumers = consumers
        self._busy = threading.Lock()
        self._is_closed = False
        # What happened to the file, if it must be opened again before anything is written.
        self._lost: database_file.FileState | None = None
        # Whether the file still has to be checked, and whether the last attempt to write may have been committed.
        self._is_unchecked = True
        self._is_unsure = True
        self._refusals = Refusals(counters)
        self._saved: list[Path] = []
        # By UUID, as of the newest commit.
        self._energy_j: dict[str, float] = {}
        self._use(engine)
        # When it began: by the wall clock, or the history where that is ahead; and by a clock that cannot be set.
        self._began = max(time.time(), float(retention.newest(engine) or 0)), elapsed()

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        self._writer = Writer(
            engine,
            self._settings.host_name,
            self._source,
            self._settings.interval,
            60 * self._settings.idle_minutes,
        )
        self._rolled_up = rollups.Progress()
        # Every transaction of every thread passes the lock.
        sa.event.listen(engine, "begin", self.lock.fence)
        path = database.file_of(self.target.url)
        self.target.file = None if path is None else OpenFile(path)

    @property
    def now(self) -> float:
        """UTC seconds for retention: a wall clock that was set far ahead must not delete the history."""
        began, at = self._began
        return min(time.time(), began + elapsed() - at)

    def is_new(self) -> bool:
        """Whether the database holds nothing of this host yet. Raises SQLAlchemyError."""
        return self._writer.is_new()

    def write_past(self, ticks: Iterable[Attributed], stopping: threading.Event) -> None:
        """Write older ticks, as a demo's first hour; consumers do not get them. Raises SQLAlchemyError."""
        with self._busy:
            past = list(ticks)
            if past and not self._is_closed:
                self._writer.write_all(past)
                self.roll_up(stopping)

    def take_over(self) -> None:
        """Load the ticks that an earlier recorder could not write."""
        left = buffer.saved(self._settings.data_dir, self.target.name)
        for problem in left.problems:
            log.error("%s", problem)
            self._counters.failed(problem, tick=False)
        if not left.files:
            return
        waiting = self.target.buffer
        if waiting.committed is None:
            waiting.committed = left.committed
        dropped = waiting.put_before(left.ticks)
        self._saved += left.files
        self._is_unsure = True
        log.info("%d ticks that an earlier recorder could not write are written now", len(left.ticks) - dropped)
        if dropped:
            self._counters.dropped(dropped, "more ticks waited than the buffer holds")

    def write(self) -> None:
        """Write the ticks that wait, oldest first, and hand over what was committed; the rest goes on waiting.

        Raises SQLAlchemyError, database.DatabaseError, and LockLost.
        """
        waiting = self.target.buffer
        with self._busy:
            try:
                if not self._is_closed:
                    self._follow_file()
                while len(waiting) and not self._is_closed:
                    self._follow_file()
                    if self._is_unchecked:
                        self._check()
                    if self._is_unsure:
                        self._compare()
                    batch = waiting.take(CATCH_UP_TICKS)
                    if not batch:
                        break
                    self._is_unsure = True
                    try:
                        written = self._refusals.write(self._writer, batch)
                    except ContentReplaced:
                        waiting.put_back()
                        self._meet_other_content()
                        continue
                    except BaseException:
                        waiting.put_back()
                        raise
                    if self.is_elsewhere():
                        # What was committed went into a file that is lost.
                        waiting.put_back()
                        self._is_unsure = False
                        continue
                    self._is_unsure = False
                    waiting.done()
                    newest = batch[-1][0]
                    waiting.committed = int(newest.timestamp)
                    if written:
                        self._counters.committed(len(written), newest.elapsed)
                        self._energy_j = self._writer.energy()
                        self._hand_over(written)
                if not len(waiting):
                    self._forget_saved()
            finally:
                self._counters.waiting(len(waiting))

    def _hand_over(self, ticks: Sequence[Attributed]) -> None:
        self._consumers.hand_over(self._source, ticks, self._energy_j)

    def _forget_saved(self) -> None:
        """Delete the files with ticks that are in the database now."""
        for path in self._saved:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.error(
                    "%s cannot be deleted: %s. Its ticks are in the database: delete it by hand", path, error
                )
        self._saved = []

    def _compare(self) -> None:
        """Leave out ticks that the database has already: a commit that failed may have happened, and another
        recorder may have written meanwhile."""
        waiting = self.target.buffer
        newest = self._writer.last_seen()
        if newest is None or newest == waiting.committed or newest > time.time():
            return
        seconds = waiting.seconds()
        if newest in seconds:
            committed = len(seconds) - seconds[::-1].index(newest)
            left_out = waiting.leave_out(committed)
            self._counters.committed(committed, None)
            waiting.committed = newest
            self._hand_over(left_out)
            return
        late = next((place for place, second in enumerate(seconds) if second > newest), len(seconds))
        if late:
            waiting.leave_out(late)
            reason = (
                f"{late} ticks waited while another recorder wrote; they are left out, since it recorded that time"
            )
            log.warning("%s", reason)
            self._counters.dropped(late, reason)

    # ---- The file ----------------------------------------------------------------------------------

    def is_elsewhere(self) -> bool:
        """Whether the path of the database leads to another file now, or to none."""
        return self.target.file is not None and self.target.file.look() != "same"

    def _follow_file(self) -> None:
        """Open the database again where its file was removed or replaced. Raises database.DatabaseError."""
        file = self.target.file
        if file is None:
            return
        found = file.look()
        if found == "same":
            if self._lost is not None:
                self._take_back(file)
            return
        if self._lost is None:
            log.error("the database %s was %s while it was open", file.path, WORDS[found])
        self._lost = found
        database_file.close_readers(file.path, READERS_CLOSE_S)
        is_saved = self._lost != "without log" or database_file.save_log(self.engine)
        self.engine.dispose()
        self.notice = prepare(file, self._lost, is_saved)
        self._counters.failed(self.notice.reason, tick=False)
        engine, damaged = open_database(self.target.url, self._counters)
        self.notice = damaged or self.notice
        self._lost, self._is_unchecked, self._is_unsure = None, True, True
        self._use(engine)

    def _meet_other_content(self) -> None:
        """A backup was restored into the open database: it is checked, and everything is looked up again."""
        self.notice = Problem(
            f"The content of the database {mask_password(self.target.url)} was replaced while it was recorded "
            "into; recording goes on with what is there now",
            "Stop gpumon before you restore a backup: the last ticks may be lost.",
        )
        log.error("%s", self.notice.reason)
        self._counters.failed(self.notice.reason, tick=False)
        self._rolled_up.forget()
        self._is_unchecked = True

    def _take_back(self, file: OpenFile) -> None:
        """Open the file again, which was out of reach and is unchanged. Raises database.DatabaseError."""
        log.info("the database %s is there again", file.path)
        self.engine.dispose()
        engine, self.notice = open_database(self.target.url, self._counters)
        self._lost, self._is_unchecked, self._is_unsure = None, True, True
        self._use(engine)

    def regain(self) -> bool:
        """Take the lock again after it was lost; False where another has it. Raises OSError."""
        self._is_unsure = True
        self._rolled_up.forget()
        return self.lock.acquire()

    def doubt(self) -> None:
        """Have the file checked before the next tick is written: a reader has found damage."""
        self._is_unchecked = True

    def _check(self) -> None:
        """Check the complete file, once. Raises SQLAlchemyError, database.DatabaseError."""
        found = database_file.damage(self.engine)
        if found is not None:
            log.error("the database %s is damaged: %s", database.file_of(self.target.url), found)
            self.replace_damaged()
        self._is_unchecked = False

    def replace_damaged(self) -> None:
        """Set a damaged file aside, and make a new one. Raises database.DatabaseError."""
        self.engine.dispose()
        self.notice = set_aside(self.target.url)
        self._counters.failed(self.notice.reason, tick=False)
        self._use(open_database(self.target.url, self._counters)[0])
        self._is_unchecked, self._is_unsure = False, True

    # ---- Beside the ticks --------------------------------------------------------------------------

    def roll_up(self, stopping: threading.Event) -> None:
        """Bring the coarser resolutions up to date. Raises SQLAlchemyError and LockLost."""
        oldest, self._writer.rewritten_from = self._writer.rewritten_from, None
        try:
            rollups.roll_up(self.engine, self._writer.host, oldest, stopping, self._rolled_up)
        except (SQLAlchemyError, LockLost):
            later = self._writer.rewritten_from
            self._writer.rewritten_from = oldest if later is None else min(later, oldest or later)
            raise

    def is_open(self) -> bool:
        """Whether the file is still the one that was opened, so that jobs beside `write` may use it."""
        return not self._is_closed and self._lost is None and not self._is_unchecked and not self.is_elsewhere()

    def note_health(self) -> None:
        """Store the counters of the last minute. Raises SQLAlchemyError."""
        if self._writer.host_id is not None:
            recorder_stats.write(self.engine, self._writer.host_id, int(time.time()), self._counters.minute())

    def forget(self, stopping: threading.Event) -> None:
        """Delete what is older than the settings say. Raises SQLAlchemyError."""
        settings = self._settings
        days = retention.RetentionDays.of(settings)
        retention.forget(self.engine, days, self.now, stopping=stopping, host=settings.host_name)

    def close(self) -> None:
        """Release the database, with its ledger and rollups up to date if possible. For the thread that writes."""
        with self._busy:
            self._is_closed = True
            try:
                if self._lost is None and not self.is_elsewhere():
                    self._writer.settle()
                    self._finish_rollups()
            except LockLost:
                log.debug("the ledger and the rollups are left to the recorder that has the lock now")
            except SQLAlchemyError as error:
                # The next recorder reads from the ticks what they lack.
                log.warning(
                    "the ledger and the rollups could not be brought up to date: %s. The next recorder does it",
                    getattr(error, "orig", None) or error,
                )
            finally:
                self.engine.dispose()
                if self.target.file is not None:
                    self.target.file.close()
                self.lock.release()

    def _finish_rollups(self) -> None:
        """Renew the newest bucket of every tier: this host may never record again. Raises SQLAlchemyError and
        LockLost."""
        if self._is_unchecked:
            return
        enough = threading.Event()
        timer = threading.Timer(LAST_ROLLUPS_S, enough.set)
        timer.daemon = True
        timer.start()
        try:
            self._rolled_up.forget()
            self.roll_up(enough)
        finally:
            timer.cancel()
