"""Tables that are made of DataFrames: their columns, in files of every format and as plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd

from gpumon_core.export.formats import FORMATS, RowChunk, Type, in_zone

TEXT, NUMBER, WHOLE, FLAG, MOMENT = Type.TEXT, Type.NUMBER, Type.WHOLE, Type.FLAG, Type.MOMENT
PIECE_ROWS = 5000
# The values' JSON Schema.
_IN_JSON: Mapping[Type, dict[str, str]] = {
    TEXT: {"type": "string"},
    NUMBER: {"type": "number"},
    WHOLE: {"type": "integer"},
    FLAG: {"type": "boolean"},
    MOMENT: {"type": "string", "format": "date-time"},
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    key: its name among plain values. of: its values in a frame: texts, numbers, or UTC seconds where the type is
    MOMENT; None and NaN where not known. is_known: whether all of them always are.
    """

    key: str
    title: str
    type: Type
    of: Callable[[pd.DataFrame], pd.Series]
    unit: str | None = None
    is_known: bool = False

    @property
    def header(self) -> str:
        """The title with its unit."""
        return self.title if self.unit is None else f"{self.title} ({self.unit})"

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of its plain values."""
        schema = _IN_JSON[self.type]
        kind = {"type": schema["type"] if self.is_known else [schema["type"], "null"]}
        return {**schema, **kind, "description": self.header}

    def values(self, frame: pd.DataFrame) -> list[Any]:
        """Its values in a frame, as formats.Type has them."""
        found = self.of(frame)
        if self.type == WHOLE and found.dtype.kind == "f":
            # A frame has floats where some are not known.
            return [None if value != value else int(value) for value in found.tolist()]  # noqa: PLR0124 - NaN
        if found.hasnans:
            return list(found.astype(object).where(found.notna(), None))
        return found.tolist()


def plain(
    key: str, title: str, kind: Type, name: str = "", unit: str | None = None, is_known: bool = False
) -> Column:
    """A column as the frame has it, there under `name` where that is not its key."""
    return Column(key, title, kind, lambda frame: frame[name or key], unit, is_known)


def scaled(key: str, title: str, unit: str, name: str, by: float, digits: int) -> Column:
    """A number in another unit."""
    return Column(key, title, NUMBER, lambda frame: (frame[name] / by).round(digits), unit)


@dataclass(frozen=True, slots=True)
class Table:
    """Columns that frames are written in."""

    columns: Sequence[Column]

    @property
    def row_schema(self) -> dict[str, Any]:
        """What a row of plain values is, as JSON Schema."""
        return {
            "type": "object",
            "properties": {one.key: one.schema for one in self.columns},
            "required": [one.key for one in self.columns],
            "additionalProperties": False,
        }

    @property
    def units(self) -> dict[str, str]:
        """The units of the columns that have one, by key."""
        return {one.key: one.unit for one in self.columns if one.unit}

    def piece(self, frame: pd.DataFrame) -> RowChunk:
        """A frame as a piece of a file."""
        return [one.values(frame) for one in self.columns]

    def write(self, name: str, frames: Iterable[pd.DataFrame], zone: ZoneInfo) -> Iterator[bytes]:
        """Frames as one file in the format of that name, piece by piece. Raises KeyError for another name."""
        return FORMATS[name].write(self.columns, map(self.piece, frames), zone)

    def csv(self, frame: pd.DataFrame, zone: ZoneInfo) -> bytes:
        """One frame as a CSV file."""
        return b"".join(self.write("csv", [frame], zone))

    def plain_rows(self, frame: pd.DataFrame, zone: ZoneInfo) -> list[dict[str, Any]]:
        """A frame as values for JSON, by the columns' keys: None where not known, times as ISO 8601 in `zone`."""
        keys = [one.key for one in self.columns]
        rows = zip(*in_zone(self.columns, self.piece(frame), zone), strict=True)
        return [dict(zip(keys, row, strict=True)) for row in rows]


def in_pieces(frame: pd.DataFrame, size: int = PIECE_ROWS) -> Iterator[pd.DataFrame]:
    """A frame in pieces of at most `size` rows."""
    for first in range(0, len(frame), size):
        yield frame.iloc[first : first + size]
