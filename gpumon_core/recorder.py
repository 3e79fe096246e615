"""Carries telemetry through attribution into the store, tick after tick.

One recorder writes a database; a second one stands by, read-only, and takes over when the first
ends. In `auto`, GPUs are simulated (into a database of their own) until the driver loads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from gpumon_core import private_files
from gpumon_core.clockwork import Clockwork
from gpumon_core.masking import hide
from gpumon_core.newest import Newest, follow
from gpumon_core.observer import Observer, SimulatedObserver, real
from gpumon_core.settings import Settings, mask_password
from gpumon_core.store import database, health, retention, rollups
from gpumon_core.store.lock import Lock, recorder_lock
from gpumon_core.store.writer import Attributed, Writer
from gpumon_core.telemetry.records import SourceUnavailable, elapsed
from gpumon_core.vitals import Pulse, Vitals, give_back_memory

log = logging.getLogger(__name__)

# How often a missing driver, or a database that another recorder holds, is tried again.
RETRY_S = 10.0
HOUSEKEEPING_S = 3600.0
ROLLUP_S = 60.0
REHEARSAL_S = 3600.0
# Ticks that wait in memory while the database does not take them: an hour at the usual interval. The
# oldest make room for newer ones.
BUFFER_TICKS = 900
# So many of them are written in one transaction once it does.
CATCH_UP_TICKS = 50


@dataclass(frozen=True, slots=True)
class Problem:
    """Something the user should know: what is the matter, and what to do about it."""

    reason: str
    remedy: str

    def __post_init__(self) -> None:
        # Pages and /healthz show it, and another library's error may quote a password.
        object.__setattr__(self, "reason", hide(self.reason))


@dataclass(frozen=True, slots=True)
class State:
    """What the recorder is doing, for pages and /healthz.

    role: recording; standby (another recorder holds the database); viewing (GPUMON_RECORD is
    false); stopped. `driver` is the problem with NVML, `recording` the one with this recorder, and `notice`
    something that has happened and is over.
    """

    role: Literal["recording", "standby", "viewing", "stopped"]
    source: Literal["nvml", "demo"]
    database_url: str
    driver: Problem | None = None
    recording: Problem | None = None
    notice: Problem | None = None


class _Recording:
    """One observer's snapshots being written to one database; it ends whole."""

    def __init__(self, observer: Observer, engine: Engine, writer: Writer, lock: Lock, pulse: Pulse) -> None:
        self.observer = observer
        self.engine = engine
        self.lock = lock
        self._writer = writer
        self._pulse = pulse
        self._waiting: deque[Attributed] = deque()
        self.newest: Newest | None = None
        # When it began: by the wall clock, or by the history where that is ahead; and by the clock nobody sets.
        self._began = max(time.time(), float(retention.newest(engine) or 0)), elapsed()

    @property
    def now(self) -> float:
        """UTC seconds for what forgets: a wall clock that was set far ahead must not cost the history."""
        began, at = self._began
        return min(time.time(), began + elapsed() - at)

    def tick(self, interval_s: float) -> None:
        """Take a snapshot, and write it and whatever waits. Raises SourceUnavailable and SQLAlchemyError; what
        could not be written is kept."""
        if not self._waiting and self._writer.is_new():
            self._rehearse(interval_s)
        observed = self.observer.observe()
        self.newest = follow(self.newest, *observed)
        self._waiting.append(observed)
        if len(self._waiting) > BUFFER_TICKS:
            self._waiting.popleft()
            self._pulse.dropped()
        self.catch_up()
        self.newest = replace(self.newest, energy_j=self._writer.energy())

    def _rehearse(self, interval_s: float) -> None:
        """A demo that begins has an hour behind it already, so that there is something to see."""
        now = time.time()
        past = list(self.observer.past(now - REHEARSAL_S, now - interval_s, interval_s))
        if past:
            self._writer.write_all(past)
            self.roll_up(threading.Event())

    def catch_up(self) -> None:
        """Write what waits, oldest first. Raises SQLAlchemyError."""
        try:
            while self._waiting:
                batch = list(self._waiting)[:CATCH_UP_TICKS]
                self._write(batch)
                for _ in batch:
                    self._waiting.popleft()
        finally:
            self._pulse.waiting(len(self._waiting))

    def _write(self, batch: list[Attributed]) -> None:
        try:
            self._pulse.committed(self._writer.write_all(batch), batch[-1][0].elapsed)
        except OperationalError:
            # The database is locked, full or away: that passes.
            raise
        except Exception as error:
            if database.is_damage(error) or (isinstance(error, DBAPIError) and error.connection_invalidated):
                raise
            if len(batch) == 1:
                # It would never be taken, and those behind it must not wait for it.
                reason = f"a tick cannot be written, and is left out: {getattr(error, 'orig', None) or error!r}"
                log.error("%s", reason)
                self._pulse.failed(reason, tick=True)
                return
            # One of them it is; the others are good.
            for tick in batch:
                self._write([tick])

    def go_on(self, engine: Engine) -> None:
        """Write into another database from now on; what waits goes there too."""
        self.engine = engine
        before = self._writer
        self._writer = Writer(engine, before.host, before.source, before.interval_s, before.idle_after_s)

    def roll_up(self, stopping: threading.Event) -> None:
        """Bring the coarser resolutions up to date. Raises SQLAlchemyError."""
        oldest, self._writer.rewritten_from = self._writer.rewritten_from, None
        try:
            rollups.roll_up(self.engine, self._writer.host, oldest, stopping)
        except SQLAlchemyError:
            later = self._writer.rewritten_from
            self._writer.rewritten_from = oldest if later is None else min(later, oldest or later)
            raise

    def note_health(self) -> None:
        """Write down how the last minute went. Raises SQLAlchemyError."""
        if self._writer.host_id is not None:
            health.write(self.engine, self._writer.host_id, int(time.time()), self._pulse.minute())

    def close(self) -> None:
        """End it, with everything written that the database takes."""
        self.observer.close()
        try:
            self.catch_up()
            self._writer.settle()
        except SQLAlchemyError as error:
            log.error(
                "%d ticks could not be written: %s", len(self._waiting), getattr(error, "orig", None) or error
            )
        self.engine.dispose()
        self.lock.release()


