"""Asks for what /proc does not say: the loaded model of a server, the name of a container, and the content of
files that a process controls.

One thread asks. A tick only gives it the present processes, and gets what is known by now. Threads of their own
read what may never answer (readers.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gpumon_core.attribution import containers, endpoints, inside, listeners, masked_fields, ollama, rights
from gpumon_core.attribution.readers import Late, Readers
from gpumon_core.attribution.records import Ask, Endpoint, ProcessIdentity, is_placeholder
from gpumon_core.attribution.rules import tidy
from gpumon_core.attribution.secrets import Mask
from gpumon_core.safety import text
from gpumon_core.telemetry.records import ProcessReading

log = logging.getLogger(__name__)

# The time after which a server is asked again. It is asked at once when its memory changes by so much: then it may
# have loaded or dropped a model.
EVERY_S = 60.0
CHANGE_MIB = 128
# A server that does not answer (it may be loading) is asked again after a pause, which doubles from the first to
# the last.
FIRST_RETRY_S = 2.0
LAST_RETRY_S = 120.0
# The longest wait for the socket of a container engine, and for a file.
ENGINE_S = 10.0
FILE_S = 2.0
LONGEST_TEXT = text.LONGEST

FAILURES = (OSError, ValueError, RecursionError)
_UNKNOWN: Any = object()


@dataclass(slots=True, eq=False)
class _Subject:
    """A process to ask about."""

    pid: int
    ask: Ask
    # In clock ticks; None where it is not known.
    start: int | None = None
    due: float = 0.0
    retry_s: float = field(default_factory=lambda: FIRST_RETRY_S)
    memory_mib: int | None = None
    memory_asked_mib: int | None = None
    container: Mapping[str, str] | None = None
    model: Any = _UNKNOWN
    namespace: Any = _UNKNOWN
    # Whether its own command line names its model.
    names_its_model: bool = False
    # The known sockets of its server.
    sockets: frozenset[int] = frozenset()
    # The known fields of Program; None before the first answer. Always replaced, never changed.
    facts: Mapping[str, str | None] | None = None
    # The identity of the last call, the facts known then, and the identity with these facts.
    merged: tuple[ProcessIdentity, Mapping[str, str | None], ProcessIdentity] | None = None


class Inquirer:
    """Completes identities with what it learns. Only the recorder's thread calls `add` and `close`."""

    def __init__(
        self, every_s: float = EVERY_S, container_socket: str | None = None, mask: Mask | None = None
    ) -> None:
        self._mask = Mask() if mask is None else mask
        self._every_s = every_s
        self._container_socket = container_socket
        self._subjects: dict[int, _Subject] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self.readers = Readers("inquirer")

    def add(
        self, identities: dict[int, ProcessIdentity], processes: Iterable[ProcessReading]
    ) -> dict[int, ProcessIdentity]:
        """The identities with what is known by now; never waits. From now on it asks about those with an `ask`."""
        asking = {pid: identity for pid, identity in identities.items() if identity.ask is not None}
        if not asking and not self._subjects:
            return identities
        memory: dict[int, int] = {}
        for process in processes:
            if process.pid in asking and process.memory_mib is not None:
                memory[process.pid] = memory.get(process.pid, 0) + process.memory_mib
        subjects = {}
        wake = False
        for pid, identity in asking.items():
            subject = self._subjects.get(pid)
            if subject is None or subject.ask is not identity.ask:
                assert identity.ask is not None
                model = identity.program.model
                subject = _Subject(
                    pid,
                    identity.ask,
                    _start(identity.start_key),
                    names_its_model=bool(model and not is_placeholder(model)),
                )
                wake = True
            subject.memory_mib = memory.get(pid)
            wake = wake or _has_changed(subject)
            subjects[pid] = subject
            identities[pid] = _merge(subject, identity)
        self._subjects = subjects
        if wake:
            self._start()
            with self._wake:
                self._wake.notify()
        return identities

    def wait(self, timeout_s: float) -> None:
        """Wait until everything was asked once, at most `timeout_s`: for callers that need one result only."""
        ends = time.monotonic() + timeout_s
        while time.monotonic() < ends and any(subject.facts is None for subject in self._subjects.values()):
            time.sleep(0.01)

    def close(self) -> None:
        """Stop asking. A running request ends by itself."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="inquirer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._go_on()
        finally:
            self.readers.close()

    def _go_on(self) -> None:
        while True:
            now = time.monotonic()
            # The recorder replaces this dict and never changes it.
            subjects = list(self._subjects.values())
            due = [subject for subject in subjects if subject.due <= now or _has_changed(subject)]
            answers: dict[tuple[str, int, str], Any] = {}
            for subject in due:
                if self._closed:
                    return
                try:
                    self._inquire(subject, answers)
                except Exception:
                    # An unexpected answer of one server must not stop the questions to the others.
                    log.exception("cannot ask about process %d; the others go on", subject.pid)
                    subject.due = time.monotonic() + LAST_RETRY_S
                    subject.facts = subject.facts or {}
            with self._wake:
                if self._closed:
                    return
                if due:
                    continue
                soonest = min((subject.due for subject in subjects), default=now + self._every_s)
                self._wake.wait(max(0.05, min(self._every_s, soonest - now)))

    def _inquire(self, subject: _Subject, answers: dict[tuple[str, int, str], Any]) -> None:
        ask = subject.ask
        subject.memory_asked_mib = subject.memory_mib
        complete = True
        if ask.container is not None and not subject.container:
            complete = self._ask_engine(subject, *ask.container)
        if ask.namespace and subject.namespace is _UNKNOWN:
            complete = self._read_namespace(subject) and complete
        if ask.endpoint is not None and ask.address is not None:
            complete = self._ask_server(subject, answers) and complete
        said: dict[str, str | None] = {}
        if ask.namespace and subject.namespace is not _UNKNOWN:
            said["namespace"] = subject.namespace
        # The facts of the engine win over those of the process itself.
        said |= subject.container or {}
        if subject.model is not _UNKNOWN:
            said["model"] = subject.model
        masked = masked_fields.starred_facts(said, self._mask)
        subject.facts = {name: text.field(name, value) for name, value in masked.items()}
        if complete:
            subject.retry_s = FIRST_RETRY_S
            wait = self._every_s if ask.endpoint is not None else float("inf")
        else:
            wait = subject.retry_s
            subject.retry_s = min(LAST_RETRY_S, 2 * wait)
        subject.due = time.monotonic() + wait

    def _ask_engine(self, subject: _Subject, engine: str, container: str) -> bool:
        """Ask for the name of the container; whether the engine answered."""
        ask = subject.ask
        # A rootless engine belongs to the user of the slice, whatever user the process has inside it.
        uid = containers.owner(subject.pid, ask.proc) if ask.owner is None else ask.owner
        if maker := containers.maker(subject.pid, container, ask.proc):
            engine, uid = f"{containers.ROOTLESS}{engine}", maker
        facts = partial(containers.facts_of, engine, container, uid, self._container_socket)
        # A user can put anything in the place of the socket of that user's engine.
        what = f"PID {subject.pid}'s container engine ({engine}, user {uid})"
        try:
            subject.container = self.readers.read((ask, "engine"), what, facts, ENGINE_S, uid)
        except Late as error:
            log.debug("%s", error)
        return bool(subject.container)

    def _read_namespace(self, subject: _Subject) -> bool:
        """Read the namespace; whether its file could be read."""
        ask, what = subject.ask, f"PID {subject.pid}'s file {inside.NAMESPACE_FILE}"
        look = partial(inside.look, ask.proc, subject.pid, subject.start, inside.namespace)
        try:
            uid = rights.user_of(f"{ask.proc}/{subject.pid}")
            subject.namespace = self.readers.read((ask, "namespace"), what, look, FILE_S, uid, is_last=True)
        except Late as error:
            log.debug("%s", error)
            return False
        except OSError as error:
            log.debug("%s: %s", what, error)
            subject.namespace = None
        return True

    def _ask_server(self, subject: _Subject, answers: dict[tuple[str, int, str], Any]) -> bool:
        """Ask for the model; whether the server answered."""
        endpoint = subject.ask.endpoint
        assert endpoint is not None
        answer = self._answer(subject, endpoint, answers)
        if endpoint.runners:
            known, were_read = self._names_of(subject)
            ask = subject.ask
            model = ollama.model_of(answer, ask.blob, ask.root, subject.memory_mib, endpoint.models, known)
            if model is not None:
                subject.model = model
            return were_read and (answer is not None or model is not None)
        if not isinstance(answer, dict | list) or not endpoints.values_at(
            answer, endpoint.models.partition(".")[0]
        ):
            # It does not answer, or another program answers.
            return False
        loaded, is_router = endpoints.loaded_at(answer, endpoint.models)
        # The models of a router run in processes below it, and each of them knows its own model.
        names = dict.fromkeys(() if is_router else map(tidy, loaded))
        subject.model = ", ".join(list(names)[: endpoints.MOST_MODELS]) or None
        return True

    def _names_of(self, subject: _Subject) -> tuple[list[str], bool]:
        """The names of an Ollama runner's file, and whether they could be looked up."""
        ask = subject.ask
        try:
            return ollama.names_of(ask.blob, ask.root, self.readers, subject.start) if ask.blob else [], True
        except Late as error:
            log.debug("%s", error)
            return [], False

    def _answer(self, subject: _Subject, endpoint: Endpoint, answers: dict[tuple[str, int, str], Any]) -> Any:
        """The answer of the process's own server; None without an answer, or where another program has its
        port."""
        host, port = subject.ask.address or ("", 0)
        found = _listener(subject, host, port)
        if found.verdict == "foreign":
            log.debug("port %d is not process %d's", port, subject.pid)
            return None
        subject.sockets = found.inodes
        where = (found.host, port, endpoint.path)
        if where not in answers:
            # One answer is enough for all runners of a server.
            try:
                answers[where] = endpoints.get(*where)
            except FAILURES as error:
                log.debug("http://%s:%d%s: %s", *where, error)
                answers[where] = None
        if found.verdict == "none" and answers[where] is not None:
            # A program has begun to listen meanwhile: the server or another one.
            found = _listener(subject, host, port)
        # An answer from an unknown program does not win over what the process says itself.
        is_believed = found.verdict in ("own", "unknown") or (
            found.verdict == "none" and not subject.names_its_model
        )
        return answers[where] if is_believed else None


