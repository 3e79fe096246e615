"""Formats, cards, figures and CSV: what numbers look like, and that outside text stays text."""

from __future__ import annotations

import itertools
import math
import random
import re
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from drawn import drawn

from gpumon_core import figures
from gpumon_core import format as fmt
from gpumon_core.figures.lanes import pack
from gpumon_core.metrics import GPU_METRICS, GPU_METRICS_BY_KEY, TICK_COLUMNS, Level
from gpumon_core.store.schema import gpu_metrics
from pages.components import cards

BERLIN = ZoneInfo("Europe/Berlin")
NAN = math.nan
BAD = ("skipped", "failed", "dropped")


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


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (0.027, 1, "0.03"),
        (9.94, 1, "9.94"),
        (12.34, 1, "12.3"),
        (1234.4, 0, "1,234"),
        (1.2, 0, "1.2"),
        (0, 1, "0.00"),
    ],
)
def test_a_small_sum_has_one_decimal_more(number: float, digits: int, text: str) -> None:
    assert fmt.amount(number, digits) == text


@pytest.mark.parametrize(
    ("key", "number", "text"),
    [
        ("energy", 123_002_798.0, "34.167 kWh"),
        ("energy", 4_444_444_444.0, "1,234.568 kWh"),
        ("energy", 15_120.0, "4.2 Wh"),
        ("energy", 0.0, "0.0 Wh"),
        ("energy", 3_599_000.0, "999.7 Wh"),
        ("energy", 3_599_900.0, "1.000 kWh"),
        ("energy", NAN, "–"),
        ("performance_state", 8.0, "P8"),
        ("performance_state", 0, "P0"),
        ("performance_state", None, "–"),
        ("memory", 62_669.0, "61.2 GiB"),
        ("sm_clock", 2520.0, "2520 MHz"),
        ("pcie_tx", 12345.6, "12,346 MiB/s"),
    ],
)
def test_a_value_reads_as_people_say_it(key: str, number: float | None, text: str) -> None:
    assert fmt.value(GPU_METRICS_BY_KEY[key], number) == text


def test_a_chart_tells_energy_in_watt_hours_and_performance_states_by_name() -> None:
    frame = pd.DataFrame({"gpu_id": [1, 1], "timestamp_epoch": [0, 4]})
    for key, values in (("energy", (3600.0, 7200.0)), ("performance_state", (0.0, 8.0))):
        for end in ("", "_min", "_max"):
            frame[key + end] = values
    drawn = figures.history(frame, {1: "GPU 0"}, ["energy", "performance_state"], 0, 8, dark=False)
    lines = [line for line in drawn["data"] if "hovertemplate" in line]
    assert [line["hovertemplate"] for line in lines] == ["Energy %{y:,.2f} Wh", "Performance state P%{y:.0f}"]
    assert [list(line["y"]) for line in lines] == [[1, 2], [0, 8]]
    assert [note["text"] for note in drawn["layout"]["annotations"]] == [
        "<b>Energy per 4s (Wh)</b>",
        "<b>Performance state</b>",
    ]


def test_plain_text_cannot_become_markup() -> None:
    assert fmt.plain("**a** [b](c) $x$") == r"\*\*a\*\* \[b\]\(c\) \$x\$"


def test_the_catalogue_is_the_schema_and_consistent() -> None:
    keys = [metric.key for metric in GPU_METRICS]
    assert len(set(keys)) == len(keys)
    assert [column.name for column in gpu_metrics.columns][2:] == [*TICK_COLUMNS, "recorded_ms"]
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
    values |= {"id": 1, "parent_id": None, "gpu_index": 0, "mig_index": None, "clocks_event_reasons": 0.0}
    values |= {"name": "Board", "uuid": "GPU-1", "host": "box", "state": "ok"}
    values |= {"host_interval_s": 4.0}
    values |= {"memory_total_mib": 24576.0, "power_limit_w": 300.0, "host_last_seen": 100, "last_seen": 100}
    return values | changes


