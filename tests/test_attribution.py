"""Who a process is: on processes that really run, and on /proc folders that a test writes."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import eventually

from gpumon_core.attribution import local
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import ProcessIdentity

SLEEP = shutil.which("sleep") or "/bin/sleep"
NEVER = 4_194_304  # PID_MAX_LIMIT: the kernel gives out numbers below it
BOOT_ID = "0f1e2d3c-aaaa-bbbb-cccc-ddddeeeeffff"


@pytest.fixture
def attribution() -> Iterator[LocalAttribution]:
    made = LocalAttribution(trusted=True)
    yield made
    made.close()


@contextmanager
def running(program: str | Path = SLEEP, user: str | None = None) -> Iterator[int]:
    """A process that runs until the block ends; its PID."""
    process = subprocess.Popen([str(program), "600"], user=user, cwd="/")
    try:
        # Popen returns while the kernel is still at it: it renames the process, then hands over the arguments.
        arguments = Path(f"/proc/{process.pid}/cmdline")
        eventually(lambda: arguments.read_bytes() == os.fsencode(program) + b"\x00600\0", every_s=0.001)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def one(attribution: LocalAttribution, pid: int) -> ProcessIdentity:
    return attribution.identify({pid}, time.time())[pid]


class FakeProc:
    """A /proc folder in the kernel's format."""

    def __init__(self, path: Path, btime: int | None = 1_700_000_000, interrupts: int = 8) -> None:
        self.path = path
        (path / "sys/kernel/random").mkdir(parents=True)
        (path / "sys/kernel/random/boot_id").write_text(BOOT_ID + "\n")
        lines = ["cpu  1 2 3 4 5 6 7 8 9 0", "intr 99" + " 0" * interrupts, "ctxt 12345"]
        lines += [] if btime is None else [f"btime {btime}"]
        (path / "stat").write_text("\n".join([*lines, "processes 4711", "procs_running 1", ""]))

    def put(self, pid: int, ticks: int, comm: bytes = b"python", cmdline: bytes = b"", uid: int = 0) -> None:
        folder = self.path / str(pid)
        folder.mkdir(exist_ok=True)
        numbers = (
            f" S 1 {pid} {pid} 0 -1 4194560 145 0 0 0 1 2 0 0 20 0 1 0 {ticks} 8454144 500 18446744073709551615"
        )
        (folder / "stat").write_bytes(f"{pid} (".encode() + comm + b")" + numbers.encode() + b" 1 1 0 0 0 0\n")
        (folder / "cmdline").write_bytes(cmdline)
        shown = comm.replace(b"\n", b"\\n")
        (folder / "status").write_bytes(b"Name:\t" + shown + f"\nUmask:\t0022\nUid:\t{uid}\t0\t0\t0\n".encode())

    def end(self, pid: int) -> None:
        shutil.rmtree(self.path / str(pid))

    def attribution(self) -> LocalAttribution:
        return LocalAttribution(self.path, trusted=True)


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc")


# ---- Real processes ------------------------------------------------------------------------------


def test_a_running_process_has_name_user_and_start(attribution: LocalAttribution) -> None:
    before = time.time()
    with running() as pid:
        found = one(attribution, pid)
    assert found.pid == pid
    assert found.name == "sleep"
    assert found.user == pwd.getpwuid(os.getuid()).pw_name
    assert found.start_time is not None
    # btime has no fraction, so the start that follows from it is up to a second early.
    assert before - 1.1 <= found.start_time <= time.time() + 0.1
    assert found.start_key is not None


@pytest.mark.parametrize("name", ["a", "fifteen-letters", "sixteen-letters-", "a name with (brackets) and blanks"])
def test_a_name_of_any_length_is_complete(attribution: LocalAttribution, tmp_path: Path, name: str) -> None:
    shutil.copy(SLEEP, tmp_path / name)
    # A program that looks at its own name to know what to do (busybox) would not do for a copy.
    with running(tmp_path / name) as pid:
        assert one(attribution, pid).name == name


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")
def test_another_users_process_has_that_users_name(attribution: LocalAttribution) -> None:
    with running(user="nobody") as pid:
        found = one(attribution, pid)
    assert (found.user, found.name) == ("nobody", "sleep")


def test_a_process_is_the_same_over_many_ticks(attribution: LocalAttribution) -> None:
    with running() as pid:
        found = {one(attribution, pid) for _ in range(20)}
        other = LocalAttribution(trusted=True)
        assert found == {one(other, pid)}, "another recorder knows it as the same process"
        other.close()


def test_two_processes_have_keys_of_their_own(attribution: LocalAttribution) -> None:
    with running() as first:
        time.sleep(0.05)
        with running() as second:
            found = attribution.identify({first, second}, time.time())
    assert found[first].start_key != found[second].start_key


def test_a_process_that_has_ended_keeps_its_identity(attribution: LocalAttribution) -> None:
    with running() as pid:
        before = one(attribution, pid)
    assert one(attribution, pid) == before
    assert one(attribution, pid) == before


def test_a_process_that_left_the_gpu_is_forgotten(attribution: LocalAttribution) -> None:
    with running() as pid:
        one(attribution, pid)
        attribution.identify(set(), time.time())
    assert one(attribution, pid) == ProcessIdentity(pid)


