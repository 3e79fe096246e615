"""Finds the source and its database, and makes this program the database's recorder unless another one is.

In `auto`, GPUs are simulated (into a database of their own) until the driver loads. Where another program records
into the database, this one is on standby, and takes over when the other ends.
"""

from __future__ import annotations

import hashlib
import logging
import threading

from sqlalchemy.exc import SQLAlchemyError

from gpumon_core.recording.buffer import TickBuffer
from gpumon_core.recording.collector import Observer, SimulatedObserver, real
from gpumon_core.recording.consumers import Consumers
from gpumon_core.recording.counters import LiveCounters
from gpumon_core.recording.lost_files import open_database, prepare
from gpumon_core.recording.sampler import Sampler
from gpumon_core.recording.session import Session, Target
from gpumon_core.recording.state import LiveState, Problem
from gpumon_core.settings import Settings, mask_password
from gpumon_core.store import database
from gpumon_core.store.lock import Lock, recorder_lock
from gpumon_core.telemetry.records import SourceUnavailable

log = logging.getLogger(__name__)

# How often a missing driver, or a database that another recorder holds, is tried again.
RETRY_S = 10.0
# Ticks that wait in memory while the database does not take them: an hour at the usual interval. The
# oldest are dropped for newer ones.
BUFFER_TICKS = 900


