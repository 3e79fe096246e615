"""The records that identify a process."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Program:
    """What a process runs and who started it; None where it cannot be read, or where GPUMON_COMMANDS excludes it.

    Many processes run the same program, which is stored once. `parents` are the names from the session or service
    that started it down to its parent ("sshd > bash > tmux"); `command` is its command line with secrets masked;
    `pod` and `namespace` are Kubernetes'; `unit` is systemd's; `job_...` are Slurm's.
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
# The placeholder of a model with an unknown name: the beginning of its file's digest.
PLACEHOLDER = "sha256-"


def is_placeholder(model: str) -> bool:
    """Whether a name is the placeholder of a model with an unknown name."""
    return model.startswith(PLACEHOLDER)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a kind of server reports what it serves: the `endpoint` of a rule.

    `models` is the path to the names in the JSON of the answer ("data.0.id", "models.*.name"). The port is the
    value of `option`, of the variable `environment`, or `port`. With `runners`, each of several GPU processes of
    one server has one of the models, as with Ollama.
    """

    path: str
    models: str
    port: int | None = None
    option: str | None = None
    environment: str | None = None
    runners: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What to ask about a process: the server at `address` for its models, the engine for the name of the
    `container` (engine, id). `blob` is the model's file as an Ollama runner names it, `root` the root of its file
    system, and `proc` the folder of processes. gpumon believes only a server of the `family`: the process and
    those above it that belong to it, each with its start in clock ticks. `launcher` is the process that started
    them, and `owner` the user of their slice. `namespace` says whether to read a file inside the process's root
    for its Kubernetes namespace."""

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
    """A process, and never another one with the same PID.

    `start_key` is different for two processes with one reused PID: on Linux it is the id of the boot and the start
    in clock ticks since that boot, which no clock change can move. Where the process table cannot be read,
    `start_key` and `start_time` (UTC seconds) are None. `name` is what people call it: "train.py" for `python
    train.py`. While it is `pending`, gpumon is asking for more about it; `ask` says what.
    """

    pid: int
    start_key: str | None = None
    start_time: float | None = None
    name: str | None = None
    user: str | None = None
    program: Program = NOTHING
    pending: bool = False
    ask: Ask | None = field(default=None, compare=False, repr=False)
