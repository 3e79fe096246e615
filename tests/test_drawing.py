"""Formats, cards, figures and CSV: what numbers look like, and that outside text stays text."""

from __future__ import annotations

import math
from zoneinfo import ZoneInfo

import pandas as pd
import pytest

from gpumon_core import cards, figures
from gpumon_core import format as fmt
from gpumon_core.metrics import GPU_METRICS, GPU_METRICS_BY_KEY, TICK_COLUMNS, Level
from gpumon_core.store.schema import gpu_metrics

BERLIN = ZoneInfo("Europe/Berlin")
NAN = math.nan


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (13, "13s"),
        (313, "5m 13s"),
        (7513, "2h 5m 13s"),
        (273_600, "3d 4h 0m"),
        (None, "–"),
        (NAN, "–"),
        (-5, "0s"),
    ],
)
def test_durations_read_naturally(seconds: float | None, text: str) -> None:
    assert fmt.duration(seconds) == text


def test_padded_durations_sort_as_their_lengths() -> None:
    lengths = [0, 5, 59, 60, 61, 600, 3599, 3600, 36_000, 86_399, 86_400, 864_000, 8_640_000]
    texts = [fmt.sortable_duration(length) for length in lengths]
    # Browsers sort spaces before digits, as their code points would not.
    as_sorted = sorted(texts, key=lambda text: text.replace(fmt.FIGURE_SPACE, " "))
    assert as_sorted == texts
    assert [" ".join(text.replace(fmt.FIGURE_SPACE, "").split()) for text in texts] == [
        fmt.duration(length) for length in lengths
    ]


@pytest.mark.parametrize(("mib", "text"), [(512, "512 MiB"), (62_669, "61.2 GiB"), (0, "0 MiB"), (None, "–")])
def test_memory_has_its_unit(mib: float | None, text: str) -> None:
    assert fmt.memory(mib) == text


def test_plain_text_cannot_become_markup() -> None:
    assert fmt.plain("**a** [b](c) $x$") == r"\*\*a\*\* \[b\]\(c\) \$x\$"


def test_the_catalogue_is_the_schema_and_consistent() -> None:
    keys = [metric.key for metric in GPU_METRICS]
    assert len(set(keys)) == len(keys)
    assert [column.name for column in gpu_metrics.columns][2:] == list(TICK_COLUMNS)
    assert len({metric.prometheus for metric in GPU_METRICS}) == len(keys)
    for metric in GPU_METRICS:
        assert metric.critical is None or (metric.warning or 0) < metric.critical


@pytest.mark.parametrize(
    ("key", "value", "whole", "level"),
    [
        ("temperature", 79, None, Level.CALM),
        ("temperature", 80, None, Level.WARNING),
        ("temperature", 90, None, Level.CRITICAL),
        ("memory", 90, 100, Level.WARNING),
        ("memory", 90, None, Level.CALM),
        ("power", 300, 300, Level.CALM),
        ("power", None, 300, Level.UNKNOWN),
        ("utilization", 100, None, Level.CALM),
    ],
)
def test_levels(key: str, value: float | None, whole: float | None, level: Level) -> None:
    assert GPU_METRICS_BY_KEY[key].level(value, whole) is level