def scene(of: pd.DataFrame | None = None, **changes: object) -> cards.Scene:
    drawn = {} if of is None else cards.sparks([gpu()], of.assign(gpu_id=1), (1000, 1008))
    return cards.Scene(sparks=drawn, **changes)  # type: ignore[arg-type]


def process(**changes: object) -> dict[str, object]:
    values = {"pid": 7, "name": "train.py", "username": "ada", "workload": None, "model": None, "memory": 6144.0}
    return values | changes


def trend(*values: float) -> pd.DataFrame:
    columns = {metric.key + suffix: values for metric in GPU_METRICS for suffix in ("", "_min", "_max")}
    return pd.DataFrame({"timestamp_epoch": range(1000, 1000 + 4 * len(values), 4)} | columns)


def test_a_missing_value_is_a_dash_without_a_trend() -> None:
    html = cards.card(gpu(fan_speed=None, temperature=None), scene(trend(1, 2, 3)))
    temperature = html.split('data-metric="temperature"')[1].split("data-metric=")[0]
    assert "–" in temperature
    assert "--drawing" not in temperature
    assert "–" in html.split('data-metric="fan_speed"')[1].split("</span>")[0]


def test_a_level_is_told_by_sign_and_word_too() -> None:
    html = cards.card(gpu(temperature=95.0), cards.Scene())
    assert 'aria-label="critical">◆' in html
    assert "gm-critical" in html


def spark(*values: float, end: int, now: float) -> str:
    drawn = cards.sparkline(trend(*values), GPU_METRICS_BY_KEY["utilization"], None, (1000, end))
    assert drawn is not None
    return drawn.up_to(now)


def test_a_trend_breaks_where_nothing_was_recorded() -> None:
    whole, broken = spark(1, 2, 3, 4, 5, end=1016, now=5), spark(1, 2, NAN, 4, 5, end=1016, now=5)
    # Each path has one "M" per unbroken piece: one for the area and one for the line.
    assert whole.count("M") == 2
    assert broken.count("M") == 4


def test_a_trend_ends_at_the_present_value_unless_it_has_ended_before() -> None:
    for now, y in ((0, 31), (50, 16), (100, 1), (130, 1)):
        drawn = spark(10, 20, end=1008, now=now)
        assert drawn.count(f"L160 {y}L160 32Z") == drawn.count(f"L160 {y}%22") == 1, "the area, and the line"
    after_a_gap = spark(10, 20, NAN, 30, end=1016, now=50)
    assert after_a_gap.count("M") == 4, "the point and the present are a line"
    assert "L160" not in spark(10, 20, end=1000 + 4 + cards.PRESENT_WITHIN_S + 1, now=50)
    assert "L160 16" in spark(10, 20, end=1000 + 4 + cards.PRESENT_WITHIN_S, now=50)
    assert cards.PRESENT not in drawn + after_a_gap


EVIL = ["<script>x</script>", '"><img src=x>', "') url(javascript:x)", "&lt;b&gt;"]


@pytest.mark.parametrize("evil", EVIL)
def test_text_from_outside_stays_text(evil: str) -> None:
    mine = [process(name=evil, username=evil, workload=evil, model=evil)]
    shown = scene(trend(1, 2), with_host=True, processes={1: mine})
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
    assert cards.state(gpu(**changes))[0] == word
    html = cards.card(gpu(**changes), cards.Scene())
    assert f">{word}</span>" in html
    assert ("No answer since 1m 12s" in html) == (word == "Lost")
    assert ("for 1m 12s" in html) == (word == "Hung")


@pytest.mark.parametrize(("memory_from", "marked"), [("unified", True), ("device", False), (None, False)])
def test_memory_that_is_shared_with_the_system_says_so(memory_from: str | None, marked: bool) -> None:
    assert ("shared with the system" in cards.card(gpu(memory_from=memory_from), cards.Scene())) == marked


