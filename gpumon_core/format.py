"""Formats values for people: the only module that turns numbers into text."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo

from gpumon_core.metrics import Metric
from gpumon_core.safety.text import escaped

# Text from outside, made safe for a terminal.
printable = escaped
# Shown where there is no value.
MISSING = "–"
FIGURE_SPACE = "\u2007"
MIB_PER_GIB = 1024
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """How a number is shown: multiplied by `scale`, between `before` and `unit`. `form` is a format of both Python
    and Plotly."""

    scale: float
    form: str
    unit: str
    before: str = ""


# Units that are shown in another way than they are stored, by the catalogue's unit. A step of a chart may be
# seconds, so its energy is in watt-hours. The driver's documentation calls the performance states P0 to P15.
_READINGS = {
    "MiB": NumberFormat(1 / MIB_PER_GIB, ".1f", "GiB"),
    "J": NumberFormat(1000 / JOULES_PER_KWH, ",.2f", "Wh"),
    "P": NumberFormat(1.0, ".0f", "", before="P"),
    "MiB/s": NumberFormat(1.0, ",.0f", "MiB/s"),
}


def missing(value: float | None) -> bool:
    """Whether there is no value: None, or pandas' NaN."""
    return value is None or math.isnan(value)


def gpu_label(index: int, mig_index: float | None) -> str:
    """A short name for a GPU: "3", or "3:1" for its MIG instance 1."""
    return str(index) if mig_index is None or math.isnan(mig_index) else f"{index}:{int(mig_index)}"


def container(pod: str | None, name: str | None, identifier: str | None) -> str | None:
    """The name of a container: its pod, its name, or its id as engines shorten it; None without a container."""
    return pod or name or (identifier or "")[:12] or None


def duration(seconds: float | None) -> str:
    """A length of time in its two or three largest units: "2h 5m 13s", "3d 4h 0m", "13s"."""
    if seconds is None or math.isnan(seconds):
        return MISSING
    total = max(0, int(seconds))
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, seconds = divmod(rest, 60)
    if days:
        return f"{days}d {hours}h {minutes}m"
    if hours:
        return f"{hours}h {minutes}m {seconds}s"
    if minutes:
        return f"{minutes}m {seconds}s"
    return f"{seconds}s"


def is_of_this_year(epoch: float, zone: tzinfo = UTC) -> bool:
    """Whether a time is in the present year."""
    return datetime.fromtimestamp(epoch, zone).year == datetime.now(zone).year


def date_form(earliest: float, zone: tzinfo = UTC) -> str:
    """The format of dates from a time on, for strftime and Plotly: with the year where that time needs it."""
    return "%a %d %b" if is_of_this_year(earliest, zone) else "%a %d %b %Y"


def moment(epoch: float, zone: ZoneInfo) -> str:
    """A time for people: "Tue 24 Nov 08:15:30", with the year where it is not the present one."""
    return datetime.fromtimestamp(epoch, zone).strftime(f"{date_form(epoch, zone)} %H:%M:%S")


def span(seconds: int) -> str:
    """A round length of time in words: "20 seconds", "1 minute", "4 hours"."""
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length and seconds % length == 0:
            count = seconds // length
            return f"{count} {unit}" + ("" if count == 1 else "s")
    return f"{seconds} second" + ("" if seconds == 1 else "s")


def sortable_duration(seconds: float | None) -> str:
    """`duration` for a table: padded, so that sorting the texts sorts the lengths of time.

    A grid sorts a column of texts by their characters. A figure space is as wide as a digit and sorts
    before it, so fields of equal width bring the characters into the order of the numbers.
    """
    if seconds is None or math.isnan(seconds):
        return ""
    parts = duration(seconds).split(" ")
    given = {part[-1]: part[:-1] for part in parts}
    fields = [(given.get(unit), unit, width) for unit, width in (("d", 5), ("h", 2), ("m", 2), ("s", 2))]
    if "d" in given:
        del fields[3]
    return " ".join(
        FIGURE_SPACE * (width + 1) if number is None else number.rjust(width, FIGURE_SPACE) + unit
        for number, unit, width in fields
    )


def memory(mib: float | None) -> str:
    """An amount of memory: "512 MiB", "61.2 GiB"."""
    if mib is None or math.isnan(mib):
        return MISSING
    return f"{mib:.0f} MiB" if abs(mib) < MIB_PER_GIB else f"{mib / MIB_PER_GIB:.1f} GiB"


def energy(joules: float | None) -> str:
    """An amount of energy: "4.2 Wh", "1,234.567 kWh"."""
    if joules is None or math.isnan(joules):
        return MISSING
    kwh = joules / JOULES_PER_KWH
    return f"{kwh:,.3f} kWh" if abs(round(kwh, 4)) >= 1 else f"{1000 * kwh:.1f} Wh"


def amount(number: float, digits: int) -> str:
    """A sum with `digits` decimals, and one more below 10."""
    return f"{number:,.{digits + (abs(number) < 10)}f}"


# Units with amounts that differ too much for one unit, or that only grow.
_WRITTEN = {"MiB": memory, "J": energy}


def reading(metric: Metric) -> NumberFormat:
    """How a metric is shown where all of its numbers have one unit, as in a chart."""
    return _READINGS.get(metric.unit) or NumberFormat(1.0, f".{metric.digits}f", metric.unit)


def value(metric: Metric, number: float | None) -> str:
    """A metric's number with its unit: "97 %", "61.2 GiB", "34.167 kWh", "P8"."""
    if number is None or math.isnan(number):
        return MISSING
    if write := _WRITTEN.get(metric.unit):
        return write(number)
    how = reading(metric)
    return f"{how.before}{number * how.scale:{how.form}} {how.unit}".rstrip()


def value_of(metric: Metric, number: float | None, total: float | None) -> tuple[str, str]:
    """A metric's number, and the text after it: ("61.2", "of 79.6 GiB"), ("97", "%"), ("–", "")."""
    if number is None or math.isnan(number):
        return MISSING, ""
    unit, digits, scale = metric.unit, metric.digits, 1.0
    has_total = total is not None and not math.isnan(total)
    if unit == "MiB" and max(number, total if total is not None and has_total else 0.0) >= MIB_PER_GIB:
        unit, digits, scale = "GiB", 1, 1 / MIB_PER_GIB
    rest = f"of {total * scale:.{digits}f} {unit}" if total is not None and has_total else unit
    return f"{number * scale:.{digits}f}", rest


# Marks with a meaning in Streamlit's Markdown even after a backslash: its plugins look for links, mail addresses,
# emoji, icons and arrows after the backslashes are removed.
_FOUND_LATER = re.compile(
    r":(?=//[-\w]*\.|[\w+-]+:)|(?<=www)\.|(?<=[-.\w+])@(?=[-\w]+\.[-\w])|-(?=[->])|(?<=<)-|[<>~](?==)",
    re.IGNORECASE,
)
_MARKS = re.compile(r"[!-/:-@\[-`{-~]")


def plain(text: str) -> str:
    """Text from outside, made safe for Markdown: in one line, with a backslash before every mark. A mark that a
    plugin would still find is put into an element of its own without a colour, which splits the text for the
    plugins; see `:color[...]` in the documentation of st.markdown."""
    line = printable(re.sub(r"[\t\n\v\f\r\x85\u2028\u2029]+", " ", text))
    later = {found.start() for found in _FOUND_LATER.finditer(line)}
    return _MARKS.sub(lambda mark: f":color[\\{mark[0]}]" if mark.start() in later else f"\\{mark[0]}", line)
