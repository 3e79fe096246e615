"""The original program's history becomes gpumon's, and nothing of either is lost or touched."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import pynvml
import pytest
import sqlalchemy as sa
import streamlit as st
from conftest import PATIENCE_S, ROOT, Server, eventually
from fake_nvml import FakeNvml, environment
from originals import INTERVAL_S, Original
from test_pages import open_page, texts, url, writer  # noqa: F401 - the fixtures of pages
from test_writer import ask

from gpumon_core import importer, original, original_file
from gpumon_core.original_folder import NamedGpu, named_gpus
from gpumon_core.settings import Settings, load
from gpumon_core.store import database, frames, placing_rows, processes, retention, rollups, usage
from gpumon_core.store import placing as placing_module
from gpumon_core.store.placed import Place
from gpumon_core.store.usage import Scope
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

HOUR = 3600
DAY = 86400
NOW = 1_790_000_000 - 1_790_000_000 % HOUR + 1800
GPUS = tuple(GpuInfo(index, f"GPU-{index}{index}", f"Board {index}", 24576) for index in range(2))
COUNTED = "gpu_metrics", "gpu_processes", "process_gpus", "process_snapshots", "process_hours", "gpu_usage"


def record(engine: sa.Engine, times: range, gpus: tuple[GpuInfo, ...] = GPUS[:1], pid: int | None = None) -> None:
    """gpumon's own ticks: power 200 W, busy at 10 %."""
    own = Writer(engine, "here", "nvml", INTERVAL_S)
    values = {"temperature": 40.0, "utilization": 10.0, "memory": 2000, "power": 200.0}
    there = () if pid is None else (ProcessReading(gpus[0].uuid, pid, "C", 700),)
    own.write_all(
        [
            (Snapshot(at, HostInfo("here"), gpus, tuple(GpuReading(gpu.uuid, values) for gpu in gpus), there), {})
            for at in times
        ]
    )
    own.settle()


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    """A database in which gpumon has taken one tick of one GPU, just now."""
    made = database.open_for_writing(database_url)
    record(made, range(NOW, NOW + 1))
    return made


@pytest.fixture
def settings(tmp_path: Path, database_url: str) -> Settings:
    return load(database_url=database_url, data_dir=tmp_path, host_name="here")


@pytest.fixture
def file(tmp_path: Path) -> Original:
    return Original(tmp_path / "gpu_metrics.db")


def everything(engine: sa.Engine) -> dict[str, list[tuple[object, ...]]]:
    """All that a reader can see, but for when it was imported."""
    tables = sa.inspect(engine).get_table_names()
    left_out = ("alembic_version",)
    return {
        table: sorted(ask(engine, f"SELECT * FROM {table}"), key=repr) for table in tables if table not in left_out
    }


def span(length: int, until: int = NOW - 60) -> range:
    return range(until - length, until, INTERVAL_S)


