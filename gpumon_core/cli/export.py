"""Write recorded history as CSV, JSON or Parquet, however long it is.

Tables:
  history    metrics at a chosen number of points: mean, lowest and highest
             value, from the resolution that fits (--points, --metric); of a
             counter, such as energy, what it grew by
  metrics    every tick of every GPU (gpu_metrics)
  processes  one row per process that was seen on a GPU, as in the page's
             download
  and every table of the database by its name, such as process_snapshots,
  process_hours, gpu_usage, gpu_hours or model_sessions: the stored rows. Of
  process_snapshots these are changes: a row holds until the next one of its
  process and GPU, ten minutes at most. Those of gpu_changes hold until the
  next one of their GPU and metric, however long.

CSV has units in its header and ISO 8601 times; a cell that a spreadsheet would
take for a formula begins with an apostrophe. JSON is newline-delimited: one
object a line. Parquet has units in its fields' metadata, and UTC times. A file
has its name only once it is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from gpumon_core.cli import stored, terminal
from gpumon_core.export.formats import FORMATS, Described, RowChunk
from gpumon_core.metrics import GPU_METRICS_BY_KEY, TICK_METRICS
from gpumon_core.safety.private_files import opener
from gpumon_core.settings import Settings
from gpumon_core.store.schema import gpu_metrics, metadata

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from gpumon_core.store.bulk import Row

SUMMARY = "Write recorded history as CSV, JSON or Parquet."
EXAMPLES = (
    ("--table history --since 24h --points 500 --out day.csv", "a day of all GPUs, drawn with any tool"),
    ("--table metrics --gpu 0 --since 3d --format parquet --out ticks.parquet", "every tick of one GPU"),
    ("--table process_snapshots --since 2026-03-29T12:00 --until 2026-03-29T13:00 --tz Europe/Berlin", "an hour"),
    ("--table processes --since 7d --format json | jq -r .name", "what ran in a week"),
)
# The end of a file's name -> its format.
SUFFIXES = {suffix: one.name for one in FORMATS.values() for suffix in one.suffixes}
TABLES = ("history", "metrics", "processes", *(name for name in sorted(metadata.tables)))
POINTS, MOST_POINTS = 1000, 10_000


def add(parser: argparse.ArgumentParser) -> None:
    """The table, the time range and the file."""
    parser.add_argument(
        "--table", required=True, choices=TABLES, metavar="TABLE", help=f"one of {', '.join(TABLES)}"
    )
    terminal.add_range(parser, None)
    stored.add_gpu(parser)
    parser.add_argument(
        "--points",
        metavar="N",
        type=terminal.number(1, MOST_POINTS, int),
        help=f"of history: about how many points per GPU, 1 to {MOST_POINTS} ({POINTS})",
    )
    parser.add_argument(
        "--metric",
        metavar="KEY",
        action="append",
        choices=tuple(GPU_METRICS_BY_KEY),
        help="of history: a metric by its key, such as temperature; may "
        "be given several times (those of every tick)",
    )
    parser.add_argument("--format", choices=tuple(FORMATS), help="how it is written (as FILE ends, or csv)")
    parser.add_argument(
        "--out", metavar="FILE", type=terminal.named_file, help="the file to be written (standard output)"
    )
    parser.add_argument("--force", action="store_true", help="write over a FILE that exists")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Write it."""
    chosen = arguments.format or SUFFIXES.get(arguments.out.suffix.lower() if arguments.out else "", "csv")
    if arguments.table != "history" and (arguments.points or arguments.metric):
        raise terminal.Usage("--points and --metric are for --table history")
    if arguments.out is None:
        if not FORMATS[chosen].is_text and sys.stdout.isatty():
            raise terminal.Usage(f"{FORMATS[chosen].label} is nothing for a terminal: name a file with --out")
        with stored.history(settings) as engine:
            write(engine, arguments, chosen, sys.stdout.buffer)
        return terminal.FINE
    path = terminal.destination(arguments.out, arguments.force)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with stored.history(settings) as engine, open(part, "xb", opener=opener) as file:
            rows = write(engine, arguments, chosen, file)
            file.flush()
            os.fsync(file.fileno())
        terminal.destination(path, arguments.force)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"{rows:,} rows, {path.stat().st_size / 1e6:.1f} MB, in {arguments.out}")
    return terminal.FINE