class Roles:
    """The session with the database that is written now, and how it begins and ends."""

    def __init__(
        self,
        settings: Settings,
        state: LiveState,
        counters: LiveCounters,
        sampler: Sampler,
        consumers: Consumers,
        due: threading.Event,
        stopping: threading.Event,
    ) -> None:
        """`due` wakes the thread that writes; nothing is opened once `stopping` is set."""
        self._settings = settings
        self._state = state
        self._counters = counters
        self._sampler = sampler
        self._consumers = consumers
        self._due = due
        self._stopping = stopping
        # One thread at a time decides about source and database.
        self._guard = threading.Lock()
        self.session: Session | None = None
        self.targets: dict[str, Target] = {}
        # Sessions that have ended, and that the thread that writes has still to close.
        self._leaving: list[Session] = []
        # The lock that another recorder holds.
        self._awaited: Lock | None = None

    def open(self) -> None:
        """Find the source, and become its database's recorder if that is free. Raises database.DatabaseError; what
        is sampled then waits for the database."""
        with self._guard:
            if self.session is not None or self._leaving or self._stopping.is_set():
                return
            kind = self._settings.source
            observer = self._sampler.observer
            if observer is None and kind != "demo":
                observer = self._open_nvml()
            if observer is None and kind != "nvml":
                observer = SimulatedObserver(self._settings)
            if observer is not None:
                self._record(observer)
            else:
                # No driver and nothing to simulate: the history can still be read.
                database.open_for_writing(self._state.now.database_url).dispose()
                self._state.solve("database")

    def _open_nvml(self) -> Observer | None:
        try:
            observer = real(self._settings)
        except SourceUnavailable as error:
            problem = Problem(str(error), error.remedy)
            if self._state.now.driver != problem:
                log.warning("%s. %s", problem.reason, problem.remedy)
            self._state.set(driver=problem)
            return None
        self._state.set(driver=None)
        return observer

    def _record(self, observer: Observer) -> None:
        """Sample, and write into the database of the source unless another recorder does. Raises
        database.DatabaseError."""
        is_demo = observer.source.name == "demo"
        url = self._settings.demo_database_url if is_demo else self._settings.real_database_url
        self._state.set(source="demo" if is_demo else "nvml", database_url=url)
        target = self.targets.get(url)
        if target is None:
            target = self.targets[url] = Target(url, self._name(url), TickBuffer(BUFFER_TICKS))
        try:
            session = self._open_session(target, observer)
        except database.DatabaseError:
            self._sampler.use(observer, target)
            raise
        if session is None:
            # A recorder on standby asks no driver; the next `open` opens the source again.
            self._sampler.use(None, None)
            observer.close()
            return
        self.session = session
        self._sampler.use(observer, target)
        self._state.solve("standby")
        self._state.solve("database")
        self._state.set(role="recording")
        if session.notice is not None:
            self._state.set(notice=session.notice)
        log.info(
            "recording %s every %g s into %s",
            "simulated GPUs" if is_demo else "NVIDIA GPUs",
            self._settings.interval,
            mask_password(url),
        )

    def _name(self, url: str) -> str:
        """The name of the files in which ticks of this host wait for a database."""
        place = f"{mask_password(url)}\0{self._settings.host_name}"
        return f"waiting-{hashlib.sha256(place.encode('utf-8', 'replace')).hexdigest()[:12]}"

    def _open_session(self, target: Target, observer: Observer) -> Session | None:
        """The session with a database; None where another recorder has it. Raises database.DatabaseError."""
        url, notice = target.url, None
        lock = recorder_lock(url, self._settings.host_name)
        try:
            if not _acquire(lock, url):
                self._stand_by(lock, url)
                return None
            if target.file is not None and (found := target.file.look()) != "same":
                notice = prepare(target.file, found)
            engine, damaged = open_database(url, self._counters)
            session = Session(
                target, self._settings, observer.source.name, lock, self._counters, self._consumers, engine
            )
            session.notice = damaged or notice
            session.take_over()
        except SQLAlchemyError as error:
            lock.release()
            raise database.DatabaseAway(
                f"The database {mask_password(url)} does not answer: {getattr(error, 'orig', None) or error}."
            ) from error
        except database.DatabaseError:
            lock.release()
            raise
        return session

    def _stand_by(self, lock: Lock, url: str) -> None:
        holder = lock.holder()
        reason = (
            f"{str(holder).capitalize() if holder else 'Another program'} is recording into {mask_password(url)} "
            "already"
        )
        remedy = "This one shows what is recorded, and takes over when the other ends."
        self._awaited = lock
        self._state.set(role="standby")
        self._state.forget("database")
        self._state.fail("standby", reason, remedy)

    def retry(self) -> None:
        """Try again to get what is missing: the database's lock, or the driver."""
        try:
            if self._settings.source == "auto" and self._state.now.source == "demo":
                self._change_over()
            if self.session is None and self._database_is_free():
                self.open()
        except database.DatabaseError as error:
            self._state.fail("database", str(error))
        except Exception:
            log.exception(
                "the recorder could not be set up; nothing is recorded, and it is tried again every %g s", RETRY_S
            )

    def _database_is_free(self) -> bool:
        """Whether no other recorder has the database. Asked first: opening the driver may take a second."""
        if self._awaited is not None:
            try:
                if not self._awaited.is_free():
                    return False
            except OSError as error:
                log.debug("the recorder's lock cannot be looked at: %s", error)
                return False
            self._awaited = None
        return True

    def _change_over(self) -> None:
        """From simulated GPUs to the real ones, as soon as the driver answers."""
        with self._guard:
            observer = self._open_nvml()
            if observer is None:
                return
            log.info("the NVIDIA driver answers: real GPUs are recorded instead of simulated ones")
            self._sampler.use(None, None)
            if self.session is not None:
                self.leave(self.session)
            self._awaited = None
            self._state.forget()
            self._record(observer)

    def leave(self, session: Session) -> None:
        """Write nothing more in a session; the thread that writes closes it."""
        if self.session is session:
            self.session = None
            self._leaving.append(session)
            self._due.set()

    def regain_lock(self, session: Session) -> None:
        """Take the lock again after it was lost: another may record by now. Until then all ticks wait."""
        url = mask_password(session.target.url)
        if database.file_of(session.target.url) is None:
            # The connections stay: a schema that has become newer meanwhile would not be opened again.
            try:
                if session.regain():
                    log.warning("the lock on %s was lost, and is taken again; no tick is lost", url)
                    self._due.set()
                    return
            except OSError as error:
                self._state.fail(
                    "database",
                    f"the lock on {url} was lost, and cannot be taken now: {error.strerror}; ticks wait in memory",
                )
                return
        with self._guard:
            if self.session is session:
                log.warning("the lock on %s was lost; ticks wait in memory until it is taken again", url)
                self.leave(session)

    def leaving(self) -> list[Session]:
        """Sessions to be closed, each of them once."""
        found, self._leaving = self._leaving, []
        return found

    def end(self) -> Session | None:
        """Write nothing more; returns the session that has to be closed."""
        with self._guard:
            session, self.session = self.session, None
        return session


def _acquire(lock: Lock, url: str) -> bool:
    try:
        return lock.acquire()
    except OSError as error:
        path = database.file_of(url)
        if path is None:
            kind = database.DatabaseError if isinstance(error, PermissionError) else database.DatabaseAway
            raise kind(
                f"The database {mask_password(url)} cannot be reached ({error.strerror}). Look at the server "
                "and at GPUMON_DATABASE_URL."
            ) from error
        raise database.DatabaseError(
            f"The lock beside {path} cannot be written ({error.strerror}). Give this user write access to the "
            "folder, or choose another with GPUMON_DATA_DIR."
        ) from error