def test_what_a_gpu_said_before_it_fell_asleep_is_not_said_of_it_now() -> None:
    html = cards.card(gpu(state="asleep", utilization=60.0, temperature=71.0), cards.Scene())
    assert "Asleep" in html
    assert "71" not in html


def test_the_reason_of_a_throttled_gpu_is_told() -> None:
    html = cards.card(gpu(clocks_event_reasons=float(0x40 | 0x80 | 0x1)), cards.Scene())
    assert "hardware thermal, power brake" in html
    assert "idle" not in html.split('class="gm-state')[1].split(">")[0]


def test_memory_is_told_by_who_holds_it() -> None:
    mine = [
        process(workload="vLLM", model="Qwen3", memory=12288.0),
        process(pid=8, memory=6144.0),
        process(pid=9, memory=None),
    ]
    html = cards.card(gpu(memory=20480.0), scene(workloads={"vLLM": 0}, processes={1: mine}))
    bar = html.split('class="gm-bar gm-thick"')[1].split("</div>")[0]
    assert re.findall(r"width:([\d.]+)%", bar) == ["50.00", "25.00", "8.33"], "two processes, and the rest"
    assert figures.color(0, False) in bar, "a workload has its colour"
    assert "vLLM · Qwen3" in html
    assert "+1" in html.split('class="gm-who"')[1], "how many more there are"


def test_more_held_than_used_is_no_bar_beyond_its_end() -> None:
    html = cards.card(gpu(memory=6144.0), scene(processes={1: [process(memory=9000.0), process(memory=9000.0)]}))
    bar = html.split('class="gm-bar gm-thick"')[1].split("</div>")[0]
    assert sum(float(width) for width in re.findall(r"width:([\d.]+)%", bar)) == pytest.approx(25, abs=0.1)


def test_instances_stand_on_their_gpus_card_and_orphans_for_themselves() -> None:
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


def history_frame() -> pd.DataFrame:
    rows = [(gpu_id, 1000 + 4 * step, 50.0 + gpu_id) for gpu_id in (1, 2) for step in range(5)]
    frame = pd.DataFrame(rows, columns=["gpu_id", "timestamp_epoch", "temperature"])
    frame["power"] = frame["temperature"] * 2
    for key in ("temperature", "power"):
        frame[f"{key}_min"] = frame[f"{key}_max"] = frame[key]
    frame.loc[2, ["temperature", "power"]] = NAN
    return frame


def test_a_chart_per_metric_and_a_line_per_gpu_with_its_gaps() -> None:
    labels = {1: "GPU 0", 2: "GPU 1"}
    made = figures.history(history_frame(), labels, ["temperature", "power"], 1000, 1016, dark=False)
    figure = drawn(made)
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
    assert [shape.y0 for shape in figure.layout.shapes] == [80, 90], "where a temperature begins to be one"


def test_a_mean_stands_in_the_band_of_its_extremes_which_breaks_where_it_does() -> None:
    frame = history_frame()
    frame["temperature_max"] += 5
    frame.loc[2, ["temperature_min", "temperature_max"]] = NAN
    figure = drawn(figures.history(frame, {1: "GPU 0", 2: "GPU 1"}, ["temperature"], 1000, 1016, False))
    band, line, *_ = figure.data
    assert (band.fill, band.hoverinfo, line.name) == ("toself", "skip", "GPU 0")
    assert band.line.width == 0
    assert list(band.y[:2]) == [56, 56]
    assert list(band.y[2:4]) == [51, 51]
    assert math.isnan(band.y[4])
    assert math.isnan(band.x[4])
    assert len(band.y) == 4 + 1 + 4