def _listener(subject: _Subject, host: str, port: int) -> listeners.PortOwner:
    """What listens at an address: the process's own server, or one of its family, or another program."""
    ask = subject.ask
    if not ask.family:
        return listeners.PortOwner("unknown", host)
    return listeners.find(ask.family, ask.launcher, host, port, ask.proc, subject.sockets)


def _has_changed(subject: _Subject) -> bool:
    asked, now = subject.memory_asked_mib, subject.memory_mib
    return (
        subject.ask.endpoint is not None
        and asked is not None
        and now is not None
        and abs(now - asked) >= CHANGE_MIB
    )


def _merge(subject: _Subject, identity: ProcessIdentity) -> ProcessIdentity:
    facts = subject.facts
    if facts is None:
        return identity
    merged = subject.merged
    # The same object while nothing new is known: so the writer knows that nothing changed.
    if merged is None or merged[0] is not identity or (merged[1] is not facts and merged[1] != facts):
        program = replace(identity.program, **dict(facts))
        merged = subject.merged = (identity, facts, replace(identity, program=program, pending=False))
    return merged[2]


def _start(key: str | None) -> int | None:
    """The start of a process in clock ticks, from its start_key."""
    ticks = (key or "").rpartition(":")[2]
    return int(ticks) if ticks.isdecimal() else None
