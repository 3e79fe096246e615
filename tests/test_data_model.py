"""What docs/data-model.md says of the database is true, and its queries answer what they promise."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import data_model
import pandas as pd
import pytest
from sqlalchemy.engine import Engine

from gpumon_core.metrics import CLOCKS_EVENT_REASONS
from gpumon_core.settings import load
from gpumon_core.simulation import past
from gpumon_core.store import database
from gpumon_core.store.queries import frames, model_sessions, occupancy, processes, usage
from gpumon_core.store.queries.history import metrics_history
from gpumon_core.store.queries.usage import Scope
from gpumon_core.store.schema import metadata

PAGE = data_model.PAGE.read_text()
QUERIES = {
    int(number): sql
    for number, sql in re.findall(r"^### (\d+)\. .*?```sql\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
}
# Three nights of four GPUs, a tick every 20 seconds.
DAYS, INTERVAL_S, DAY_S = 2.5, 20, 86400
OFF_S = 1800


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo's database, as `fill` writes it."""
    folder = tmp_path_factory.mktemp("history")
    settings = load(data_dir=folder, host_name="workstation", interval=INTERVAL_S)
    engine = database.open_for_writing(settings.demo_database_url)
    past.fill(engine, settings, DAYS, 4, None, lambda done, whole: None)
    engine.dispose()
    return folder / "demo.db"


@pytest.fixture
def engine(history: Path) -> Iterator[Engine]:
    """What gpumon itself reads it with."""
    opened = database.open_for_reading(f"sqlite:///{history}")
    yield opened
    opened.dispose()


