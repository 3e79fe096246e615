"""From the sums of the ledger to what pages show: costs, steps of time, names. No database is needed."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pandas as pd
import pytest

from gpumon_core.store.queries import costs
from gpumon_core.store.queries.costs import OTHERS, UNKNOWN, Prices
from gpumon_core.store.queries.usage import ALL_OTHERS, GPU_ROWS

BERLIN = ZoneInfo("Europe/Berlin")
KOLKATA = ZoneInfo("Asia/Kolkata")
BEIRUT = ZoneInfo("Asia/Beirut")
HAVANA = ZoneInfo("America/Havana")
HOUR, DAY = 3600, 86400
FREE = Prices(None, None, "EUR")
KWH = 3.6e6


def epoch(text: str, zone: ZoneInfo = BERLIN) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp())


def sums(*rows: tuple[object, ...], columns: str) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=columns.split())
    for name in ("busy_s", "memory_mib_s", "energy_j", "seconds", "idle_s"):
        if name not in frame:
            frame[name] = 0.0
    return frame


def ranking(*rows: tuple[object, ...]) -> pd.DataFrame:
    frame = sums(*rows, columns="key kind busy_s energy_j")
    return frame.assign(processes=1.0, estimated=0.0)


# ---- Prices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_kwh", "per_gpu_hour", "cost"),
    [(0.30, None, 0.60), (None, 2.0, 3.0), (0.30, 2.0, 3.60), (None, None, 0.0), (0.0, None, 0.0)],
)
def test_cost_is_of_energy_and_of_busy_hours(
    per_kwh: float | None, per_gpu_hour: float | None, cost: float
) -> None:
    prices = Prices(per_kwh, per_gpu_hour, "EUR")
    found = prices.cost(pd.Series([2 * KWH, float("nan")]), pd.Series([1.5 * HOUR, float("nan")]))
    assert found.tolist() == pytest.approx([cost, 0.0])
    assert prices.known == (per_kwh is not None or per_gpu_hour is not None)


def test_every_measure_is_in_the_unit_that_it_is_shown_with() -> None:
    frame = sums((5400.0, 1.8e6, 1024.0 * 7200), columns="busy_s energy_j memory_mib_s")
    found = {name: costs.measure(frame, name, Prices(0.4, None, "EUR"))[0] for name in costs.MEASURES}
    assert found == {"GPU-hours": 1.5, "Memory-hours": 2.0, "Energy": 0.5, "Cost": pytest.approx(0.2)}


# ---- Rankings ----------------------------------------------------------------------------------------


def test_a_ranking_names_each_key_and_the_gpus_own_rows() -> None:
    frame = ranking(
        ("ada", "part", 7200.0, 3 * KWH),
        (None, "part", 3600.0, 0.5 * KWH),
        (GPU_ROWS["idle"], "idle", 0.0, 0.5 * KWH),
    )
    table = costs.ranked(frame, {"ada": "ada"}, "User", Prices(0.25, None, "EUR"))
    assert table["User"].tolist() == ["ada", UNKNOWN, "Idle GPUs"]
    assert table["GPU-hours"].tolist() == [2.0, 1.0, 0.0]
    assert table["Energy"].tolist() == [3.0, 0.5, 0.5]
    assert table["Share"].tolist() == [75.0, 12.5, 12.5]
    assert table["Cost"].tolist() == [0.75, 0.125, 0.125]
    assert table["Estimate"].tolist() == [False] * 3


def test_without_a_price_there_is_no_cost_and_without_energy_no_share() -> None:
    table = costs.ranked(ranking(("ada", "part", 1.0, 0.0)), {"ada": "ada"}, "User", FREE)
    assert "Cost" not in table
    assert table["Share"].tolist() == [0.0]


def test_keys_that_are_numbers_have_their_names_and_one_that_is_forgotten_is_unknown() -> None:
    frame = ranking((3, "part", 1.0, 1.0), (4, "part", 1.0, 1.0), ("x", "unattributed", 1.0, 1.0))
    assert costs.called(frame, {3: "train.py (7)"}).tolist() == ["train.py (7)", UNKNOWN, "No known process"]


# ---- Steps of time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25", "2026-06-15"])
def test_a_day_is_the_viewers_even_when_the_clock_is_set(day: str) -> None:
    begin = epoch(f"{day}T00:00")
    length = {"2026-03-29": 23, "2026-10-25": 25}.get(day, 24)
    hours = pd.Series([begin + HOUR * number for number in range(-1, length + 1)])
    found = costs.steps(hours, DAY, BERLIN)
    before = int((datetime.fromisoformat(day) - pd.Timedelta(days=1)).replace(tzinfo=BERLIN).timestamp())
    assert found.tolist() == [before, *[begin] * length, begin + length * HOUR]


def test_an_hour_is_the_viewers_even_where_it_begins_at_half_past() -> None:
    times = pd.Series([7200, 8999, 9000, 10800])
    assert costs.steps(times, HOUR, BERLIN).tolist() == [7200, 7200, 7200, 10800]
    assert costs.steps(times, HOUR, KOLKATA).tolist() == [5400, 5400, 9000, 9000]


def test_a_night_without_midnight_or_with_two_has_its_day_all_the_same() -> None:
    # In Beirut the clock goes from 23:59 to 1:00; in Havana from 0:59 back to midnight: the first begins the day.
    spring = epoch("2026-03-29T01:00", BEIRUT)
    assert costs.steps(pd.Series([spring, spring + 5 * HOUR]), DAY, BEIRUT).tolist() == [spring] * 2
    autumn = epoch("2026-11-01T00:00", HAVANA)
    times = pd.Series([autumn, autumn + HOUR, autumn + 24 * HOUR])
    assert costs.steps(times, DAY, HAVANA).tolist() == [autumn] * 3


# ---- Over time ---------------------------------------------------------------------------------------

TREND = "timestamp_epoch key busy_s energy_j"
OWN_HOURS = "timestamp_epoch idle_j unattributed_j unrecorded_j unattributed_s"


def test_the_largest_are_drawn_apart_and_the_rest_together() -> None:
    trend = sums(
        (0, 1, 3600.0, 0.0), (0, 2, 1800.0, 0.0), (0, 3, 900.0, 0.0), (0, ALL_OTHERS, 900.0, 0.0), columns=TREND
    )
    names = {1: "one (1)", 2: "two (2)", 3: "three (3)"}
    frame = costs.by_step(trend, pd.DataFrame(), [2, 1], names, "GPU-hours", FREE, BERLIN, HOUR)
    assert list(frame) == ["timestamp_epoch", "two (2)", "one (1)", OTHERS]
    assert frame["one (1)"].tolist() == [1.0]
    assert frame[OTHERS].tolist() == [0.5]
    assert frame.drop(columns="timestamp_epoch").sum().sum() == pytest.approx(2.0)


def test_an_hour_without_processes_is_zero_and_not_the_hour_before() -> None:
    trend = sums((0, "ada", 3600.0, 0.0), (4 * HOUR, "ada", 1800.0, 0.0), columns=TREND)
    frame = costs.by_step(trend, pd.DataFrame(), ["ada"], {"ada": "ada"}, "GPU-hours", FREE, BERLIN, HOUR)
    assert frame["timestamp_epoch"].tolist() == [HOUR * number for number in range(5)]
    assert frame["ada"].tolist() == [1.0, 0.0, 0.0, 0.0, 0.5]


@pytest.mark.parametrize("zone", [BERLIN, KOLKATA])
def test_days_without_processes_are_zero_across_a_night_in_which_the_clock_is_set(zone: ZoneInfo) -> None:
    first, last = epoch("2026-03-27T12:00", zone), epoch("2026-03-31T12:00", zone)
    trend = sums((first, "ada", 3600.0, 0.0), (last, "ada", 3600.0, 0.0), columns=TREND)
    frame = costs.by_step(trend, pd.DataFrame(), ["ada"], {"ada": "ada"}, "GPU-hours", FREE, zone, DAY)
    assert frame["timestamp_epoch"].tolist() == [epoch(f"2026-03-{day}T00:00", zone) for day in range(27, 32)]
    assert frame["ada"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_energy_and_cost_have_what_the_idle_gpus_took() -> None:
    trend = sums((HOUR, "ada", 3600.0, KWH), columns=TREND)
    own = sums((0, KWH, 0.0, 0.0, 0.0), (HOUR, KWH, 0.5 * KWH, 0.5 * KWH, 1800.0), columns=OWN_HOURS)
    prices = Prices(0.5, 1.0, "EUR")
    energy = costs.by_step(trend, own, ["ada"], {"ada": "ada"}, "Energy", prices, BERLIN, HOUR)
    assert energy.to_dict("list") == {
        "timestamp_epoch": [0, HOUR],
        "ada": [0.0, 1.0],
        GPU_ROWS["idle"]: [1.0, 2.0],
    }
    cost = costs.by_step(trend, own, ["ada"], {"ada": "ada"}, "Cost", prices, BERLIN, HOUR)
    assert cost["ada"].tolist() == [0.0, 1.5]
    assert cost[GPU_ROWS["idle"]].tolist() == [0.5, 1.5]
    hours = costs.by_step(trend, own, ["ada"], {"ada": "ada"}, "GPU-hours", prices, BERLIN, HOUR)
    assert GPU_ROWS["idle"] not in hours


def test_a_key_that_is_not_known_is_drawn_as_unknown() -> None:
    trend = sums((0, None, 3600.0, 0.0), (0, "ada", 3600.0, 0.0), columns=TREND)
    frame = costs.by_step(trend, pd.DataFrame(), ["ada", None], {"ada": "ada"}, "GPU-hours", FREE, BERLIN, HOUR)
    assert frame[UNKNOWN].tolist() == [1.0]


def test_nothing_over_time_is_an_empty_frame() -> None:
    trend = sums(columns=TREND)
    frame = costs.by_step(trend, pd.DataFrame(), [], {}, "GPU-hours", FREE, BERLIN, HOUR)
    assert list(frame) == ["timestamp_epoch"]
    assert frame.empty


# ---- The week ----------------------------------------------------------------------------------------


def test_the_hours_of_the_week_are_the_viewers() -> None:
    monday = epoch("2026-06-15T09:00")
    whole = sums(
        (monday, 2 * HOUR, 0), (monday + 7 * DAY, 2 * HOUR, 0), columns="timestamp_epoch seconds unknown_s"
    )
    used = sums((monday, 1800.0), (monday, 1800.0), columns="timestamp_epoch busy_s")
    [row] = costs.by_week(used, whole, BERLIN).to_dict("records")
    # Half of the first Monday's hour of two GPUs, nothing of the second's.
    assert row == {"weekday": 0, "hour": 9, "share": 25.0}


def test_time_of_unknown_utilization_does_not_count() -> None:
    nine, ten = epoch("2026-06-15T09:00"), epoch("2026-06-15T10:00")
    whole = sums((nine, HOUR, HOUR / 2), (ten, HOUR, HOUR), columns="timestamp_epoch seconds unknown_s")
    used = sums((nine, 900.0), columns="timestamp_epoch busy_s")
    [row] = costs.by_week(used, whole, BERLIN).to_dict("records")
    assert row == {"weekday": 0, "hour": 9, "share": 50.0}, "of an hour of which nothing is known there is no row"


def test_the_hour_that_the_clock_skips_was_never_there_and_the_doubled_one_counts_twice() -> None:
    for day, hours in (("2026-03-29", 23), ("2026-10-25", 25)):
        begin = epoch(f"{day}T00:00")
        times = [begin + HOUR * number for number in range(hours)]
        whole = pd.DataFrame({"timestamp_epoch": times, "seconds": float(HOUR), "unknown_s": 0.0})
        used = pd.DataFrame({"timestamp_epoch": times, "busy_s": HOUR / 2})
        frame = costs.by_week(used, whole, BERLIN)
        assert frame["weekday"].unique().tolist() == [6]
        assert frame["hour"].tolist() == [hour for hour in range(24) if hours == 25 or hour != 2]
        assert frame["share"].tolist() == [50.0] * len(frame)


@pytest.mark.parametrize(
    ("zone", "fits"),
    [("UTC", True), ("Asia/Kolkata", True), ("Asia/Kathmandu", False), ("Pacific/Chatham", False)],
)
def test_a_zone_that_is_off_by_a_quarter_of_an_hour_does_not_fit(zone: str, fits: bool) -> None:
    assert costs.fits(ZoneInfo(zone), 1_790_000_000) == fits
