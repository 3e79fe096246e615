"""The history, its copies and the log are for their owner alone, from the moment in which they are made."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from cli import PROGRAM, gpumon, record, settings
from conftest import PATIENCE_S, ROOT, eventually
from rig import free_port

from gpumon_core import logs
from gpumon_core.safety import private_files
from gpumon_core.store import database


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def modes(folder: Path) -> dict[str, int]:
    """Every file in a folder, and the folder itself under an empty name."""
    return {"": mode(folder)} | {path.name: mode(path) for path in folder.iterdir()}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A history as an older gpumon made it."""
    folder = tmp_path / "history"
    record(f"sqlite:///{folder / 'gpumon.db'}", 2).dispose()
    for name in ("gpumon.db.lock", "gpumon-20260102-030405.db", "demo.db", "demo.db-wal"):
        (folder / name).write_bytes(b"")
    (folder / "gpumon.db.damaged-20260102-030405").write_bytes(b"once")
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)
    return folder


def test_whatever_the_umask_nothing_that_gpumon_makes_is_for_others(tmp_path: Path) -> None:
    folder, port = tmp_path / "new" / "history", free_port()
    environ = settings(
        folder, GPUMON_SOURCE="demo", GPUMON_INTERVAL="1", GPUMON_LOG_FILE=str(tmp_path / "logs" / "gpumon.log")
    )
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=environ, umask=0, stderr=subprocess.DEVNULL) as server:
        try:
            for name in ("demo.db", "demo.db-wal", "demo.db-shm", "demo.db.lock"):
                eventually((folder / name).exists)
            eventually(lambda: database.exists(f"sqlite:///{folder / 'demo.db'}"))

            def answers() -> bool:
                try:
                    return urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").status == 200
                except OSError:
                    return False

            eventually(answers)
            out = tmp_path / "out"
            out.mkdir()
            for verb in (
                ("backup",),
                ("backup", "--out", str(out / "copy.db")),
                *(
                    ("export", "--table", "metrics", "--out", str(out / f"a.{kind}"))
                    for kind in ("csv", "parquet")
                ),
            ):
                subprocess.run([*PROGRAM, *verb], cwd=ROOT, env=environ, umask=0, timeout=PATIENCE_S, check=True)
            found = modes(folder)
            assert found.pop("") == 0o700
            assert len(found) >= 5
            assert set(found.values()) == {0o600}, found
            assert modes(tmp_path / "logs") == {"": 0o700, "gpumon.log": 0o600}
            assert set(modes(out).values()) - {mode(out)} == {0o600}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(PATIENCE_S)


def test_a_renamed_log_and_its_successor_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 2000)
    before = os.umask(0)
    ours = logging.getLogger("gpumon_core")
    handlers = ours.handlers[:]
    try:
        logs.configure("INFO", tmp_path / "logs" / "a.log")
        for _ in range(100):
            logging.getLogger("gpumon_core.test").info("a line that fills the file")
    finally:
        os.umask(before)
        for handler in ours.handlers:
            handler.close()
        ours.handlers[:] = handlers
    found = modes(tmp_path / "logs")
    assert found == {"": 0o700, **dict.fromkeys(("a.log", "a.log.1", "a.log.2", "a.log.3"), 0o600)}


def test_a_copy_of_a_database_that_everybody_reads_is_for_its_owner(wide: Path, tmp_path: Path) -> None:
    assert gpumon(settings(wide), "backup", "--out", str(tmp_path / "copy.db")).returncode == 0
    assert mode(tmp_path / "copy.db") == 0o600


def test_doctor_names_what_others_can_read_and_changes_it_only_with_fix(wide: Path) -> None:
    before = modes(wide)
    told = gpumon(settings(wide), "doctor")
    assert "can be read by other users" in told.stdout
    assert "doctor --fix" in told.stdout
    assert str(wide) in told.stdout
    assert modes(wide) == before
    fixed = gpumon(settings(wide), "doctor", "--fix")
    assert fixed.stdout.count("cannot be read by other users of this machine any more") == len(before)
    assert "can be read by" not in fixed.stdout
    assert modes(wide) == {"": 0o700, **dict.fromkeys(set(before) - {""}, 0o600)}
    with closing(sqlite3.connect(wide / "gpumon.db")) as connection:
        assert connection.execute("SELECT count(*) FROM gpu_metrics").fetchone() == (4,)
    again = gpumon(settings(wide), "doctor", "--fix")
    assert "corrected" not in again.stdout