def ask(path: Path, number: int) -> pd.DataFrame:
    """The answer to a query of the page, as the page has it."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return pd.read_sql_query(QUERIES[number], connection)
    finally:
        connection.close()


def copied(history: Path, folder: Path) -> Path:
    """A copy that a test may change."""
    copy = folder / "copy.db"
    with sqlite3.connect(history) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    return copy


def week() -> Scope:
    """The last seven days."""
    now = int(time.time())
    return Scope(now - 7 * DAY_S, now)


def by_id(frame: pd.DataFrame, value: str, key: str = "id") -> dict[int, float]:
    """A column by the number of the process or GPU."""
    return dict(zip(frame[key], frame[value].astype("float64"), strict=True))


# -- the tables


def test_the_tables_of_the_page_are_those_of_the_schema() -> None:
    assert data_model.filled(PAGE) == PAGE, "run docs/data_model.py"


def test_every_table_has_a_heading_and_every_heading_a_table() -> None:
    tables = PAGE.split("## Tables\n")[1].split("## Queries\n")[0]
    headed = ", ".join(re.findall(r"^### (.*)$", tables, re.MULTILINE)).split(", ")
    assert sorted(headed) == sorted(metadata.tables)


def test_every_column_of_every_rollup_is_named() -> None:
    named = set(re.findall(r"`(\w+)`", data_model.rollup_columns()))
    for name in data_model.ROLLUPS:
        assert set(metadata.tables[name].c.keys()) <= named


def test_a_meaning_without_a_column_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data_model.MEANINGS, "hosts", data_model.MEANINGS["hosts"] | {"colour": "blue"})
    with pytest.raises(ValueError, match="hosts has no colour"):
        data_model.columns_of("hosts")


def test_the_bits_of_the_throttle_reasons_are_those_of_the_catalogue() -> None:
    listed = " ".join(PAGE.split("The bits of `clocks_event_reasons`")[1].split("\n\n")[0].split())
    told = dict(re.findall(r"(\d+) ([a-z ]+?)(?=[,.])", listed))
    assert told == {str(reason.bit): reason.label.lower() for reason in CLOCKS_EVENT_REASONS}
    for bit, label in re.findall(r"\((\d+), '([\w ]+)'\)", QUERIES[5]):
        assert {reason.label for reason in CLOCKS_EVENT_REASONS if reason.bit == int(bit)} == {label}


# -- the queries


def test_there_are_at_least_ten_of_them() -> None:
    assert sorted(QUERIES) == list(range(1, len(QUERIES) + 1))
    assert len(QUERIES) >= 10
    assert len(QUERIES) == PAGE.count("```sql")


@pytest.mark.parametrize("number", sorted(set(QUERIES) - {7}))
def test_every_query_has_an_answer(history: Path, number: int) -> None:
    assert len(ask(history, number))


@pytest.mark.parametrize("number", sorted(QUERIES))
def test_no_query_reads_all_ticks(history: Path, number: int) -> None:
    connection = sqlite3.connect(history)
    plan = " ".join(str(row[-1]) for row in connection.execute("EXPLAIN QUERY PLAN " + QUERIES[number]))
    connection.close()
    assert "SCAN gpu_metrics" not in plan
    assert "SCAN process_snapshots" not in plan


def held_at(engine: Engine, at: int, gpu_ids: list[int]) -> dict[int, float]:
    """The memory of each process at a time."""
    first = occupancy.memory_by_process(engine, gpu_ids, at, at + INTERVAL_S, 1, 1000).iloc[0]
    return {int(name): value for name, value in first.items() if name != "timestamp_epoch" and value}


def test_who_was_on_gpu_0_at_three(history: Path, engine: Engine) -> None:
    at = datetime.now().astimezone().replace(hour=3, minute=0, second=0, microsecond=0) - timedelta(days=1)
    answer = ask(history, 1)
    assert answer["name"].notna().all()
    gpu_0 = frames.gpu_table(engine).query("gpu_index == 0")["id"].tolist()
    assert by_id(answer, "memory_mib") == held_at(engine, int(at.timestamp()), gpu_0)


def test_the_energy_of_the_users_is_that_of_the_usage_page(history: Path, engine: Engine) -> None:
    answer = ask(history, 2)
    ranking = usage.ranking(engine, "user", week()).query("kind == 'part'").set_index("key")
    found = answer.set_index("username")
    assert len(found) == len(ranking) > 3
    assert (found["kwh"] * 3.6e6).to_dict() == pytest.approx(ranking["energy_j"].to_dict())
    assert (found["gpu_hours"] * 3600).to_dict() == pytest.approx(ranking["busy_s"].to_dict())
    assert answer["kwh"].is_monotonic_decreasing


def test_the_largest_processes_are_those_of_the_processes_page(history: Path, engine: Engine) -> None:
    answer = ask(history, 3)
    ledger = processes.process_history(engine).nlargest(20, "max_memory")
    assert answer["peak_mib"].tolist() == ledger["max_memory"].tolist()
    assert answer["peak_mib"].iloc[0] > 10_000
    assert (answer["mean_mib"] <= answer["peak_mib"]).all()


def test_the_idle_holders_are_those_of_the_usage_page(history: Path, engine: Engine) -> None:
    answer = ask(history, 4)
    known = (
        usage.idle_holders(engine, week(), 60).query("not running").set_index(["process_id", "gpu_id"])["idle_s"]
    )
    told = answer.set_index(["id", "gpu_id"])["idle_hours"] * 3600
    assert told[known.index].to_dict() == pytest.approx(known.to_dict())


def test_the_throttled_hours_are_those_of_the_gpu_page(history: Path, tmp_path: Path) -> None:
    copy = copied(history, tmp_path)
    began = int(time.time()) - DAY_S
    # Hardware slowdown and software thermal at once, for an hour.
    rows = [(1, "clocks_event_reasons", began, 0x28), (1, "clocks_event_reasons", began + 3600, 0x1)]
    with sqlite3.connect(copy) as connection:
        connection.execute("DELETE FROM gpu_changes WHERE gpu_id = 1 AND metric = 'clocks_event_reasons'")
        connection.executemany("INSERT INTO gpu_changes VALUES (?, ?, ?, ?)", rows)
    answer = ask(copy, 5)
    assert dict(answer[answer["id"] == 1][["reason", "hours"]].to_numpy()) == {
        "Hardware slowdown": 1.0,
        "Software thermal": 1.0,
    }
    opened = database.open_for_reading(f"sqlite:///{copy}")
    for gpu_id in range(1, 5):
        known = occupancy.throttling(opened, gpu_id, 0, int(time.time())).query("reason != 'Idle'")
        hours = known.assign(s=known["last"] - known["first"]).groupby("reason")["s"].sum() / 3600
        told = answer[answer["id"] == gpu_id].set_index("reason")["hours"]
        assert told.to_dict() == pytest.approx(hours.to_dict())
    opened.dispose()


def test_the_model_sessions_are_those_of_the_usage_page(history: Path, engine: Engine) -> None:
    answer = ask(history, 6)
    known = model_sessions.loaded(engine, week(), 50)
    assert answer["id"].tolist() == known["session_id"].tolist()
    assert answer["model"].tolist() == known["model"].tolist()
    over = ~known["running"].to_numpy()
    assert (answer["hours"] * 3600)[over].tolist() == pytest.approx(known["lifetime_s"][over].tolist())


def test_a_machine_that_was_off_is_found_as_a_gap(history: Path, tmp_path: Path) -> None:
    assert ask(history, 7).empty
    copy = copied(history, tmp_path)
    now = int(time.time())
    off = now - DAY_S - (now - DAY_S) % 60
    with sqlite3.connect(copy) as connection:
        for table in ("gpu_metrics", "gpu_minutes"):
            span = (off, off + OFF_S)
            connection.execute(f"DELETE FROM {table} WHERE timestamp_epoch >= ? AND timestamp_epoch < ?", span)
    answer = ask(copy, 7)
    assert len(answer) == 4
    assert set(answer["stopped"]) == {off}
    assert set(answer["minutes"]) == {OFF_S / 60}
    opened = database.open_for_reading(f"sqlite:///{copy}")
    drawn = metrics_history(opened, [int(answer["id"][0])], ["power"], off - 3600, off + 7200, 500)
    opened.dispose()
    (break_at,) = drawn.loc[drawn["power"].isna(), "timestamp_epoch"]
    assert off <= break_at <= off + OFF_S


def test_the_days_add_up_to_what_the_gpus_took(history: Path, engine: Engine) -> None:
    answer = ask(history, 8)
    assert answer["day"].nunique() in (3, 4)
    totals = usage.gpu_totals(engine, week()).set_index("gpu_id")
    sums = answer.groupby("id")[["kwh", "idle_kwh"]].sum() * 3.6e6
    assert sums["kwh"].to_dict() == pytest.approx(totals["energy_j"].to_dict())
    assert sums["idle_kwh"].to_dict() == pytest.approx(totals["idle_j"].to_dict())


def test_the_longest_lives_are_those_of_the_processes_page(history: Path, engine: Engine) -> None:
    answer = ask(history, 9)
    ledger = processes.process_history(engine).set_index("process_id")
    assert (answer["hours"] * 3600).tolist() == pytest.approx(ledger["lifetime_s"].nlargest(20).tolist())
    assert (answer["running"] == 1).tolist() == ledger.loc[answer["id"], "running"].tolist()


def test_the_memory_an_hour_ago_is_that_of_the_history_page(history: Path, engine: Engine) -> None:
    gpu_ids = frames.gpu_table(engine)["id"].tolist()
    before = int(time.time()) - 3600
    answer = by_id(ask(history, 10), "memory_mib")
    after = int(time.time()) - 3600
    assert answer in [held_at(engine, at, gpu_ids) for at in range(before, after + 1)]


def test_the_hottest_hour_is_no_cooler_than_any_tick_of_it(history: Path, engine: Engine) -> None:
    answer = ask(history, 11)
    now = int(time.time())
    for _, row in answer.iterrows():
        drawn = metrics_history(engine, [int(row["id"])], ["temperature", "power"], now - 3 * DAY_S, now, 100)
        assert row["hottest_c"] == pytest.approx(drawn["temperature_max"].max(), abs=0.5)
        assert row["highest_w"] <= drawn["power_max"].max() + 0.1
    assert (answer["mean_percent"].between(0, 100)).all()
