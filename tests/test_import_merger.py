"""An import takes the original's history, and loses or changes nothing of either history."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import importing
import pytest
import sqlalchemy as sa
from importing import DAY, GPUS, HOUR, NOW, everything, record, span
from originals import INTERVAL_S, OriginalFile
from ticks import ask

from gpumon_core.legacy_import import batch_writer, importer, merger
from gpumon_core.settings import Settings, load
from gpumon_core.store import database, retention, rollups
from gpumon_core.store.queries import process_life, processes, usage
from gpumon_core.store.queries.history import metrics_history
from gpumon_core.store.queries.usage import Scope
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, HostInfo, ProcessReading, Snapshot

# The fixtures that these tests share.
engine, settings, file = importing.engine, importing.settings, importing.file


def test_ticks_processes_and_snapshots_are_taken_and_a_second_time_nothing(
    engine: sa.Engine, settings: Settings, file: OriginalFile
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


def test_every_page_has_the_imported_hours(engine: sa.Engine, settings: Settings, file: OriginalFile) -> None:
    times = range(NOW - 5 * HOUR - 1800, NOW - HOUR - 1800, INTERVAL_S)
    file.ticks(times, utilization=50.0, power=360.0)
    file.seen(7, "train", [at + 1 for at in times], 1500.0)
    file.seen(8, "serve", [at + 1 for at in times], 500.0)
    importer.run(settings, file.path, now=NOW)
    reader = database.open_for_reading(settings.real_database_url)
    drawn = metrics_history(reader, [1], ["utilization", "power"], times[0], times[-1], 100)
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
    engine: sa.Engine, settings: Settings, file: OriginalFile, tmp_path: Path
) -> None:
    """The same ticks give the same history, from the recorder or from an import."""
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
    monkeypatch.setattr(merger, "BATCH_ROWS", 100)
    times = range(NOW - HOUR, NOW - 60, INTERVAL_S)
    results = []
    for parts in ((times,), (times[:cut], times[cut:])):
        folder = tmp_path / str(len(parts))
        folder.mkdir()
        chosen = load(data_dir=folder, host_name="here")
        engine = database.open_for_writing(chosen.real_database_url)
        record(engine, range(NOW, NOW + 1))
        grown = OriginalFile(folder / "gpu_metrics.db")
        taken = 0
        for part in parts:
            for at in part:
                grown.ticks([at], utilization=float(at % 90))
                grown.seen(7, "train", [at + 1], 500.0 + at // 60 % 3)
            taken += importer.run(chosen, grown.path, now=NOW).taken["ticks"]
        assert taken == len(times)
        found = everything(engine)
        # Where a batch ends, what goes on is written once more; readers see the same.
        del found["process_snapshots"]
        # It has the path of the file.
        del found["imported_files"]
        results.append((found, process_life.ticks(engine, 1)))
    for table in results[0][0]:
        one, other = results[0][0][table], results[1][0][table]
        assert [pytest.approx(row, abs=0.2, nan_ok=True) for row in one] == other, table
    assert results[0][1].equals(results[1][1])


def test_a_reused_pid_is_two_processes_where_there_are_snapshots(
    engine: sa.Engine, settings: Settings, file: OriginalFile
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
    engine: sa.Engine, settings: Settings, file: OriginalFile
) -> None:
    times = [at for at in span(1200) if not NOW - 800 < at < NOW - 600]
    file.ticks(times)
    file.seen(7, "train", times)
    importer.run(settings, file.path, now=NOW)
    assert ask(engine, "SELECT count(*), max(sample_count) FROM gpu_processes") == [(1, len(times))]
    # What happened in the pause is not known: its time is not counted.
    [(seconds,)] = ask(engine, "SELECT seconds FROM gpu_processes")
    assert seconds == len(times) * INTERVAL_S


def test_what_was_before_the_snapshots_is_as_the_original_counted_it(
    engine: sa.Engine, settings: Settings, file: OriginalFile
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


def test_own_ticks_win(engine: sa.Engine, settings: Settings, file: OriginalFile) -> None:
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
    engine: sa.Engine, settings: Settings, file: OriginalFile
) -> None:
    old = NOW - 5 * DAY
    record(engine, range(old, old + 600, 4))
    rollups.roll_up(engine, "here", old)
    retention.forget(engine, retention.RetentionDays(3, 30, 730), NOW, pause_s=0)
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
    # The rollups hold them: retention deletes none of them.
    retention.forget(engine, retention.RetentionDays(3, 30, 730), NOW, pause_s=0)
    assert ask(engine, "SELECT count(*) FROM gpu_minutes WHERE power = 1000") == [(30,)]
    assert not importer.run(settings, file.path, now=NOW).taken["ticks"]


def test_every_age_goes_where_it_is_stored(engine: sa.Engine, settings: Settings, file: OriginalFile) -> None:
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
    file = OriginalFile(tmp_path / "gpu_metrics.db", "several")
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


def test_a_dry_run_counts_the_same_and_changes_nothing(
    engine: sa.Engine, settings: Settings, file: OriginalFile
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
    engine: sa.Engine, settings: Settings, file: OriginalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merger, "BATCH_ROWS", 60)
    file.ticks(span(1200))
    file.seen(7, "train", span(1200))
    commit, done = batch_writer.BatchWriter.commit, []

    def failing(self: batch_writer.BatchWriter, *given: object) -> object:
        result = commit(self, *given)  # type: ignore[arg-type]
        done.append(1)
        if len(done) == 5:
            # After everything was written and before it is committed.
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(batch_writer.BatchWriter, "commit", failing)
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
    engine: sa.Engine, settings: Settings, file: OriginalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tick is committed before the next is judged."""
    monkeypatch.setattr(merger, "BATCH_ROWS", 1)
    file.ticks(range(NOW - 1800 - 80, NOW - 1800 + 80, 4))
    assert importer.run(settings, file.path, now=NOW).taken["ticks"] == 40


def test_the_half_hour_in_which_a_recorder_works_gets_both(
    database_url: str, settings: Settings, file: OriginalFile
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


def test_energy_that_a_counter_has_covered_is_not_counted_again(
    engine: sa.Engine, settings: Settings, file: OriginalFile
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
