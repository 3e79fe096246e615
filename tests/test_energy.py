"""What an energy counter is worth: which growths are believed, and what is estimated by power instead."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from gpumon_core.telemetry.energy import DOUBTED_S, EnergyCounter, EnergyMeter

# A board of 300 W that takes 100 W: 400 J in a tick of 4 s, at most 1,920 J.
LIMIT_W, POWER_W, TICK_S = 300.0, 100.0, 4.0
TICK_J = POWER_W * TICK_S


def begun(value: float = 10_000.0) -> EnergyMeter:
    """A meter whose counter was at that value a tick ago."""
    meter = EnergyMeter(EnergyCounter())
    assert tick(meter, value) == (0.0, 0.0), "what was counted before is not this history's"
    return meter


def tick(
    meter: EnergyMeter, value: float | None, power: float | None = POWER_W, pause_s: float = 0.0
) -> tuple[float, float] | None:
    return meter.add(value, power, LIMIT_W, TICK_S, pause_s)


def joules(meter: EnergyMeter, values: Iterable[float | None]) -> list[float | None]:
    """What the meter says tick by tick."""
    found = [tick(meter, value) for value in values]
    return [None if each is None else each[0] for each in found]


# Values of a counter, tick by tick after 10,000 J, and the joules that are counted of each tick.
STORIES: dict[str, tuple[list[float | None], list[float]]] = {
    "steady": ([10_390, 10_800, 11_200], [390, 410, 400]),
    "a new count is doubted for a tick, and then believed": ([150, 560, 970], [400, 410, 410]),
    "a step back of a joule is a new beginning": ([10_400, 10_399, 10_799], [400, 400, 400]),
    "a hiccup and back: what was estimated is not counted again": ([10_400, 0, 11_200], [400, 400, 400]),
    "a longer hiccup: the same": ([0, 0, 11_200], [400, 400, 400]),
    "one that stops has it all once it moves": ([10_000, 10_000, 11_200], [400, 400, 400]),
    "one that moves a little late makes up for the estimate": ([10_000, 10_700, 11_200], [400, 300, 500]),
    "a jump beyond the limit is estimated, and what follows believed": ([90_000, 90_400, 90_800], [400, 400, 400]),
    "a jump and back": ([90_000, 10_800, 11_200], [400, 400, 400]),
    "failed readings are in the next": ([None, None, 11_300, 11_700], [400, 400, 500, 400]),
    "a failed reading after a new count": ([150, None, 950], [400, 400, 400]),
    "a short peak above the limit is believed": ([11_600, 12_000], [1_600, 400]),
}


@pytest.mark.parametrize(("values", "counted"), STORIES.values(), ids=STORIES)
def test_a_growth_counts_where_the_gpu_can_have_taken_it(values: list[float | None], counted: list[float]) -> None:
    meter = begun()
    assert joules(meter, values) == pytest.approx(counted)
    assert meter.source == "counter"


@pytest.mark.parametrize("times", [1.2, 1.4, 2.0])
def test_a_counter_of_a_whole_module_does_not_count_for_long(times: float) -> None:
    """On a GH200 it has the processor in it: the peak at first may be believed, not the mean."""
    meter, value, counted = begun(), 10_000.0, []
    for _ in range(100):
        value += times * LIMIT_W * TICK_S
        found = tick(meter, value)
        assert found is not None
        counted.append(found[0])
    assert sum(counted) <= 1.1 * LIMIT_W * TICK_S * 100 + 2 * LIMIT_W
    assert counted[-50:] == pytest.approx([TICK_J] * 50), "by power"
    assert meter.source == "power"


def test_a_counter_that_stops_for_long_is_no_source() -> None:
    meter = begun()
    for number in range(1, 2 + int(DOUBTED_S / TICK_S)):
        assert tick(meter, 10_000.0) == (TICK_J, 0.0)
        assert meter.source == ("counter" if number * TICK_S <= DOUBTED_S else "power")
    # It moves again: it has all of that time in it, which was estimated.
    assert tick(meter, 10_000.0 + (number + 1) * TICK_J) == pytest.approx((TICK_J, 0.0))
    assert meter.source == "counter"


def test_a_gpu_that_takes_nothing_may_have_a_counter_that_stops() -> None:
    meter = begun()
    for _ in range(30):
        assert tick(meter, 10_000.0, power=0.0) == (0.0, 0.0)
    assert meter.source == "counter"


def test_without_a_counter_the_power_gives_the_energy_and_without_both_nothing_does() -> None:
    meter = EnergyMeter(EnergyCounter())
    assert tick(meter, None) == (TICK_J, 0.0)
    assert meter.source == "power"
    assert tick(meter, None, power=None) is None
    assert tick(begun(), None, power=None) is None
    assert tick(begun(), 10_400.0, power=None) == (TICK_J, 0.0), "a counter needs no power beside it"


def test_a_counter_that_comes_late_does_not_bring_what_was_before() -> None:
    meter = EnergyMeter(EnergyCounter())
    assert joules(meter, [None, None, 50_000.0, 50_400.0]) == pytest.approx([400, 400, 400, 400])


@pytest.mark.parametrize(
    ("value", "recorded", "unrecorded"),
    [
        pytest.param(70_400.0, 400.0, 60_000.0, id="it went on counting"),
        pytest.param(10_300.0, 300.0, 0.0, id="less than the power says is all that there is"),
        pytest.param(5_400.0, 400.0, 5_000.0, id="it began anew, and has what was taken since"),
    ],
)
def test_what_was_taken_in_a_pause_is_counted_apart(value: float, recorded: float, unrecorded: float) -> None:
    meter = begun()
    assert tick(meter, value, pause_s=600.0) == pytest.approx((recorded, unrecorded))
    assert tick(meter, value + 390) == pytest.approx((390, 0)), "and then it goes on"


def test_after_a_pause_a_counter_that_cannot_be_believed_says_nothing_about_it() -> None:
    meter = begun()
    assert tick(meter, 9_000_000.0, pause_s=600.0) == (TICK_J, 0.0)
    assert tick(meter, 9_000_400.0) == pytest.approx((TICK_J, 0.0))


def test_what_was_estimated_before_a_restart_is_not_counted_again_after_it() -> None:
    meter = begun()
    assert joules(meter, [None, None]) == [TICK_J, TICK_J]
    again = EnergyMeter(EnergyCounter(meter.counter.value), begun=True, ahead_j=meter.ahead_j)
    assert tick(again, 11_250.0) == pytest.approx((450.0, 0.0))
