"""The process ledger as CSV, Parquet and plain values."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from ticks import GPUS, tick

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.export.formats import Type, arrow_schema
from gpumon_core.export.processes import LEDGER, PROGRAM
from gpumon_core.store import database
from gpumon_core.store.queries import processes
from gpumon_core.store.queries.processes import process_history
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot

# What a spreadsheet runs as a formula begins like this.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "﹦", "﹢", "﹣", "﹫")
BERLIN = ZoneInfo("Europe/Berlin")
HEADERS = [one.header for one in LEDGER.columns]
NOON = 1_775_000_000
HOSTILE = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "one\r=2",
    "one\n=2\r\n=3",
    'a "quoted" name',
    "a, b; c",
    '","=1',
    "Größe 大小 🚀",
    "'=already",
    "None",
    "NaN",
    "007",
]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'gpumon.db'}"


@pytest.fixture
def writer(url: str) -> Writer:
    return Writer(database.open_for_writing(url), "here", "nvml", 4)


@pytest.fixture
def engine(url: str) -> sa.Engine:
    return database.open_for_reading(url)


def work(now: int, *rows: ProcessReading) -> Snapshot:
    """A tick of two GPUs that are half busy at 100 W each."""
    plain = tick(now, gpus=GPUS[:2])
    readings = tuple(GpuReading(gpu.uuid, {"utilization": 50.0, "power": 100.0}) for gpu in GPUS[:2])
    return Snapshot(now, plain.host, plain.gpus, readings, rows)


@pytest.fixture
def ledger(writer: Writer, engine: sa.Engine) -> sa.Engine:
    """A training that has ended, a server that goes on, and one that nothing is known of."""
    training = Program(workload="PyTorch", command="python train.py", container_name="lab", job_id="4711")
    people = {
        7: ProcessIdentity(7, "b:7", NOON - 10.63, "train.py", "ada", training),
        8: ProcessIdentity(8, "b:8", NOON - 5.0, "serve", "grace", Program(model="llama3")),
        9: ProcessIdentity(9, None, None, None, None),
    }
    for now in (NOON, NOON + 4):
        both = (ProcessReading(f"GPU-{gpu}", 7, "C", 1000, sm_utilization=20 + 13 * gpu) for gpu in range(2))
        writer.write(work(now, *both), people)
    for now in (NOON + 8, NOON + 12):
        rows = (ProcessReading("GPU-0", 8, "C+G", 2048), ProcessReading("GPU-1", 9, "G", None))
        writer.write(work(now, *rows), people)
    return engine


def in_csv(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


def in_parquet(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def both(engine: sa.Engine, size: int = 5000) -> tuple[list[dict[str, str]], pa.Table]:
    """The whole ledger, read back from each kind of file."""
    return (
        in_csv(b"".join(LEDGER.write("csv", processes.pages(engine, size=size), BERLIN))),
        in_parquet(b"".join(LEDGER.write("parquet", processes.pages(engine, size=size), BERLIN))),
    )


def value_of(cell: str, kind: Type) -> Any:
    """What a cell of the CSV means."""
    if cell == "":
        return None
    if kind == Type.TEXT:
        return cell[1:] if cell.startswith("'") and cell[1:2] and cell[1] in FORMULA_STARTS else cell
    means: dict[Type, Callable[[str], Any]] = {
        Type.NUMBER: float,
        Type.WHOLE: int,
        Type.FLAG: {"True": True, "False": False}.__getitem__,
        Type.MOMENT: lambda text: datetime.fromisoformat(text).astimezone(UTC),
    }
    return means[kind](cell)


def assert_same(rows: list[dict[str, str]], table: pa.Table) -> None:
    """Both files have the same values in the same order."""
    assert table.column_names == HEADERS
    told = [{one.header: value_of(row[one.header], one.type) for one in LEDGER.columns} for row in rows]
    assert told == table.to_pylist()


def test_csv_and_parquet_hold_the_ledgers_rows_in_its_order(ledger: sa.Engine) -> None:
    frame = process_history(ledger)
    rows, table = both(ledger)
    assert list(rows[0]) == HEADERS
    assert_same(rows, table)
    assert table["Id in gpumon"].to_pylist() == frame["process_id"].tolist()
    for header, column in (("PID", "pid"), ("Host", "host"), ("GPU", "gpus"), ("Type", "kind"), *PROGRAM.items()):
        assert table[header].to_pylist() == frame[column].tolist()
    assert [moment.timestamp() for moment in table["First seen"].to_pylist()] == frame["first_seen"].tolist()
    assert [moment.timestamp() for moment in table["Last seen"].to_pylist()] == frame["last_seen"].tolist()


def test_every_quantity_is_in_the_unit_of_its_header(ledger: sa.Engine) -> None:
    rows, _ = both(ledger)
    row = next(row for row in rows if row["PID"] == "7")
    # On two GPUs for two ticks of 4 s, each half busy at 100 W, with 1000 MiB.
    assert float(row["GPU-hours (h)"]) == pytest.approx(8 / 3600, abs=1e-6)
    # The energy before the first tick is not known.
    assert float(row["Energy (kWh)"]) == pytest.approx(800 / 3.6e6, abs=1e-9)
    assert float(row["Memory-hours (GiB h)"]) == pytest.approx(2000 * 8 / 1024 / 3600, abs=1e-6)
    told = {"Lifetime (s)": "4", "Maximum memory (MiB)": "2000", "Average memory (MiB)": "2000.0", "Samples": "2"}
    told |= {"SM mean (%)": "26.5", "SM maximum (%)": "33", "Estimate": "False", "State": "ended", "GPU": "0, 1"}
    assert {header: row[header] for header in told} == told


def test_what_is_not_known_is_empty_and_null(ledger: sa.Engine) -> None:
    rows, table = both(ledger)
    row = next(row for row in rows if row["PID"] == "9")
    nulls = next(row for row in table.to_pylist() if row["PID"] == 9)
    for header in ("Name", "User", "Started", "Maximum memory (MiB)", "SM maximum (%)", *PROGRAM):
        assert (row[header], nulls[header]) == ("", None)
    with_key = next(row for row in LEDGER.plain_rows(process_history(ledger), BERLIN) if row["pid"] == 9)
    for key in ("name", "user", "started", "max_memory_mib", "sm_max_percent", *PROGRAM.values()):
        assert with_key[key] is None


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_stays_one_text_in_its_own_cell(writer: Writer, engine: sa.Engine, name: str) -> None:
    program = Program(command=name, model=name, container_name=name)
    writer.write(tick(NOON, {(0, 7): 10}), {7: ProcessIdentity(7, "b:7", 1.0, name, name, program)})
    frame = process_history(engine)
    kept = frame["name"][0]
    data = b"".join(LEDGER.write("csv", [frame], BERLIN))
    [row] = in_csv(data)
    [exact] = in_parquet(b"".join(LEDGER.write("parquet", [frame], BERLIN))).to_pylist()
    [plain] = LEDGER.plain_rows(frame, BERLIN)
    for header, key in (("Name", "name"), ("User", "user"), ("Command", "command"), ("Model", "model")):
        stored = frame["username" if key == "user" else key][0]
        guarded = stored.startswith(FORMULA_STARTS)
        assert row[header] == ("'" if guarded else "") + stored
        assert exact[header] == plain[key] == stored
    assert kept == name
    # A reader that ends a record at any kind of line end, as spreadsheets do, finds no further one either.
    assert len(list(csv.reader(io.StringIO(data.decode(), newline=None)))) == 2
    assert not any(cell.startswith(FORMULA_STARTS) for cell in row.values())


def test_parquet_has_types_keys_and_units(ledger: sa.Engine) -> None:
    _, table = both(ledger)
    assert table.schema.equals(arrow_schema(LEDGER.columns))
    kinds = {field.name: field.type for field in table.schema}
    assert kinds["Started"] == kinds["First seen"] == pa.timestamp("ms", tz="UTC")
    assert kinds["PID"] == kinds["Maximum memory (MiB)"] == pa.int64()
    assert kinds["Energy (kWh)"] == pa.float64()
    assert kinds["Estimate"] == pa.bool_()
    assert kinds["Name"] == pa.string()
    for field in table.schema:
        unit = (field.metadata or {}).get(b"unit")
        assert field.name.endswith(f" ({unit.decode()})" if unit else field.name)
    keys = [field.metadata[b"key"].decode() for field in table.schema]
    assert keys == [one.key for one in LEDGER.columns]
    assert len(set(keys)) == len(set(HEADERS)) == len(keys)
    energy = table.schema.field("Energy (kWh)")
    assert (energy.metadata[b"key"], energy.metadata[b"unit"]) == (b"energy_kwh", b"kWh")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_bytes_come_out_page_by_page(ledger: sa.Engine, kind: str) -> None:
    asked = []

    def told() -> Iterator[pd.DataFrame]:
        for frame in processes.pages(ledger, size=1):
            asked.append(len(frame))
            yield frame

    stream = LEDGER.write(kind, told(), BERLIN)
    seen = [(len(asked), len(chunk) > 0) for chunk in stream]
    assert seen[:4] == [(0, True), (1, True), (2, True), (3, True)]


def test_a_row_group_is_a_page(ledger: sa.Engine) -> None:
    data = b"".join(LEDGER.write("parquet", processes.pages(ledger, size=2), BERLIN))
    file = pq.ParquetFile(io.BytesIO(data))
    assert [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)] == [2, 1]
    rows, table = both(ledger, size=2)
    assert_same(rows, table)
    assert len(rows) == 3


def test_an_empty_ledger_is_a_valid_file(writer: Writer, engine: sa.Engine) -> None:
    writer.write(tick(NOON), {})
    data = b"".join(LEDGER.write("csv", processes.pages(engine), BERLIN))
    assert data.endswith(b"\r\n")
    assert list(csv.reader(io.StringIO(data.decode(), newline=""))) == [HEADERS]
    _, table = both(engine)
    assert table.num_rows == 0
    assert table.schema.equals(arrow_schema(LEDGER.columns))
    assert LEDGER.plain_rows(process_history(engine), BERLIN) == []


@pytest.mark.parametrize(
    ("utc", "local"),
    [
        # Summer time begins: no clock ever shows 02:30.
        ("2026-03-29T00:59:59+00:00", "2026-03-29T01:59:59+01:00"),
        ("2026-03-29T01:00:00+00:00", "2026-03-29T03:00:00+02:00"),
        # It ends: 02:30 comes twice.
        ("2026-10-25T00:30:00+00:00", "2026-10-25T02:30:00+02:00"),
        ("2026-10-25T01:30:00+00:00", "2026-10-25T02:30:00+01:00"),
    ],
)
def test_times_have_the_offset_of_their_own_day(writer: Writer, engine: sa.Engine, utc: str, local: str) -> None:
    moment = datetime.fromisoformat(utc)
    at = int(moment.timestamp())
    writer.write(tick(at, {(0, 7): 10}), {7: ProcessIdentity(7, "b:7", at - 0.37, "w", "ada")})
    rows, table = both(engine)
    assert rows[0]["First seen"] == rows[0]["Last seen"] == local
    assert table["First seen"].to_pylist() == [moment]
    assert LEDGER.plain_rows(process_history(engine), BERLIN)[0]["first_seen"] == local
    assert_same(rows, table)


def test_a_page_may_hold_times_of_different_offsets(writer: Writer, engine: sa.Engine) -> None:
    winter, summer = (int(datetime(2026, month, 1, tzinfo=UTC).timestamp()) for month in (1, 7))
    for at, pid in ((winter, 7), (summer, 8)):
        writer.write(tick(at, {(0, pid): 10}), {pid: ProcessIdentity(pid, f"b:{pid}", None, "w", "ada")})
    rows, _ = both(engine)
    assert [row["First seen"] for row in rows] == ["2026-07-01T02:00:00+02:00", "2026-01-01T01:00:00+01:00"]


def test_a_start_has_milliseconds_everywhere(ledger: sa.Engine) -> None:
    rows, table = both(ledger)
    assert [row["Started"][19:] for row in rows] == ["", ".000+02:00", ".370+02:00"]
    [_, whole, fine] = table["Started"].to_pylist()
    assert (whole.microsecond, fine.microsecond) == (0, 370_000)
    assert fine.timestamp() == pytest.approx(NOON - 10.63)


def test_plain_values_are_json_under_keys_that_do_not_change(ledger: sa.Engine) -> None:
    plain = LEDGER.plain_rows(process_history(ledger), BERLIN)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [row["pid"] for row in plain] == [9, 8, 7]
    _, table = both(ledger)
    for row, exact in zip(plain, table.to_pylist(), strict=True):
        assert list(row) == [one.key for one in LEDGER.columns]
        for one in LEDGER.columns:
            value = row[one.key]
            if one.type == Type.MOMENT and value is not None:
                value = datetime.fromisoformat(value)
            assert value == exact[one.header]
            assert not (isinstance(value, float) and math.isnan(value))
