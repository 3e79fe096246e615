"""Reads from /proc what a process runs (see proc(5)): once, when the process appears."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from gpumon_core.attribution import inside, masked_fields, names, rules
from gpumon_core.attribution.cgroups import placement
from gpumon_core.attribution.endpoints import address_of, port_behind
from gpumon_core.attribution.files import read
from gpumon_core.attribution.records import NOTHING, Ask, Program
from gpumon_core.attribution.rules import Rules
from gpumon_core.attribution.secrets import Mask
from gpumon_core.safety import text

Commands = Literal["full", "masked", "name", "off"]
# The most characters of a command line that are stored.
LONGEST_COMMAND = text.LONGEST_OF["command"]
# Engines that identify containers by names, and engines that gpumon can ask for the names.
NAMED = ("lxc", "systemd-nspawn")
ENGINES = ("docker", "podman", "containerd", "cri-o")
BLOB = re.compile(r"/blobs/sha256-[0-9a-f]{64}")
# The most arguments of a process to look at, and the most characters of one to look at for a file.
MOST_ARGUMENTS = 4096
LONGEST_PATH = 4096
# The most processes of a server with arguments to look at, from the one on the GPU upwards.
LONGEST_FAMILY = 4
# Rules get the names of this many processes above a process.
NEAREST = 3
# Programs that only start another program: they are left out of its parents.
PASSES_ON = re.compile(
    r"(?:ba|da|z|k|fi)?sh|.*\.sh|tini|dumb-init|docker-init|env|sudo|nice|timeout|uv|conda|pixi"
    r"|orted|prted|hydra_\w+"
)
# A chain of parents longer than this is cut at its upper end.
LONGEST_CHAIN = 12


@dataclass(frozen=True, slots=True)
class _Ancestor:
    """A process above another; `start` is in clock ticks since the boot."""

    pid: int
    comm: str
    start: int


class _Family:
    """A process and those above it that it belongs to. `reach` is how many processes above it were examined, and
    `top` how many of them are up to the last one of the family."""

    def __init__(self, member: tuple[int, int | None], program: rules.RuleSubject) -> None:
        self.members = [member]
        self.programs = [program]
        self.reach = self.top = 0

    def add(self, one: _Ancestor, program: rules.RuleSubject) -> None:
        """Add a process that is further up."""
        self.members.append((one.pid, one.start))
        self.programs.append(program)
        self.reach += 1
        self.top = self.reach


class Describer:
    """Reads everything about a process. `commands` says how much of it may be stored (GPUMON_COMMANDS), and `ask`
    whether servers and engines may be asked for more (GPUMON_ASK_SERVERS)."""

    def __init__(
        self,
        proc: str = "/proc",
        commands: Commands = "masked",
        rules: Rules | None = None,
        ask: bool = True,
    ) -> None:
        self._proc = proc
        self._asks = ask
        self._commands = commands
        self._rules = rules if rules is not None else Rules.load()
        self._mask = Mask(self._rules.secrets)

    def describe(self, pid: int, comm: str, parent: int) -> tuple[str, Program, Ask | None]:
        """The readable name of a process, its program, and what to ask for more. What cannot be read raises
        nothing."""
        folder = f"{self._proc}/{pid}"
        # placement() cleans the names, because systemd escapes some.
        placed = placement((read(f"{folder}/cgroup") or b"").decode("utf-8", "replace"))
        above = self._above(parent)
        program = replace(
            NOTHING,
            container_engine=placed.container_engine,
            container_id=placed.container_id,
            container_name=placed.container_id if placed.container_engine in NAMED else None,
            unit=placed.unit,
            job_id=placed.slurm_job,
            parents=" > ".join(names.readable(one.comm, ()) for one in reversed(above)) or None,
        )
        owner = int(placed.slice_uid) if placed.slice_uid is not None else None
        if self._commands == "off":
            name = self._mask.text(names.readable(comm, ()))
            return name, self._safe(program), self._ask(pid, program, owner)
        cmdline = read(f"{folder}/cmdline")
        own = self._looked_at(pid, comm, above, cmdline)
        family = _Family((pid, None), own)
        acting = self._acting(family, above)
        arguments, environment, executable = _arguments(cmdline), own.environment, own.executable
        name = acting.name
        if self._commands != "full":
            # A process can set any title, which may hold a password as an argument may.
            name = self._mask.text(name)
        workload = self._rules.identify(acting)
        if workload is not None:
            workload = self._with_family(workload, family, above)
        job_id = placed.slurm_job or environment.get("SLURM_JOB_ID")
        in_pod = placed.pod_uid is not None or "KUBERNETES_SERVICE_HOST" in environment
        namespace = inside.as_label(environment.get("POD_NAMESPACE", "")) if in_pod else None
        program = replace(
            program,
            job_id=job_id,
            job_name=environment.get("SLURM_JOB_NAME") or None if job_id else None,
            job_user=environment.get("SLURM_JOB_USER") or None if job_id else None,
            pod=environment.get("POD_NAME") or environment.get("HOSTNAME") or None if in_pod else None,
            namespace=namespace,
            executable=executable or None,
            workload=workload.name if workload else None,
            category=workload.category if workload else None,
            model=workload.model if workload else None,
        )
        # The process that started the first one may have opened the socket for them.
        launcher = next(((one.pid, one.start) for one in above[family.top : family.top + 1]), None)
        is_asked = in_pod and namespace is None
        ask = self._ask(pid, program, owner, workload, family, launcher, namespace=is_asked)
        name = text.clean(name, names.LONGEST)
        if self._commands == "name":
            return name, self._safe(program), ask
        program = replace(
            program,
            command=self._command(arguments),
            working_directory=own.working_directory or None,
            # Jupyter names the notebook to its kernel: https://github.com/jupyter-server/jupyter_server/pull/679
            notebook=environment.get("JPY_SESSION_NAME") or None,
        )
        return name, self._safe(program), ask

    def _safe(self, program: Program) -> Program:
        """The program with its texts first masked, then cleaned and cut: half a secret would not be recognized."""
        return text.record(masked_fields.starred(program, self._mask))

    def _above(self, pid: int) -> list[_Ancestor]:
        """Its parents up to the session or service that PID 1 started, nearest first."""
        found: list[_Ancestor] = []
        while pid > 1 and len(found) < LONGEST_CHAIN:
            stat = read(f"{self._proc}/{pid}/stat")
            if not stat:
                break
            comm, fields = split_stat(stat)
            found.append(_Ancestor(pid, comm, int(fields[19])))
            pid = int(fields[1])
        return found

    def _looked_at(
        self, pid: int, comm: str, above: Sequence[_Ancestor], cmdline: bytes | None = None
    ) -> rules.RuleSubject:
        """A process in the form that rules look at."""
        folder = f"{self._proc}/{pid}"
        arguments = _arguments(read(f"{folder}/cmdline") if cmdline is None else cmdline)
        return rules.RuleSubject(
            names.readable(comm, [*map(self._title, arguments[:1]), *arguments[1:]]),
            _link(f"{folder}/exe"),
            tuple(arguments[:MOST_ARGUMENTS]),
            _environment(read(f"{folder}/environ")),
            partial(_mapped, folder),
            _link(f"{folder}/cwd"),
            tuple(names.readable(one.comm, ()) for one in above[:NEAREST]),
        )

    def _title(self, argument: str) -> str:
        """The title of a process, masked before it is cut to a name: half a password would not be recognized."""
        return (
            argument if self._commands == "full" else self._mask.text(text.clean(argument, masked_fields.LONGEST))
        )

    def _acting(self, family: _Family, above: Sequence[_Ancestor]) -> rules.RuleSubject:
        """The program for which a process works: a worker of its parent has no name of its own."""
        own = program = family.programs[0]
        while names.is_worker(program.line, program.arguments) and family.reach < min(len(above), LONGEST_FAMILY):
            one = above[family.reach]
            if PASSES_ON.fullmatch(one.comm):
                family.reach += 1
                continue
            program = self._looked_at(one.pid, one.comm, above[family.reach + 1 :])
            family.add(one, program)
        if program is own or names.is_worker(program.line, program.arguments):
            return own
        # Its own environment says what it has loaded and which worker it is.
        environment = {**program.environment, **own.environment}
        return replace(program, environment=environment, libraries=own.libraries)

    def _with_family(
        self, workload: rules.Workload, family: _Family, above: Sequence[_Ancestor]
    ) -> rules.Workload:
        """Add the processes above that have the same workload to the family: the worker of a server often has only
        a title, and its launcher has the arguments. What a process says itself wins over what those above it
        say."""
        while family.reach < min(len(above), LONGEST_FAMILY):
            one = above[family.reach]
            if PASSES_ON.fullmatch(one.comm):
                family.reach += 1
                continue
            program = self._looked_at(one.pid, one.comm, above[family.reach + 1 :])
            theirs = self._rules.identify(program)
            model, endpoint, goes_on = None, None, False
            if theirs is not None and (
                theirs.name == workload.name or (workload.worker and theirs.category == workload.category)
            ):
                model, endpoint, goes_on = theirs.model, theirs.endpoint, theirs.name == workload.name
            elif workload.worker:
                # A script that uses the library of a server may name the model in its arguments.
                model = rules.model_of(workload.ways, program)
            else:
                break
            family.add(one, program)
            # A worker of a worker knows as little.
            is_worker = workload.worker and (theirs is None or theirs.worker)
            workload = replace(
                workload,
                model=workload.model or model,
                endpoint=workload.endpoint or endpoint,
                worker=is_worker,
            )
            if not goes_on:
                break
        return workload

    def _ask(
        self,
        pid: int,
        program: Program,
        owner: int | None,
        workload: rules.Workload | None = None,
        family: _Family | None = None,
        launcher: tuple[int, int] | None = None,
        namespace: bool = False,
    ) -> Ask | None:
        if not self._asks:
            # Reading a file of the process itself asks no server.
            return Ask(proc=self._proc, namespace=True) if namespace else None
        endpoint = workload.endpoint if workload is not None else None
        address = None
        programs = family.programs if family is not None else []
        if endpoint is not None:
            # The port of the nearest process that names one: a router has another port.
            arguments = (one.arguments for one in programs if port_behind(endpoint.option, one.arguments))
            environment = (one.environment for one in programs if endpoint.environment in one.environment)
            address = address_of(endpoint, pid, next(arguments, ()), next(environment, {}), self._proc)
        named = program.container_engine in ENGINES and program.container_id is not None
        if address is None and not named and not namespace:
            return None
        blob = next(filter(None, (_blob(argument) for one in programs for argument in one.arguments)), None)
        return Ask(
            endpoint=endpoint if address is not None else None,
            address=address,
            container=(program.container_engine or "", program.container_id or "") if named else None,
            blob=blob,
            root=f"{self._proc}/{pid}/root",
            proc=self._proc,
            family=tuple(family.members) if family is not None else (),
            launcher=launcher,
            owner=owner,
            namespace=namespace,
        )

    def _command(self, arguments: Sequence[str]) -> str | None:
        if not arguments:
            return None
        if self._commands == "masked":
            # Remove invisible characters before masking: they could split a word that marks a secret.
            arguments = self._mask.arguments([text.clean(one) for one in arguments], LONGEST_COMMAND)
        command = arguments[0] if len(arguments) == 1 else shlex.join(arguments)
        return text.clean(command, LONGEST_COMMAND)


def split_stat(stat: bytes) -> tuple[str, list[bytes]]:
    """The name of the command and the fields after it in /proc/PID/stat, state first: proc_pid_stat(5)."""
    # The name is in parentheses, and may contain any character, also parentheses.
    opening, closing = stat.index(b"("), stat.rindex(b")")
    return stat[opening + 1 : closing].decode("utf-8", "surrogateescape"), stat[closing + 2 :].split(None, 20)


def _arguments(cmdline: bytes | None) -> list[str]:
    """The arguments; only the title for a process that has set one."""
    if not cmdline:
        return []
    parts = cmdline.rstrip(b"\0").split(b"\0")
    return [text.decoded(part) for part in parts]


def _environment(environ: bytes | None) -> dict[str, str]:
    pairs = (entry.partition(b"=") for entry in (environ or b"").split(b"\0"))
    return {text.decoded(key): text.decoded(value) for key, separator, value in pairs if separator}


def _blob(argument: str) -> str | None:
    """The path of a model's file in Ollama's folders, from an argument that is the path or an option with it."""
    argument = argument[:LONGEST_PATH]
    found = BLOB.search(argument)
    return argument[argument.index("/") : found.end()] if found and found.start() else None


def _mapped(folder: str) -> list[str]:
    """The mapped files of a process, such as libraries, each once: proc_pid_maps(5)."""
    lines = (read(f"{folder}/maps") or b"").splitlines()
    # The path is the last part of a line, and no part before it has a slash.
    return [
        text.decoded(path) for path in dict.fromkeys(line[line.find(b"/") :] for line in lines if b"/" in line)
    ]


def _link(path: str) -> str | None:
    try:
        target = os.readlink(path)
    except OSError:
        return None
    return text.decoded(os.fsencode(target)).removesuffix(" (deleted)")
