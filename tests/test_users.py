"""Whose a user id is, when the directory does not know it for a moment, and in a rootless container."""

from __future__ import annotations

import pwd
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PATIENCE_S, eventually
from test_attribution import FakeProc

from gpumon_core.attribution import local, users
from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.attribution.users import Owner, UserNames, id_inside, subordinate_owner

UID = 3_999_999_999


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    made = FakeProc(tmp_path / "proc")
    made.put(7, ticks=100, uid=UID)
    return made


def login(name: str) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", UID, UID, "", "/", "/bin/sh"))


def until_known(attribution: local.LocalAttribution, name: str) -> ProcessIdentity:
    return eventually(lambda: (found := attribution.identify({7}, 0)[7]).user == name and found)


def test_a_directory_that_does_not_know_a_user_for_a_moment_is_asked_again(
    proc: FakeProc, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def directory(uid: int) -> pwd.struct_passwd:
        asked.append(uid)
        if len(asked) < 4:
            raise KeyError(uid)
        return login("ada")

    monkeypatch.setattr(pwd, "getpwuid", directory)
    attribution = proc.attribution()
    first = attribution.identify({7}, 0)[7]
    assert first.user == str(UID), "not known is its number"
    found = until_known(attribution, "ada")
    assert (found.start_key, found.program) == (first.start_key, first.program)
    assert attribution.identify({7}, 0)[7] is found, "nothing new is known, and nobody need look"
    assert asked == [UID] * 4, "a name that is known is not asked for again"


def test_a_directory_that_hangs_does_not_hold_up_a_tick(proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    by: set[str] = set()

    def directory(uid: int) -> pwd.struct_passwd:
        by.add(threading.current_thread().name)
        hangs.wait(PATIENCE_S)
        return login("ada")

    monkeypatch.setattr(pwd, "getpwuid", directory)
    monkeypatch.setattr(users, "PATIENCE_S", 0.01)
    attribution = proc.attribution()
    for _ in range(100):
        assert attribution.identify({7}, 0)[7].user == str(UID)
    hangs.set()
    until_known(attribution, "ada")
    assert by == {"user name"}


def test_an_unknown_id_is_looked_up_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    asked: list[float] = []
    monkeypatch.setattr(users, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def directory(uid: int) -> Owner | None:
        asked.append(now[0])
        return None

    names = UserNames(directory)
    while now[0] < 3600:
        assert names.find(UID) is None
        assert names._thread is not None
        names._thread.join(PATIENCE_S)
        now[0] += 0.1
    pauses = [round(later - earlier) for earlier, later in pairwise(asked)]
    assert pauses == sorted(pauses)
    assert len(asked) < 25
    assert pauses[-1] == pytest.approx(users.LONGEST_PAUSE_S, abs=1)


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("ada:100000:65536\n", "ada"),
        ("# a comment\n\nbob:1:5\nada:100000:65536", "ada"),
        ("ada:100000:999\n", None),
        ("ada:101001:65536\n", None),
        ("3999999998:100000:65536\n", "3999999998"),
        ("0:100000:65536\n", "root"),
        ("ada:x:65536\nada:100000\nada\n:100000:65536\n", None),
        ("\xff\x00:100000:" + "9" * 50, None),
    ],
)
def test_an_id_of_a_container_belongs_to_whom_the_file_of_subordinate_ids_gives_it(
    tmp_path: Path, text: str, owner: str | None
) -> None:
    path = tmp_path / "subuid"
    path.write_text(text)
    assert subordinate_owner(101_000, str(path)) == owner
    assert subordinate_owner(101_000, str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("uid_map", "inside"),
    [
        (b"         0       1000          1\n         1     100000      65536\n", 1001),
        (b"0 101000 1\n", 0),
        (b"0 0 4294967295\n", None),
        (b"", None),
        (None, None),
        (b"x y z\n1 2\n", None),
    ],
)
def test_an_id_has_another_number_inside(uid_map: bytes | None, inside: int | None) -> None:
    assert id_inside(101_000, uid_map) == inside


@pytest.mark.parametrize(
    ("uid", "uid_map", "user"),
    [
        (UID, "0 1000 1\n1 3999999000 65536\n", "ada (1000 in the container)"),
        (UID, "0 3999999999 65536\n", "ada (root in the container)"),
        (UID, None, "ada"),
        (0, "0 0 4294967295\n", "root"),
    ],
)
def test_a_process_in_a_rootless_container_has_its_owner_and_the_containers_own_user(
    proc: FakeProc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, uid_map: str | None, user: str
) -> None:
    path = tmp_path / "subuid"
    path.write_text("ada:3999999000:65536\n")
    monkeypatch.setattr(users, "subordinate_owner", lambda uid: subordinate_owner(uid, str(path)))
    proc.put(7, ticks=100, uid=uid)
    if uid_map is not None:
        (proc.path / "7" / "uid_map").write_text(uid_map)
    assert proc.attribution().identify({7}, 0)[7].user == user
    assert local.user_name(UID) == "ada"
