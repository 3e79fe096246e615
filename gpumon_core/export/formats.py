"""The file formats: what routes, downloads and `export` can write is a row of FORMATS.

A writer takes columns, pieces of their values and a time zone, and yields bytes as soon as they are ready: one
piece is in memory, however long the file. A writer imports its libraries when it runs, because the server imports
this module at its start.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    import pyarrow as pa


class Type(StrEnum):
    """What the values of a column are; any of them is None where it is not known.

    A MOMENT is UTC seconds: an int is exact to the second, a float to the millisecond.
    """

    TEXT = "text"
    NUMBER = "number"
    WHOLE = "whole"
    FLAG = "flag"
    MOMENT = "moment"


class Described(Protocol):
    """What a writer must know about a column. key: its name for programs. header: its title with its unit."""

    @property
    def key(self) -> str: ...
    @property
    def header(self) -> str: ...
    @property
    def type(self) -> Type: ...
    @property
    def unit(self) -> str | None: ...


# Some rows of a file: for each column, its values in these rows.
RowChunk = Sequence[Sequence[Any]]
FormatWriter = Callable[[Sequence[Described], Iterable[RowChunk], ZoneInfo], Iterator[bytes]]


@dataclass(frozen=True, slots=True)
class FileFormat:
    """A file format.

    name: what queries and the command line call it. label: its name on a page. suffixes: the ends of file names
    that mean it; a download gets the first. is_text: whether a terminal can show it. is_served: whether routes and
    pages offer it as a file.
    """

    name: str
    label: str
    media_type: str
    suffixes: tuple[str, ...]
    write: FormatWriter
    is_text: bool = True
    is_served: bool = True


# ---- Writers -----------------------------------------------------------------------------------------


def _csv(columns: Sequence[Described], pieces: Iterable[RowChunk], zone: ZoneInfo) -> Iterator[bytes]:
    """UTF-8 CSV (RFC 4180): the header, then a chunk for each piece.

    An apostrophe precedes a text that a spreadsheet would run as a formula. Lines end as in RFC 4180, so that the
    csv module quotes a lone carriage return in a text, too.
    """
    from gpumon_core.export.csv import without_formulas

    written = io.StringIO(newline="")
    writer = csv.writer(written, lineterminator="\r\n")
    writer.writerow([one.header for one in columns])
    yield written.getvalue().encode()
    for piece in pieces:
        written.seek(0)
        written.truncate()
        cells = [
            without_formulas(values) if one.type == Type.TEXT else values
            for one, values in zip(columns, in_zone(columns, piece, zone), strict=True)
        ]
        writer.writerows(zip(*cells, strict=True))
        yield written.getvalue().encode()


def _json(columns: Sequence[Described], pieces: Iterable[RowChunk], zone: ZoneInfo) -> Iterator[bytes]:
    """Newline-delimited JSON: an object in each line, by the columns' keys."""
    keys = [one.key for one in columns]
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
    for piece in pieces:
        rows = zip(*in_zone(columns, piece, zone), strict=True)
        yield "".join(encode(dict(zip(keys, row, strict=True))) + "\n" for row in rows).encode()


def _parquet(columns: Sequence[Described], pieces: Iterable[RowChunk], _: ZoneInfo) -> Iterator[bytes]:
    """Parquet, a row group for each piece: columns have the CSV's headers, and `key` and `unit` in their metadata.

    Texts are stored by dictionary, and without an apostrophe; times are UTC, to the millisecond.
    """
    import pyarrow.parquet as pq

    schema, sink = arrow_schema(columns), _Sink()
    texts = [one.header for one in columns if one.type == Type.TEXT]
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=texts) as writer:
        yield sink.take()
        for piece in pieces:
            writer.write_table(_as_arrow(columns, schema, piece))
            yield sink.take()
    yield sink.take()


FORMATS: dict[str, FileFormat] = {
    one.name: one
    for one in (
        FileFormat("csv", "CSV", "text/csv", (".csv",), _csv),
        # The routes have their own JSON, one object that says how many rows there are.
        FileFormat("json", "JSON", "application/x-ndjson", (".json", ".ndjson", ".jsonl"), _json, is_served=False),
        FileFormat("parquet", "Parquet", "application/vnd.apache.parquet", (".parquet",), _parquet, is_text=False),
    )
}


def served() -> dict[str, FileFormat]:
    """Those that routes and pages offer, by name."""
    return {name: one for name, one in FORMATS.items() if one.is_served}


# ---- Values ------------------------------------------------------------------------------------------


def in_zone(columns: Sequence[Described], piece: RowChunk, zone: ZoneInfo) -> list[Sequence[Any]]:
    """A piece with its times as ISO 8601 in `zone`, with their offset."""
    from gpumon_core.export.csv import iso_texts

    return [
        iso_texts(values, zone) if one.type == Type.MOMENT else values
        for one, values in zip(columns, piece, strict=True)
    ]


def arrow_schema(columns: Sequence[Described]) -> pa.Schema:
    """The schema of a Parquet file of these columns."""
    import pyarrow as pa

    types = {
        Type.TEXT: pa.string(),
        Type.NUMBER: pa.float64(),
        Type.WHOLE: pa.int64(),
        Type.FLAG: pa.bool_(),
        Type.MOMENT: pa.timestamp("ms", tz="UTC"),
    }
    return pa.schema(
        [
            pa.field(
                one.header, types[one.type], metadata={"key": one.key} | ({"unit": one.unit} if one.unit else {})
            )
            for one in columns
        ]
    )


def _as_arrow(columns: Sequence[Described], schema: pa.Schema, piece: RowChunk) -> pa.Table:
    """A piece as a table of arrow_schema."""
    import pyarrow as pa

    arrays = [
        _moments(values, field.type) if one.type == Type.MOMENT else pa.array(values, field.type)
        for one, field, values in zip(columns, schema, piece, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _moments(values: Sequence[int | float | None], kind: pa.DataType) -> pa.Array:
    import pyarrow as pa
    from pyarrow import compute

    # Numbers of one type: the library converts all of them at once.
    ms = compute.multiply(pa.array(values, pa.float64()), 1000.0)
    return compute.round(ms).cast(pa.int64()).cast(kind)


class _Sink(io.RawIOBase):
    """A file that hands its bytes on in pieces."""

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
        """The bytes since the last call."""
        taken, self._parts = b"".join(self._parts), []
        return taken