@pytest.mark.parametrize("gpus", [6, 7])
def test_no_extreme_is_outside_its_band_however_coarse(gpus: int) -> None:
    rng = random.Random(5)
    rows = []
    for gpu_id in range(1, gpus + 1):
        for step in range(40):
            low, high = sorted(rng.uniform(100, 300) for _ in range(2))
            rows.append((gpu_id, 1000 + 4 * step, (low + high) / 2, low, high))
    names = ["gpu_id", "timestamp_epoch", "power", "power_min", "power_max"]
    frame = pd.DataFrame(rows, columns=names).astype({"power_min": "float32", "power_max": "float32"})
    # A gap after seven steps, one lone step, and another gap.
    frame.loc[frame["timestamp_epoch"].isin([1028, 1036]), names[2:]] = NAN
    labels = {gpu_id: f"GPU {gpu_id}" for gpu_id in range(1, gpus + 1)}
    figure = drawn(figures.history(frame, labels, ["power"], 1000, 1160, dark=False))
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert len(bands) == gpus
    for gpu_id, band in enumerate(bands, start=1):
        mine = frame[frame["gpu_id"] == gpu_id].set_index(frame["timestamp_epoch"][frame["gpu_id"] == gpu_id])
        breaks = [-1, *np.flatnonzero(np.isnan(band.x)), len(band.x)]
        pieces = [slice(a + 1, b) for a, b in itertools.pairwise(breaks)]
        assert len(pieces) == 3
        covered = []
        for piece in pieces:
            half = len(band.x[piece]) // 2
            times, upper = band.x[piece][:half] / 1000, band.y[piece][:half]
            lower = band.y[piece][half:][::-1]
            assert list(band.x[piece][half:][::-1] / 1000) == list(times)
            steps = [at for at in mine.index if times[0] <= at <= times[-1]]
            assert (np.interp(steps, times, upper) >= mine.loc[steps, "power_max"] - 1e-3).all()
            assert (np.interp(steps, times, lower) <= mine.loc[steps, "power_min"] + 1e-3).all()
            covered += steps
        assert covered == mine.index[mine["power"].notna()].tolist(), "every step has its band, and no gap has"
        corners = len(band.x)
        assert corners == (2 * 38 + 2 if gpus == 6 else 2 * (4 + 2 + 11) + 2), "coarse only where there are many"


def test_the_bands_of_one_gpu_in_depth_are_exact_however_many() -> None:
    keys = [metric.key for metric in GPU_METRICS if metric.unit == "%" and metric.kept == "tick"][:5]
    frame = pd.DataFrame({"gpu_id": 1, "timestamp_epoch": range(1000, 1040, 4)})
    for number, key in enumerate(keys):
        frame[key] = 10.0 + number
        frame[f"{key}_min"], frame[f"{key}_max"] = 5.0, 20.0
    figure = drawn(figures.device(frame, 1, {"Compute": keys}, 1000, 1040, dark=True))
    assert [len(trace.x) for trace in figure.data if trace.fill == "toself"] == [20] * 5


def test_gpus_that_were_read_together_share_their_times() -> None:
    made = figures.history(history_frame(), {1: "GPU 0", 2: "GPU 1"}, ["temperature", "power"], 1000, 1016, False)
    assert figures.as_json(made).count('"f8"') == 1


def test_what_stands_in_a_figure_several_times_is_sent_once_and_nothing_else_is() -> None:
    frame = pd.DataFrame({"timestamp_epoch": [0, 60], **dict.fromkeys(BAD, 0), "buffered": 0})
    frame = frame.assign(duration_ms=[1.0, 2.0], duration_max_ms=[3.0, 4.0], database_bytes=[5.0, 6.0])
    mean, longest = drawn(figures.pulse(frame, dark=True)).data
    assert list(mean.y) == [1, 2]
    assert list(longest.y) == [3, 4]
    assert figures.as_json(figures.pulse(frame, dark=True)).count("bdata") == 3