class Recorder:
    """Runs in the background from `start` to `stop`. Errors of a tick never end it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._guard = threading.Lock()
        self._recording: _Recording | None = None
        self._awaited: Lock | None = None
        self._failing: str | None = None
        self._clockwork: Clockwork | None = None
        self._state = State(
            role="recording" if settings.record else "viewing",
            source="demo" if settings.source == "demo" else "nvml",
            database_url=settings.database_of(settings.source),
        )
        self._stopping = threading.Event()
        self._pulse = Pulse()

    @property
    def vitals(self) -> Vitals:
        """What was done so far, in numbers."""
        return self._pulse.vitals

    @property
    def age_s(self) -> float | None:
        """How old the newest tick in the database is, in seconds by a clock that nobody sets; None where this
        recorder has written none."""
        return self._pulse.age_s

    @property
    def newest(self) -> Newest | None:
        """The newest tick, as long as this recorder records; a new object whenever there is another."""
        recording = self._recording
        return None if recording is None else recording.newest

    @property
    def state(self) -> State:
        """The newest state; a new object whenever it changes."""
        return self._state

    def start(self, patient: bool = False) -> None:
        """Take the first tick at once and the following at the interval.

        A database that cannot be opened raises database.DatabaseError, or, for the `patient`,
        is a problem in the state that is tried again.
        """
        if not self._settings.record:
            log.info(
                "recording is switched off (GPUMON_RECORD): serving %s", mask_password(self._state.database_url)
            )
            return
        exposed = private_files.exposed(database.files_of(self._settings), self._settings.log_file)
        for reason, remedy in private_files.sentences(exposed):
            log.warning("%s. %s", reason, remedy)
        try:
            self._open()
        except database.DatabaseError as error:
            if not patient:
                raise
            self._fail(str(error))
        # One worker: a tick and a retry never run at the same time. Rollups and housekeeping have their
        # own, so that no tick waits for them.
        clockwork = Clockwork(("ticks", "rollups", "housekeeping"), self._count_skipped)
        interval_s = self._settings.interval
        clockwork.add("tick", self._tick, interval_s, 0.0, "ticks")
        clockwork.add("retry", self._retry, RETRY_S, RETRY_S, "ticks")
        clockwork.add("rollups", self._every_minute, ROLLUP_S, min(ROLLUP_S, 2 * interval_s), "rollups")
        clockwork.add("housekeeping", self._keep_house, HOUSEKEEPING_S, 60.0, "housekeeping")
        clockwork.start()
        self._clockwork = clockwork

    def _count_skipped(self, job: str) -> None:
        """A tick fell due while the one before it was still at work."""
        if job == "tick":
            self._pulse.skipped(1)

    def stop(self) -> None:
        """Let the running tick commit, then close everything. Doing it twice is fine."""
        if self._clockwork is not None:
            self._stopping.set()
            self._clockwork.stop()
            self._clockwork = None
            log.info("recorder stopped")
        with self._guard:
            self._close()
        self._set(role="stopped")

    def _set(self, **changes: object) -> None:
        values = {name: getattr(self._state, name) for name in State.__slots__} | changes
        if values != {name: getattr(self._state, name) for name in State.__slots__}:
            self._state = State(**values)

    def _open(self) -> None:
        """Find the source, and become its database's recorder if that is free."""
        with self._guard:
            kind = self._settings.source
            observer = None if kind == "demo" else self._open_nvml()
            if observer is None and kind != "nvml":
                self._set(source="demo", database_url=self._settings.demo_database_url)
                self._record(SimulatedObserver(self._settings))
            elif observer is not None:
                self._set(source="nvml", database_url=self._settings.real_database_url)
                self._record(observer)
            else:
                # No driver and nothing to simulate: the history is still there to be read.
                database.open_for_writing(self._state.database_url).dispose()

    def _open_nvml(self) -> Observer | None:
        try:
            observer = real(self._settings)
        except SourceUnavailable as error:
            problem = Problem(str(error), error.remedy)
            if self._state.driver != problem:
                log.warning("%s. %s", problem.reason, problem.remedy)
            self._set(driver=problem)
            return None
        self._set(driver=None)
        return observer

    def _record(self, observer: Observer) -> None:
        url = self._state.database_url
        lock = recorder_lock(url, self._settings.host_name)
        try:
            if not _acquire(lock, url):
                observer.close()
                self._stand_by(lock, url)
                return
            engine = self._open_database(url)
        except database.DatabaseError:
            observer.close()
            lock.release()
            raise
        writer = Writer(
            engine,
            self._settings.host_name,
            observer.source.name,
            self._settings.interval,
            60 * self._settings.idle_minutes,
        )
        self._recording = _Recording(observer, engine, writer, lock, self._pulse)
        self._set(role="recording", recording=None)
        log.info(
            "recording %s every %g s into %s",
            "simulated GPUs" if observer.source.name == "demo" else "NVIDIA GPUs",
            self._settings.interval,
            mask_password(url),
        )

    def _open_database(self, url: str) -> Engine:
        """The database; a damaged file is set aside, and a new one begun. Raises database.DatabaseError."""
        patience = min(database.WRITER_TIMEOUT_S, self._settings.interval / 4)
        try:
            return database.open_for_writing(url, patience)
        except database.DatabaseDamaged:
            self._set_aside(url)
            return database.open_for_writing(url, patience)

    def _set_aside(self, url: str) -> None:
        """Move a damaged file out of the way. Raises database.DatabaseError."""
        path = database.file_of(url)
        try:
            aside = database.set_aside(url)
        except OSError as reason:
            raise database.DatabaseError(
                f"The database {path} is damaged, and could not be set aside: {reason.strerror}."
            ) from reason
        problem = Problem(
            f"The database {path} was damaged and has been set aside as {aside.name}; a new one was begun",
            "Nothing of it was deleted: `sqlite3 FILE .recover` may save what it holds.",
        )
        log.error("%s. %s", problem.reason, problem.remedy)
        self._pulse.failed(problem.reason, tick=False)
        self._set(notice=problem)

    def _stand_by(self, lock: Lock, url: str) -> None:
        holder = lock.holder()
        problem = Problem(
            f"{str(holder).capitalize() if holder else 'Another program'} is recording into {mask_password(url)} "
            "already",
            "This one shows what is recorded, and takes over when the other ends.",
        )
        if self._state.recording != problem:
            log.warning("%s. %s", problem.reason, problem.remedy)
        self._awaited = lock
        self._set(role="standby", recording=problem)

    def _close(self) -> None:
        if self._recording is not None:
            self._recording.close()
            self._recording = None

    def _retry(self) -> None:
        """Try again what was missing: the database's lock, or the driver."""
        try:
            if self._settings.source == "auto" and self._state.source == "demo":
                self._change_over()
            if self._recording is None and self._database_is_free():
                self._open()
        except database.DatabaseError as error:
            self._fail(str(error))
        except Exception:
            log.exception("the recorder could not be set up again; it is tried every %g s", RETRY_S)

    def _database_is_free(self) -> bool:
        """Asked before the driver is: opening that may take a second, and for nothing."""
        if self._awaited is not None:
            try:
                if not self._awaited.is_free():
                    return False
            except OSError as error:
                log.debug("the recorder's lock cannot be asked for: %s", error)
                return False
            self._awaited = None
        return True

    def _change_over(self) -> None:
        """From simulated GPUs to the real ones, as soon as the driver answers."""
        with self._guard:
            observer = self._open_nvml()
            if observer is None:
                return
            log.info("the NVIDIA driver has appeared: changing over from simulated to real GPUs")
            self._close()
            self._awaited = None
            self._set(source="nvml", database_url=self._settings.real_database_url)
            self._record(observer)

    def _tick(self) -> None:
        with self._guard:
            recording = self._recording
            if recording is None:
                return
            began = time.monotonic()
            try:
                recording.tick(self._settings.interval)
            except SourceUnavailable as error:
                self._set(driver=Problem(str(error), error.remedy))
                self._pulse.failed(str(error), tick=True)
                self._say_once(f"{error}. {error.remedy}")
            except SQLAlchemyError as error:
                self._database_failed(error)
            except Exception as error:
                # A tick may fail in ways nobody thought of; the next one is tried all the same.
                if self._failing is None:
                    log.exception("a tick failed")
                self._pulse.failed(f"a tick failed: {error!r}", tick=True)
                self._fail(f"a tick failed: {error!r}")
            else:
                if self._failing is not None:
                    log.info("recording again")
                    self._failing = None
                self._set(recording=None)
                if self._state.source == "nvml":
                    self._set(driver=None)
            self._pulse.took(1000 * (time.monotonic() - began))

    def _database_failed(self, error: SQLAlchemyError) -> None:
        """Ticks wait in memory; a damaged file is replaced."""
        cause = getattr(error, "orig", None) or error
        if database.is_damage(error) and self._recording is not None:
            url = self._state.database_url
            self._recording.engine.dispose()
            try:
                # What a look at the first page does not show.
                self._set_aside(url)
                self._recording.go_on(self._open_database(url))
            except database.DatabaseError as reason:
                self._pulse.failed(str(reason), tick=False)
                self._fail(str(reason))
            return
        self._pulse.failed(f"the database does not take ticks: {cause}", tick=False)
        self._fail(f"the database does not take ticks, which wait in memory: {cause}")

    def _every_minute(self) -> None:
        """Rollups, the recorder's health, and a look whether the lock is still ours."""
        recording = self._recording
        if recording is None:
            return
        try:
            if not recording.lock.is_held():
                self._lose_lock(recording)
                return
            recording.roll_up(self._stopping)
            recording.note_health()
            give_back_memory()
        except (SQLAlchemyError, OSError) as error:
            # What is not done now is done a minute later.
            log.warning("rollups were broken off: %s", getattr(error, "orig", None) or error)

    def _lose_lock(self, recording: _Recording) -> None:
        """The connection that held the lock is gone: another may record by now."""
        with self._guard:
            if self._recording is recording:
                log.warning("the lock on %s was lost; it is taken again", mask_password(self._state.database_url))
                self._close()

    def _keep_house(self) -> None:
        recording = self._recording
        if recording is None:
            return
        settings = self._settings
        keep = retention.Keep(
            settings.retention_raw_days, settings.retention_minute_days, settings.retention_hour_days
        )
        try:
            retention.forget(recording.engine, keep, recording.now, stopping=self._stopping)
        except SQLAlchemyError as error:
            # What is not forgotten now is forgotten an hour later.
            log.warning("retention was broken off: %s", getattr(error, "orig", None) or error)

    def _say_once(self, reason: str) -> None:
        """The log hears of a failure when it begins or changes, not with every tick."""
        if reason != self._failing:
            log.error("%s", reason)
            self._failing = reason

    def _fail(self, reason: str) -> None:
        """Note a failure of this recorder."""
        self._say_once(reason)
        self._set(recording=Problem(reason, "It is tried again by itself."))


def _acquire(lock: Lock, url: str) -> bool:
    try:
        return lock.acquire()
    except OSError as error:
        path = database.file_of(url)
        if path is None:
            raise database.DatabaseError(
                f"The database {mask_password(url)} cannot be reached ({error.strerror}). Look at the server "
                "and at GPUMON_DATABASE_URL."
            ) from error
        raise database.DatabaseError(
            f"The lock beside {path} cannot be written ({error.strerror}). Give this user write access to the "
            "folder, or choose another with GPUMON_DATA_DIR."
        ) from error


def run_until(settings: Settings, stopped: threading.Event) -> None:
    """Record alone, without a server, until `stopped` is set. Raises database.DatabaseError."""
    recorder = Recorder(settings)
    recorder.start()
    try:
        while not stopped.wait(timeout=3600):
            pass
    finally:
        recorder.stop()
