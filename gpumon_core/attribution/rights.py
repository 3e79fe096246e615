"""Gives a thread the rights of a process, so that it cannot read what that process could not read.

On Linux each thread has its own user, groups and capabilities: credentials(7), setfsuid(2), capabilities(7). The
thread cannot get its own rights back: it reads, and ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass

from gpumon_core.attribution.files import read

# setgroups(2) of this thread alone; the C library's function changes all of them.
_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "ppc64le": 81, "s390x": 206}
# _LINUX_CAPABILITY_VERSION_3, of two words of 32 bits each.
_CAPABILITIES = 0x20080522
# The id of a user or group without a name here.
NOBODY = 65534
MOST_GROUPS = 65536


@dataclass(frozen=True, slots=True)
class Rights:
    """The user and the groups with which a process opens files."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def of(status: bytes | None) -> Rights | None:
    """The rights in /proc/PID/status; the fourth number of each line counts for files: proc_pid_status(5)."""
    found: dict[str, list[int]] = {}
    for line in (status or b"").splitlines():
        name, _, rest = line.partition(b":")
        if name in (b"Uid", b"Gid", b"Groups"):
            numbers = rest.split()
            if not all(number.isdigit() and len(number) <= 10 for number in numbers):
                return None
            found[name.decode()] = [int(number) for number in numbers]
    if len(found.get("Uid", ())) != 4:
        return None
    gid = found["Gid"][3] if len(found.get("Gid", ())) == 4 else NOBODY
    return Rights(found["Uid"][3], gid, tuple(found.get("Groups", ())[:MOST_GROUPS]))


def user_of(process: str) -> int | None:
    """The user as which a process opens files; None where it cannot be read."""
    rights = of(read(f"{process}/status"))
    return None if rights is None else rights.uid


def take(rights: Rights) -> None:
    """Give the calling thread these rights, until it ends. Raises OSError; open nothing then."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SETGROUPS.get(os.uname().machine)
    if number is None or not hasattr(libc, "setfsuid"):
        raise OSError(errno.ENOSYS, "cannot take the rights of a process on this machine")
    if _may_change_users():
        groups = (ctypes.c_uint32 * len(rights.groups))(*rights.groups)
        if libc.syscall(ctypes.c_long(number), ctypes.c_long(len(rights.groups)), groups):
            raise OSError(ctypes.get_errno(), "setgroups")
        libc.setfsgid(ctypes.c_uint32(rights.gid))
        libc.setfsuid(ctypes.c_uint32(rights.uid))
    # Both return the former id. An impossible id changes nothing.
    uid, gid = (call(ctypes.c_uint32(0xFFFFFFFF)) & 0xFFFFFFFF for call in (libc.setfsuid, libc.setfsgid))
    if (uid, gid) != (rights.uid, rights.gid):
        raise PermissionError(errno.EPERM, "needs CAP_SETUID and CAP_SETGID to look at another user's files")
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _may_change_users() -> bool:
    """Whether this thread has CAP_SETGID and CAP_SETUID."""
    for line in (read("/proc/thread-self/status") or b"").splitlines():
        if line.startswith(b"CapEff:"):
            return int(line.split()[1], 16) >> 6 & 0b11 == 0b11
    return False
