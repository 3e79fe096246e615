"""The data of the simulation: GPU models, programs, and which user runs which program, how often and how long.

Memory totals, limits and clocks are those that nvidia-smi shows for these models. To change what is simulated,
change a row here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HOUR = 3600
DAY = 24 * HOUR


@dataclass(frozen=True, slots=True)
class PowerModel:
    """The power draw of a GPU model in W, and its temperatures in °C.

    It draws `context_w` while a CUDA context exists and nothing runs. `idle_c` and `load_c` are the temperatures
    on an average day, when idle and at the power limit.
    """

    limit_w: float
    idle_w: float
    context_w: float
    idle_c: float
    load_c: float


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A GPU model. Memory in MiB, clocks as lowest and highest in MHz.

    The driver itself uses `driver_mib`. `fan_min` is None for a model without a fan of its own. A model that
    `sleeps` returns to its idle clocks while a context does nothing.
    """

    name: str
    architecture: str
    compute_capability: str
    memory_mib: int
    power: PowerModel
    sm_mhz: tuple[int, int]
    memory_mhz: tuple[int, int]
    driver_mib: int
    fan_min: int | None = None
    sleeps: bool = False


H100_POWER = PowerModel(700, 69, 112, 29, 74)
H100 = GpuModel("NVIDIA H100 80GB HBM3", "Hopper", "9.0", 81559, H100_POWER, (345, 1980), (2619, 2619), 4)

A100_POWER = PowerModel(400, 56, 79, 30, 72)
A100 = GpuModel("NVIDIA A100-SXM4-80GB", "Ampere", "8.0", 81920, A100_POWER, (210, 1410), (1593, 1593), 4)

L40S_POWER = PowerModel(350, 33, 84, 31, 76)
L40S = GpuModel("NVIDIA L40S", "Ada", "8.9", 46068, L40S_POWER, (210, 2520), (405, 9001), 4)

A6000_POWER = PowerModel(300, 22, 71, 35, 84)
A6000 = GpuModel("NVIDIA RTX A6000", "Ampere", "8.6", 49140, A6000_POWER, (210, 1800), (405, 8001), 6, 30)

RTX_4090_POWER = PowerModel(450, 18, 24, 34, 78)
RTX_4090 = GpuModel(
    *("NVIDIA GeForce RTX 4090", "Ada", "8.9", 24564, RTX_4090_POWER, (210, 2730), (405, 10501), 18),
    fan_min=0,
    sleeps=True,
)

RTX_3090_POWER = PowerModel(350, 21, 29, 36, 83)
RTX_3090 = GpuModel(
    *("NVIDIA GeForce RTX 3090", "Ampere", "8.6", 24576, RTX_3090_POWER, (210, 1905), (405, 9751), 14),
    fan_min=0,
    sleeps=True,
)

Pattern = Literal["training", "requests", "notebook", "batch", "encoding", "desktop", "worker"]


@dataclass(frozen=True, slots=True)
class ProgramProfile:
    """One program, and how it loads a GPU.

    `power` and `bandwidth` are the shares of the power limit and of the memory controller that it uses at 100 %
    utilization. It fills its memory within `ramp_s` seconds: smoothly before it begins to compute, or in `stairs`
    steps while it computes. It runs as one of `users`.
    """

    name: str
    pattern: Pattern
    power: float
    bandwidth: float
    ramp_s: tuple[int, int]
    users: tuple[str, ...]
    kind: str = "C"
    stairs: int = 0


PEOPLE = ("alice", "bob", "carol", "dave", "erin", "farid", "grace")