def test_a_start_reports_it_in_the_log(wide: Path) -> None:
    environ = settings(wide, GPUMON_SOURCE="demo", GPUMON_LOG_LEVEL="WARNING")
    (wide / "demo.db").unlink()
    with subprocess.Popen(
        [*PROGRAM, "record"], cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True
    ) as recorder:
        try:
            assert recorder.stderr is not None
            assert "can be read by other users" in recorder.stderr.readline()
        finally:
            recorder.send_signal(signal.SIGTERM)
            recorder.communicate(timeout=PATIENCE_S)
    assert mode(wide / "gpumon.db") == 0o644


def test_of_a_folder_that_others_use_too_only_the_files_are_mended(wide: Path) -> None:
    (wide / "thesis.txt").write_text("mine")
    (wide / "thesis.txt").chmod(0o644)
    fixed = gpumon(settings(wide), "doctor", "--fix")
    assert mode(wide) == 0o755
    assert mode(wide / "thesis.txt") == 0o644
    assert mode(wide / "gpumon.db") == 0o600
    assert "other files are in it, too: 'thesis.txt'" in fixed.stdout


def test_neither_links_nor_names_elsewhere_nor_pipes_are_followed(wide: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    outside.chmod(0o644)
    (wide / "gpumon.db.a").symlink_to(outside)
    os.link(outside, wide / "gpumon.db.b")
    os.mkfifo(wide / "gpumon.db.c", 0o644)
    (wide / "gpumon.db.d").mkdir(0o755)
    fixed = gpumon(settings(wide), "doctor", "--fix")
    assert mode(outside) == 0o644
    assert mode(wide / "gpumon.db.d") == 0o755
    assert "a link leads there" in fixed.stdout
    assert "it has another name elsewhere" in fixed.stdout
    assert mode(wide / "gpumon.db") == 0o600


def test_a_folder_that_a_link_leads_to_is_named_and_left(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(wide)
    before = modes(wide)
    fixed = gpumon(settings(tmp_path / "link"), "doctor", "--fix")
    assert modes(wide) == before
    assert "a link leads there" in fixed.stdout


@pytest.mark.parametrize("what", ["home", "above", "sticky"])
def test_no_folder_of_the_system_or_of_a_user_is_changed(wide: Path, what: str) -> None:
    home = wide if what == "home" else wide / "gpumon.db" if what == "above" else wide.parent
    if what == "sticky":
        wide.chmod(0o1777)
    before = mode(wide)
    fixed = gpumon(settings(wide, HOME=str(home)), "doctor", "--fix")
    assert mode(wide) == before
    assert mode(wide / "gpumon.db") == 0o600
    assert "it is a folder of the system or of a user" in fixed.stdout


def test_files_of_another_user_are_named_and_not_changed(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    found = private_files.exposed([wide / "gpumon.db", wide / "demo.db"], None)
    assert {one.obstacle for one in found} == {"it belongs to another user"}
    for one in found:
        assert private_files.mend(one)
    assert mode(wide) == 0o755


def test_a_link_that_takes_the_place_of_a_file_meanwhile_is_not_followed(wide: Path, tmp_path: Path) -> None:
    found = {one.path.name: one for one in private_files.exposed([wide / "gpumon.db", wide / "demo.db"], None)}
    outside = tmp_path / "outside.txt"
    shutil.move(wide / "gpumon.db", outside)
    (wide / "gpumon.db").symlink_to(outside)
    assert private_files.mend(found["gpumon.db"]) == "it is a link"
    assert mode(outside) == 0o644


def test_who_may_look_by_an_access_list_goes_on_looking(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"an access list")
    for path in (wide, *wide.iterdir()):
        # The group's bits are the mask of the list.
        path.chmod(0o754 if path.is_dir() else 0o640)
    found = private_files.exposed([wide / "gpumon.db", wide / "demo.db"], None)
    assert [one.path for one in found] == [wide]
    assert private_files.mend(found[0]) == ""
    assert mode(wide) == 0o750
    assert private_files.exposed([wide / "gpumon.db", wide / "demo.db"], None) == []