def test_a_gpu_keeps_its_colour_when_another_is_left_out() -> None:
    labels = {1: "GPU 0", 2: "GPU 1"}
    both = drawn(figures.history(history_frame(), labels, ["power"], 1000, 1016, dark=True))
    one = history_frame().query("gpu_id == 2")
    alone = drawn(figures.history(one, labels, ["power"], 1000, 1016, dark=True))
    assert alone.data[0].line.color == both.data[1].line.color != both.data[0].line.color


def test_a_gpu_in_depth_has_a_chart_for_each_group_and_unit_and_leaves_out_what_tells_nothing() -> None:
    frame = pd.DataFrame({"gpu_id": 1, "timestamp_epoch": [0, 4, 8]})
    values = {
        "utilization": [1.0, 2.0, 3.0],
        "sm_activity": [NAN, NAN, NAN],
        "memory": [1024.0, 2048.0, 1024.0],
        "memory_utilization": [1.0, 1.0, 1.0],
        "pcie_generation": [4.0, 4.0, 4.0],
        "pcie_width": [16.0, 8.0, 16.0],
        "ecc_corrected_volatile": [NAN, 0.0, 0.0],
        "pcie_replays": [NAN, 0.0, 2.0],
    }
    for key, numbers in values.items():
        for suffix in ("", "_min", "_max"):
            frame[key + suffix] = numbers
    groups: dict[str, list[str]] = {}
    for key in values:
        groups.setdefault(GPU_METRICS_BY_KEY[key].group, []).append(key)
    figure = drawn(figures.device(frame, 1, groups, 0, 8, dark=False))
    assert [(line.name, line.yaxis) for line in figure.data] == [
        ("Utilization", "y"),
        ("Memory used", "y2"),
        ("Memory controller", "y3"),
        ("PCIe width", "y4"),
        ("PCIe replays", "y5"),
    ]
    assert list(figure.data[1].y) == [1, 2, 1], "in GiB"
    assert not any(line.showlegend for line in figure.data), "a single line is named by its chart's heading"


def test_several_lines_of_a_gpus_chart_are_named_beside_it() -> None:
    frame = pd.DataFrame({"gpu_id": 1, "timestamp_epoch": [0, 4, 8]})
    keys = ("utilization", "encoder_utilization", "memory", "memory_utilization", "dram_activity")
    for key in keys:
        for suffix in ("", "_min", "_max"):
            frame[key + suffix] = [1.0, 2.0, 3.0]
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(GPU_METRICS_BY_KEY[key].group, []).append(key)
    figure = drawn(figures.device(frame, 1, groups, 0, 8, dark=False))
    named = {line.name: line.legend for line in figure.data if line.showlegend}
    assert len(named) == 4
    assert named["Utilization"] == named["Encoder"] != named["Memory controller"] == named["DRAM active"]


def test_a_time_on_the_viewers_clock_is_one_moment() -> None:
    summer = int(pd.Timestamp("2026-07-01 12:00:30", tz="UTC").timestamp())
    assert figures.from_wall_clock("2026-07-01 14:00:30.25", BERLIN) == summer
    for night in ("2026-03-29 02:30", "2026-10-25 02:30"):
        # A time that this clock has never or twice shown is one all the same.
        assert figures.from_wall_clock(night, BERLIN)


def bars(*rows: tuple[int, int, int, float]) -> pd.DataFrame:
    """timeline.lanes' frame of (gpu, first, last, memory) rows."""
    frame = pd.DataFrame(rows, columns=["gpu_id", "first", "last", "memory"])
    frame = frame.assign(
        max_memory=frame["memory"], share=frame["memory"] / 100, running=False, pid=range(len(rows))
    )
    texts = {
        "name": [f"p{number}" for number in range(len(rows))],
        "username": None,
        "workload": None,
        "model": None,
    }
    return frame.assign(process_id=range(len(rows)), **texts).astype(
        dict.fromkeys(("username", "workload"), object)
    )


