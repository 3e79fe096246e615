"""The clockwork: carries telemetry through attribution into the store, tick after tick.

One recorder writes a database; a second one stands by, read-only, and takes over when the first
ends. In `auto`, GPUs are simulated (into a database of their own) until the driver loads.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from gpumon_core.observer import Observer, SimulatedObserver, real
from gpumon_core.settings import Settings, mask_password
from gpumon_core.store import database, retention
from gpumon_core.store.lock import RecorderLock
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import SourceUnavailable

log = logging.getLogger(__name__)

# How often a missing driver, or a database that another recorder holds, is tried again.
RETRY_S = 10.0
HOUSEKEEPING_S = 3600.0
REHEARSAL_S = 3600.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Something the user should know: what is the matter, and what to do about it."""

    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class State:
    """What the recorder is doing, for pages and /healthz.

    role: recording; standby (another recorder holds the database); viewing (GPUMON_RECORD is
    false); stopped. `driver` is the problem with NVML, `recording` the one with this recorder.
    """

    role: Literal["recording", "standby", "viewing", "stopped"]
    source: Literal["nvml", "demo"]
    database_url: str
    driver: Problem | None = None
    recording: Problem | None = None


class _Recording:
    """One observer's snapshots being written to one database; it ends whole."""

    def __init__(self, observer: Observer, engine: Engine, writer: Writer, lock: RecorderLock | None) -> None:
        self.observer = observer
        self.engine = engine
        self._writer = writer
        self._lock = lock

    def tick(self, interval_s: float) -> None:
        if self._writer.is_new():
            # A demo that begins has an hour behind it already, so that there is something to see.
            now = time.time()
            for snapshot, identities in self.observer.past(now - REHEARSAL_S, now - interval_s, interval_s):
                self._writer.write(snapshot, identities)
        snapshot, identities = self.observer.observe()
        self._writer.write(snapshot, identities)

    def close(self) -> None:
        self.observer.close()
        self.engine.dispose()
        if self._lock is not None:
            self._lock.release()


class Recorder:
    """Runs in the background from `start` to `stop`. Errors of a tick never end it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._guard = threading.Lock()
        self._recording: _Recording | None = None
        self._awaited: RecorderLock | None = None
        self._failing: str | None = None
        self._scheduler: BackgroundScheduler | None = None
        demo = settings.source == "demo"
        self._state = State(
            role="recording" if settings.record else "viewing",
            source="demo" if demo else "nvml",
            database_url=settings.demo_database_url if demo else settings.real_database_url,
        )
        self._stopping = threading.Event()

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
        try:
            self._open()
        except database.DatabaseError as error:
            if not patient:
                raise
            self._fail(str(error))
        # One worker: a tick and a retry never run at the same time. Housekeeping has its own, so that
        # no tick waits for it.
        executors = {"default": ThreadPoolExecutor(1), "housekeeping": ThreadPoolExecutor(1)}
        scheduler = BackgroundScheduler(timezone=UTC, executors=executors)
        now = datetime.now(UTC)
        common = {"max_instances": 1, "coalesce": True, "misfire_grace_time": None}
        scheduler.add_job(
            self._tick, "interval", seconds=self._settings.interval, id="tick", next_run_time=now, **common
        )
        scheduler.add_job(self._retry, "interval", seconds=RETRY_S, id="retry", **common)
        scheduler.add_job(
            self._keep_house,
            "interval",
            seconds=HOUSEKEEPING_S,
            id="housekeeping",
            executor="housekeeping",
            next_run_time=now + timedelta(seconds=60),
            **common,
        )
        scheduler.start()
        self._scheduler = scheduler

    def stop(self) -> None:
        """Let the running tick commit, then close everything. Doing it twice is fine."""
        if self._scheduler is not None:
            self._stopping.set()
            self._scheduler.shutdown(wait=True)
            self._scheduler = None
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
        path = database.file_of(url)
        lock = RecorderLock(path, self._settings.host_name) if path is not None else None
        try:
            if lock is not None and not _acquire(lock, path):
                observer.close()
                self._stand_by(lock, url)
                return
            engine = database.open_for_writing(url)
        except database.DatabaseError:
            observer.close()
            if lock is not None:
                lock.release()
            raise
        writer = Writer(engine, self._settings.host_name, observer.source.name, self._settings.interval)
        self._recording = _Recording(observer, engine, writer, lock)
        self._set(role="recording", recording=None)
        log.info(
            "recording %s every %g s into %s",
            "simulated GPUs" if observer.source.name == "demo" else "NVIDIA GPUs",
            self._settings.interval,
            mask_password(url),
        )

    def _stand_by(self, lock: RecorderLock, url: str) -> None:
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
            if not self._awaited.is_free():
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
            try:
                recording.tick(self._settings.interval)
            except SourceUnavailable as error:
                self._set(driver=Problem(str(error), error.remedy))
                self._say_once(f"{error}. {error.remedy}")
            except SQLAlchemyError as error:
                self._fail(f"the database does not take the tick: {getattr(error, 'orig', None) or error}")
            except Exception as error:
                # A tick may fail in ways nobody thought of; the next one is tried all the same.
                if self._failing is None:
                    log.exception("a tick failed")
                self._fail(f"a tick failed: {error!r}")
            else:
                if self._failing is not None:
                    log.info("recording again")
                    self._failing = None
                self._set(recording=None)
                if self._state.source == "nvml":
                    self._set(driver=None)

    def _keep_house(self) -> None:
        recording = self._recording
        if recording is None:
            return
        try:
            retention.forget(recording.engine, self._settings.retention_raw_days, stopping=self._stopping)
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


def _acquire(lock: RecorderLock, path: Path | None) -> bool:
    try:
        return lock.acquire()
    except OSError as error:
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
