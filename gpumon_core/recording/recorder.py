"""Carries telemetry through attribution into the store, tick after tick.

One recorder writes a database; a second one stands by, read-only, and takes over when the first
ends. In `auto`, GPUs are simulated (into a database of their own) until the driver loads.

Two threads share the work: one samples and never waits, one writes. What the database does not take waits between
them, and on disk while no recorder runs.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import Literal

from sqlalchemy.exc import SQLAlchemyError

from gpumon_core.recording.buffer import Buffer, FileFailed
from gpumon_core.recording.clockwork import Clockwork
from gpumon_core.recording.collector import Observer, SimulatedObserver, real
from gpumon_core.recording.counters import Pulse, Vitals, give_back_memory
from gpumon_core.recording.latest_tick import Newest, follow
from gpumon_core.recording.session import Problem, Session, Target, open_database, prepare
from gpumon_core.safety import private_files
from gpumon_core.settings import Settings, mask_password
from gpumon_core.store import database
from gpumon_core.store.lock import Lock, LockLost, recorder_lock
from gpumon_core.telemetry.records import SourceUnavailable

log = logging.getLogger(__name__)

# How often a missing driver, or a database that another recorder holds, is tried again.
RETRY_S = 10.0
# How often the thread that writes looks for work, and whether its file is still there.
LOOK_S = 5.0
HOUSEKEEPING_S = 3600.0
ROLLUP_S = 60.0
REHEARSAL_S = 3600.0
# Ticks that wait in memory while the database does not take them: an hour at the usual interval. The
# oldest make room for newer ones.
BUFFER_TICKS = 900
# How long the end waits for what is being written and for the source: 10 s at the most, with the jobs at work.
WRITING_ENDS_S = 3.0
SAMPLING_ENDS_S = 1.0


@dataclass(frozen=True, slots=True)
class State:
    """What the recorder is doing, for pages and /healthz.

    role: recording; standby (another recorder holds the database); viewing (GPUMON_RECORD is
    false); stopped. `driver` is the problem with NVML, `recording` the one with this recorder, `reader` the one
    with reads of processes, of which `hung_readers` hang, and `notice` something that has happened and is over.
    """

    role: Literal["recording", "standby", "viewing", "stopped"]
    source: Literal["nvml", "demo"]
    database_url: str
    driver: Problem | None = None
    recording: Problem | None = None
    reader: Problem | None = None
    hung_readers: int = 0
    notice: Problem | None = None


class Recorder:
    """Runs in the background from `start` to `stop`. Errors of a tick never end it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Who has which part: the source, the database.
        self._guard = threading.Lock()
        self._observer: Observer | None = None
        self._target: Target | None = None
        self._session: Session | None = None
        self._targets: dict[str, Target] = {}
        # Sessions that have ended, and that the thread that writes has still to close.
        self._leaving: list[Session] = []
        self._awaited: Lock | None = None
        # The observer belongs to one thread at a time.
        self._sampling = threading.Lock()
        self._sampled_ms = 0.0
        self._newest_guard = threading.Lock()
        self._newest: Newest | None = None
        self._clockwork: Clockwork | None = None
        self._writing: threading.Thread | None = None
        self._due = threading.Event()
        self._ending = threading.Event()
        self._stopping = threading.Event()
        self._state_guard = threading.Lock()
        # What is wrong with the recording, by topic.
        self._problems: dict[str, Problem] = {}
        self._state = State(
            role="recording" if settings.record else "viewing",
            source="demo" if settings.source == "demo" else "nvml",
            database_url=settings.database_of(settings.source),
        )
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
        """The newest tick, as long as this recorder samples; a new object whenever there is another."""
        return None if self._observer is None else self._newest

    @property
    def state(self) -> State:
        """The newest state; a new object whenever it changes."""
        return self._state

    def start(self, patient: bool = False) -> None:
        """Take the first tick at once and the following at the interval.

        A database that cannot be opened raises database.DatabaseError, or, for the `patient`,
        is a problem in the state that is tried again. One that is only away is waited for.
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
            if not patient and not isinstance(error, database.DatabaseAway):
                self._sample(None, None)
                raise
            self._fail("database", str(error))
        # Sampling waits for nobody, and no tick waits for rollups and housekeeping.
        clockwork = Clockwork(("ticks", "retries", "rollups", "housekeeping"), self._count_skipped)
        interval_s = self._settings.interval
        clockwork.add("tick", self._tick, interval_s, 0.0, "ticks")
        clockwork.add("retry", self._retry, RETRY_S, RETRY_S, "retries")
        clockwork.add("rollups", self._every_minute, ROLLUP_S, min(ROLLUP_S, 2 * interval_s), "rollups")
        clockwork.add("housekeeping", self._keep_house, HOUSEKEEPING_S, 60.0, "housekeeping")
        clockwork.start()
        self._clockwork = clockwork
        self._writing = threading.Thread(target=self._write_forever, name="writing", daemon=True)
        self._writing.start()

    def _count_skipped(self, job: str) -> None:
        """A tick fell due while the one before it was still at work."""
        if job == "tick":
            self._pulse.skipped(1)

    def stop(self) -> None:
        """Let the running tick commit, then close everything, within 10 s. Doing it twice is fine."""
        if self._clockwork is not None:
            self._stopping.set()
            for name in self._clockwork.stop():
                log.warning("a job of %s does not end, and is not waited for", name)
            self._clockwork = None
            self._ending.set()
            self._due.set()
            if self._writing is not None:
                self._writing.join(WRITING_ENDS_S)
                if self._writing.is_alive():
                    log.warning("the database does not answer, and is not waited for")
                    if self._session is not None:
                        database.break_off(self._session.engine)
                        self._writing.join(SAMPLING_ENDS_S)
                self._writing = None
            self._save_waiting()
            self._sample(None, None)
            log.info("recorder stopped")
        self._set(role="stopped")

    def _save_waiting(self) -> None:
        """Leave what could not be written to the next recorder."""
        for target in self._targets.values():
            waiting = len(target.buffer)
            if not waiting:
                continue
            try:
                target.buffer.save(self._settings.data_dir, target.name)
                log.warning("%d ticks could not be written: the next recorder writes them", waiting)
            except FileFailed as error:
                reason = f"{waiting} ticks could not be written, and are lost: {error}"
                log.error("%s", reason)
                self._pulse.dropped(waiting, reason)

    # ---- State ---------------------------------------------------------------------------------------

    def _set(self, **changes: object) -> None:
        with self._state_guard:
            before = {name: getattr(self._state, name) for name in State.__slots__}
            if (values := before | changes) != before:
                self._state = State(**values)

    def _fail(self, topic: str, reason: str, remedy: str = "It is tried again by itself.") -> None:
        """Note what is wrong with the recording. The log says it when it begins or changes, not every time."""
        problem = Problem(reason, remedy)
        if self._problems.get(topic) != problem:
            log.error("%s", reason)
            self._problems[topic] = problem
        self._show_problems()

    def _is_well(self, topic: str) -> None:
        """What was wrong is over."""
        if self._problems.pop(topic, None) is not None:
            log.info("recording again")
            self._show_problems()

    def _show_problems(self) -> None:
        self._set(recording=next(iter(list(self._problems.values())), None))

    # ---- Source and database -------------------------------------------------------------------------

    def _open(self) -> None:
        """Find the source, and become its database's recorder if that is free. Raises database.DatabaseError; what
        is sampled then waits for the database."""
        with self._guard:
            if self._session is not None or self._leaving or self._stopping.is_set():
                return
            kind = self._settings.source
            observer = self._observer
            if observer is None and kind != "demo":
                observer = self._open_nvml()
            if observer is None and kind != "nvml":
                observer = SimulatedObserver(self._settings)
            if observer is not None:
                self._record(observer)
            else:
                # No driver and nothing to simulate: the history is still there to be read.
                database.open_for_writing(self._state.database_url).dispose()
                self._is_well("database")

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
        """Sample, and write into the database of the source unless another recorder does. Raises
        database.DatabaseError."""
        is_demo = observer.source.name == "demo"
        url = self._settings.demo_database_url if is_demo else self._settings.real_database_url
        self._set(source="demo" if is_demo else "nvml", database_url=url)
        target = self._targets.get(url)
        if target is None:
            target = self._targets[url] = Target(url, self._name(url), Buffer(BUFFER_TICKS))
        try:
            session = self._open_session(target, observer)
        except database.DatabaseError:
            self._sample(observer, target)
            raise
        if session is None:
            # Who stands by asks no driver; the next `_open` opens the source again.
            self._sample(None, None)
            observer.close()
            return
        self._session = session
        self._sample(observer, target)
        self._is_well("standby")
        self._is_well("database")
        self._set(role="recording")
        if session.notice is not None:
            self._set(notice=session.notice)
        log.info(
            "recording %s every %g s into %s",
            "simulated GPUs" if is_demo else "NVIDIA GPUs",
            self._settings.interval,
            mask_password(url),
        )

    def _name(self, url: str) -> str:
        """Of the files in which ticks of this host wait for a database."""
        place = f"{mask_password(url)}\0{self._settings.host_name}"
        return f"waiting-{hashlib.sha256(place.encode('utf-8', 'replace')).hexdigest()[:12]}"

    def _sample(self, observer: Observer | None, target: Target | None) -> None:
        """Sample this source from now on, or none; the one before is closed."""
        if not self._sampling.acquire(timeout=SAMPLING_ENDS_S if observer is None else -1):
            log.warning("the driver does not answer, and is not waited for")
            self._observer = None
            return
        try:
            before, self._observer, self._target = self._observer, observer, target
        finally:
            self._sampling.release()
        if before is not None and before is not observer:
            before.close()
            self._newest = None

    def _open_session(self, target: Target, observer: Observer) -> Session | None:
        """The hold on a database; None where another recorder has it. Raises database.DatabaseError."""
        url, notice = target.url, None
        lock = recorder_lock(url, self._settings.host_name)
        try:
            if not _acquire(lock, url):
                self._stand_by(lock, url)
                return None
            if target.file is not None and (found := target.file.look()) != "same":
                notice = prepare(target.file, found)
            engine, damaged = open_database(url, self._pulse)
            session = Session(target, self._settings, observer.source.name, lock, self._pulse, engine)
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
        self._set(role="standby")
        self._problems.pop("database", None)
        self._fail("standby", reason, remedy)

    def _retry(self) -> None:
        """Try again what was missing: the database's lock, or the driver."""
        try:
            if self._settings.source == "auto" and self._state.source == "demo":
                self._change_over()
            if self._session is None and self._database_is_free():
                self._open()
        except database.DatabaseError as error:
            self._fail("database", str(error))
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
            self._sample(None, None)
            if self._session is not None:
                self._leave(self._session)
            self._awaited = None
            self._problems.clear()
            self._record(observer)

    def _leave(self, session: Session) -> None:
        """Write nothing more in a session; the thread that writes closes it."""
        if self._session is session:
            self._session = None
            self._leaving.append(session)
            self._due.set()

    def _regain_lock(self, session: Session) -> None:
        """Another may record by now. What waits goes on waiting, and what is sampled with it."""
        url = mask_password(session.target.url)
        if database.file_of(session.target.url) is None:
            # The connections stay: a schema that has become newer meanwhile would not be opened again.
            try:
                if session.regain():
                    log.warning("the lock on %s was lost, and is taken again", url)
                    self._due.set()
                    return
            except OSError as error:
                self._fail("database", f"the lock on {url} was lost, and cannot be taken again: {error.strerror}")
                return
        with self._guard:
            if self._session is session:
                log.warning("the lock on %s was lost", url)
                self._leave(session)

    # ---- Sampling ------------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Take a snapshot, and hand it to the thread that writes."""
        with self._sampling:
            observer, target = self._observer, self._target
            if observer is None or target is None:
                return
            began = time.monotonic()
            try:
                observed = observer.observe()
            except SourceUnavailable as error:
                if self._state.driver != Problem(str(error), error.remedy):
                    log.error("%s. %s", error, error.remedy)
                self._set(driver=Problem(str(error), error.remedy))
                self._pulse.failed(str(error), tick=True)
                self._pulse.took(1000 * (time.monotonic() - began))
                return
            except Exception as error:
                # A tick may fail in ways nobody thought of; the next one is tried all the same.
                reason = f"a tick failed: {error!r}"
                if "tick" not in self._problems:
                    log.exception("a tick failed")
                self._pulse.failed(reason, tick=True)
                self._fail("tick", reason)
                return
            with self._newest_guard:
                self._newest = follow(self._newest, *observed)
            self._sampled_ms = 1000 * (time.monotonic() - began)
            dropped = target.buffer.add(observed)
            self._look_at_readers(observer)
        if dropped:
            self._pulse.dropped(dropped, "more ticks waited for the database than the buffer holds")
        if len(target.buffer) > 1:
            self._pulse.waiting(len(target.buffer))
        self._due.set()
        self._is_well("tick")
        if self._state.source == "nvml" and self._state.driver is not None:
            log.info("the driver answers again")
            self._set(driver=None)

    def _look_at_readers(self, observer: Observer) -> None:
        """Say so where a read of what a process controls hangs."""
        if not observer.hung_readers and self._state.reader is None:
            return
        reason = observer.reader_problem
        problem = None
        if reason is not None:
            remedy = "Everything else is recorded. Look at that process, or at the file system that it uses."
            problem = Problem(reason, remedy)
        self._set(reader=problem, hung_readers=observer.hung_readers)

    # ---- Writing -------------------------------------------------------------------------------------

    def _write_forever(self) -> None:
        while not self._ending.is_set():
            # A file that was replaced is not left alone for an hour, however rare the ticks are.
            self._due.wait(LOOK_S)
            self._due.clear()
            try:
                self._close_leaving()
                self._write()
            except Exception:
                # Nothing may end this thread: what waits is tried again.
                log.exception("the thread that writes met what it does not know")
        # What was sampled last.
        self._write()
        self._close_leaving()
        with self._guard:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def _write(self) -> None:
        """Write what waits."""
        session = self._session
        if session is None or not (len(session.target.buffer) or session.is_elsewhere()):
            return
        began = time.monotonic()
        try:
            self._rehearse(session)
            session.write()
        except LockLost:
            self._regain_lock(session)
        except database.DatabaseError as error:
            self._pulse.failed(str(error), tick=False)
            self._fail("database", str(error))
        except SQLAlchemyError as error:
            self._database_failed(session, error)
        except Exception as error:
            # What nobody thought of; the ticks wait, and are tried again with the next.
            if "database" not in self._problems:
                log.exception("ticks could not be written")
            reason = f"ticks could not be written, and wait in memory: {error!r}"
            self._pulse.failed(reason, tick=False)
            self._fail("database", reason)
        else:
            self._is_well("database")
            self._pulse.took(self._sampled_ms + 1000 * (time.monotonic() - began))
        if session.notice is not None:
            self._set(notice=session.notice)
        with self._newest_guard:
            if self._newest is not None and self._session is session:
                self._newest = replace(self._newest, energy_j=session.energy_j)

    def _database_failed(self, session: Session, error: SQLAlchemyError) -> None:
        """Ticks wait in memory; a damaged file is replaced."""
        cause = getattr(error, "orig", None) or error
        reason = f"the database does not take ticks, which wait in memory: {cause}"
        if database.is_damage(error):
            try:
                # What a look at the first page does not show.
                session.replace_damaged()
                return
            except database.DatabaseError as refused:
                reason = str(refused)
        self._pulse.failed(reason, tick=False)
        self._fail("database", reason)
        self._look_at_version(session)

    def _look_at_version(self, session: Session) -> None:
        """Say so where a newer gpumon has moved the database on meanwhile."""
        try:
            newer = database.newer_revision(session.engine)
        except (SQLAlchemyError, LockLost) as error:
            # The next minute asks again.
            log.debug("the revision of the database cannot be read: %s", error)
            return
        if newer is None:
            self._is_well("version")
            return
        self._fail(
            "version",
            f"A newer gpumon has brought the database {mask_password(session.target.url)} to revision {newer}; "
            f"this one, of revision {database.head()}, goes on as long as it can",
            "Update this gpumon.",
        )

    def _rehearse(self, session: Session) -> None:
        """A demo that begins has an hour behind it already, so that there is something to see."""
        observer = self._observer
        waiting = session.target.buffer.seconds()
        if not isinstance(observer, SimulatedObserver) or not waiting or not session.is_new():
            return
        with self._sampling:
            now, interval_s = waiting[0], self._settings.interval
            past = list(observer.past(now - REHEARSAL_S, now - interval_s, interval_s))
        session.write_past(past, self._stopping)

    def _close_leaving(self) -> None:
        """Close what has ended, and begin anew at once."""
        leaving, self._leaving = self._leaving, []
        for session in leaving:
            try:
                session.write()
            except (SQLAlchemyError, database.DatabaseError, LockLost) as error:
                log.debug("what waits goes on waiting: %s", error)
            session.close()
        if leaving and not self._ending.is_set():
            self._retry()

    # ---- Beside the ticks ----------------------------------------------------------------------------

    def _every_minute(self) -> None:
        """Rollups, the recorder's health, and a look whether the lock is still ours."""
        session = self._session
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
            # What is not done now is done a minute later.
            self._break_off(session, "rollups", error)

    def _keep_house(self) -> None:
        session = self._session
        if session is None or not session.is_open():
            return
        try:
            session.forget(self._stopping)
        except LockLost:
            self._due.set()
        except SQLAlchemyError as error:
            # What is not forgotten now is forgotten an hour later.
            self._break_off(session, "retention", error)

    def _break_off(self, session: Session, what: str, error: Exception) -> None:
        if database.is_damage(error):
            session.doubt()
        # Somebody else writes just now: that is nothing to worry about, and ticks say so where it lasts.
        level = logging.INFO if database.is_busy(error) else logging.WARNING
        log.log(level, "broken off until its next turn: %s: %s", what, getattr(error, "orig", None) or error)


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


def run_until(settings: Settings, stopped: threading.Event) -> None:
    """Record alone, without a server, until `stopped` is set. Raises database.DatabaseError."""
    recorder = Recorder(settings)
    recorder.start()
    try:
        # A signal that the kernel hands to another thread does not wake this one, which alone acts on it.
        while not stopped.wait(timeout=5.0):
            pass
    finally:
        recorder.stop()
