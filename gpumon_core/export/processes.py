"""The process ledger in other programs' formats: the same columns as CSV, Parquet and plain values.

Pages of `store.processes.pages` go in, bytes come out as they are ready: of a file of any length, one page is in
memory.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gpumon_core.export.csv import PROGRAM, harmless, iso
from gpumon_core.format import MIB_PER_GIB

HOUR_S = 3600
JOULES_PER_KWH = 3.6e6
TEXT, NUMBER, WHOLE, FLAG = pa.string(), pa.float64(), pa.int64(), pa.bool_()
MOMENT = pa.timestamp("ms", tz="UTC")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the exported ledger.

    key: its name among plain values. of: what it is of a frame of process_history: texts, numbers, or UTC
    seconds where the type is MOMENT; None and NaN where it is not known.
    """

    key: str
    title: str
    type: pa.DataType
    of: Callable[[pd.DataFrame], pd.Series]
    unit: str | None = None

    @property
    def header(self) -> str:
        """The title with its unit."""
        return self.title if self.unit is None else f"{self.title} ({self.unit})"


def _plain(key: str, title: str, kind: pa.DataType, name: str = "", unit: str | None = None) -> Column:
    """A column as the frame has it."""
    return Column(key, title, kind, lambda frame: frame[name or key], unit)


def _scaled(key: str, title: str, unit: str, name: str, by: float, digits: int) -> Column:
    """A number in another unit."""
    return Column(key, title, NUMBER, lambda frame: (frame[name] / by).round(digits), unit)


COLUMNS = (
    _plain("host", "Host", TEXT),
    _plain("gpus", "GPU", TEXT),
    _plain("pid", "PID", WHOLE),
    _plain("name", "Name", TEXT),
    _plain("user", "User", TEXT, "username"),
    _plain("type", "Type", TEXT, "kind"),
    Column("state", "State", TEXT, lambda frame: frame["running"].map({True: "running", False: "ended"})),
    _plain("started", "Started", MOMENT, "start_time"),
    _plain("first_seen", "First seen", MOMENT),
    _plain("last_seen", "Last seen", MOMENT),
    _plain("lifetime_s", "Lifetime", WHOLE, unit="s"),
    _plain("max_memory_mib", "Maximum memory", WHOLE, "max_memory", "MiB"),
    _scaled("avg_memory_mib", "Average memory", "MiB", "avg_memory", 1, 1),
    _scaled("memory_gib_hours", "Memory-hours", "GiB h", "memory_mib_s", MIB_PER_GIB * HOUR_S, 6),
    _scaled("gpu_hours", "GPU-hours", "h", "busy_s", HOUR_S, 6),
    _scaled("energy_kwh", "Energy", "kWh", "energy_j", JOULES_PER_KWH, 9),
    _plain("estimated", "Estimate", FLAG),
    _scaled("sm_mean_percent", "SM mean", "%", "sm_mean", 1, 2),
    _plain("sm_max_percent", "SM maximum", WHOLE, "max_sm", "%"),
    _plain("sample_count", "Samples", WHOLE),
    *(_plain(column, title, TEXT) for title, column in PROGRAM.items()),
    _plain("process_id", "Id in gpumon", WHOLE),
)

SCHEMA = pa.schema(
    [
        pa.field(one.header, one.type, metadata={"key": one.key} | ({"unit": one.unit} if one.unit else {}))
        for one in COLUMNS
    ]
)


def csv_chunks(pages: Iterable[pd.DataFrame], zone: ZoneInfo) -> Iterator[bytes]:
    """Frames of process_history as one UTF-8 CSV: the header, then a chunk for each frame.

    Times are ISO 8601 in `zone`, with its offset, Started to the millisecond. A text that a spreadsheet would take
    for a formula has an apostrophe before it. Lines end as in RFC 4180, so that a lone carriage return in a text
    is quoted, too.
    """
    yield _lines(pd.DataFrame(columns=[one.header for one in COLUMNS]), header=True)
    for frame in pages:
        shown = {one.header: _as_text(one, frame, zone) for one in COLUMNS}
        yield _lines(pd.DataFrame(shown), header=False)


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


def parquet_chunks(pages: Iterable[pd.DataFrame]) -> Iterator[bytes]:
    """Frames of process_history as one Parquet file, a row group for each.

    Columns are called as in the CSV, with `key` and `unit` in their metadata; texts are what they are, and
    stored by dictionary; times are UTC, to the millisecond.
    """
    sink = Sink()
    texts = [one.header for one in COLUMNS if one.type == TEXT]
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", use_dictionary=texts) as writer:
        yield sink.take()
        for frame in pages:
            writer.write_table(as_arrow(frame))
            yield sink.take()
    yield sink.take()


def as_arrow(frame: pd.DataFrame) -> pa.Table:
    """A frame of process_history as a table of SCHEMA."""
    return pa.Table.from_arrays([_as_array(one, one.of(frame)) for one in COLUMNS], schema=SCHEMA)


def _as_array(column: Column, values: pd.Series) -> pa.Array:
    if column.type == MOMENT:
        return pa.Array.from_pandas((values * 1000).round().astype("Int64"), type=WHOLE).cast(MOMENT)
    return pa.Array.from_pandas(values.astype("Int64") if column.type == WHOLE else values, type=column.type)


def plain_rows(frame: pd.DataFrame, zone: ZoneInfo) -> list[dict[str, Any]]:
    """A frame of process_history as values for JSON, by the columns' keys: None where not known.

    Times are ISO 8601 in `zone`, with its offset.
    """
    columns = []
    for one in COLUMNS:
        values = one.of(frame)
        values = _as_moments(values, zone) if one.type == MOMENT else values
        values = values.astype("Int64") if one.type == WHOLE else values
        columns.append([None if pd.isna(value) else value for value in values.tolist()])
    keys = [one.key for one in COLUMNS]
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


class Sink(io.RawIOBase):
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
