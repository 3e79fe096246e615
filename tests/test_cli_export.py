"""`export`: every table, whole, in formats that other programs read."""

from __future__ import annotations

import argparse
import csv
import io
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from cli import FORMULA, HOSTILE, NOON, gpumon, record, settings

from gpumon_core.__main__ import parser
from gpumon_core.cli import export, stored, terminal
from gpumon_core.export import rows
from gpumon_core.metrics import TICK_METRICS
from gpumon_core.store import database
from gpumon_core.store.queries import table_reader
from gpumon_core.store.schema import metadata

TICKS = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    record(f"sqlite:///{folder / 'gpumon.db'}", TICKS).dispose()
    return folder


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    record(database_url, TICKS).dispose()
    engine = database.open_for_reading(database_url)
    yield engine
    engine.dispose()


def arguments(*words: str) -> argparse.Namespace:
    return parser(["export"]).parse_args(["export", *words])


def written(engine: sa.Engine, chosen: str, *words: str) -> bytes:
    file = io.BytesIO()
    export.write(engine, arguments(*words), chosen, file)
    return file.getvalue()


def as_csv(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def test_every_table_is_exported_whole_in_every_format(engine: sa.Engine) -> None:
    filled = 0
    for name, table in metadata.tables.items():
        with engine.connect() as connection:
            rows = connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
        filled += rows > 0
        assert len(as_csv(written(engine, "csv", "--table", name))) == rows, name
        plain = [json.loads(line) for line in written(engine, "json", "--table", name).splitlines()]
        assert len(plain) == rows, name
        parquet = pq.read_table(io.BytesIO(written(engine, "parquet", "--table", name)))
        assert parquet.num_rows == rows, name
        keys = [field.metadata[b"key"].decode() for field in parquet.schema]
        assert len(set(keys)) == len(keys) == len(set(parquet.column_names)), name
        for one, column in zip(keys, parquet.columns, strict=True):
            if not pa.types.is_timestamp(column.type):
                assert column.to_pylist() == [row[one] for row in plain], (name, one)
    assert filled >= 14


def test_pages_of_any_size_have_every_row_once_in_the_order_of_the_key(engine: sa.Engine) -> None:
    for table in metadata.tables.values():
        key = list(table.primary_key.columns)
        with engine.connect() as connection:
            due = [tuple(row) for row in connection.execute(sa.select(*key).order_by(*key))]
        for size in (7, len(due) or 1):
            found = [
                row[: len(key)]
                for page in table_reader.pages(engine, table_reader.RowSelection(table), key, size)
                for row in page
            ]
            assert found == due, table.name


def test_times_and_gpus_choose_rows(engine: sa.Engine) -> None:
    words = ("--since", str(NOON + 40), "--until", str(NOON + 80), "--gpu", "1", "--gpu", "GPU-1")
    for name, due in (("metrics", 11), ("gpu_20s", 3)):
        rows = as_csv(written(engine, "csv", "--table", name, *words))
        assert (len(rows), {row["GPU"] for row in rows}) == (due, {"1"})
    assert {row["PID"] for row in as_csv(written(engine, "csv", "--table", "processes", "--gpu", "box/0"))} == {
        "7"
    }
    assert {row["PID"] for row in as_csv(written(engine, "csv", "--table", "gpu_processes", "--gpu", "0"))} == {
        "7"
    }
    late = ("--since", str(NOON + 86400))
    assert not as_csv(written(engine, "csv", "--table", "model_sessions", *late))
    stretch = {"gpu_id": 1, "first": NOON, "last": NOON + 60, "ticks": 2, "source": "f", "imported_at": NOON}
    with database.open_for_writing(str(engine.url.render_as_string(hide_password=False))).begin() as connection:
        connection.execute(metadata.tables["imports"].insert(), stretch)
    for since, due in ((NOON + 60, ["2025-11-24T11:00:00+00:00"]), (NOON + 61, [])):
        found = as_csv(written(engine, "csv", "--table", "imports", "--since", str(since)))
        assert [row["First"] for row in found] == due
    with pytest.raises(terminal.Usage, match=r"no GPU 7; there are box/0 \(.*, GPU-0\), box/1 \("):
        written(engine, "csv", "--table", "metrics", "--gpu", "7")
    with pytest.raises(terminal.Usage, match="programs has no times"):
        written(engine, "csv", "--table", "programs", "--since", "3d")


def test_units_times_and_scales_are_those_of_the_pages(engine: sa.Engine) -> None:
    row = as_csv(written(engine, "csv", "--table", "metrics", "--tz", "Europe/Berlin"))[0]
    assert row["Time"] == "2025-11-24T12:00:00+01:00"
    assert (row["Temperature (°C)"], row["Power (W)"], row["Fan (%)"]) == ("93.0", "250.5", "")
    # Rollups hold tenths as whole numbers.
    minute = as_csv(written(engine, "csv", "--table", "gpu_minutes"))[0]
    assert (minute["Power (W)"], minute["Utilization, lowest (%)"]) == ("250.5", "12.5")
    parquet = pq.read_table(io.BytesIO(written(engine, "parquet", "--table", "metrics")))
    assert parquet.schema.field("Power (W)").metadata == {b"key": b"power", b"unit": b"W"}
    assert parquet["Time"][0].as_py().timestamp() == NOON
    started = as_csv(written(engine, "csv", "--table", "gpu_processes"))[0]["Started"]
    assert started == "2025-11-24T10:58:59.500+00:00"


def test_every_time_of_the_schema_is_a_time_in_an_export() -> None:
    """Whole numbers of 64 bits are times, but for counters and the size of the database."""
    others = {metric.key for metric in TICK_METRICS} | {"database_bytes"}
    columns = {
        column.name
        for table in metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, sa.BigInteger)
    }
    assert columns - others <= rows.MOMENTS
    for table in metadata.tables.values():
        part = table_reader.RowSelection(table, start=0)
        if any(column.name in rows.MOMENTS - {"last_used"} for column in table.columns):
            assert part.conditions(), table.name