def write(engine: Engine, arguments: argparse.Namespace, chosen: str, file: BinaryIO) -> int:
    """Write the rows that the arguments choose, and return how many there are. Raises terminal.Usage."""
    from gpumon_core.store.queries.table_reader import NotSelectable

    try:
        source = SOURCES.get(arguments.table, _table)(engine, arguments)
    except NotSelectable as error:
        raise terminal.Usage(str(error)) from error
    bar = terminal.Bar("rows", shown=arguments.out is not None or not sys.stdout.isatty())
    # Only the bar needs the number of rows: a server may take long to count a very long table.
    about = source.about() if bar.shown else 0
    done = 0

    def counted() -> Iterator[RowChunk]:
        nonlocal done
        for page in source.pages:
            done += len(page)
            bar.show(done, max(done, about))
            yield source.piece(page)

    try:
        for chunk in FORMATS[chosen].write(source.columns, counted(), arguments.tz):
            file.write(chunk)
        file.flush()
        bar.show(done, done)
    finally:
        bar.end()
    if not done:
        terminal.say("there are no such rows")
    return done


@dataclass(frozen=True, slots=True)
class ExportSource:
    """The content of a file.

    about: returns about how many rows there are. piece: makes of one of the pages a piece of the file.
    """

    columns: Sequence[Described]
    about: Callable[[], int]
    pages: Iterable[Any]
    piece: Callable[[Any], RowChunk]


def _table(engine: Engine, arguments: argparse.Namespace) -> ExportSource:
    from gpumon_core.export import rows
    from gpumon_core.store.queries import table_reader

    table = gpu_metrics if arguments.table == "metrics" else metadata.tables[arguments.table]
    start, end = terminal.span(arguments, time.time())
    part = table_reader.RowSelection(table, start, end, stored.gpu_ids(engine, arguments.gpu))
    # Raises what is wrong before a file is begun.
    part.conditions()
    shown = rows.columns(table)
    read = table_reader.pages(engine, part, [one.source for one in shown])
    names = rows.read_names(engine)
    return ExportSource(
        shown, lambda: table_reader.count(engine, part), read, lambda page: rows.piece(shown, page, names)
    )


def _history(engine: Engine, arguments: argparse.Namespace) -> ExportSource:
    from gpumon_core.export import rows
    from gpumon_core.store.queries import frames
    from gpumon_core.store.queries.history import metrics_history

    metrics = list(dict.fromkeys(arguments.metric or (metric.key for metric in TICK_METRICS)))
    start, end = terminal.span(arguments, time.time())
    wanted = stored.gpu_ids(engine, arguments.gpu)
    ids = frames.gpu_ids(engine) if wanted is None else wanted
    if start is None:
        first = frames.resolutions(engine)["first"].min(skipna=True)
        # Everything may have been deleted.
        start = int(first) if first == first else 0  # noqa: PLR0124
    until = int(time.time()) if end is None else end
    points = arguments.points or POINTS

    def pages() -> Iterator[list[Row]]:
        # One GPU after the other: the points of all GPUs may not fit into memory.
        for gpu_id in ids:
            frame = metrics_history(engine, [gpu_id], metrics, start, until, points)
            values = frame.columns[2:]
            # An empty row marks a gap in the recording; a file has no row there.
            frame = frame.dropna(subset=values, how="all")
            known = frame[values].astype(object).where(frame[values].notna(), None)
            keys = (frame["timestamp_epoch"].tolist(), *[frame["gpu_id"].tolist()] * 2)
            yield list(zip(*keys, *(known[name].tolist() for name in values), strict=True))

    shown, names = rows.history_columns(metrics), rows.read_names(engine)
    return ExportSource(shown, lambda: points * len(ids), pages(), lambda page: rows.piece(shown, page, names))


def _processes(engine: Engine, arguments: argparse.Namespace) -> ExportSource:
    from gpumon_core.export.processes import LEDGER
    from gpumon_core.store.queries import processes
    from gpumon_core.store.queries.process_filter import ProcessFilter

    start, end = terminal.span(arguments, time.time())
    ids = stored.gpu_ids(engine, arguments.gpu)
    wanted = ProcessFilter(start=start, end=end, gpu_ids=ids or ())
    return ExportSource(
        LEDGER.columns, lambda: processes.count(engine, wanted), processes.pages(engine, wanted), LEDGER.piece
    )


SOURCES: Mapping[str, Callable[[Engine, argparse.Namespace], ExportSource]] = {
    "history": _history,
    "processes": _processes,
}