def gpu(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {metric.key: 10.0 for metric in GPU_METRICS}
    values |= {"gpu_index": 0, "mig_index": NAN, "name": "Board", "uuid": "GPU-1", "host": "box", "state": "ok"}
    values |= {"memory_total_mib": 24576.0, "power_limit_w": 300.0, "host_last_seen": 100, "last_seen": 100}
    return values | changes


def trend(*values: float) -> pd.DataFrame:
    columns = {metric.key + suffix: values for metric in GPU_METRICS for suffix in ("", "_min", "_max")}
    return pd.DataFrame({"timestamp_epoch": range(1000, 1000 + 4 * len(values), 4)} | columns)


def test_a_missing_value_is_a_dash_without_a_trend() -> None:
    html = cards.card(gpu(fan_speed=NAN), trend(1, 2, 3), (1000, 1008))
    fan = html.split('data-metric="fan_speed"')[1].split("</div></div>")[0]
    assert "–" in fan
    assert "--drawing" not in fan


def test_a_level_is_told_by_sign_and_word_too() -> None:
    html = cards.card(gpu(temperature=95.0), None, (0, 1))
    assert 'aria-label="critical">◆' in html
    assert "gm-critical" in html


def test_a_trend_breaks_where_nothing_was_recorded() -> None:
    whole = cards.sparkline(trend(1, 2, 3, 4, 5), GPU_METRICS_BY_KEY["utilization"], None, (1000, 1016))
    broken = cards.sparkline(trend(1, 2, NAN, 4, 5), GPU_METRICS_BY_KEY["utilization"], None, (1000, 1016))
    # Each path has one "M" per unbroken piece: one for the area and one for the line.
    assert whole.count("M") == 2
    assert broken.count("M") == 4


@pytest.mark.parametrize("evil", ["<script>x</script>", '"><img src=x>', "') url(javascript:x)", "&lt;b&gt;"])
def test_text_from_outside_stays_text(evil: str) -> None:
    html = cards.card(gpu(name=evil, uuid=evil, host=evil), trend(1, 2), (1000, 1004), with_host=True)
    assert evil not in html.replace("gm-", "")
    for start in ("<script", "<img"):
        assert start not in html


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"utilization": 60.0}, "Busy"),
        ({"utilization": 0.0, "memory": 100.0}, "Idle"),
        ({"utilization": 0.0, "memory": 20000.0}, "Idle, memory held"),
        ({"utilization": NAN, "memory": 20000.0}, "In use"),
        ({"state": "lost", "host_last_seen": 172}, "Lost"),
    ],
)
def test_the_state_in_a_word(changes: dict[str, object], word: str) -> None:
    assert cards.state(gpu(**changes))[0] == word
    html = cards.card(gpu(**changes), None, (0, 1))
    assert ("No answer since 1m 12s" in html) == (word == "Lost")


def history_frame() -> pd.DataFrame:
    rows = [(gpu_id, 1000 + 4 * step, 50.0 + gpu_id) for gpu_id in (1, 2) for step in range(5)]
    frame = pd.DataFrame(rows, columns=["gpu_id", "timestamp_epoch", "temperature"])
    frame["power"] = frame["temperature"] * 2
    frame.loc[2, ["temperature", "power"]] = NAN
    return frame


def test_a_chart_per_metric_and_a_line_per_gpu_with_its_gaps() -> None:
    labels = {1: "GPU 0", 2: "GPU 1"}
    figure = figures.history(history_frame(), labels, ["temperature", "power"], 1000, 1016, BERLIN, dark=False)
    assert [(line.name, line.yaxis) for line in figure.data] == [
        ("GPU 0", "y"),
        ("GPU 1", "y"),
        ("GPU 0", "y2"),
        ("GPU 1", "y2"),
    ]
    assert not any(line.connectgaps for line in figure.data)
    assert math.isnan(figure.data[0].y[2])
    assert "°C" in figure.layout.annotations[0].text
    assert "(W)" in figure.layout.annotations[1].text


def test_a_gpu_keeps_its_colour_when_another_is_left_out() -> None:
    labels = {1: "GPU 0", 2: "GPU 1"}
    both = figures.history(history_frame(), labels, ["power"], 1000, 1016, BERLIN, dark=True)
    alone = figures.history(history_frame().query("gpu_id == 2"), labels, ["power"], 1000, 1016, BERLIN, dark=True)
    assert alone.data[0].line.color == both.data[1].line.color != both.data[0].line.color


def test_the_time_axis_is_the_viewers_wall_clock() -> None:
    summer = pd.Timestamp("2026-07-01 12:00", tz="UTC").timestamp()
    assert figures.wall_clock(pd.Series([int(summer)]), BERLIN)[0] == pd.Timestamp("2026-07-01 14:00")
