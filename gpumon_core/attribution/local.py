"""Identifies the processes of this machine, from /proc (see proc(5))."""

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

# The device through which Windows shares a GPU with WSL.
WSL = Path("/dev/dxg")

# Reading a command line or an environment can take forever: the process may hang in the kernel while it holds a
# lock that the read needs (mm->mmap_lock, signal->exec_update_lock). A tick waits this long for all new processes
# together, and only a moment while one hangs. A later tick uses what comes later.
PATIENCE_S = 1.5
SHORT_PATIENCE_S = 0.1

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def sees_host_processes() -> bool:
    """Whether PIDs here are those of the host, which the driver uses."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino == INITIAL_PID_NAMESPACE
    except OSError:
        return False


def is_wsl() -> bool:
    """Whether this is WSL. Its driver reports few processes or none, in any PID namespace."""
    return WSL.exists()


class LocalAttribution:
    """Identifies processes. It reads everything about a process once, when the process appears.

    After that a tick only checks that the PID still belongs to the same process, which is cheap.
    """

    def __init__(
        self, proc: Path = Path("/proc"), trusted: bool | None = None, describer: Describer | None = None
    ) -> None:
        self._proc = str(proc)
        self._describer = describer or Describer(self._proc)
        # In a container with PIDs of its own, the driver's PID may belong to another process.
        self._trusted = sees_host_processes() if trusted is None else trusted
        self._known: dict[int, ProcessIdentity] = {}
        self.readers = Readers()
        # The PIDs of processes with a command line that is not read yet, and until when this tick waits for them.
        self._unread: set[int] = set()
        self._waits_until = 0.0
        self._users = UserNames(users.owner_of)
        # The user ids without a name, by PID.
        self._unnamed_users: dict[int, int] = {}
        # A handle of a process (pidfd_open(2)) reports its end, and never means a later process with the same PID.
        # One poll of all handles is the cheapest way to know that each PID still belongs to the same process.
        self._handles: dict[int, int] = {}
        self._ends = select.poll()
        self._uses_handles = self._proc == "/proc" and hasattr(os, "pidfd_open")
        boot = read(f"{self._proc}/sys/kernel/random/boot_id")
        self._boot = boot.decode("ascii", "replace").strip()[:8] if boot else "boot"
        self._boot_time = _boot_time(read(f"{self._proc}/stat"))

    def identify(self, pids: set[int], timestamp: float) -> dict[int, ProcessIdentity]:
        """An identity for every PID as it is now; only the PID where its process cannot be read."""
        del timestamp
        ended = {handle for handle, _ in self._ends.poll(0)}
        for pid, handle in list(self._handles.items()):
            if pid not in pids or handle in ended:
                self._close_handle(pid)
        self._waits_until = time.monotonic() + PATIENCE_S
        self._unread &= pids
        self._known = {
            pid: self._known[pid]
            if pid in self._handles and pid in self._known and pid not in self._unread
            else self._identify(pid)
            for pid in pids
        }
        if self._unnamed_users:
            self._name_users()
        return dict(self._known)

    def close(self) -> None:
        """Close all handles."""
        for pid in list(self._handles):
            self._close_handle(pid)
        self.readers.close()

    def _open_handle(self, pid: int) -> None:
        if self._uses_handles and pid not in self._handles:
            try:
                handle = os.pidfd_open(pid)
            except OSError:
                # The process has ended, or the system has no handles (left): compare its start time instead.
                return
            self._handles[pid] = handle
            self._ends.register(handle, select.POLLIN)

    def _close_handle(self, pid: int) -> None:
        handle = self._handles.pop(pid)
        self._ends.unregister(handle)
        os.close(handle)

    def _identify(self, pid: int) -> ProcessIdentity:
        if not is_pid(pid):
            return ProcessIdentity(pid)
        known = self._known.get(pid)
        if self._trusted:
            # Open the handle before reading: then what is read belongs to this process, or the handle reports its
            # end.
            self._open_handle(pid)
        stat = read(f"{self._proc}/{pid}/stat") if self._trusted else None
        if not stat:
            # It has just ended, or cannot be read. Another process would have another start time, so what is known
            # stays true.
            return known or ProcessIdentity(pid)
        comm, fields = split_stat(stat)
        start_ticks = int(fields[19])
        start_key = f"{self._boot}:{start_ticks}"
        if known is not None and known.start_key == start_key and pid not in self._unread:
            return known
        status = read(f"{self._proc}/{pid}/status")
        name, program, ask = self._describe(pid, start_ticks, comm, int(fields[1]), _uid(status))
        if known is not None and known.start_key == start_key and pid in self._unread:
            # Nothing new is known: the same object shows the caller that nothing changed.
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
        """What a process runs; only the kernel's name for it until its command line is read."""
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
        self._unnamed_users.pop(pid, None)
        uid = _uid(status)
        if uid is None:
            return None
        owner = self._users.find(uid)
        if owner is None:
            self._unnamed_users[pid] = uid
            return str(uid)
        if not owner.is_subordinate:
            return owner.name
        inside = id_inside(uid, read(f"{self._proc}/{pid}/uid_map"))
        # 0 is root in every namespace.
        return owner.name if inside is None else f"{owner.name} ({inside or 'root'} in the container)"

    def _name_users(self) -> None:
        """Look up the names that a directory did not know, again."""
        for pid, uid in list(self._unnamed_users.items()):
            known = self._known.get(pid)
            if known is None:
                del self._unnamed_users[pid]
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
    """The login name of a user id, the user who may use it in containers, or else the number."""
    owner = users.owner_of(uid)
    return str(uid) if owner is None else owner.name
