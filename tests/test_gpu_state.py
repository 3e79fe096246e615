"""The one word for what a GPU is doing, of every combination of what is known and what is not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from gpumon_core import gpu_state
from gpumon_core.gpu_state import Facts, GpuCondition
from pages.components import cards

UTILIZATIONS = {"unknown": None, "0": 0.0, "little": 4.0, "busy": 60.0}
MEMORIES = {"unknown": None, "low": 300.0, "high": 20000.0}
PROCESSES: dict[str, list[float | None] | None] = {
    "not listed": None,
    "none": [],
    "holding": [19135.0],
    "holding little": [200.0],
    "of unknown memory": [None],
}
TOTALS = {"unknown": None, "known": 24576.0}

# Memory, processes, whether the total is known -> whether memory is held; what is not here is not known.
HELD = {
    **{("high", processes, total): True for processes in PROCESSES for total in TOTALS},
    **{("low", processes, total): processes == "holding" for processes in PROCESSES for total in TOTALS},
    **{("unknown", "holding", total): True for total in TOTALS},
    **{("unknown", "holding little", total): False for total in TOTALS},
    **{("unknown", "none", total): False for total in TOTALS},
}


@pytest.mark.parametrize("utilization", UTILIZATIONS)
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("part", ["whole", "instance"])
def test_what_is_not_known_is_neither_idle_nor_free(
    utilization: str, memory: str, processes: str, total: str, part: gpu_state.GpuPart
) -> None:
    found = gpu_state.of(
        Facts(
            utilization=UTILIZATIONS[utilization],
            memory_mib=MEMORIES[memory],
            total_mib=TOTALS[total],
            holders=PROCESSES[processes],
            part=part,
        )
    )
    held = HELD.get((memory, processes, total))
    if utilization == "busy":
        expected = "Busy"
    elif utilization == "unknown":
        # Only where nobody is there, and the driver says so of the memory as well, nothing can compute.
        expected = "Idle" if memory == "low" and processes == "none" else "Unknown"
    else:
        expected = {None: "Unknown", True: "Held idle", False: "Idle"}[held]
    assert found.word == expected
    if expected == "Unknown":
        assert found.css == "unknown"
        assert "not known" in found.why or "does not report" in found.why
        assert "MIG" in found.why or not (part == "instance" and utilization == "unknown")
        assert ("are held" in found.why) == (utilization == "unknown" and held is True)
    else:
        assert found.css != "unknown"


@pytest.mark.parametrize(
    ("state", "word", "css", "lost"),
    [
        ("lost", "Lost", "lost", True),
        ("hung", "Hung", "lost", True),
        ("asleep", "Asleep", "asleep", False),
        ("quiet", "Quiet", "asleep", False),
        ("gone", "Gone", "lost", False),
        ("new to this version", "Unknown", "unknown", False),
    ],
)
def test_a_gpu_without_a_reading_is_what_its_state_says_whatever_it_said_last(
    state: str, word: str, css: str, lost: bool
) -> None:
    for utilization, memory in itertools.product(UTILIZATIONS.values(), MEMORIES.values()):
        found = gpu_state.of(Facts(state, utilization, memory, 24576.0, []))
        assert (found.word, found.css) == (word, css)
    assert gpu_state.is_lost(state) == lost
    assert not gpu_state.answers(state)


BUSY, HOLDS, IDLE, UNKNOWN = (GpuCondition(word, "idle", "") for word in ("Busy", "Held idle", "Idle", "Unknown"))


@pytest.mark.parametrize(
    ("instances", "memory", "word"),
    [
        ((IDLE, BUSY), 300.0, "Busy"),
        ((UNKNOWN, BUSY), 300.0, "Busy"),
        ((IDLE, IDLE), 300.0, "Idle"),
        ((IDLE, IDLE), 20000.0, "Held idle"),
        ((IDLE, HOLDS), 20000.0, "Held idle"),
        ((IDLE, UNKNOWN), 300.0, "Unknown"),
        ((HOLDS, UNKNOWN), 20000.0, "Unknown"),
    ],
)
def test_a_split_gpu_is_what_its_instances_are(
    instances: tuple[GpuCondition, ...], memory: float, word: str
) -> None:
    found = gpu_state.of(Facts(memory_mib=memory, total_mib=24576.0, holders=[], instances=instances))
    assert found.word == word
    assert ("split by MIG" in found.why) == (word == "Unknown")


def row(**changes: Any) -> dict[str, Any]:
    known = {
        **{"id": 1, "parent_id": None, "mig_index": None, "state": "ok", "utilization": 0.0, "memory": None},
        **{"memory_total_mib": 24576, "memory_from": "device", "clocks_event_reasons": None},
        **{"host_last_seen": 100, "last_seen": 100, "host_interval_s": 4.0},
    }
    return known | changes


def test_a_card_asks_the_processes_where_the_driver_says_nothing_of_the_memory() -> None:
    assert cards.condition(row()).word == "Unknown"
    assert cards.condition(row(), processes=[{"memory": 19135}]).word == "Held idle"
    assert cards.condition(row(memory=float("nan")), processes=[{"memory": float("nan")}]).word == "Unknown"
    assert cards.condition(row(), processes=[]).word == "Idle"


def test_a_silent_machine_says_nothing_of_its_gpus() -> None:
    assert cards.condition(row(utilization=90.0), latest=1000).word == "Stale"


def test_a_mig_instance_says_why_it_is_unknown() -> None:
    found = cards.condition(row(mig_index=0, parent_id=2, utilization=None, memory=20000.0))
    assert found.word == "Unknown"
    assert found.why == "The driver does not report utilization on MIG; 19.5 GiB are held"
