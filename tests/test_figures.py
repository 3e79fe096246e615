"""Figures: what is drawn is what was measured, and text from outside stays text."""

from __future__ import annotations

import itertools
import math
import random
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from drawn import drawn

from gpumon_core import figures
from gpumon_core.figures.lanes import pack
from gpumon_core.metrics import GPU_METRICS, GPU_METRICS_BY_KEY

BERLIN = ZoneInfo("Europe/Berlin")
NAN = math.nan
BAD = ("skipped", "failed", "dropped")


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


def test_a_line_is_within_the_band_of_its_extremes_and_both_break_together() -> None:
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
    keys = [metric.key for metric in GPU_METRICS if metric.unit == "%" and metric.stored == "tick"][:5]
    frame = pd.DataFrame({"gpu_id": 1, "timestamp_epoch": range(1000, 1040, 4)})
    for number, key in enumerate(keys):
        frame[key] = 10.0 + number
        frame[f"{key}_min"], frame[f"{key}_max"] = 5.0, 20.0
    figure = drawn(figures.device(frame, 1, {"Compute": keys}, 1000, 1040, dark=True))
    assert [len(trace.x) for trace in figure.data if trace.fill == "toself"] == [20] * 5


def test_gpus_that_were_read_together_share_their_times() -> None:
    made = figures.history(history_frame(), {1: "GPU 0", 2: "GPU 1"}, ["temperature", "power"], 1000, 1016, False)
    assert figures.as_json(made).count('"f8"') == 1


def test_an_array_that_occurs_several_times_is_sent_once() -> None:
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


def test_a_gpu_in_depth_has_a_chart_for_each_group_and_unit_with_something_to_show() -> None:
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
    """occupancy.lanes' frame of (gpu, first, last, memory) rows."""
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


def test_there_are_as_many_lanes_as_bars_at_once_and_the_largest_are_above() -> None:
    packed = pack(bars((1, 0, 400, 10.0), (1, 500, 1000, 10.0), (1, 0, 1000, 90.0), (2, 0, 10, 5.0)), 0, 1000)
    lanes = dict(zip(packed["pid"], packed["lane"], strict=True))
    assert lanes == {2: 0, 0: 1, 1: 1, 3: 2}


def test_bars_in_a_lane_never_overlap() -> None:
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
def test_a_hover_describes_its_process_and_hostile_names_stay_text(evil: str) -> None:
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


def test_the_parts_of_one_group_have_its_colour_each_paler_than_the_one_before() -> None:
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


def test_a_chart_shows_energy_in_watt_hours_and_performance_states_by_name() -> None:
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
