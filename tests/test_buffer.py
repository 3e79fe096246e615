"""Ticks that wait: in memory, bounded and in order; on disk while no recorder runs."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import crash
import pytest

from gpumon_core.attribution.records import NOTHING, Ask, ProcessIdentity, Program
from gpumon_core.recording import buffer
from gpumon_core.recording.buffer import FileFailed, TickBuffer
from gpumon_core.store.writer import Attributed


def ticks(*seconds: int) -> list[Attributed]:
    return [(replace(crash.tick(crash.FIRST + second), elapsed=float(second)), crash.WHO) for second in seconds]


def filled(most: int, *seconds: int) -> TickBuffer:
    made = TickBuffer(most)
    for tick in ticks(*seconds):
        made.add(tick)
    return made


def waiting(found: TickBuffer) -> list[int]:
    return [second - crash.FIRST for second in found.seconds()]


def test_the_oldest_tick_makes_room_unless_it_is_being_written() -> None:
    made = filled(3, 1, 2, 3)
    assert [int(tick[0].timestamp) - crash.FIRST for tick in made.take(50)] == [1], "a part of it only"
    assert made.add(ticks(4)[0]) == 1
    assert waiting(made) == [1, 3, 4]
    made.put_back()
    assert waiting(made) == [1, 3, 4], "what was not committed is there again, in order"
    made.take(1)
    made.done()
    assert waiting(made) == [3, 4]
    assert len(made) == 2


def test_what_waits_is_stored_and_read_as_it_was(tmp_path: Path) -> None:
    made = filled(9, 1, 2, 3)
    made.take(1)
    made.committed = crash.FIRST
    assert made.save(tmp_path, "waiting-x") == 3
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = buffer.saved(tmp_path, "waiting-x")
    assert found.ticks == ticks(1, 2, 3)
    assert (found.committed, found.files, found.problems) == (crash.FIRST, [path], [])
    assert all(isinstance(value, int) for value in (found.ticks[0][0].processes[0].memory_mib,))
    assert buffer.saved(tmp_path, "waiting-y").ticks == []


def test_an_identity_keeps_what_is_known_and_asks_nobody_later(tmp_path: Path) -> None:
    known = ProcessIdentity(7, "boot:7", 1.5, "train.py", "ada", Program(command="python train.py"), True, Ask())
    snapshot = crash.tick(crash.FIRST)
    made = TickBuffer(9)
    made.add((snapshot, {7: known, 8: ProcessIdentity(8)}))
    made.save(tmp_path, "waiting-x")
    (tick,) = buffer.saved(tmp_path, "waiting-x").ticks
    assert tick[1][7] == replace(known, ask=None, pending=False)
    assert tick[1][7].ask is None
    assert tick[1][8].program is NOTHING


def test_after_a_reboot_nothing_is_known_of_the_time_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(9, 1).save(tmp_path, "waiting-x")
    assert buffer.saved(tmp_path, "waiting-x").ticks[0][0].elapsed == 1.0
    other = tmp_path / "boot_id"
    other.write_text("another\n")
    monkeypatch.setattr(buffer, "BOOT_ID", other)
    assert buffer.saved(tmp_path, "waiting-x").ticks[0][0].elapsed is None
    # Without an id of the boot no two runs of the machine count as the same.
    monkeypatch.setattr(buffer, "BOOT_ID", tmp_path / "missing")
    filled(9, 2).save(tmp_path, "waiting-z")
    assert buffer.saved(tmp_path, "waiting-z").ticks[0][0].elapsed is None


@pytest.mark.parametrize("data", [b"", b"\x00", b"nonsense", b"\xc1" * 100, b"\x80", b"\x94\xa0\xc0\x90\x90"])
def test_a_file_that_is_none_of_ours_is_named_and_costs_no_other(tmp_path: Path, data: bytes) -> None:
    filled(9, 5).save(tmp_path, "waiting-x")
    bad = tmp_path / "waiting-x-bad.ticks"
    bad.write_bytes(data)
    found = buffer.saved(tmp_path, "waiting-x")
    assert found.ticks == ticks(5)
    assert len(found.problems) == 1
    assert str(bad) in found.problems[0]
    assert bad.with_suffix(".unreadable").read_bytes() == data, "nothing is deleted"
    assert buffer.saved(tmp_path, "waiting-x").problems == [], "and it is not read again"


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "sparse"])
def test_what_is_no_file_of_ticks_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    filled(9, 5).save(tmp_path, "waiting-x")
    bad = tmp_path / "waiting-x-bad.ticks"
    if kind == "pipe":
        os.mkfifo(bad)
    elif kind == "link":
        bad.symlink_to("/dev/zero")
    elif kind == "folder":
        bad.mkdir()
    else:
        bad.touch()
        os.truncate(bad, 1 << 42)
    found = buffer.saved(tmp_path, "waiting-x")
    assert found.ticks == ticks(5)
    assert str(bad) in found.problems[0]
    assert buffer.saved(tmp_path, "waiting-x").problems == []


def test_several_files_are_read_in_the_order_of_their_ticks(tmp_path: Path) -> None:
    for seconds in ((7, 8), (1, 2), (4,)):
        filled(9, *seconds).save(tmp_path, "waiting-x")
    found = buffer.saved(tmp_path, "waiting-x")
    assert [int(snapshot.timestamp) - crash.FIRST for snapshot, _ in found.ticks] == [1, 2, 4, 7, 8]


def test_a_folder_that_takes_nothing_is_an_error_that_says_so(tmp_path: Path) -> None:
    made = filled(9, 1)
    (tmp_path / "file").touch()
    with pytest.raises(FileFailed, match=r"Not a directory|File exists"):
        made.save(tmp_path / "file", "waiting-x")
    assert len(made) == 1
    # One that was removed meanwhile is made again.
    assert made.save(tmp_path / "missing", "waiting-x") == 1
    assert buffer.saved(tmp_path / "missing", "waiting-x").ticks == ticks(1)
