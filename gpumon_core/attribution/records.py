"""Who a process is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Program:
    """What a process runs and who started it; None where it may not be read, or GPUMON_COMMANDS says so.

    Many processes run the same: it is kept once for all of them. `parents` are the names from the
    session or service that started it down to its parent ("sshd > bash > tmux"); `command` is its command
    line with secrets masked; `pod` and `namespace` are Kubernetes'; `unit` is systemd's; `job_...` are Slurm's.
    """

    executable: str | None = None
    command: str | None = None
    working_directory: str | None = None
    parents: str | None = None
    container_engine: str | None = None
    container_id: str | None = None
    container_name: str | None = None
    container_image: str | None = None
    pod: str | None = None
    namespace: str | None = None
    unit: str | None = None
    job_id: str | None = None
    job_name: str | None = None
    job_user: str | None = None
    notebook: str | None = None
    workload: str | None = None
    category: str | None = None
    model: str | None = None


NOTHING = Program()
# A model that is known by the beginning of its file's digest, until somebody tells its name.
PLACEHOLDER = "sha256-"


def is_placeholder(model: str) -> bool:
    """Whether a model's name only stands for one that is not known yet."""
    return model.startswith(PLACEHOLDER)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a kind of server says what it serves: a rule's `endpoint`.

    `models` is the way to the names in the answer's JSON ("data.0.id", "models.*.name"). Its port stands
    behind the `option`, in the variable `environment`, or is `port`. Of several GPU processes behind one
    Ollama each has one of the models: `runners` says so.
    """

    path: str
    models: str
    port: int | None = None
    option: str | None = None
    environment: str | None = None
    runners: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What others can be asked about a process: a server at `address` what it serves, an engine how the container
    (engine, id) is called. `blob` is the model's file as an Ollama runner names it, `root` the root of the file
    system that it means, and `proc` where processes are looked up. Only a server that `family` has is believed:
    the process, and those above it that belong to it, each with its start in clock ticks. `launcher` is who
    started them, and `owner` the user in whose slice they are. `namespace`: whether a file inside the process's
    root says in which namespace of Kubernetes it is."""

    endpoint: Endpoint | None = None
    address: tuple[str, int] | None = None
    container: tuple[str, str] | None = None
    blob: str | None = None
    root: str = ""
    proc: str = "/proc"
    family: tuple[tuple[int, int | None], ...] = ()
    launcher: tuple[int, int | None] | None = None
    owner: int | None = None
    namespace: bool = False


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that cannot be confused with another.

    `start_key` tells two processes under one reused PID apart: on Linux the boot's id and the
    process's start in clock ticks since that boot, which no clock change can move. It is None
    where the process table may not be read; `start_time` (UTC seconds) is None then too. `name` is
    what people call it: of `python train.py` it is "train.py". While `pending`, more of what it runs is
    being asked for; `ask` says whom.
    """

    pid: int
    start_key: str | None = None
    start_time: float | None = None
    name: str | None = None
    user: str | None = None
    program: Program = NOTHING
    pending: bool = False
    ask: Ask | None = field(default=None, compare=False, repr=False)