def test_no_cell_is_a_formula_and_json_and_parquet_have_the_names_as_they_are(engine: sa.Engine) -> None:
    for name in ("process_snapshots", "gpu_processes", "processes"):
        names = {row["Name"] for row in as_csv(written(engine, "csv", "--table", name))}
        assert names == {HOSTILE, "'" + FORMULA}, name
        plain = [json.loads(line) for line in written(engine, "json", "--table", name).splitlines()]
        assert {row["name"] for row in plain} == {HOSTILE, FORMULA}, name
        parquet = pq.read_table(io.BytesIO(written(engine, "parquet", "--table", name)))
        assert set(parquet["Name"].to_pylist()) == {HOSTILE, FORMULA}, name


def test_history_has_the_points_and_metrics_that_were_asked_for(engine: sa.Engine) -> None:
    span = ("--since", str(NOON), "--until", str(NOON + 4 * TICKS))
    words = ("--table", "history", "--points", "20", "--metric", "temperature", "--metric", "power", *span)
    rows = as_csv(written(engine, "csv", *words))
    assert list(rows[0])[:4] == ["Time", "Host", "GPU", "Temperature (°C)"]
    assert len(rows[0]) == 3 + 2 * 3
    for gpu in ("0", "1"):
        assert 10 <= sum(row["GPU"] == gpu for row in rows) <= 22
    assert {row["Power, highest (W)"] for row in rows} == {"250.5"}
    # Without a beginning it reaches as far back as there is something to tell.
    assert {row["GPU"] for row in as_csv(written(engine, "csv", "--table", "history"))} == {"0", "1"}


def test_a_history_with_nothing_stored_is_an_empty_file(engine: sa.Engine, database_url: str) -> None:
    with database.open_for_writing(database_url).begin() as connection:
        for name in ("gpu_metrics", "gpu_20s", "gpu_minutes", "gpu_5min", "gpu_20min", "gpu_hours", "gpu_4h"):
            connection.execute(metadata.tables[name].delete())
    assert as_csv(written(engine, "csv", "--table", "history")) == []


def test_a_file_has_its_name_when_it_is_complete_and_is_never_overwritten_unasked(
    folder: Path, tmp_path: Path
) -> None:
    environ = settings(folder)
    out = tmp_path / "ticks.parquet"
    done = gpumon(environ, "export", "--table", "metrics", "--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert pq.read_table(out).num_rows == 2 * TICKS, "the format is that of the name"
    again = gpumon(environ, "export", "--table", "gpus", "--out", str(out))
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "--force" in again.stderr
    assert pq.read_table(out).num_rows == 2 * TICKS
    assert gpumon(environ, "export", "--table", "gpus", "--out", str(out), "--force").returncode == 0
    assert pq.read_table(out).num_rows == 2
    assert list(tmp_path.iterdir()) == [out]


def test_an_export_that_is_broken_off_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (33_000, limit[1]))
    try:
        done = gpumon(settings(folder), "export", "--table", "metrics", "--out", str(tmp_path / "x.csv"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert done.returncode == 1
    assert done.stderr == "gpumon: the output cannot be read or written: File too large\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--table", "cats"), "invalid choice"),
        (("--table", "metrics", "--since", "soon"), "--since 'soon' is not a time"),
        (("--table", "metrics", "--since", "1h", "--until", "2h"), "later than --until"),
        (("--table", "metrics", "--points", "5"), "--table history"),
        (("--table", "metrics", "--tz", "Mars/Base"), "Europe/Berlin"),
        ((), "--table"),
    ],
)
def test_wrong_arguments_are_one_line_and_2(folder: Path, words: tuple[str, ...], sentence: str) -> None:
    done = gpumon(settings(folder), "export", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert sentence in line


def test_a_database_that_is_not_there_damaged_or_of_another_version_is_one_line(tmp_path: Path) -> None:
    def sentence() -> str:
        done = gpumon(settings(tmp_path), "export", "--table", "gpus")
        assert (done.returncode, done.stdout) == (1, "")
        [line] = done.stderr.splitlines()
        return line

    assert "nothing has been recorded" in sentence()
    file = tmp_path / "gpumon.db"
    assert not file.exists()
    record(f"sqlite:///{file}", 2).dispose()
    writing = database.open_for_writing(f"sqlite:///{file}")
    with writing.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    writing.dispose()
    assert "start the recorder once" in sentence()
    file.write_bytes(b"no database at all" * 300)
    assert "move the file away" in sentence()


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("3d", NOON - 3 * 86400),
        ("1.5h", NOON - 5400),
        ("30M", NOON - 1800),
        ("90s", NOON - 90),
        ("2w", NOON - 14 * 86400),
        (str(NOON), NOON),
        ("2025-11-24T12:00", NOON),
        ("2025-11-24 11:00Z", NOON),
        ("2025-11-24", NOON - 12 * 3600),
    ],
)
def test_times_are_taken_as_people_write_them(text: str, due: int) -> None:
    assert terminal.moment(text, "--since", terminal.zone("Europe/Berlin"), NOON) == due


def test_an_empty_choice_of_gpus_is_all_of_them(engine: sa.Engine) -> None:
    assert stored.gpu_ids(engine, None) is None
    assert len(stored.gpu_ids(engine, ["0", "1"]) or ()) == 2
