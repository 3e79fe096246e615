"""Who a process is, found from real processes and from /proc as the kernel writes it."""

from __future__ import annotations

import os
import pwd
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpumon_core.attribution.local import LocalAttribution


@pytest.fixture
def attribution() -> Iterator[LocalAttribution]:
    made = LocalAttribution(trusted=True)
    yield made
    made.close()


def stat(comm: bytes, start: int) -> bytes:
    """A line of /proc/PID/stat, see proc(5): the 22nd field is the start in clock ticks."""
    return b"7 (" + comm + b") S " + b" ".join(b"%d" % field for field in range(4, 22)) + b" %d 0 0\n" % start


def test_a_process_has_its_name_owner_and_start(attribution: LocalAttribution) -> None:
    started = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        found = attribution.identify({process.pid}, 0)[process.pid]
        process.kill()
    assert found.name == "sleep"
    assert found.user == pwd.getpwuid(os.getuid()).pw_name
    assert found.start_time == pytest.approx(started, abs=2)
    assert found.start_key


def test_a_long_name_is_not_cut_off(attribution: LocalAttribution, tmp_path: Path) -> None:
    program = tmp_path / "a-name-longer-than-fifteen"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        found = attribution.identify({process.pid}, 0)[process.pid]
        process.kill()
    assert found.name == "a-name-longer-than-fifteen"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start another user's process")
def test_another_users_process_is_named_with_its_owner(attribution: LocalAttribution) -> None:
    with subprocess.Popen(["sleep", "60"], user="nobody") as process:
        assert attribution.identify({process.pid}, 0)[process.pid].user == "nobody"
        process.kill()


def test_a_process_that_has_ended_stays_who_it_was(attribution: LocalAttribution) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        before = attribution.identify({process.pid}, 0)[process.pid]
        process.kill()
    assert attribution.identify({process.pid}, 0)[process.pid] == before


def test_a_running_process_is_read_once(attribution: LocalAttribution, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        first = attribution.identify({process.pid}, 0)
        monkeypatch.setattr(attribution, "_identify", lambda _: pytest.fail("read again"))
        assert attribution.identify({process.pid}, 0) == first
        process.kill()


def test_no_handle_outlives_its_use(attribution: LocalAttribution) -> None:
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = handles()
    for _ in range(20):
        with subprocess.Popen(["sleep", "60"]) as process:
            attribution.identify({process.pid}, 0)
            process.kill()
    attribution.identify(set(), 0)
    assert handles() == before


def test_a_pid_that_never_was_has_nothing_but_its_number(attribution: LocalAttribution) -> None:
    found = attribution.identify({4_194_304}, 0)[4_194_304]
    assert (found.start_key, found.start_time, found.name, found.user) == (None, None, None, None)


def test_where_pids_mean_something_else_nothing_is_read() -> None:
    found = LocalAttribution(trusted=False).identify({os.getpid()}, 0)[os.getpid()]
    assert (found.start_key, found.name) == (None, None)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "7").mkdir()
    (tmp_path / "stat").write_text("cpu 1 2 3\nbtime 1700000000\n")
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("0f2c7c5e-1111-2222-3333-444444444444\n")
    (tmp_path / "7" / "status").write_text("Name:\tx\nUid:\t0\t0\t0\t0\n")
    return tmp_path


def test_a_reused_pid_is_another_process(proc: Path) -> None:
    attribution = LocalAttribution(proc, trusted=True)
    (proc / "7" / "stat").write_bytes(stat(b"first", 100))
    first = attribution.identify({7}, 0)[7]
    (proc / "7" / "stat").write_bytes(stat(b"second", 101))
    second = attribution.identify({7}, 0)[7]
    assert (first.name, second.name) == ("first", "second")
    assert first.start_key != second.start_key
    assert second.start_time == 1_700_000_000 + 101 / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("comm", [b"a) R 1 (b", b"with space", b"\xff\xfe", b"))))", b""])
def test_no_name_confuses_the_reading(proc: Path, comm: bytes) -> None:
    (proc / "7" / "stat").write_bytes(stat(comm, 4711))
    found = LocalAttribution(proc, trusted=True).identify({7}, 0)[7]
    assert found.name == comm.decode("utf-8", "replace")
    assert found.start_key is not None
    assert found.start_key.endswith(":4711")
