"""Tables for other programs: the same columns as CSV, Parquet and plain values.

Frames go in piece by piece, and bytes come out as they are ready: of a file of any length, one piece is in memory.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gpumon_core.export.csv import harmless, iso

TEXT, NUMBER, WHOLE, FLAG = pa.string(), pa.float64(), pa.int64(), pa.bool_()
MOMENT = pa.timestamp("ms", tz="UTC")
PIECE_ROWS = 5000
# What a value is in JSON.
_IN_JSON: Mapping[pa.DataType, dict[str, str]] = {
    TEXT: {"type": "string"},
    NUMBER: {"type": "number"},
    WHOLE: {"type": "integer"},
    FLAG: {"type": "boolean"},
    MOMENT: {"type": "string", "format": "date-time"},
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    key: its name among plain values. of: what it is of a frame: texts, numbers, or UTC seconds where the type is
    MOMENT; None and NaN where it is not known. sure: whether it always is.
    """

    key: str
    title: str
    type: pa.DataType
    of: Callable[[pd.DataFrame], pd.Series]
    unit: str | None = None
    sure: bool = False

    @property
    def header(self) -> str:
        """The title with its unit."""
        return self.title if self.unit is None else f"{self.title} ({self.unit})"

    @property
    def schema(self) -> dict[str, Any]:
        """What its plain values are, as JSON Schema."""
        told = _IN_JSON[self.type]
        kind = {"type": told["type"] if self.sure else [told["type"], "null"]}
        return {**told, **kind, "description": self.header}


def plain(
    key: str, title: str, kind: pa.DataType, name: str = "", unit: str | None = None, sure: bool = False
) -> Column:
    """A column as the frame has it, there under `name` where that is not its key."""
    return Column(key, title, kind, lambda frame: frame[name or key], unit, sure)


def scaled(key: str, title: str, unit: str, name: str, by: float, digits: int) -> Column:
    """A number in another unit."""
    return Column(key, title, NUMBER, lambda frame: (frame[name] / by).round(digits), unit)


@dataclass(frozen=True, slots=True)
class Table:
    """Columns that frames are written in."""

    columns: Sequence[Column]

    @property
    def arrow_schema(self) -> pa.Schema:
        """As Parquet has it: columns are called as in the CSV, with `key` and `unit` in their metadata."""
        return pa.schema([field(one.key, one.header, one.type, one.unit) for one in self.columns])

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

    def csv_chunks(self, pieces: Iterable[pd.DataFrame], zone: ZoneInfo) -> Iterator[bytes]:
        """Frames as one UTF-8 CSV: the header, then a chunk for each frame.

        Times are ISO 8601 in `zone`, with its offset. A text that a spreadsheet would take for a formula has an
        apostrophe before it. Lines end as in RFC 4180, so that a lone carriage return in a text is quoted, too.
        """
        yield _lines(pd.DataFrame(columns=[one.header for one in self.columns]), header=True)
        for frame in pieces:
            shown = {one.header: _as_text(one, frame, zone) for one in self.columns}
            yield _lines(pd.DataFrame(shown), header=False)

    def csv(self, frame: pd.DataFrame, zone: ZoneInfo) -> bytes:
        """One frame as a whole CSV."""
        return b"".join(self.csv_chunks([frame], zone))

    def parquet_chunks(self, pieces: Iterable[pd.DataFrame]) -> Iterator[bytes]:
        """Frames as one Parquet file, a row group for each.

        Texts are what they are, and stored by dictionary; times are UTC, to the millisecond.
        """
        return parquet(self.arrow_schema, map(self.as_arrow, pieces))

    def as_arrow(self, frame: pd.DataFrame) -> pa.Table:
        """A frame as a table of arrow_schema."""
        arrays = [_as_array(one, one.of(frame)) for one in self.columns]
        return pa.Table.from_arrays(arrays, schema=self.arrow_schema)

    def plain_rows(self, frame: pd.DataFrame, zone: ZoneInfo) -> list[dict[str, Any]]:
        """A frame as values for JSON, by the columns' keys: None where not known.

        Times are ISO 8601 in `zone`, with its offset.
        """
        columns = []
        for one in self.columns:
            values = one.of(frame)
            values = _as_moments(values, zone) if one.type == MOMENT else values
            values = values.astype("Int64") if one.type == WHOLE else values
            columns.append([None if pd.isna(value) else value for value in values.tolist()])
        keys = [one.key for one in self.columns]
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def field(key: str, header: str, kind: pa.DataType, unit: str | None) -> pa.Field:
    """A column of a Parquet file, with `key` and `unit` in its metadata."""
    return pa.field(header, kind, metadata={"key": key} | ({"unit": unit} if unit else {}))


def parquet(schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[bytes]:
    """Tables of a schema as one Parquet file, a row group for each; texts are stored by dictionary."""
    sink = _Sink()
    texts = [one.name for one in schema if one.type == TEXT]
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=texts) as writer:
        yield sink.take()
        for table in tables:
            writer.write_table(table)
            yield sink.take()
    yield sink.take()


def in_pieces(frame: pd.DataFrame, size: int = PIECE_ROWS) -> Iterator[pd.DataFrame]:
    """A frame in pieces of at most `size` rows."""
    for first in range(0, len(frame), size):
        yield frame.iloc[first : first + size]


def _lines(table: pd.DataFrame, header: bool) -> bytes:
    return table.to_csv(index=False, header=header, lineterminator="\r\n").encode()


def _as_text(column: Column, frame: pd.DataFrame, zone: ZoneInfo) -> pd.Series:
    values = column.of(frame)
    if column.type == MOMENT:
        return _as_moments(values, zone)
    if column.type == TEXT:
        # Few texts are different, and hardly one of them is a formula.
        guard = any(harmless(text) is not text for text in values.unique())
        return values.map(harmless) if guard else values
    return values.astype("Int64") if column.type == WHOLE else values


def _as_moments(values: pd.Series, zone: ZoneInfo) -> pd.Series:
    # Whole numbers are ticks, which are told to the second; the others are what a kernel says of a start.
    return iso(values, zone, "s" if values.dtype == "int64" else "ms")


def _as_array(column: Column, values: pd.Series) -> pa.Array:
    if column.type == MOMENT:
        return pa.Array.from_pandas((values * 1000).round().astype("Int64"), type=WHOLE).cast(MOMENT)
    return pa.Array.from_pandas(values.astype("Int64") if column.type == WHOLE else values, type=column.type)


class _Sink(io.RawIOBase):
    """A file that is handed on in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        self._at += len(self._parts[-1])
        return len(self._parts[-1])

    def tell(self) -> int:
        return self._at

    def take(self) -> bytes:
        """What was written since the last time."""
        taken, self._parts = b"".join(self._parts), []
        return taken
