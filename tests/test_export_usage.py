"""The files of the Usage page: they have what the tables have, with units, and no cell is a formula."""

from __future__ import annotations

import csv
import io
import math
from zoneinfo import ZoneInfo

import pandas as pd
import pytest

from gpumon_core.export.formats import Type
from gpumon_core.export.processes import PROGRAM
from gpumon_core.export.tables import Table, plain
from gpumon_core.export.usage import IDLE, SESSIONS, named, ranking_table, time_split
from gpumon_core.store.queries import costs

BERLIN = ZoneInfo("Europe/Berlin")
NOON = 1_795_431_600  # 2026-11-23 12:00 in Berlin.
HOUR = 3600
FORMULA = '=cmd|" /C calc"!A0'
STARTS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]


def read(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode(), newline="")))


def as_csv(frame: pd.DataFrame) -> bytes:
    """A frame of users, and what they cost."""
    types = {"User": Type.TEXT, "Cost": Type.NUMBER}
    return Table([plain(name, name, types[name]) for name in frame.columns]).csv(frame, BERLIN)


@pytest.mark.parametrize("evil", STARTS)
def test_no_cell_of_any_table_is_a_formula(evil: str) -> None:
    [row] = read(as_csv(pd.DataFrame({"User": [evil], "Cost": [-1.5]})))
    assert row["User"] == "'" + evil
    assert row["Cost"] == "-1.5", "a negative number is a number"


@pytest.mark.parametrize("name", ["a\r=1+1", "a\n=1+1", "a\r\n=1+1", 'a",=1+1', "a,=1+1"])
def test_no_text_breaks_out_of_its_cell(name: str) -> None:
    content = as_csv(pd.DataFrame({"User": [name, "ada"]}))
    assert content.endswith(b"\r\nada\r\n")
    assert [row["User"] for row in read(content)] == [name, "ada"]


def test_a_ranking_has_its_units_and_currency_and_everything_that_the_table_has() -> None:
    ranking = pd.DataFrame(
        {
            "key": [FORMULA, "ada"],
            "kind": "part",
            "processes": [1.0, 2.0],
            "busy_s": [3600.0, 1800.0],
            "seconds": [7200.0, 60.0],
            "idle_s": [600.0, 0.0],
            "memory_mib_s": [1024.0 * 3600, 0.0],
            "energy_j": [3.6e6, 3.6e6],
            "estimated": [1.0, 0.0],
        }
    )
    names = {FORMULA: FORMULA, "ada": "ada"}
    whole = named(ranking, names)
    rows = read(ranking_table(costs.Prices(0.25, None, "CHF")).csv(whole, BERLIN))
    assert rows[0] == {
        "Name": "'" + FORMULA,
        "Kind": "part",
        "Key": "'" + FORMULA,
        "Processes": "1",
        "GPU-hours (h)": "1.0",
        "Memory-hours (GiB h)": "1.0",
        "Energy (kWh)": "1.0",
        "Share (% of energy)": "50.0",
        "On GPU (s)": "7200.0",
        "Held idle (s)": "600.0",
        "Cost (CHF)": "0.25",
        "Estimate": "True",
    }
    assert len(rows) == 2
    free = read(ranking_table(costs.Prices(None, None, "CHF")).csv(whole, BERLIN))
    assert [row["Cost (CHF)"] for row in free] == ["", ""], "without a price"
    shown = costs.ranked(ranking, names, "User", costs.Prices(0.25, None, "CHF"))
    for title, header in (
        ("GPU-hours", "GPU-hours (h)"),
        ("Share", "Share (% of energy)"),
        ("Cost", "Cost (CHF)"),
    ):
        assert [float(row[header]) for row in rows] == shown[title].tolist(), "the table that is shown"


def test_where_the_time_went_is_in_hours() -> None:
    table = pd.DataFrame(
        {"GPU": ["GPU 0"], "Busy": [1.5], "Held idle": [2.0], "Free": [0.0], "Not recorded": [3.0]}
    )
    [row] = read(time_split(table).csv(table, BERLIN))
    assert row == {
        "GPU": "GPU 0",
        "Busy (h)": "1.5",
        "Held idle (h)": "2.0",
        "Free (h)": "0.0",
        "Not recorded (h)": "3.0",
    }


def test_idle_holders_have_units_offsets_and_no_formulas() -> None:
    frame = pd.DataFrame(
        {
            "host": ["box", "=box"],
            "gpu_index": [0, 1],
            "mig_index": [math.nan, 2.0],
            "pid": [7, 8],
            "name": [FORMULA, "train.py"],
            "username": [None, "-ada"],
            "running": [True, False],
            "memory": [8192.04, 100.0],
            "idle_since": [float(NOON), math.nan],
            "idle_s": [7200.4, 600.0],
            "wasted_mib_s": [1024.0 * 3600 * 2, 0.0],
            **{column: [None, None] for column in PROGRAM.values()},
            "command": ["@SUM(A1)", "python train.py"],
        }
    )
    one, two = read(IDLE.csv(frame, BERLIN))
    assert (one["Name"], one["Command"], one["User"]) == ("'" + FORMULA, "'@SUM(A1)", "")
    assert (two["Host"], two["User"], two["GPU"]) == ("'=box", "'-ada", "1:2")
    assert one["Idle since"] == "2026-11-23T12:00:00+01:00"
    assert two["Idle since"] == "", "it has ended"
    assert (one["Memory held (MiB)"], one["Held idle (s)"], one["Memory wasted (GiB h)"]) == (
        "8192.0",
        "7200.0",
        "2.0",
    )


def test_model_sessions_have_units_offsets_and_no_formulas() -> None:
    frame = pd.DataFrame(
        {
            "model": ["=qwen"],
            "host": ["box"],
            "gpu_index": [0],
            "mig_index": [math.nan],
            "first_seen": [NOON],
            "last_seen": [NOON + HOUR],
            "lifetime_s": [HOUR],
            "running": [False],
            "max_memory": [9000.0],
            "avg_memory": [8999.96],
            "workload": ["+Ollama"],
            "name": ["@ollama"],
            "pid": [7],
            "username": [None],
            "gpu_id": [1],
            "process_id": [2],
            "session_id": [3],
        }
    )
    [row] = read(SESSIONS.csv(frame, BERLIN))
    assert (row["Model"], row["Workload"], row["Name"], row["User"]) == ("'=qwen", "'+Ollama", "'@ollama", "")
    assert (row["Loaded"], row["Last seen"]) == ("2026-11-23T12:00:00+01:00", "2026-11-23T13:00:00+01:00")
    assert (row["Loaded for (s)"], row["Still loaded"]) == ("3600", "False")
    assert (row["Maximum memory (MiB)"], row["Average memory (MiB)"]) == ("9000", "9000.0")