TRAIN = ProgramProfile("train.py", "training", 0.99, 0.62, (40, 150), PEOPLE)
FINETUNE = ProgramProfile("finetune.py", "training", 0.95, 0.48, (60, 240), PEOPLE)
PRETRAIN = ProgramProfile("pretrain.py", "training", 0.99, 0.58, (90, 300), PEOPLE)
DDP = ProgramProfile("train_ddp.py", "training", 1.0, 0.66, (90, 240), PEOPLE)
VLLM = ProgramProfile("vllm", "requests", 0.82, 0.74, (70, 160), ("vllm",))
TRITON = ProgramProfile("tritonserver", "requests", 0.66, 0.41, (20, 50), ("triton",))
OLLAMA = ProgramProfile("ollama", "requests", 0.72, 0.80, (12, 30), ("ollama",))
COMFY = ProgramProfile("ComfyUI", "requests", 0.97, 0.55, (15, 40), ("alice", "grace"))
NOTEBOOK = ProgramProfile("ipykernel_launcher", "notebook", 0.60, 0.30, (3600, 7200), PEOPLE, stairs=4)
PYTHON = ProgramProfile("python3", "notebook", 0.55, 0.25, (900, 3600), PEOPLE, stairs=3)
FFMPEG = ProgramProfile("ffmpeg", "encoding", 0.75, 0.50, (2, 4), ("media", "bob"))
BLENDER = ProgramProfile("blender", "batch", 0.93, 0.35, (6, 20), ("carol", "grace"), "C+G")
EVALUATE = ProgramProfile("evaluate.py", "batch", 0.85, 0.52, (12, 35), PEOPLE)
WHISPER = ProgramProfile("whisper", "batch", 0.70, 0.45, (8, 20), ("media", "dave"))
XORG = ProgramProfile("Xorg", "desktop", 0.30, 0.40, (2, 3), ("root",), "G")
SHELL = ProgramProfile("gnome-shell", "desktop", 0.30, 0.40, (3, 5), ("alice",), "G")
BROWSER = ProgramProfile("firefox", "desktop", 0.35, 0.50, (20, 60), ("alice",), "G", stairs=3)
RAY = ProgramProfile("ray::RolloutWorker", "worker", 0.6, 0.4, (5, 15), PEOPLE)
WORKER = ProgramProfile("python3", "worker", 0.6, 0.4, (5, 15), PEOPLE)


@dataclass(frozen=True, slots=True)
class Habit:
    """At most one run of one of `programs` in every period of `period_s` seconds.

    It begins within `start` (shares of the period), runs `length_s` seconds, but not beyond the period, and holds
    `share` of the GPU's memory. Periods begin at `phase_s` after midnight UTC, or at any time (None). `daily`
    habits follow the working day.
    """

    programs: tuple[ProgramProfile, ...]
    period_s: int
    chance: float
    start: tuple[float, float]
    length_s: tuple[int, int]
    share: tuple[float, float]
    phase_s: int | None = None
    daily: bool = False


def _training(share: tuple[float, float], *programs: ProgramProfile, chance: float = 0.9) -> Habit:
    return Habit(programs, 14 * HOUR, chance, (0, 0.15), (3 * HOUR, 13 * HOUR), share)


def _server(share: tuple[float, float], *programs: ProgramProfile) -> Habit:
    return Habit(programs, 3 * DAY, 1, (0.0004, 0.003), (3 * DAY, 3 * DAY), share)


def _notebook(share: tuple[float, float], chance: float = 0.85) -> Habit:
    return Habit((NOTEBOOK, PYTHON), DAY, chance, (0.08, 0.3), (7 * HOUR, 22 * HOUR), share, 6 * HOUR)


def _short(share: tuple[float, float], *programs: ProgramProfile, period_s: int = 18 * 60) -> Habit:
    return Habit(programs, period_s, 0.9, (0, 0.4), (40, 13 * 60), share, daily=True)


def _session(program: ProgramProfile, share: tuple[float, float]) -> Habit:
    return Habit((program,), 7 * DAY, 1, (0.0002, 0.0004), (7 * DAY, 7 * DAY), share, 5 * HOUR)


def _day(program: ProgramProfile, chance: float, length_s: tuple[int, int], share: tuple[float, float]) -> Habit:
    return Habit((program,), DAY, chance, (0.3, 0.45), length_s, share, 0)