def test_a_pid_that_never_existed_has_nothing_but_its_number(attribution: LocalAttribution) -> None:
    assert one(attribution, NEVER) == ProcessIdentity(NEVER)


def test_where_pids_are_not_the_hosts_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    attribution = LocalAttribution(trusted=False)
    monkeypatch.setattr(local, "read", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(os, "pidfd_open", lambda pid: pytest.fail(f"a handle on {pid} was taken"))
    assert attribution.identify({os.getpid(), 1}, 0) == {
        os.getpid(): ProcessIdentity(os.getpid()),
        1: ProcessIdentity(1),
    }


# ---- A /proc of our own --------------------------------------------------------------------------


def test_start_and_key_follow_from_the_kernels_clock_ticks(proc: FakeProc) -> None:
    proc.put(7, ticks=12_345)
    found = one(proc.attribution(), 7)
    assert found.start_time == pytest.approx(1_700_000_000 + 12_345 / os.sysconf("SC_CLK_TCK"))
    assert found.start_key == "0f1e2d3c:12345"


def test_a_reused_pid_is_another_process(proc: FakeProc) -> None:
    attribution = proc.attribution()
    proc.put(7, ticks=100, comm=b"first", uid=0)
    first = one(attribution, 7)
    proc.end(7)
    assert one(attribution, 7) == first
    proc.put(7, ticks=200, comm=b"second", uid=os.getuid())
    second = one(attribution, 7)
    assert second.start_key != first.start_key
    assert (first.name, second.name) == ("first", "second")


def test_the_same_start_after_another_boot_is_another_process(proc: FakeProc) -> None:
    proc.put(7, ticks=100)
    before = one(proc.attribution(), 7)
    (proc.path / "sys/kernel/random/boot_id").write_text("99999999-0000\n")
    assert one(proc.attribution(), 7).start_key != before.start_key


@pytest.mark.parametrize(
    ("comm", "name"),
    [
        (b"a) (b", "a) (b"),
        (b") S 1 2 3 (", ") S 1 2 3 ("),
        (b"((", "(("),
        (b"))", "))"),
        (b"with two spaces", "with two spaces"),
        (b"\xff\xfe(x)", "��(x)"),
        (b"line\nbreak", "line break"),
        (b"\x1b[31m\x00a", "\ufffd[31m\ufffda"),
        ("a\u202eb".encode(), "a\ufffdb"),
        (b"", ""),
        ("träiner".encode(), "träiner"),
    ],
)
def test_a_name_may_contain_anything(proc: FakeProc, comm: bytes, name: str) -> None:
    proc.put(7, ticks=100, comm=comm)
    found = one(proc.attribution(), 7)
    assert (found.name, found.start_key, found.user) == (name, "0f1e2d3c:100", "root")


@pytest.mark.parametrize(
    ("cmdline", "name"),
    [
        (b"/opt/bin/a-name-longer-than-that\0--flag\0", "a-name-longer-than-that"),
        (b"a-name-longer-t\0", "a-name-longer-t"),
        (b"/usr/bin/python3\0train.py\0", "train.py"),
        (b"", "a-name-longer-t"),
    ],
    ids=["program", "just as long", "renamed itself", "zombie"],
)
def test_a_name_that_the_kernel_cut_off_is_completed_from_its_arguments(
    proc: FakeProc, cmdline: bytes, name: str
) -> None:
    proc.put(7, ticks=100, comm=b"a-name-longer-t", cmdline=cmdline)
    assert one(proc.attribution(), 7).name == name


def test_a_cut_through_a_letter_of_two_bytes_is_mended(proc: FakeProc) -> None:
    whole = "aaaaaaaaaaaaaaäbc".encode()
    proc.put(7, ticks=100, comm=whole[:15], cmdline=b"/x/" + whole + b"\0")
    assert one(proc.attribution(), 7).name == whole.decode()


def test_a_user_id_without_a_name_is_shown_as_its_number(proc: FakeProc) -> None:
    proc.put(7, ticks=100, uid=3_999_999_999)
    assert one(proc.attribution(), 7).user == "3999999999"


def test_the_boot_time_is_found_behind_the_interrupts_of_a_large_machine(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc", interrupts=100_000)
    proc.put(7, ticks=0)
    assert one(proc.attribution(), 7).start_time == 1_700_000_000


def test_without_boot_time_there_is_a_key_but_no_start(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc", btime=None)
    proc.put(7, ticks=5)
    found = one(proc.attribution(), 7)
    assert (found.start_time, found.start_key) == (None, "0f1e2d3c:5")


def test_a_process_that_ends_while_it_is_read_does_no_harm(proc: FakeProc) -> None:
    proc.put(7, ticks=100, comm=b"a-name-longer-t")
    (proc.path / "7/status").unlink()
    (proc.path / "7/cmdline").unlink()
    found = one(proc.attribution(), 7)
    assert (found.name, found.user, found.start_key) == ("a-name-longer-t", None, "0f1e2d3c:100")


def test_an_identity_that_is_given_out_is_the_callers_to_change(proc: FakeProc) -> None:
    proc.put(7, ticks=100)
    attribution = proc.attribution()
    given = attribution.identify({7}, 0)
    given[7] = replace(given[7], name="changed")
    assert one(attribution, 7).name == "python"
