"""What `top` and `snapshot` draw: it fits whatever there is; GPUs and containers are called alike everywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from cli import GPUS, PEOPLE, tick

from gpumon_core import format as fmt
from gpumon_core.cli import glance
from gpumon_core.export import snapshot as export
from gpumon_core.export.text_columns import width


@pytest.mark.parametrize("columns", [1, 5, 12, 20, 80])
@pytest.mark.parametrize("rows", [6, 8, 24])
@pytest.mark.parametrize("gpus", [0, 1, 9, 200])
def test_no_line_is_wider_than_the_terminal_and_none_is_too_many(columns: int, rows: int, gpus: int) -> None:
    full = glance.of_snapshot(tick(0), PEOPLE, simulated=False)
    view = replace(full, gpus=full.gpus[:1] * gpus, processes=full.processes[:1] * gpus)
    drawn = glance.lines(view, columns, rows, colours=False, note="the driver has gone away")
    assert len(drawn) <= rows
    assert max(map(width, drawn)) <= columns


def test_what_is_left_out_is_counted_and_one_alone_is_shown_instead() -> None:
    full = glance.of_snapshot(tick(0), PEOPLE, simulated=False)
    one = replace(full, gpus=full.gpus[:1])
    # A headline, a blank, titles and a GPU, a blank and titles: five lines are left for processes.
    for many, last in ((5, "chat-0"), (6, "… and 2 more processes"), (7, "… and 3 more processes")):
        view = replace(one, processes=full.processes[:1] * many)
        drawn = glance.lines(view, 80, 11, colours=False)
        assert last in drawn[-1]
        assert len(drawn) == 11
    view = replace(full, gpus=full.gpus[:1] * 4, processes=())
    assert "… and 2 more GPUs" in glance.lines(view, 80, 11, colours=False)


@pytest.mark.parametrize(
    ("mig_index", "label"), [(None, "3"), (math.nan, "3"), (1, "3:1"), (1.0, "3:1"), (0, "3:0")]
)
def test_a_gpu_has_one_short_name(mig_index: float | None, label: str) -> None:
    assert fmt.gpu_label(3, mig_index) == label


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (("chat-0", "vllm", "0123456789abcdef"), "chat-0"),
        ((None, "vllm", "0123456789abcdef"), "vllm"),
        (("", "", "0123456789abcdef"), "0123456789ab"),
        ((None, None, None), None),
    ],
)
def test_a_container_is_called_by_the_best_name_that_it_has(
    given: tuple[str | None, str | None, str | None], called: str | None
) -> None:
    assert fmt.container(*given) == called


def test_every_verb_reports_a_gpu_that_does_not_answer_alike() -> None:
    first, second = (gpu.uuid for gpu in GPUS)
    taken = replace(tick(0), readings=(), processes=(), lost=frozenset({first, second}), hung=frozenset({second}))
    assert [taken.state_of(uuid) for uuid in (first, second, "another")] == ["lost", "hung", "ok"]
    assert [gpu.state for gpu in glance.of_snapshot(taken, {}, simulated=False).gpus] == ["lost", "hung"]
    assert [gpu["state"] for gpu in export.as_json(taken, {}, "nvml")["gpus"]] == ["lost", "hung"]
    table = export.as_text(taken, {}, "nvml").splitlines()
    assert [line.split()[-1] for line in table[3:5]] == ["lost", "hung"]


def test_a_gpu_that_is_asleep_is_called_so_without_alarm() -> None:
    first, second = (gpu.uuid for gpu in GPUS)
    taken = replace(tick(0), readings=(), processes=(), asleep=frozenset({first}), quiet=frozenset({second}))
    view = glance.of_snapshot(taken, {}, simulated=False)
    assert [gpu.state for gpu in view.gpus] == ["asleep", "quiet"]
    assert [gpu["state"] for gpu in export.as_json(taken, {}, "nvml")["gpus"]] == ["asleep", "quiet"]
    table = export.as_text(taken, {}, "nvml").splitlines()
    assert [line.split()[-1] for line in table[3:5]] == ["asleep", "quiet"]
    drawn = glance.lines(view, 80, 24, colours=True)
    assert not any("\x1b" in line for line in drawn if "asleep" in line or "quiet" in line)
    drawn = glance.lines(replace(view, gpus=(replace(view.gpus[0], state="lost"),)), 80, 24, colours=True)
    assert any("\x1b" in line for line in drawn if "lost" in line)


def test_memory_that_is_shared_is_marked() -> None:
    full = tick(0)
    shared = replace(full, gpus=tuple(replace(gpu, memory_from="unified") for gpu in full.gpus))
    for taken, marks in ((full, 0), (shared, 2)):
        drawn = glance.lines(glance.of_snapshot(taken, PEOPLE, simulated=False), None, None, colours=False)
        assert sum(" shared" in line for line in drawn) == marks
