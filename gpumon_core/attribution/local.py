"""Who a process of this machine is, from /proc (see proc(5))."""

from __future__ import annotations

import os
import select
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from gpumon_core.attribution import names, users
from gpumon_core.attribution.describe import Describer, split_stat
from gpumon_core.attribution.files import read
from gpumon_core.attribution.readers import Late, Readers
from gpumon_core.attribution.records import NOTHING, Ask, ProcessIdentity, Program
from gpumon_core.attribution.users import UserNames, id_inside
from gpumon_core.telemetry.limits import is_pid

# Inode of the first PID namespace: PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h.
INITIAL_PID_NAMESPACE = 0xEFFFFFFC

# The device of a GPU that Windows shares with its Linux.
WSL = Path("/dev/dxg")

# To read a command line or an environment can take for ever: the process may hang in the kernel while it holds
# what such a read waits for (mm->mmap_lock, signal->exec_update_lock). All new processes of a tick together are
# waited for so long, and while one hangs others only for a moment; what comes later is taken at a later tick.
PATIENCE_S = 1.5
SHORT_PATIENCE_S = 0.1

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def sees_host_processes() -> bool:
    """Whether PIDs here mean what they mean to the driver, which numbers processes as the host does."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE
    except OSError:
        return False


def is_wsl() -> bool:
    """Whether this is the Linux of a Windows, whose driver names few processes or none, in any PID namespace."""
    return WSL.exists()


class LocalAttribution:
    """Identifies processes, reading all about one only when it appears.

    What stays cheap every tick is the check that a PID still is the process it was.
    """

    def __init__(
        self, proc: Path = Path("/proc"), trusted: bool | None = None, describer: Describer | None = None
    ) -> None:
        self._proc = str(proc)
        self._describer = describer or Describer(self._proc)
        # In a container with PIDs of its own, the driver's PID may be another program's number here.
        self._trusted = sees_host_processes() if trusted is None else trusted
        self._known: dict[int, ProcessIdentity] = {}
        self.readers = Readers()
        # The processes whose command line has not been read so far, and until when this tick waits for them.
        self._unread: set[int] = set()
        self._waits_until = 0.0
        self._users = UserNames(users.owner_of)
        # The user ids, by PID, of those whose user has no name so far.
        self._nameless: dict[int, int] = {}
        # A handle on a process (pidfd_open(2)) tells of its end, and never means a later process
        # under the same PID: asking all of them at once is the cheapest way to know who is still who.
        self._handles: dict[int, int] = {}
        self._ends = select.poll()
        self._uses_handles = self._proc == "/proc" and hasattr(os, "pidfd_open")
        boot = read(f"{self._proc}/sys/kernel/random/boot_id")
        self._boot = boot.decode("ascii", "replace").strip()[:8] if boot else "boot"
        self._boot_time = _boot_time(read(f"{self._proc}/stat"))

    def identify(self, pids: set[int], timestamp: float) -> dict[int, ProcessIdentity]:
        """An identity for every PID as it is now; one that may not be read has nothing but its PID."""
        del timestamp
        ended = {handle for handle, _ in self._ends.poll(0)}
        for pid, handle in list(self._handles.items()):
            if pid not in pids or handle in ended:
                self._let_go(pid)
        self._waits_until = time.monotonic() + PATIENCE_S
        self._unread &= pids
        self._known = {
            pid: self._known[pid]
            if pid in self._handles and pid in self._known and pid not in self._unread
            else self._identify(pid)
            for pid in pids
        }
        if self._nameless:
            self._name_users()
        return dict(self._known)

    def close(self) -> None:
        """Let go of every process."""
        for pid in list(self._handles):
            self._let_go(pid)
        self.readers.close()

    def _hold(self, pid: int) -> None:
        if self._uses_handles and pid not in self._handles:
            try:
                handle = os.pidfd_open(pid)
            except OSError:
                # It has ended, or the system has no handles (left): its start is compared instead.
                return
            self._handles[pid] = handle
            self._ends.register(handle, select.POLLIN)

    def _let_go(self, pid: int) -> None:
        handle = self._handles.pop(pid)
        self._ends.unregister(handle)
        os.close(handle)

    def _identify(self, pid: int) -> ProcessIdentity:
        if not is_pid(pid):
            return ProcessIdentity(pid)
        known = self._known.get(pid)
        if self._trusted:
            # Before anything is read: what is read next is this process's, or the handle tells of its end.
            self._hold(pid)
        stat = read(f"{self._proc}/{pid}/stat") if self._trusted else None
        if not stat:
            # It has just ended, or may not be read. Had it been another process, its start would
            # have told: what is known of it stays true.
            return known or ProcessIdentity(pid)
        comm, fields = split_stat(stat)
        start_ticks = int(fields[19])
        start_key = f"{self._boot}:{start_ticks}"
        if known is not None and known.start_key == start_key and pid not in self._unread:
            return known
        status = read(f"{self._proc}/{pid}/status")
        name, program, ask = self._describe(pid, start_ticks, comm, int(fields[1]), _uid(status))
        if known is not None and known.start_key == start_key and pid in self._unread:
            # Nothing new is known: the same object, so that nobody looks further.
            return known
        return ProcessIdentity(
            pid=pid,
            start_key=start_key,
            start_time=None if self._boot_time is None else self._boot_time + start_ticks / TICKS_PER_S,
            name=name,
            user=self._user(pid, status),
            program=program,
            pending=ask is not None or pid in self._unread,
            ask=ask,
        )

    def _describe(
        self, pid: int, start: int, comm: str, parent: int, uid: int | None
    ) -> tuple[str, Program, Ask | None]:
        """What a process runs, as far as it can be read by now: until then the kernel's name for it."""
        patience_s = max(0.0, self._waits_until - time.monotonic())
        if self.readers.is_late:
            patience_s = min(patience_s, SHORT_PATIENCE_S)
        what = f"PID {pid}'s command line or environment"
        try:
            describe = partial(self._describer.describe, pid, comm, parent)
            found = self.readers.read((pid, start), what, describe, patience_s, uid)
        except Late:
            self._unread.add(pid)
            return names.readable(comm, ()), NOTHING, None
        self._unread.discard(pid)
        return found

    def _user(self, pid: int, status: bytes | None) -> str | None:
        """The real user's name: a folder in /proc belongs to root where a process is not dumpable."""
        self._nameless.pop(pid, None)
        uid = _uid(status)
        if uid is None:
            return None
        owner = self._users.find(uid)
        if owner is None:
            self._nameless[pid] = uid
            return str(uid)
        if not owner.is_subordinate:
            return owner.name
        inside = id_inside(uid, read(f"{self._proc}/{pid}/uid_map"))
        # 0 is root in every namespace.
        return owner.name if inside is None else f"{owner.name} ({inside or 'root'} in the container)"

    def _name_users(self) -> None:
        """Look again for the names of users that a directory did not know."""
        for pid, uid in list(self._nameless.items()):
            known = self._known.get(pid)
            if known is None:
                del self._nameless[pid]
            elif self._users.find(uid) is not None:
                self._known[pid] = replace(
                    known, user=self._user(pid, read(f"{self._proc}/{pid}/status")) or known.user
                )


def _uid(status: bytes | None) -> int | None:
    """The real user id in /proc/PID/status."""
    for line in (status or b"").splitlines():
        if line.startswith(b"Uid:"):
            return int(line.split()[1])
    return None


def _boot_time(stat: bytes | None) -> int | None:
    for line in (stat or b"").splitlines():
        if line.startswith(b"btime "):
            return int(line.split()[1])
    return None


def user_name(uid: int) -> str:
    """The login name of a user id, the user that it is given to for containers, or else the number."""
    owner = users.owner_of(uid)
    return str(uid) if owner is None else owner.name
