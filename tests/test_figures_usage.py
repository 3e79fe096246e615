"""The figures of the Usage page: what is drawn is what was measured."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import pandas as pd
import pytest
from drawn import drawn

from gpumon_core import figures
from gpumon_core.figures.usage import DAYS

BERLIN = ZoneInfo("Europe/Berlin")
NOON = 1_795_431_600  # 2026-11-23 12:00 in Berlin.
HOUR = 3600
FORMULA = '=cmd|" /C calc"!A0'
STARTS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]


def test_areas_are_stacked_to_the_end_of_the_last_step() -> None:
    frame = pd.DataFrame(
        {"timestamp_epoch": [NOON, NOON + HOUR], "ada": [1.0, 0.5], "Others": [0.25, 0.0], "unused": [9.0, 9.0]}
    )
    colors = {"ada": "#112233", "Others": "#445566"}
    figure = drawn(figures.stacked(frame, colors, "h", dark=False, span_s=HOUR))
    assert [(area.name, area.fillcolor) for area in figure.data] == list(colors.items())
    assert len({area.stackgroup for area in figure.data}) == 1
    assert figure.data[0].stackgroup
    for area in figure.data:
        assert list(area.y[:2]) == frame[area.name].tolist()
        times = [pd.Timestamp(moment, unit="ms", tz=BERLIN).strftime("%d %H:%M") for moment in area.x]
        assert (times[0], times[-1]) == ("23 12:00", "23 14:00"), "on the viewer's clock"
        assert area.hovertemplate.endswith(" h")


@pytest.mark.parametrize("dark", [True, False])
def test_the_week_has_every_hour_and_what_was_never_recorded_is_empty(dark: bool) -> None:
    frame = pd.DataFrame({"weekday": [0, 6], "hour": [9, 23], "share": [25.0, 100.0]})
    figure = drawn(figures.week(frame, dark))
    [fields] = figure.data
    shares = zip(fields.base, fields.x, fields.marker.color, strict=True)
    assert sorted(shares) == [(0, 9, 25.0), (6, 23, 100.0)]
    assert list(fields.customdata) == ["Mon 09:00", "Sun 23:00"]
    assert (fields.marker.cmin, fields.marker.cmax) == (0, 100)
    days, hours = figure.layout.yaxis, figure.layout.xaxis
    assert (round(days.range[0]), round(days.range[1])) == (7, 0), "all seven days, Monday on top"
    assert hours.range == (-0.5, 23.5)
    for day, name in zip(days.tickvals, days.ticktext, strict=True):
        assert DAYS[int(day)] == name


def test_a_gpus_bar_is_all_its_time_and_its_parts_differ_by_more_than_colour() -> None:
    frame = pd.DataFrame(
        {"busy_s": [3600.0, 0.0], "held_s": [1800.0, 0.0], "free_s": [900.0, 0.0], "unrecorded_s": [900.0, 0.0]}
    )
    bars = drawn(figures.time_split(frame, ["GPU 0", "GPU 1"], dark=False)).data
    assert {bar.name: bar.x[0] for bar in bars} == {
        "busy": 50.0,
        "held idle": 25.0,
        "free": 12.5,
        "not recorded": 12.5,
    }
    assert [bar.x[1] for bar in bars] == [0.0] * 4, "no time at all is no division by nothing"
    assert all(list(bar.y) == ["GPU 0", "GPU 1"] for bar in bars)
    looks = {(bar.marker.color, bar.marker.pattern.shape) for bar in bars}
    assert len(looks) == 4
    assert bars[1].marker.pattern.shape


def test_unknown_time_is_drawn_where_there_is_some() -> None:
    whole = {"busy_s": [900.0], "held_s": [0.0], "free_s": [900.0], "unrecorded_s": [0.0]}
    bars = drawn(figures.time_split(pd.DataFrame({**whole, "unknown_s": [1800.0]}), ["GPU 0"], dark=True)).data
    assert {bar.name: bar.x[0] for bar in bars} == {
        **{"busy": 25.0, "held idle": 0.0, "free": 25.0},
        **{"unknown": 50.0, "not recorded": 0.0},
    }
    assert len({(bar.marker.color, bar.marker.pattern.shape) for bar in bars}) == len(bars)
    bars = drawn(figures.time_split(pd.DataFrame({**whole, "unknown_s": [0.0]}), ["GPU 0"], dark=True)).data
    assert "unknown" not in {bar.name for bar in bars}
