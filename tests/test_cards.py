"""Cards of GPUs: what they say about one, and that text from outside stays text."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest

from gpumon_core import figures
from gpumon_core.metrics import GPU_METRICS, GPU_METRICS_BY_KEY
from pages.components import cards, sparks

NAN = math.nan


def gpu(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {metric.key: 10.0 for metric in GPU_METRICS}
    values |= {"id": 1, "parent_id": None, "gpu_index": 0, "mig_index": None, "clocks_event_reasons": 0.0}
    values |= {"name": "Board", "uuid": "GPU-1", "host": "box", "state": "ok"}
    values |= {"host_interval_s": 4.0}
    values |= {"memory_total_mib": 24576.0, "power_limit_w": 300.0, "host_last_seen": 100, "last_seen": 100}
    return values | changes


def context(of: pd.DataFrame | None = None, **changes: object) -> cards.Context:
    drawn = {} if of is None else sparks.of_gpus([gpu()], of.assign(gpu_id=1), (1000, 1008))
    return cards.Context(trends=drawn, **changes)  # type: ignore[arg-type]


def process(**changes: object) -> dict[str, object]:
    values = {"pid": 7, "name": "train.py", "username": "ada", "workload": None, "model": None, "memory": 6144.0}
    return values | changes


def trend(*values: float) -> pd.DataFrame:
    columns = {metric.key + suffix: values for metric in GPU_METRICS for suffix in ("", "_min", "_max")}
    return pd.DataFrame({"timestamp_epoch": range(1000, 1000 + 4 * len(values), 4)} | columns)


def test_a_missing_value_is_a_dash_without_a_trend() -> None:
    html = cards.card(gpu(fan_speed=None, temperature=None), context(trend(1, 2, 3)))
    temperature = html.split('data-metric="temperature"')[1].split("data-metric=")[0]
    assert "–" in temperature
    assert "--drawing" not in temperature
    assert "–" in html.split('data-metric="fan_speed"')[1].split("</span>")[0]


def test_a_level_has_a_sign_and_a_word() -> None:
    html = cards.card(gpu(temperature=95.0), cards.Context())
    assert 'aria-label="critical">◆' in html
    assert "gm-critical" in html


def spark(*values: float, end: int, now: float) -> str:
    drawn = sparks.sparkline(trend(*values), GPU_METRICS_BY_KEY["utilization"], None, (1000, end))
    assert drawn is not None
    return drawn.up_to(now)


def test_a_trend_breaks_where_nothing_was_recorded() -> None:
    whole, broken = spark(1, 2, 3, 4, 5, end=1016, now=5), spark(1, 2, NAN, 4, 5, end=1016, now=5)
    # Each path has one "M" per unbroken piece: one for the area and one for the line.
    assert whole.count("M") == 2
    assert broken.count("M") == 4


def test_a_trend_ends_at_the_present_value_unless_it_ended_earlier() -> None:
    for now, y in ((0, 31), (50, 16), (100, 1), (130, 1)):
        drawn = spark(10, 20, end=1008, now=now)
        assert drawn.count(f"L160 {y}L160 32Z") == drawn.count(f"L160 {y}%22") == 1, "the area, and the line"
    after_a_gap = spark(10, 20, NAN, 30, end=1016, now=50)
    assert after_a_gap.count("M") == 4, "the point and the present are a line"
    assert "L160" not in spark(10, 20, end=1000 + 4 + sparks.PRESENT_WITHIN_S + 1, now=50)
    assert "L160 16" in spark(10, 20, end=1000 + 4 + sparks.PRESENT_WITHIN_S, now=50)
    assert sparks.PRESENT not in drawn + after_a_gap


EVIL = ["<script>x</script>", '"><img src=x>', "') url(javascript:x)", "&lt;b&gt;"]


@pytest.mark.parametrize("evil", EVIL)
def test_text_from_outside_stays_text(evil: str) -> None:
    mine = [process(name=evil, username=evil, workload=evil, model=evil)]
    shown = context(trend(1, 2), with_host=True, processes={1: mine})
    html = cards.card(gpu(name=evil, uuid=evil, host=evil), shown)
    assert evil not in html.replace("gm-", "")
    for start in ("<script", "<img"):
        assert start not in html


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"utilization": 60.0}, "Busy"),
        ({"utilization": 0.0, "memory": 100.0}, "Idle"),
        ({"utilization": 0.0, "memory": 20000.0}, "Held idle"),
        ({"utilization": None, "memory": 20000.0}, "Unknown"),
        ({"utilization": 60.0, "clocks_event_reasons": float(0x40)}, "Throttled"),
        ({"utilization": 60.0, "clocks_event_reasons": float(0x4)}, "Busy"),
        ({"utilization": 60.0, "clocks_event_reasons": None}, "Busy"),
        ({"state": "lost", "host_last_seen": 172}, "Lost"),
        ({"state": "hung", "host_last_seen": 172}, "Hung"),
    ],
)
def test_the_state_in_a_word(changes: dict[str, object], word: str) -> None:
    assert cards.condition(gpu(**changes)).word == word
    html = cards.card(gpu(**changes), cards.Context())
    assert f">{word}</span>" in html
    assert ("No answer since 1m 12s" in html) == (word == "Lost")
    assert ("for 1m 12s" in html) == (word == "Hung")


@pytest.mark.parametrize(("memory_from", "marked"), [("unified", True), ("device", False), (None, False)])
def test_memory_that_is_shared_with_the_system_says_so(memory_from: str | None, marked: bool) -> None:
    assert ("shared with the system" in cards.card(gpu(memory_from=memory_from), cards.Context())) == marked


def test_the_card_of_a_sleeping_gpu_has_no_old_values() -> None:
    html = cards.card(gpu(state="asleep", utilization=60.0, temperature=71.0), cards.Context())
    assert "Asleep" in html
    assert "71" not in html


def test_the_state_of_a_throttled_gpu_says_why() -> None:
    html = cards.card(gpu(clocks_event_reasons=float(0x40 | 0x80 | 0x1)), cards.Context())
    assert "hardware thermal, power brake" in html
    assert "idle" not in html.split('class="gm-state')[1].split(">")[0]


def test_the_bar_of_memory_has_a_part_for_each_process() -> None:
    mine = [
        process(workload="vLLM", model="Qwen3", memory=12288.0),
        process(pid=8, memory=6144.0),
        process(pid=9, memory=None),
    ]
    html = cards.card(gpu(memory=20480.0), context(workloads={"vLLM": 0}, processes={1: mine}))
    bar = html.split('class="gm-bar gm-thick"')[1].split("</div>")[0]
    assert re.findall(r"width:([\d.]+)%", bar) == ["50.00", "25.00", "8.33"], "two processes, and the rest"
    assert figures.color(0, False) in bar, "a workload has its colour"
    assert "vLLM · Qwen3" in html
    assert "+1" in html.split('class="gm-holders"')[1], "how many more there are"


def test_more_held_than_used_is_no_bar_beyond_its_end() -> None:
    html = cards.card(gpu(memory=6144.0), context(processes={1: [process(memory=9000.0), process(memory=9000.0)]}))
    bar = html.split('class="gm-bar gm-thick"')[1].split("</div>")[0]
    assert sum(float(width) for width in re.findall(r"width:([\d.]+)%", bar)) == pytest.approx(25, abs=0.1)


def test_mig_instances_are_on_their_gpus_card_and_without_it_on_their_own() -> None:
    rows = [
        gpu(),
        gpu(id=2, uuid="MIG-1", parent_id=1, mig_index=3, name="Board MIG 1g.10gb"),
        gpu(id=3, uuid="MIG-2", parent_id=99, mig_index=0),
    ]
    html = cards.overview(rows, {}, [], [], 1)
    assert html.count('role="listitem"') == 2
    first = html.split('role="listitem"')[1]
    assert "MIG 3" in first
    assert "1g.10gb" in first
    assert 'data-uuid="MIG-1"' in first