def test_lanes_are_as_few_as_there_are_bars_at_once_and_the_largest_stand_above() -> None:
    packed = pack(bars((1, 0, 400, 10.0), (1, 500, 1000, 10.0), (1, 0, 1000, 90.0), (2, 0, 10, 5.0)), 0, 1000)
    lanes = dict(zip(packed["pid"], packed["lane"], strict=True))
    assert lanes == {2: 0, 0: 1, 1: 1, 3: 2}


def test_bars_in_a_lane_never_lie_on_each_other_whatever_their_order() -> None:
    dice = random.Random(7)
    rows = [
        (gpu_id, begin := dice.randrange(900), begin + dice.randrange(1, 300), dice.uniform(1, 100))
        for gpu_id in (5, 3)
        for _ in range(60)
    ]
    packed = pack(bars(*rows), 0, 1000, most_lanes=16)
    for _, lane in packed.groupby("lane"):
        ordered = lane.sort_values("begin")
        assert lane["gpu_id"].nunique() == 1
        assert (ordered["begin"].to_numpy()[1:] >= ordered["finish"].to_numpy()[:-1]).all()
    assert packed["lane"].max() + 1 <= 16
    assert packed["begin"].min() >= 0


@pytest.mark.parametrize("evil", ["<b onclick=x>", "<a href='javascript:x'>y</a>"])
def test_a_bar_tells_its_process_and_hostile_names_are_text(evil: str) -> None:
    frame = bars((1, 0, 1000, 60.0)).assign(name=evil, username=evil, workload=evil, model=evil)
    figure = drawn(figures.lanes(pack(frame, 0, 1000), {1: evil}, {}, 0, 1000, BERLIN, True, "Processes"))
    [bar] = figure.data
    assert "60 MiB at most" in bar.customdata[0]
    assert "16m 40s" in bar.customdata[0]
    for text in (bar.customdata[0], bar.text[0], figure.layout.yaxis.ticktext[0]):
        assert "<b onclick" not in text
        assert "<a" not in text


def test_why_clocks_are_not_higher_is_a_lane_a_reason() -> None:
    frame = pd.DataFrame({"reason": ["Power cap", "Idle", "Power cap"], "first": [0, 5, 9], "last": [4, 9, 10]})
    names = {"Idle": "#111111", "Power brake": "#222222", "Power cap": "#333333"}
    figure = drawn(figures.reasons(frame, names, 0, 10, BERLIN, False, "Why"))
    assert [(bar.name, len(bar.x)) for bar in figure.data] == [("Idle", 1), ("Power cap", 2)]
    assert [note.text for note in figure.layout.annotations[1:]] == ["Idle", "Power cap"]


def test_what_is_of_one_group_has_its_colour_each_paler_than_the_one_before() -> None:
    groups = {"a": "vLLM", "b": "Ollama", "c": "vLLM", "d": None, "e": "vLLM"} | {
        f"f{n}": "Ollama" for n in range(9)
    }
    colors = figures.colors_of(["Ollama", "vLLM"], False)
    found = figures.shades(groups, colors, False)
    assert list(found) == list(groups)
    assert (found["a"], found["b"]) == (colors["vLLM"], colors["Ollama"])
    assert found["d"] == figures.GREYS[False][0]
    paler = [found[name].removeprefix(colors["vLLM"]) for name in ("a", "c", "e")]
    assert [int(part or "ff", 16) for part in paler] == sorted(
        {int(part or "ff", 16) for part in paler}, reverse=True
    )
    assert all(found[f"f{n}"].startswith(colors["Ollama"]) for n in range(9))


def test_no_group_is_grey() -> None:
    names = [str(number) for number in range(24)]
    for dark in (False, True):
        for ink in figures.colors_of(names, dark).values():
            channels = [int(ink[place : place + 2], 16) for place in (1, 3, 5)]
            assert max(channels) - min(channels) > 40, ink
