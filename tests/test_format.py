"""How numbers and texts are written for people."""

from __future__ import annotations

import math

import pytest

from gpumon_core import format as fmt
from gpumon_core.metrics import GPU_METRICS_BY_KEY

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


def test_plain_text_cannot_become_markup() -> None:
    assert fmt.plain("**a** [b](c) $x$") == r"\*\*a\*\* \[b\]\(c\) \$x\$"
