"""Who plays in the simulation: boards, programs, and which of them meet on which GPU."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Board:
    """A product: memory in MiB, power in W, clocks in MHz. `cooled` boards have a fan of their own."""

    name: str
    memory_mib: int
    limit_w: int
    idle_w: int
    sm_clock: int
    memory_clock: int
    architecture: str
    capability: str
    cooled: bool
    hot: int  # °C at full power


class Pattern(StrEnum):
    """How a program loads its GPU over time."""

    TRAINING = "training"
    SERVING = "serving"
    HOLDING = "holding"
    JOB = "job"
    DESKTOP = "desktop"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Program:
    """A program: the share of its GPU's memory that it takes, from least to most."""

    name: str
    user: str
    pattern: Pattern
    least: float
    most: float
    kind: str = "C"


@dataclass(frozen=True, slots=True)
class Lane:
    """A place on a GPU where programs follow one another: one may run in each slot of time.

    `slot_s` is the slot's length, `chance` that one runs in it, `longest` the largest share of the
    slot that it takes; `spans` that it may take the next GPU as well.
    """

    programs: tuple[Program, ...]
    slot_s: int
    chance: float
    shortest: float
    longest: float
    spans: bool = False


# Figures from NVIDIA's data sheets; memory as the driver reports it.
BOARDS = (
    Board("NVIDIA H100 80GB HBM3", 81559, 700, 71, 1980, 2619, "Hopper", "9.0", False, 74),
    Board("NVIDIA GeForce RTX 4090", 24564, 450, 18, 2610, 10501, "Ada", "8.9", True, 76),
    Board("NVIDIA L40S", 46068, 350, 33, 2490, 9001, "Ada", "8.9", False, 78),
    Board("NVIDIA GeForce RTX 3090", 24576, 350, 24, 1905, 9751, "Ampere", "8.6", True, 84),
    Board("NVIDIA A100-SXM4-80GB", 81920, 400, 58, 1410, 1593, "Ampere", "8.0", False, 68),
    Board("NVIDIA RTX A6000", 49140, 300, 22, 1800, 8001, "Ampere", "8.6", True, 82),
)

_HOUR, _DAY = 3600, 86400

TRAINING = Lane(
    (
        Program("train.py", "ada", Pattern.TRAINING, 0.62, 0.93),
        Program("finetune_lora.py", "grace", Pattern.TRAINING, 0.45, 0.8),
        Program("pretrain.py", "linus", Pattern.TRAINING, 0.7, 0.95),
    ),
    8 * _HOUR,
    chance=0.85,
    shortest=0.35,
    longest=0.9,
    spans=True,
)
SERVING = Lane(
    (
        Program("vllm", "inference", Pattern.SERVING, 0.82, 0.9),
        Program("ollama", "inference", Pattern.SERVING, 0.4, 0.75),
    ),
    2 * _DAY,
    chance=1.0,
    shortest=0.995,
    longest=0.999,
)
EMBEDDING = Lane(
    (Program("embeddings", "inference", Pattern.JOB, 0.03, 0.06),),
    12 * _HOUR,
    chance=0.9,
    shortest=0.5,
    longest=0.95,
)
NOTEBOOK = Lane(
    (
        Program("ipykernel", "alan", Pattern.HOLDING, 0.2, 0.4),
        Program("jupyter", "grace", Pattern.HOLDING, 0.1, 0.3),
    ),
    _DAY,
    chance=0.9,
    shortest=0.3,
    longest=0.8,
)
JOBS = Lane(
    (
        Program("eval.py", "ada", Pattern.JOB, 0.1, 0.3),
        Program("ffmpeg", "media", Pattern.JOB, 0.01, 0.03),
        Program("blender", "alan", Pattern.JOB, 0.15, 0.35, "C+G"),
        Program("whisper", "grace", Pattern.JOB, 0.06, 0.15),
        Program("ComfyUI", "alan", Pattern.JOB, 0.2, 0.4),
    ),
    25 * 60,
    chance=0.7,
    shortest=0.08,
    longest=0.8,
)
DESKTOP = Lane((Program("Xorg", "alan", Pattern.DESKTOP, 0.01, 0.02, "G"),), 7 * _DAY, 1.0, 0.999, 0.9999)
WORKER = Lane(
    (
        Program("dataloader", "ada", Pattern.WORKER, 0.004, 0.012),
        Program("triton", "inference", Pattern.WORKER, 0.005, 0.015),
    ),
    6 * _HOUR,
    chance=1.0,
    shortest=0.9,
    longest=0.99,
)

# What GPU number N is for: the list begins again after its last line.
ROLES: tuple[tuple[Lane, ...], ...] = (
    (TRAINING,),
    (JOBS, JOBS),
    (SERVING, EMBEDDING),
    (NOTEBOOK, NOTEBOOK, JOBS, DESKTOP),
)