def test_ticks_processes_and_snapshots_are_taken_and_a_second_time_nothing(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    times = span(1200)
    file.ticks(times)
    file.seen(7, "/usr/bin/python3", [at + 1 for at in times], 600.0)
    report = importer.run(settings, file.path, now=NOW)
    assert report.taken == {"ticks": 300, "processes": 1, "snapshots": 300}
    assert report.left_out == []
    query = "SELECT temperature, utilization, memory, power, energy FROM gpu_metrics WHERE timestamp_epoch = "
    assert ask(engine, query + str(times[5])) == [(60.0, 50.0, 1000, 100.0, None)]
    query = "SELECT pid, name, start_time, first_seen, last_seen, max_memory, avg_memory, sample_count, seconds "
    assert ask(engine, query + "FROM gpu_processes") == [
        (7, "python3", None, times[0], times[-1], 600, 600.0, 300, 1200.0)
    ]
    before = everything(engine)
    again = importer.run(settings, file.path, now=NOW)
    assert again.taken == {"ticks": 0, "processes": 0, "snapshots": 0}
    assert again.left_out == ["300 ticks, 300 process snapshots: imported before"]
    assert everything(engine) == before


def test_every_page_has_the_imported_hours(engine: sa.Engine, settings: Settings, file: Original) -> None:
    times = range(NOW - 5 * HOUR - 1800, NOW - HOUR - 1800, INTERVAL_S)
    file.ticks(times, utilization=50.0, power=360.0)
    file.seen(7, "train", [at + 1 for at in times], 1500.0)
    file.seen(8, "serve", [at + 1 for at in times], 500.0)
    importer.run(settings, file.path, now=NOW)
    reader = database.open_for_reading(settings.real_database_url)
    drawn = frames.history(reader, [1], ["utilization", "power"], times[0], times[-1], 100)
    assert drawn["utilization"].mean() == pytest.approx(50)
    assert drawn["power_max"].max() == 360
    listed = processes.process_history(reader)
    assert sorted(listed["name"]) == ["serve", "train"]
    # 4 hours at 360 W are 1440 Wh, of which half was idle; the rest went to both by their memory.
    # The first tick speaks of the seconds before it.
    chosen = Scope(times[0] - INTERVAL_S, times[-1])
    [total] = usage.gpu_totals(reader, chosen).to_dict("records")
    assert (total["seconds"], total["busy_s"]) == (4 * HOUR, 2 * HOUR)
    assert total["energy_j"] == pytest.approx(1440 * 3600, rel=1e-6)
    assert total["first_seen"] == times[0]
    ranked = usage.ranking(reader, "process", chosen).set_index("key")
    shares = ranked[ranked["kind"] == "part"]["busy_s"]
    assert shares.to_list() == pytest.approx([1.5 * HOUR, 0.5 * HOUR], rel=1e-4)
    assert ranked.loc["Idle GPUs", "energy_j"] == pytest.approx(720 * 3600, rel=1e-4)


def test_an_import_counts_like_the_recorder(
    engine: sa.Engine, settings: Settings, file: Original, tmp_path: Path
) -> None:
    """Of the same ticks, whoever brings them, comes the same."""
    times = range(NOW - 2 * HOUR - 900, NOW - 600, INTERVAL_S)
    own = database.open_for_writing(f"sqlite:///{tmp_path / 'own.db'}")
    recorder = Writer(own, "here", "nvml", INTERVAL_S)
    for at in times:
        busy = float(at // 700 % 2 * 40)
        held = 500 + at // 100 % 3
        values = {"temperature": 60.0, "utilization": busy, "memory": 1000, "power": 100.0}
        there = [ProcessReading("GPU-00", 7, "C", held)]
        if at % 2000 < 1000:
            there.append(ProcessReading("GPU-00", 8, "C", 100))
        snapshot = Snapshot(at, HostInfo("here"), GPUS[:1], (GpuReading("GPU-00", values),), tuple(there))
        recorder.write(snapshot, {})
        file.ticks([at], utilization=busy)
        file.seen(7, "train", [at + 2], float(held))
        if at % 2000 < 1000:
            file.seen(8, "serve", [at + 2], 100.0)
    recorder.settle()
    rollups.roll_up(own, "here")
    importer.run(settings, file.path, now=NOW)
    whole = f"WHERE timestamp_epoch < {NOW - 1800 - HOUR} ORDER BY 1"
    for query in (
        f"SELECT timestamp_epoch, samples, utilization, utilization_min, utilization_max FROM gpu_minutes {whole}",
        f"SELECT timestamp_epoch, samples, utilization, utilization_min, utilization_max FROM gpu_20min {whole}",
        f"SELECT timestamp_epoch, seconds, busy_s, held_s, energy_j, idle_j FROM gpu_usage {whole}",
        "SELECT first_seen, last_seen, sample_count, max_memory FROM process_gpus ORDER BY process_id",
    ):
        mine, theirs = ask(engine, query), ask(own, query)
        assert [pytest.approx(row) for row in theirs] == mine
        assert mine
    query = "SELECT h.timestamp_epoch, p.pid, round(sum(h.seconds)), round(sum(h.busy_s)), round(sum(h.idle_s)), "
    query += "round(sum(h.memory_mib_s)), sum(h.energy_j) FROM process_hours h JOIN gpu_processes p "
    query += "ON p.id = h.process_id GROUP BY 1, 2 ORDER BY 1, 2"
    assert [pytest.approx(row, abs=3) for row in ask(own, query)] == ask(engine, query)


@pytest.mark.parametrize("cut", [7, 437])
def test_a_grown_file_adds_what_is_new_as_if_it_had_come_at_once(
    tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing_module, "BATCH_ROWS", 100)
    times = range(NOW - HOUR, NOW - 60, INTERVAL_S)
    results = []
    for parts in ((times,), (times[:cut], times[cut:])):
        folder = tmp_path / str(len(parts))
        folder.mkdir()
        chosen = load(data_dir=folder, host_name="here")
        engine = database.open_for_writing(chosen.real_database_url)
        record(engine, range(NOW, NOW + 1))
        grown = Original(folder / "gpu_metrics.db")
        taken = 0
        for part in parts:
            for at in part:
                grown.ticks([at], utilization=float(at % 90))
                grown.seen(7, "train", [at + 1], 500.0 + at // 60 % 3)
            taken += importer.run(chosen, grown.path, now=NOW).taken["ticks"]
        assert taken == len(times)
        found = everything(engine)
        # Where a batch ended, what goes on is written once more: it reads the same.
        del found["process_snapshots"]
        # It names the file's path.
        del found["imported_files"]
        results.append((found, frames.process_life(engine, 1)))
    for table in results[0][0]:
        one, other = results[0][0][table], results[1][0][table]
        assert [pytest.approx(row, abs=0.2, nan_ok=True) for row in one] == other, table
    assert results[0][1].equals(results[1][1])


def test_a_reused_pid_is_two_processes_where_the_snapshots_tell(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    times = span(1200)
    file.ticks(times)
    file.seen(7, "train", times[:100])
    # The original goes on with the row of the first.
    file.seen(7, "serve", times[100:150])
    file.seen(7, "train", times[200:])
    report = importer.run(settings, file.path, now=NOW)
    assert report.taken["processes"] == 3
    query = "SELECT name, first_seen, last_seen, sample_count FROM gpu_processes ORDER BY first_seen"
    assert ask(engine, query) == [
        ("train", times[0], times[99], 100),
        ("serve", times[100], times[149], 50),
        ("train", times[200], times[-1], 100),
    ]


def test_a_pause_of_the_original_alone_ends_no_process(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    times = [at for at in span(1200) if not NOW - 800 < at < NOW - 600]
    file.ticks(times)
    file.seen(7, "train", times)
    importer.run(settings, file.path, now=NOW)
    assert ask(engine, "SELECT count(*), max(sample_count) FROM gpu_processes") == [(1, len(times))]
    # While nobody looked, nothing is known: the time is not counted.
    [(seconds,)] = ask(engine, "SELECT seconds FROM gpu_processes")
    assert seconds == len(times) * INTERVAL_S


def test_what_was_before_the_snapshots_is_as_the_original_counted_it(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    times = span(400)
    file.ticks(times)
    # One ended before there were snapshots, one goes on, and one gave its pid to another.
    file.counted(5, "gone", NOW - 2 * DAY, NOW - DAY, 1000, 300.0, 400.0)
    for pid, name, first in ((6, "long", "long"), (7, "heir", "late")):
        file.seen(pid, name, times, 500.0)
        file.execute(
            "UPDATE gpu_processes SET first_seen = ?, sample_count = 400, avg_memory = 575, max_memory = 800, "
            "process_name = ? WHERE pid = ?",
            NOW - 2 * DAY,
            first,
            pid,
        )
    importer.run(settings, file.path, now=NOW)
    query = "SELECT pid, name, first_seen, last_seen, max_memory, avg_memory, sample_count FROM gpu_processes "
    assert ask(engine, query + "ORDER BY pid, first_seen") == [
        (5, "gone", NOW - 2 * DAY, NOW - DAY, 400, 300.0, 1000),
        (6, "long", NOW - 2 * DAY, times[-1], 800, pytest.approx(575), 400),
        (7, "late", NOW - 2 * DAY, NOW - 2 * DAY + 1200, 800, 600.0, 300),
        (7, "heir", times[0], times[-1], 500, 500.0, 100),
    ]
    before = everything(engine)
    assert not any(importer.run(settings, file.path, now=NOW).taken.values())
    assert everything(engine) == before


def test_own_ticks_win(engine: sa.Engine, settings: Settings, file: Original) -> None:
    times = span(1200)
    record(engine, range(NOW - 700, NOW - 500, 4), pid=70)
    rollups.roll_up(engine, "here", NOW - 700)
    file.ticks(times)
    file.seen(7, "train", times)
    own = "SELECT * FROM gpu_metrics WHERE power = 200 ORDER BY timestamp_epoch"
    before = ask(engine, own)
    report = importer.run(settings, file.path, now=NOW)
    assert ask(engine, own) == before
    both = ask(
        engine,
        "SELECT count(*) FROM gpu_metrics WHERE power = 100 "
        f"AND timestamp_epoch BETWEEN {NOW - 712} AND {NOW - 492}",
    )
    assert both == [(0,)]
    skipped = 300 - report.taken["ticks"]
    assert 50 <= skipped <= 58
    assert report.left_out == [
        f"{skipped} ticks, {skipped} process snapshots: gpumon itself recorded this GPU then"
    ]
    assert not any(importer.run(settings, file.path, now=NOW).taken.values())


def test_own_minutes_and_hours_win_when_their_ticks_are_forgotten(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    old = NOW - 5 * DAY
    record(engine, range(old, old + 600, 4))
    rollups.roll_up(engine, "here", old)
    retention.forget(engine, retention.Keep(3, 30, 730), NOW, pause_s=0)
    file.ticks(range(old - 1200, old + 1200, 4))
    minutes = f"SELECT * FROM gpu_minutes WHERE timestamp_epoch BETWEEN {old} AND {old + 540} ORDER BY 2"
    before = ask(engine, minutes)
    assert len(before) == 10
    report = importer.run(settings, file.path, now=NOW)
    assert ask(engine, minutes) == before
    assert report.taken["ticks"] == 450
    [(samples, lowest, highest)] = ask(
        engine,
        f"SELECT sum(samples), min(power_min), max(power_max) FROM gpu_hours WHERE timestamp_epoch < {NOW - DAY}",
    )
    assert (samples, lowest, highest) == (600, 1000, 2000)
    # As rollups they are kept: forgetting takes none of them.
    retention.forget(engine, retention.Keep(3, 30, 730), NOW, pause_s=0)
    assert ask(engine, "SELECT count(*) FROM gpu_minutes WHERE power = 1000") == [(30,)]
    assert not importer.run(settings, file.path, now=NOW).taken["ticks"]


def test_every_age_goes_where_it_is_kept(engine: sa.Engine, settings: Settings, file: Original) -> None:
    ages = {"raw": DAY, "minutes": 10 * DAY, "hours": 100 * DAY, "nothing": 1000 * DAY}
    for age in sorted(ages.values(), reverse=True):
        file.ticks(range(NOW - age, NOW - age + 1200, INTERVAL_S))
        file.seen(7, "train", range(NOW - age, NOW - age + 1200, INTERVAL_S))
    file.ticks([NOW + DAY])
    report = importer.run(settings, file.path, now=NOW)
    assert report.taken == {"ticks": 900, "processes": 3, "snapshots": 900}
    old, future = report.left_out
    assert old.startswith("300 ticks, 300 process snapshots: older than everything")
    assert future == "1 ticks: in the future"
    counts = [
        ask(engine, f"SELECT count(*), coalesce(sum(samples), 0) FROM {table} WHERE power = 1000")[0]
        for table in ("gpu_minutes", "gpu_hours")
    ]
    assert counts == [(40, 600), (3, 900)]
    assert ask(engine, "SELECT count(*) FROM gpu_metrics WHERE power = 100") == [(300,)]
    assert ask(engine, "SELECT sum(seconds) FROM process_hours") == [(3600.0,)]
    before = everything(engine)
    assert not any(importer.run(settings, file.path, now=NOW).taken.values())
    assert everything(engine) == before


def test_impossible_values_are_counted_and_left_out(engine: sa.Engine, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "odd.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE gpu_metrics (timestamp_epoch, temperature, utilization, memory, power)")
    connection.execute("CREATE TABLE process_snapshots (timestamp_epoch, pid, process_name, memory_usage)")
    at = NOW - 400
    rows = [
        (at, 60, 50, 1000, 0),
        (at + 4, "60", float("inf"), -1, 1e9),
        (at + 8, None, 101, b"x", 100.0),
        ("noon", 60, 50, 1000, 100),
        (None, 60, 50, 1000, 100),
        (at + 12, 60.0, 50.0, 30000.0, 100.0),
    ]
    connection.executemany("INSERT INTO gpu_metrics VALUES (?, ?, ?, ?, ?)", rows)
    names = [
        *[(at, 7, "a\0b", 10.0), (at, 8, "x" * 100_000, 0), (at, 9, b"bytes", 10.0), (at, -1, "no", 1.0)],
        *[(at, 2**40, "no", 1.0), (at, 10, "\ud83e", 5.0), (at, 11, "many", 1e300), (at, "7", "text", 1.0)],
    ]
    for name in names:
        try:
            connection.execute("INSERT INTO process_snapshots VALUES (?, ?, ?, ?)", name)
        except UnicodeEncodeError:
            connection.execute(
                "INSERT INTO process_snapshots VALUES (?, ?, CAST(x'ffc3' AS TEXT), ?)", (*name[:2], 5)
            )
    connection.commit()
    report = importer.run(settings, path, now=NOW)
    query = "SELECT temperature, utilization, memory, power FROM gpu_metrics WHERE timestamp_epoch < "
    assert ask(engine, f"{query} {NOW} ORDER BY timestamp_epoch") == [
        (60, 50, 1000, None),
        (None, None, None, 100),
        (60, 50, None, 100),
    ]
    assert ask(engine, "SELECT pid, name, max_memory FROM gpu_processes ORDER BY pid") == [
        *[(7, "a", 10), (8, "x" * 512, None)],
        (10, "\ufffd\ufffd", 5),
        (11, "many", None),
    ]
    assert report.left_out == [
        "2 ticks: without a possible time",
        "1 values of memory: more than this GPU has",
        "1 impossible values of a process's memory",
        "2 impossible values of memory",
        "1 impossible values of power",
        "2 impossible values of temperature",
        "2 impossible values of utilization",
        "4 process snapshots without a possible GPU, PID or name",
        "1 readings without a possible value",
    ]


def test_several_gpus_go_to_theirs(engine: sa.Engine, settings: Settings, tmp_path: Path) -> None:
    record(engine, range(NOW + 4, NOW + 5), GPUS)
    file = Original(tmp_path / "gpu_metrics.db", "several")
    times = span(400)
    for index in range(3):
        file.ticks(times, index, temperature=50.0 + index)
    for index in range(2):
        file.seen(7, "train", times, 500.0 + index, index)
    report = importer.run(settings, file.path, now=NOW)
    assert report.taken == {"ticks": 200, "processes": 1, "snapshots": 200}
    assert report.left_out == ["100 ticks of GPU 2 and its processes: here has no GPU 2; choose with --gpu 2=GPU"]
    query = "SELECT gpu_id, min(temperature), max(temperature) FROM gpu_metrics WHERE power = 100 "
    assert ask(engine, query + "GROUP BY 1 ORDER BY 1") == [(1, 50, 50), (2, 51, 51)]
    assert ask(engine, "SELECT max_memory, sample_count FROM gpu_processes") == [(1001, 100)]
    assert ask(engine, "SELECT gpu_id, max_memory FROM process_gpus ORDER BY 1") == [(1, 500), (2, 501)]


PLACES = [
    Place(3, 0, "GPU-aa1", "A6000", 49140, 0, 0),
    Place(5, 1, "GPU-aa2", "A100", 40960, 0, 0),
]


@pytest.mark.parametrize(
    ("indices", "several", "named", "given", "chosen"),
    [
        ([0], False, [], ["1"], {0: 5}),
        ([0], False, [], ["GPU-aa1"], {0: 3}),
        ([0], False, [], ["id:5"], {0: 5}),
        ([0], False, [], ["gpu-AA2"], {0: 5}),
        ([0], False, [], ["here/1"], {0: 5}),
        ([0], False, [NamedGpu(0, "A100")], [], {0: 5}),
        ([0, 1], True, [], [], {0: 3, 1: 5}),
        ([0, 1], True, [], ["0=1", "1=GPU-aa1"], {0: 5, 1: 3}),
        (
            [0, 1],
            True,
            [NamedGpu(0, "A100", "GPU-aa2"), NamedGpu(1, "x", "GPU-aa1")],
            [],
            {0: 5, 1: 3},
        ),
        ([0, 1], True, [NamedGpu(0, "H100", "GPU-bb")], [], {1: 5}),
    ],
)
def test_the_right_gpu_is_chosen(
    indices: list[int],
    several: bool,
    named: list[NamedGpu],
    given: list[str],
    chosen: dict[int, int],
) -> None:
    found = importer.choose(indices, several, named, PLACES, given, "here")
    assert {index: place.id for index, place in found.places.items()} == chosen
    assert set(found.unplaced) == set(indices) - set(chosen)


@pytest.mark.parametrize(
    ("indices", "several", "named", "given", "says"),
    [
        ([0], False, [], [], "several that it may be"),
        ([0], False, [NamedGpu(0, "RTX 3090")], [], "'RTX 3090', which here does not have"),
        ([0], False, [], ["GPU-aa"], "means several"),
        ([0], False, [], ["7"], "there is no GPU 7; there are here/0 (A6000, GPU-aa1), here/1 ("),
        ([0], False, [], [""], "there is no GPU"),
        ([0, 1], True, [], ["1"], "say for each"),
        ([0, 1], True, [], ["4=1"], "tells of GPU 0, 1, not of 4"),
        ([0, 1], True, [], ["0=1"], "two GPUs of the file would be one"),
        ([4], True, [], [], "has no GPU 4"),
    ],
)
def test_a_gpu_that_cannot_be_known_is_asked_for(
    indices: list[int], several: bool, named: list[NamedGpu], given: list[str], says: str
) -> None:
    with pytest.raises(importer.ImportRefused) as caught:
        importer.choose(indices, several, named, PLACES, given, "here")
    assert says in str(caught.value)
    assert caught.value.status == 2


def test_what_lies_beside_the_file_names_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    config = tmp_path / "gpu_config.json"
    config.write_text('{"gpu_name": "NVIDIA GeForce RTX 3090"}')
    for place in (tmp_path / "gpu_metrics.db", tmp_path / "history" / "gpu_metrics.db"):
        assert named_gpus(place) == [NamedGpu(0, "NVIDIA GeForce RTX 3090")]
    config.write_text(json.dumps({"gpus": [{"index": 1, "uuid": "GPU-x", "name": "GPU"}, {"index": "a"}, 3]}))
    assert named_gpus(tmp_path / "gpu_metrics.db") == [NamedGpu(1, None, "GPU-x")]
    for nonsense in (b"", b"[1]", b"\xff\xfe{", b'{"gpu_name": 3}', b"[" * 100_000):
        config.write_bytes(nonsense)
        assert named_gpus(tmp_path / "gpu_metrics.db") == []


def test_a_dry_run_counts_the_same_and_changes_nothing(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    file.ticks(span(1200))
    file.seen(7, "train", span(1200))
    file.counted(8, "gone", NOW - 2 * DAY, NOW - DAY, 1000, 300.0, 400.0)
    before = everything(engine)
    dry = importer.run(settings, file.path, dry=True, now=NOW)
    assert everything(engine) == before
    assert dry == importer.run(settings, file.path, now=NOW)
    assert dry.taken["processes"] == 2


def test_a_run_that_was_broken_off_is_sound_and_completed_by_the_next(
    engine: sa.Engine, settings: Settings, file: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing_module, "BATCH_ROWS", 60)
    file.ticks(span(1200))
    file.seen(7, "train", span(1200))
    commit, done = placing_rows.Rows.commit, []

    def failing(self: placing_rows.Rows, *given: object) -> object:
        result = commit(self, *given)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == 5:
            # After everything was written and before it is committed.
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(placing_rows.Rows, "commit", failing)
    with pytest.raises(KeyboardInterrupt):
        importer.run(settings, file.path, now=NOW)
    [(ticks, noted)] = ask(
        engine, "SELECT (SELECT count(*) FROM gpu_metrics WHERE power = 100), (SELECT sum(ticks) FROM imports)"
    )
    assert 0 < ticks == noted < 300
    assert ask(engine, "SELECT sum(seconds) FROM process_hours") == [(ticks * 4.0,)]
    assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 300 - ticks
    assert ask(engine, "SELECT sample_count, seconds FROM gpu_processes") == [(300, 1200.0)]
    assert ask(engine, "SELECT sum(seconds) FROM process_hours") == [(1200.0,)]
    assert ask(engine, "SELECT sum(samples) FROM gpu_minutes WHERE power = 1000") == [(300,)]


def test_what_is_taken_at_the_turn_of_an_hour_is_no_tick_of_our_own(
    engine: sa.Engine, settings: Settings, file: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tick is committed before the next is judged."""
    monkeypatch.setattr(placing_module, "BATCH_ROWS", 1)
    file.ticks(range(NOW - 1800 - 80, NOW - 1800 + 80, 4))
    assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 40


def test_the_half_hour_in_which_a_recorder_works_gets_both(
    database_url: str, settings: Settings, file: Original
) -> None:
    """It began with the half hour nearly gone, and goes on while what was before is imported."""
    engine = database.open_for_writing(database_url)
    own = Writer(engine, "here", "nvml", INTERVAL_S)
    values = {"temperature": 40.0, "utilization": 10.0, "memory": 2000, "power": 200.0}

    def tick(at: int) -> None:
        own.write(Snapshot(at, HostInfo("here"), GPUS[:1], (GpuReading("GPU-00", values),)), {})

    tick(NOW - 100)
    file.ticks(range(NOW - 600, NOW - 200, 4))
    importer.run(settings, file.path, now=NOW)
    tick(NOW - 96)
    assert ask(engine, "SELECT seconds, energy_j FROM gpu_usage") == [(408.0, 400 * 100 + 8 * 200)]


def test_energy_that_a_counter_has_told_of_is_not_told_again(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    own = Writer(engine, "here", "nvml", INTERVAL_S)
    for at, joules in ((NOW - 3000, 1000.0), (NOW - 100, 301_000.0)):
        values = {"temperature": 40.0, "utilization": 10.0, "power": 100.0, "energy": joules}
        own.write(Snapshot(at, HostInfo("here"), GPUS[1:], (GpuReading("GPU-11", values),)), {})
    file.ticks(range(NOW - 2000, NOW - 1000, 4))
    importer.run(settings, file.path, ["1"], now=NOW)
    [(energy, busy)] = ask(engine, "SELECT sum(energy_j), sum(busy_s) FROM gpu_usage WHERE gpu_id = 2")
    assert energy == pytest.approx(300_400, abs=500)
    assert busy == pytest.approx(500, abs=5)


# ---- Files that are something else -----------------------------------------------------------------------


def no_sqlite(path: Path) -> None:
    path.write_text("temperature,utilization\n" * 100)


def empty(path: Path) -> None:
    path.touch()


def cut_header(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def tables(*statements: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with sqlite3.connect(path) as connection:
            for statement in statements:
                connection.execute(statement)

    make.__name__ = statements[0][:40]
    return make


READINGS = "timestamp_epoch, temperature, utilization, memory, power"


def own_database(path: Path) -> None:
    database.open_for_writing(f"sqlite:///{path}").dispose()


def torn(path: Path) -> None:
    file = Original(path)
    file.ticks(span(8000))
    file.connection.close()
    content = bytearray(path.read_bytes())
    content[3 * 4096 : 12 * 4096] = b"\xff" * (9 * 4096)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (no_sqlite, "is not a SQLite file"),
        (empty, "is not a SQLite file"),
        (cut_header, "is not a SQLite file"),
        (folder, "is not a file"),
        (pipe, "is not a file"),
        (own_database, "is a database of gpumon itself"),
        (torn, "It is damaged"),
        (tables("CREATE TABLE other (x)"), "it has no table gpu_metrics"),
        (
            tables("CREATE TABLE gpu_metrics (timestamp_epoch, power)"),
            "no column temperature, utilization, memory",
        ),
        (
            tables(
                "CREATE TABLE t (x)",
                f"CREATE VIEW gpu_metrics AS SELECT {', '.join('x AS ' + c for c in READINGS.split(', '))} FROM t",
            ),
            "is not an ordinary table",
        ),
        (
            tables(f"CREATE TABLE gpu_metrics ({READINGS})", "CREATE TABLE process_snapshots (pid)"),
            "process_snapshots has no column",
        ),
        (tables("CREATE VIRTUAL TABLE gpu_metrics USING fts5(" + READINGS + ")"), "is not an ordinary table"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_another_file_is_one_sentence(
    tmp_path: Path,
    make: Callable[[Path], None],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPUMON_DATA_DIR", str(tmp_path / "history"))
    monkeypatch.setenv("GPUMON_HOST_NAME", "here")
    chosen = load()
    engine = database.open_for_writing(chosen.real_database_url)
    record(engine, range(NOW, NOW + 1))
    before = everything(engine)
    path = tmp_path / "gpu_metrics.db"
    make(path)
    command = [sys.executable, "-m", "gpumon_core", "import", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    assert (shown.returncode, shown.stdout) == (1, "")
    [line] = shown.stderr.splitlines()
    assert line.startswith(f"gpumon: {path}")
    assert says in line
    assert everything(engine) == before


def test_triggers_and_views_beside_the_tables_do_nothing(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    """The oldest files have a view of their own."""
    file.execute("CREATE VIEW history_json_view AS SELECT json_group_array(timestamp) FROM gpu_metrics")
    file.execute("CREATE TRIGGER t AFTER INSERT ON gpu_metrics BEGIN DELETE FROM gpu_metrics; END")
    file.execute("DROP TRIGGER t")
    file.ticks(span(40))
    file.execute("CREATE TRIGGER t AFTER INSERT ON gpu_metrics BEGIN DELETE FROM gpu_metrics; END")
    assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 10


def test_a_file_of_readings_only_is_taken(engine: sa.Engine, settings: Settings, tmp_path: Path) -> None:
    file = Original(tmp_path / "early.db", "readings")
    file.ticks(span(400))
    assert importer.run(settings, file.path, now=NOW).taken == {"ticks": 100, "processes": 0, "snapshots": 0}


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("left", ["rolled up", "log", "journal"])
def test_the_file_and_what_lies_beside_it_stay_as_they_are(
    engine: sa.Engine, settings: Settings, tmp_path: Path, left: str
) -> None:
    """Whether its program ended well, or was killed with a log or a journal behind it."""
    there = tmp_path / "there"
    there.mkdir()
    file = Original(tmp_path / "live.db")
    if left == "log":
        file.execute("PRAGMA journal_mode = WAL")
    file.ticks(span(400))
    name = there / "gpu_metrics.db"
    if left == "journal":
        file.connection.execute("PRAGMA cache_size = 2")
        file.connection.execute("BEGIN")
        file.connection.execute("UPDATE gpu_metrics SET power = 1")
        file.connection.executemany(
            "INSERT INTO gpu_metrics (timestamp, timestamp_epoch, temperature, utilization, memory, power) "
            "VALUES (?, ?, 1, 1, 1, 1)",
            [("x" * 2000, NOW - 500)] * 300,
        )
        shutil.copy(tmp_path / "live.db-journal", there / "gpu_metrics.db-journal")
    if left == "log":
        shutil.copy(tmp_path / "live.db-wal", there / "gpu_metrics.db-wal")
    shutil.copy(file.path, name)
    before = digest(there)
    report = importer.run(settings, name, now=NOW)
    assert report.taken["ticks"] == 100
    assert ask(engine, "SELECT count(*) FROM gpu_metrics WHERE power = 100") == [(100,)]
    assert digest(there) == before


def test_a_file_of_another_user_in_a_folder_of_another_user_is_read(
    engine: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    file = Original(there / "gpu_metrics.db")
    file.execute("PRAGMA journal_mode = WAL")
    file.ticks(span(400))
    file.connection.close()
    for path in (file.path, there):
        path.chmod(0o555)
    try:
        assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 100
        assert [path.name for path in there.iterdir()] == ["gpu_metrics.db"]
    finally:
        there.chmod(0o755)


def write_in_wal_mode(path: Path, times: Iterable[int], padding: int = 0) -> None:
    """A program that opens the file for every batch: at its end SQLite takes the log away."""
    with closing(sqlite3.connect(path, timeout=30)) as connection, connection:
        connection.execute("CREATE TABLE IF NOT EXISTS other (x)")
        # All pages move.
        connection.execute("DELETE FROM other")
        connection.executemany("INSERT INTO other VALUES (?)", [("x" * 3000,)] * padding)
        connection.executemany(
            "INSERT INTO gpu_metrics (timestamp, timestamp_epoch, temperature, utilization, memory, power) "
            "VALUES ('', ?, 60, 50, 1000, 100)",
            [(at,) for at in times],
        )


def test_a_file_that_is_written_to_between_two_questions_is_read_as_it_is_then(file: Original) -> None:
    file.execute("PRAGMA journal_mode = WAL")
    file.ticks(span(4000))
    file.connection.close()
    with original.Original(file.path) as reader:
        assert len(list(reader.ticks(0, NOW))) == 1000
        write_in_wal_mode(file.path, span(400, NOW + 400), padding=200)
        assert len(list(reader.ticks(0, NOW + 400))) == 1100
        assert reader.contents().last == NOW + 396
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["gpu_metrics.db"]


# Opens the file for every batch, in a process of its own: a process that closes a file gives up its locks on it.
IN_BATCHES = f"""
import contextlib, itertools, sqlite3, sys, time
for number in itertools.count():
    began = time.monotonic()
    with contextlib.closing(sqlite3.connect(sys.argv[1], timeout=30)) as connection, connection:
        connection.execute("DELETE FROM gpu_metrics WHERE timestamp_epoch > {NOW}")
        connection.executemany(
            "INSERT INTO gpu_metrics (timestamp, timestamp_epoch, temperature, utilization, memory, power) "
            "VALUES (?, ?, 60, 50, 1000, 100)",
            [("x" * 3000, {NOW} + 4 * at) for at in range(1, number % 7 * 100 + 2)],
        )
    print(flush=True)
    # Quiet for longer than a reader needs, on a slow machine too.
    time.sleep(max(0.08, 8 * (time.monotonic() - began)))
"""


def test_a_sound_file_is_never_called_damaged_while_its_program_opens_and_closes_it(
    file: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.execute("PRAGMA journal_mode = WAL")
    file.execute("CREATE INDEX at ON gpu_metrics (timestamp_epoch)")
    file.ticks(span(8000))
    file.connection.close()
    monkeypatch.setattr(original, "PAGE_ROWS", 100)
    command = [sys.executable, "-c", IN_BATCHES, str(file.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writing:
        assert writing.stdout is not None
        writing.stdout.readline()
        try:
            for _ in range(40):
                with original.Original(file.path) as reader:
                    assert len([tick for tick in reader.ticks(0, NOW + DAY) if tick.at < NOW]) == 2000
        finally:
            writing.kill()


def test_a_file_that_is_always_written_to_is_to_be_read_again(
    file: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.execute("PRAGMA journal_mode = WAL")
    file.ticks(span(400))
    file.connection.close()
    monkeypatch.setattr(original_file, "RETRY_S", 0.0)
    states = itertools.count()
    monkeypatch.setattr(original_file, "_state", lambda path: (0, 0, 0, next(states)))
    with pytest.raises(original_file.OriginalError, match=r"was written to while it was read.* Run it again"):
        original.Original(file.path)


# ---- The command -------------------------------------------------------------------------------------------


@pytest.fixture
def environ(tmp_path: Path, fake: FakeNvml) -> dict[str, str]:
    ours = {"GPUMON_DATA_DIR": str(tmp_path / "history"), "GPUMON_HOST_NAME": "here", "GPUMON_INTERVAL": "1"}
    return {**os.environ, **environment(fake), **ours}


def gpumon(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpumon_core", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False
    )


def test_on_a_new_installation_the_driver_says_which_gpus_there_are(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu(name="NVIDIA RTX A6000")
    file = Original(tmp_path / "gpu_metrics.db")
    now = int(time.time())
    # Up to this moment, and gpumon is to take a tick a minute: what the driver says now is no tick of that.
    environ["GPUMON_INTERVAL"] = "60"
    file.ticks(range(now - 4000, now, 4))
    file.seen(7, "train", range(now - 4000, now, 4))
    dry = gpumon(environ, "import", str(file.path), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "Would be taken: 1,000 ticks, 1 processes, 1,000 process snapshots. Nothing was changed." in dry.stdout
    assert not (tmp_path / "history").exists()
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 0, done.stderr
    assert "it is about GPU 0, NVIDIA RTX A6000, GPU-" in done.stdout
    assert "Taken: 1,000 ticks, 1 processes, 1,000 process snapshots, in " in done.stdout
    again = gpumon(environ, "import", str(file.path))
    assert (
        "Nothing in it is new.\nLeft out:\n  1,000 ticks, 1,000 process snapshots: imported before\n"
        in again.stdout
    )


def test_without_gpus_it_says_what_comes_first(environ: dict[str, str], fake: FakeNvml, tmp_path: Path) -> None:
    fake.driver_loaded = False
    file = Original(tmp_path / "gpu_metrics.db")
    file.ticks(span(40))
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "gpumon has recorded no GPU of here yet" in line
    assert "start gpumon" in line


def test_a_driver_that_fails_while_it_is_asked_is_told_in_whole_sentences(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu()
    fake.fail("nvmlDeviceGetUtilizationRates", pynvml.NVML_ERROR_UNINITIALIZED)
    file = Original(tmp_path / "gpu_metrics.db")
    file.ticks(span(40))
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "the driver does not say which GPUs there are" in line
    assert line.endswith(".")
    assert not line.endswith("..")


def test_where_there_are_several_gpus_it_lists_them_and_asks(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu(name="NVIDIA RTX A6000")
    fake.add_gpu(name="NVIDIA A100")
    file = Original(tmp_path / "gpu_metrics.db")
    now = int(time.time())
    file.ticks(range(now - 400, now - 60, 4))
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "GPU 0, NVIDIA RTX A6000, GPU-" in line
    assert "GPU 1, NVIDIA A100, GPU-" in line
    assert "Choose with --gpu GPU-" in line
    assert ". (see" not in line
    assert gpumon(environ, "import", str(file.path), "--gpu", "1").returncode == 0


def test_an_import_that_is_refused_makes_no_database(
    environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu()
    file = Original(tmp_path / "gpu_metrics.db")
    file.ticks(range(int(time.time()) - 400, int(time.time()) - 60, 4))
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE things (a)")
    text = tmp_path / "notes.txt"
    text.write_text("no database")
    folder = Path(environ["GPUMON_DATA_DIR"])
    left = sorted(folder.rglob("*"))
    for words in (
        (other,),
        (text,),
        (tmp_path / "none.db",),
        (file.path, "--gpu", "7"),
        (file.path, "--gpu", "3=0"),
    ):
        done = gpumon(environ, "import", *map(str, words))
        assert done.returncode in (1, 2), (words, done.stdout)
        assert sorted(folder.rglob("*")) == left, words
    assert gpumon(environ, "import", str(file.path), "--gpu", "0").returncode == 0
    assert (folder / "gpumon.db").is_file()


def test_a_killed_import_is_completed_by_the_next_while_a_recorder_works(
    serve: Callable[..., Server], environ: dict[str, str], fake: FakeNvml, tmp_path: Path
) -> None:
    fake.add_gpu()
    server = serve(fake, GPUMON_HOST_NAME="here").ready()
    file = Original(tmp_path / "gpu_metrics.db")
    now = int(time.time())
    times = range(now - 30_000, now - 60, 2)
    file.ticks(times)
    for pid in (7, 8, 9):
        with file.connection:
            file.connection.executemany(
                "INSERT INTO process_snapshots VALUES (NULL, ?, ?, ?, ?)",
                [(at, pid, "train", 500.0 + at % 50) for at in times],
            )
    command = [sys.executable, "-m", "gpumon_core", "import", str(file.path)]
    running = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)
    reader = database.open_for_reading(f"sqlite:///{tmp_path / 'history' / 'gpumon.db'}")
    eventually(lambda: ask(reader, "SELECT count(*) FROM imports") != [(0,)], every_s=0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert ask(reader, "PRAGMA integrity_check") == [("ok",)]
    [(before,)] = ask(reader, "SELECT sum(ticks) FROM imports")
    assert 0 < before < len(times)
    done = gpumon(environ, "import", str(file.path))
    assert done.returncode == 0, done.stderr
    assert ask(reader, "SELECT sum(ticks) FROM imports") == [(len(times),)]
    assert (
        ask(reader, "SELECT sample_count FROM gpu_processes WHERE start_key LIKE 'imported %'")
        == [(len(times),)] * 3
    )
    assert gpumon(environ, "import", str(file.path)).stdout.count("Nothing in it is new.") == 1
    _, answer = server.health()
    assert server.health()[0] == 200, answer
    server.stop()
    assert "database does not take ticks" not in server.log.read_text()


def test_two_imports_at_once_are_one_after_the_other(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    file.ticks(span(400))
    with importer._alone(settings.real_database_url, "here", False):
        refused = []

        def other() -> None:
            with pytest.raises(importer.ImportRefused) as caught:
                importer.run(settings, file.path, now=NOW)
            refused.append(str(caught.value))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "importing into" in refused[0]
    assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 100


# ---- What is still to be imported ---------------------------------------------------------------------------


def stands(engine: sa.Engine, path: Path) -> importer.Standing:
    with original.Original(path) as reader:
        return importer.standing(engine, "here", path, reader.indices(), reader.contents())


def test_another_file_of_the_same_name_was_not_imported(
    engine: sa.Engine, settings: Settings, tmp_path: Path, file: Original
) -> None:
    file.ticks(span(400))
    importer.run(settings, file.path, now=NOW)
    (tmp_path / "other").mkdir()
    other = Original(tmp_path / "other" / "gpu_metrics.db")
    other.ticks(span(200, NOW - 200))
    assert stands(engine, file.path) == importer.Standing(span(400)[-1], True)
    assert stands(engine, other.path) == importer.Standing(None, False)


def test_a_file_is_imported_when_all_of_its_gpus_are(
    engine: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    file = Original(tmp_path / "gpu_metrics.db", "several")
    for index in (0, 1):
        file.ticks(span(400), index)
    # The host has one of them.
    importer.run(settings, file.path, now=NOW)
    assert stands(engine, file.path) == importer.Standing(span(400)[-1], False)
    record(engine, range(NOW + 4, NOW + 5), GPUS)
    importer.run(settings, file.path, now=NOW)
    assert stands(engine, file.path).whole


def test_a_file_of_which_nothing_is_new_is_offered_until_it_was_looked_at(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    record(engine, span(800))
    file.ticks(span(400))
    assert not stands(engine, file.path).whole
    assert not any(importer.run(settings, file.path, now=NOW).taken.values())
    assert stands(engine, file.path).whole


def test_a_file_that_grows_while_gpumon_records_has_nothing_new_until_there_is_a_gap(
    engine: sa.Engine, settings: Settings, file: Original
) -> None:
    begin = NOW - 2000
    file.ticks(range(begin, begin + 400, INTERVAL_S))
    importer.run(settings, file.path, now=NOW)
    record(engine, range(begin + 400, begin + 800, INTERVAL_S))
    file.ticks(range(begin + 400, begin + 800, INTERVAL_S))
    assert stands(engine, file.path).whole
    record(engine, range(begin + 1000, begin + 1200, INTERVAL_S))
    file.ticks(range(begin + 800, begin + 1200, INTERVAL_S))
    assert stands(engine, file.path) == importer.Standing(begin + 396, False)


def test_an_import_that_was_broken_off_says_how_far_it_came(
    engine: sa.Engine, settings: Settings, file: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing_module, "BATCH_ROWS", 60)
    file.ticks(span(1200))

    def interrupt(self: placing_module.Placer, until: int | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(placing_module.Placer, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        importer.run(settings, file.path, now=NOW)
    standing = stands(engine, file.path)
    assert standing.until is not None
    assert span(1200)[0] < standing.until < span(1200)[-1]
    assert not standing.whole


# ---- The page -----------------------------------------------------------------------------------------------


def test_the_system_page_offers_a_file_in_the_data_directory_and_never_touches_it(
    url: str,  # noqa: F811
    writer: Writer,  # noqa: F811
    tmp_path: Path,
) -> None:
    now = int(time.time())
    values = {"temperature": 40.0}
    writer.write(Snapshot(now, HostInfo("here"), GPUS[:1], (GpuReading("GPU-00", values),)), {})
    assert not any("import" in block.value for block in open_page("system").code)
    (tmp_path / "other.db").write_text("nothing")
    file = Original(tmp_path / "gpu metrics.db")
    file.ticks(range(now - 4000, now - 3000, 4))
    file.seen(7, "train", range(now - 4000, now - 3000, 4))
    before = digest(tmp_path)["gpu metrics.db"]
    st.cache_resource.clear()
    app = open_page("system")
    [command] = [block.value for block in app.code if "import" in block.value]
    assert command == f"{sys.executable} -m gpumon_core import '{tmp_path / 'gpu metrics.db'}'"
    shown = texts(app) + " ".join(str(element.value) for element in app.markdown)
    assert "250 ticks" in shown
    assert "Not imported" in shown
    assert digest(tmp_path)["gpu metrics.db"] == before
    assert ask(database.open_for_reading(url), "SELECT count(*) FROM imports") == [(0,)]
    done = importer.run(load(data_dir=tmp_path, host_name="here"), file.path)
    assert done.taken["ticks"] == 250
    st.cache_resource.clear()
    app = open_page("system")
    shown = texts(app) + " ".join(str(element.value) for element in app.markdown)
    assert "Imported." in shown
    assert not any("import" in block.value for block in app.code)
