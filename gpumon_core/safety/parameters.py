"""The parameters of a query: tables of them, and the one function that reads a query by such a table.

A route lists its parameters; what it refuses, and its description, follow from the list. The limits are those of
the databases: a number that no column can hold is refused here, before it reaches SQL.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

# A day before the end of the year 9999, where datetime ends: every time zone has it.
LAST_MOMENT = 253_402_214_399
# The largest number of an INTEGER column.
LARGEST = 2**31 - 1
# SQLite takes 32,766 values in a query, and patterns of 50,000 bytes.
MOST_VALUES = 1000
LONGEST_TEXT = 1000
# A query string has a blank where a client did not escape the plus sign of an offset.
_LOST_PLUS = re.compile(r"(?<=:\d\d) (?=\d\d:?\d\d$)|(?<=\.\d{3}) (?=\d\d:?\d\d$)")


class BadParameter(Exception):
    """A query that cannot be answered; `str()` says why, `name` which parameter it is."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.name = name


@dataclass(frozen=True, slots=True)
class ParameterType:
    """What a value is.

    read: makes the value of a text; times without an offset are in the zone; raises ValueError, which says what a
    value must be. schema: the JSON Schema of such a text.
    """

    read: Callable[[str, ZoneInfo], Any]
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a query.

    name, description: as in the route's documentation. is_repeatable: it may come several times, any of its values
    holds, and it is read as a tuple. default: its value where the query lacks it. only: the formats that have it;
    empty means all.
    """

    name: str
    description: str
    kind: ParameterType
    is_repeatable: bool = False
    default: Any = None
    only: tuple[str, ...] = ()


def whole(least: int, most: int) -> ParameterType:
    """A whole number between two others."""

    def read(text: str, _: ZoneInfo) -> int:
        # int() accepts more than digits, and is slow for thousands of them.
        number = int(text) if re.fullmatch("[0-9]{1,18}", text) else -1
        if not least <= number <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return number

    return ParameterType(read, {"type": "integer", "minimum": least, "maximum": most})


def one_of(*values: str) -> ParameterType:
    """One of a few words."""

    def read(text: str, _: ZoneInfo) -> str:
        if text not in values:
            raise ValueError(f"must be one of {', '.join(values)}")
        return text

    return ParameterType(read, {"type": "string", "enum": list(values)})


def words(least: int = 1) -> ParameterType:
    """A text of at least this many characters."""

    def read(text: str, _: ZoneInfo) -> str:
        if not least <= len(text) <= LONGEST_TEXT:
            raise ValueError(f"must have {least} to {LONGEST_TEXT} characters")
        if "\0" in text:
            # No database stores it, and PostgreSQL refuses a query that has it.
            raise ValueError("must not have a NUL character in it")
        return text

    return ParameterType(read, {"type": "string", "minLength": least, "maxLength": LONGEST_TEXT})


def _moment(text: str, zone: ZoneInfo) -> int:
    try:
        if re.fullmatch("[0-9]{1,18}", text):
            found = int(text)
        else:
            read = datetime.fromisoformat(_LOST_PLUS.sub("+", text))
            found = math.floor((read if read.tzinfo else read.replace(tzinfo=zone)).timestamp())
    except (ValueError, OverflowError):
        found = -1
    if not 0 <= found <= LAST_MOMENT:
        raise ValueError("must be UTC seconds, or a time as in 2026-03-29T12:00:00+02:00, from 1970 to 9999")
    return found


def _zone(text: str, _: ZoneInfo) -> ZoneInfo:
    try:
        return ZoneInfo(text)
    except (KeyError, ValueError, OSError) as error:
        # Zones are files: a folder, a path out of their folder and a name that is too long raise, too.
        raise ValueError("must be the IANA name of a time zone, as in Europe/Berlin") from error


MOMENT = ParameterType(
    _moment,
    {
        "oneOf": [
            {"type": "integer", "minimum": 0, "maximum": LAST_MOMENT},
            {"type": "string", "format": "date-time"},
        ]
    },
)
# The units of a length of time, in seconds; without one it is seconds.
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


def length_s(text: str) -> int:
    """The seconds of a length such as 15m, 1y or 900. Raises ValueError."""
    found = re.fullmatch("([0-9]{1,12})([smhdwy]?)", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 1 <= seconds <= LAST_MOMENT:
        raise ValueError("must be a length of time such as 15m, 6h, 7d or 1y, or a number of seconds")
    return seconds


LENGTH = ParameterType(
    lambda text, _: length_s(text),
    {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": LAST_MOMENT},
            {"type": "string", "pattern": "^[1-9][0-9]{0,3}[smhdwy]$"},
        ],
        "examples": ["15m", "7d", "1y", 900],
    },
)
_NAMES = words()
# A GPU as store.queries.gpu_selector names it; a number alone is an id. The database knows whether it exists.
GPU = ParameterType(
    _NAMES.read,
    {
        "anyOf": [{"type": "integer", "minimum": 1, "maximum": LARGEST}, _NAMES.schema],
        "examples": [1, "index:0", "rack1/0", "GPU-5f2c"],
    },
)
GPU_SPELLINGS = (
    "by gpumon's id of it (`gpu_id`: `7` or `id:7`), its index (`index:3`), that of a MIG instance (`3:1`), its "
    "UUID or the beginning of one, each but the id with its host before it where that is needed (`rack1/3`)"
)
ZONE = ParameterType(_zone, {"type": "string", "examples": ["Europe/Berlin"]})
UTC_ZONE = ZoneInfo("UTC")

# Every route that shows times has it, and it is read before the others.
TZ = Parameter(
    "tz", "The time zone of the answer's times, and of times that name no offset.", ZONE, False, UTC_ZONE
)


def read(parameters: Sequence[Parameter], given: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The value of every parameter, by its name. Raises BadParameter."""
    known = {one.name: one for one in parameters}
    texts: dict[str, list[str]] = {}
    for name, text in given:
        if name not in known:
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise BadParameter(shown, f"There is no parameter “{shown}” here, but {', '.join(known)}.")
        texts.setdefault(name, []).append(text)
    zone = UTC_ZONE
    values = {}
    for one in sorted(parameters, key=lambda parameter: parameter is not TZ):
        values[one.name] = _value(one, texts.get(one.name, []), zone)
        if one is TZ:
            zone = values[one.name]
    return values


def _value(one: Parameter, texts: list[str], zone: ZoneInfo) -> Any:
    if not texts:
        return () if one.is_repeatable else one.default
    if len(texts) > (MOST_VALUES if one.is_repeatable else 1):
        times = f"at most {MOST_VALUES} times" if one.is_repeatable else "once"
        raise BadParameter(one.name, f"“{one.name}” can be given {times}.")
    try:
        found = tuple(dict.fromkeys(one.kind.read(text, zone) for text in texts))
    except ValueError as error:
        raise BadParameter(one.name, f"“{one.name}” {error}.") from error
    return found if one.is_repeatable else found[0]