# What a GPU is used for, the main habit first. The highest shares of a role add up to less than 1, so that all of
# its programs fit into the memory at once.
ROLES: dict[str, tuple[Habit, ...]] = {
    "desktop": (
        Habit((OLLAMA,), DAY, 1, (0.001, 0.01), (20 * HOUR, DAY), (0.42, 0.60), 4 * HOUR),
        _session(XORG, (0.010, 0.012)),
        _session(SHELL, (0.006, 0.010)),
        _short((0.03, 0.13), FFMPEG, BLENDER, WHISPER),
        _day(COMFY, 0.7, (2 * HOUR, 9 * HOUR), (0.14, 0.20)),
        _day(BROWSER, 0.8, (5 * HOUR, 11 * HOUR), (0.010, 0.025)),
    ),
    "server": (_server((0.86, 0.92), VLLM), _short((0.01, 0.05), EVALUATE, period_s=50 * 60)),
    "pair": (_training((0.55, 0.93), TRAIN, PRETRAIN, FINETUNE), _short((0.01, 0.04), EVALUATE)),
    "trainer": (_training((0.70, 0.985), TRAIN, FINETUNE),),
    "shared": (
        _notebook((0.15, 0.35)),
        _short((0.08, 0.22), EVALUATE, BLENDER, FFMPEG),
        _short((0.05, 0.15), WHISPER, FFMPEG, EVALUATE, period_s=31 * 60),
        _notebook((0.08, 0.20), chance=0.6),
    ),
    "lab": (
        _training((0.35, 0.55), TRAIN, FINETUNE, chance=0.7),
        _notebook((0.10, 0.30)),
        _notebook((0.05, 0.12), chance=0.5),
    ),
    "slice_server": (_server((0.55, 0.85), TRITON, VLLM), _short((0.02, 0.10), EVALUATE)),
    "slice_notebook": (_notebook((0.30, 0.70)),),
    "slice_shared": (_training((0.35, 0.65), FINETUNE, TRAIN), _short((0.05, 0.30), EVALUATE, WHISPER)),
}

# Two neighbours in the role "pair" share the runs of this habit. Meanwhile neither has a main run of its own.
PAIR = _training((0.78, 0.93), DDP, chance=0.6)

# The habit that adds processes up to a given number; its processes have a share of the memory of their own.
WORKERS = Habit((RAY, WORKER), 5 * HOUR, 1, (0.002, 0.05), (4 * HOUR, 5 * HOUR), (0.5, 1.0))
WORKERS_PRESENT = 0.93  # of the time
WORKERS_SHARE = 0.12
WORKER_MIB = 900

# The GPUs in the order of their index, repeated after the eighth: the model, the role, and by how many °C this GPU
# is hotter than its model.
GPUS: tuple[tuple[GpuModel, str, float], ...] = (
    (RTX_4090, "desktop", 0),
    (L40S, "server", 0),
    (H100, "pair", 0),
    # It gets the warm air of its neighbour.
    (H100, "pair", 11),
    (A100, "lab", 0),
    (A6000, "trainer", 3),
    (RTX_3090, "shared", 2),
    (A100, "lab", -2),
)

# The GPU of this index has MIG instances: profile, memory in MiB, share of the GPU's SMs, role.
MIG_INDEX = 4
MIG_INSTANCES: tuple[tuple[str, int, float, str], ...] = (
    ("3g.40gb", 40192, 3 / 7, "slice_server"),
    ("2g.20gb", 19968, 2 / 7, "slice_notebook"),
    ("2g.20gb", 19968, 2 / 7, "slice_shared"),
)
MIG_DRIVER_MIB = 6

BUSES = ("17", "2A", "3D", "5D", "9A", "AB", "BA", "DB")

# How much people use GPUs in each hour of the day (UTC); 1 is the most.
DEMAND = (
    *(0.14, 0.10, 0.08, 0.07, 0.07, 0.10, 0.22, 0.42, 0.68, 0.88, 0.96, 0.90),
    *(0.74, 0.86, 1.00, 0.97, 0.90, 0.76, 0.60, 0.52, 0.47, 0.40, 0.30, 0.20),
)
WEEKEND = 0.45
