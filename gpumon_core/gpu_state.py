"""What a GPU is doing, in one word: the one place that decides it.

What is not known is neither idle nor free: where the driver reports no utilization, as for MIG instances, the word
is Unknown, and the sentence says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpumon_core.format import memory as memory_text
from gpumon_core.metrics import throttled_by

# From this utilization on a GPU counts as busy. An idle GPU counts as held if this share of its memory is used, or
# this much where the size of its memory is not known.
BUSY_PERCENT = 5.0
HELD_PERCENT = 10.0
HELD_MIB = 1024.0

# States in gpus.state: a GPU does not answer although it should, or gpumon leaves it alone.
NOT_ANSWERING = frozenset({"lost", "hung"})
LEFT_ALONE = frozenset({"asleep", "quiet"})

# Shown beside the memory of a GPU that has none of its own.
SHARED = "shared with the system"

Css = Literal["busy", "held", "idle", "unknown", "throttled", "asleep", "lost"]
# A GPU may be one device, be split into MIG instances, or be such an instance.
GpuPart = Literal["whole", "split", "instance"]
UNREPORTED: dict[GpuPart, str] = {
    "whole": "The driver does not report its utilization",
    "split": "The driver does not report the utilization of a GPU that is split by MIG",
    "instance": "The driver does not report utilization on MIG",
}


@dataclass(frozen=True, slots=True)
class GpuCondition:
    """A word, the CSS class of that word, and a sentence about it."""

    word: str
    css: Css
    why: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a GPU at a tick; None is not known.

    state: that of `gpus.state`. utilization: %. memory_mib, total_mib: MiB. holders: the memory in MiB that each
    of its processes holds, None where the processes are not known. instances: the conditions of its MIG
    instances.
    """

    state: str = "ok"
    utilization: float | None = None
    memory_mib: float | None = None
    total_mib: float | None = None
    holders: Sequence[float | None] | None = None
    part: GpuPart = "whole"
    instances: Sequence[GpuCondition] = ()
    clocks_event_reasons: float | None = None


def answers(state: str) -> bool:
    """Whether a GPU in this state has readings."""
    return state == "ok"


def is_lost(state: str) -> bool:
    """Whether a GPU in this state is a problem: it should answer, and does not."""
    return state in NOT_ANSWERING


def shares_memory(memory_from: object) -> bool:
    """Whether a GPU of this `gpus.memory_from` takes its memory from the machine's."""
    return memory_from == "unified"


def of(facts: Facts, lasting: str = "a while") -> GpuCondition:
    """What a GPU is doing. `lasting`: how long it has not answered, in words."""
    if not answers(facts.state):
        return _silent(facts.state, lasting)
    if reasons := throttled_by(facts.clocks_event_reasons):
        return GpuCondition("Throttled", "throttled", f"Its clocks are held down: {', '.join(reasons).lower()}")
    held = _held(facts)
    if facts.utilization is None:
        return _unreported(facts, held)
    if facts.utilization >= BUSY_PERCENT:
        return GpuCondition("Busy", "busy", "It computes")
    return IDLE[held]


# A GPU that computes nothing: by whether its memory is held.
IDLE: dict[bool | None, GpuCondition] = {
    None: GpuCondition("Unknown", "unknown", "Nothing is computed; how much memory is held is not known"),
    True: GpuCondition("Held idle", "held", "Memory is held, and nothing is computed"),
    False: GpuCondition("Idle", "idle", "Nothing is computed, and next to no memory is held"),
}


def _silent(state: str, lasting: str) -> GpuCondition:
    """The condition of a GPU without a reading."""
    conditions = {
        "hung": GpuCondition(
            "Hung",
            "lost",
            f"The driver has not returned from a call about it for {lasting}. The other GPUs go on. Look at "
            "dmesg; a driver that hangs needs a reboot.",
        ),
        "lost": GpuCondition(
            "Lost",
            "lost",
            f"No answer since {lasting}. It may have fallen off the bus: look at dmesg for “Xid”, and reset or "
            "reboot.",
        ),
        "asleep": GpuCondition(
            "Asleep",
            "asleep",
            f"Not asked for {lasting}: it is switched off to save power, as nothing uses it, and a question would "
            "wake it.",
        ),
        "quiet": GpuCondition(
            "Quiet",
            "asleep",
            f"Not asked for {lasting}, so that it can switch itself off: nothing uses it (GPUMON_LET_SLEEP).",
        ),
        "gone": GpuCondition("Gone", "lost", "The driver does not list it any more"),
    }
    return conditions.get(state, GpuCondition("Unknown", "unknown", f"Its state is “{state}”"))


def _held(facts: Facts) -> bool | None:
    """Whether more than a little memory is held; None where that is not known."""
    known = [mib for mib in facts.holders or () if mib is not None]
    by_processes = sum(known)
    used = facts.memory_mib
    # What processes hold is a part of what is used: the use cannot be less.
    least = max(used or 0.0, by_processes)
    if least >= (facts.total_mib * HELD_PERCENT / 100 if facts.total_mib else HELD_MIB):
        return True
    if used is not None and (facts.total_mib or used):
        return False
    # Without the driver's own figure only the processes' memory is known, if that of each is.
    return False if facts.holders is not None and len(known) == len(facts.holders) else None


def _unreported(facts: Facts, held: bool | None) -> GpuCondition:
    """The condition of a GPU with an unknown utilization."""
    words = {instance.word for instance in facts.instances}
    if words:
        if "Busy" in words:
            return GpuCondition("Busy", "busy", "One of its MIG instances computes")
        if words == {"Idle"} and held is False:
            return GpuCondition("Idle", "idle", "Nothing is on its MIG instances")
        if words <= {"Idle", "Held idle"}:
            return GpuCondition(
                "Held idle", "held", "Memory is held on its MIG instances, and nothing is computed"
            )
    elif facts.holders is not None and not facts.holders and held is False and facts.memory_mib is not None:
        return GpuCondition("Idle", "idle", "No process is on it, and next to no memory is held")
    why = UNREPORTED["split" if words else facts.part]
    mib = max(facts.memory_mib or 0.0, sum(mib or 0.0 for mib in facts.holders or ()))
    if held:
        why += f"; {memory_text(mib)} are held"
    elif facts.holders:
        why += f"; {len(facts.holders)} process{'es are' if len(facts.holders) > 1 else ' is'} on it"
    return GpuCondition("Unknown", "unknown", why)
