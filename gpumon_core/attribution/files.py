"""The one place that opens files about processes: those of the kernel, and those that a process controls.

Files of the kernel (/proc/PID/stat) are read directly. What a process can create (a file below its root, a socket
in the folder of its user) is hostile: it may be a link to a file that only gpumon can read, a pipe without a
writer, a device, a file of terabytes, or on a file system with a server that never answers. So a thread of its own
(readers.py) opens it, with the rights of that process (rights.py) and without following a link out of its root,
and reads it only if it is a regular file of a few kilobytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

# The arguments of a process can be of any length.
LARGEST = 1 << 22
# The most bytes of a file that a process controls, and the most entries of a folder.
LARGEST_OF_PROCESS = 1 << 16
MOST_ENTRIES = 2048

# openat2(2): the same number on every architecture, and without a wrapper in the C library.
_OPENAT2 = 437
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH, _IN_ROOT = 0x02, 0x04, 0x08, 0x10
_AT_FDCWD = -100
# File systems of the kernel (include/uapi/linux/magic.h): their files are not files of a process, wherever they
# are mounted. proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs, bpf, efivarfs, configfs, pstore,
# selinuxfs.
_KERNELS = frozenset(
    {0x9FA0, 0x62656572, 0x27E0EB, 0x63677270, 0x64626720, 0x74726163, 0x73636673, 0xCAFE4A11, 0xDE5E81E4}
    | {0x62656570, 0x6165676C, 0xF97CFF8C}
)
# The folder for the sockets of a user's programs.
_OF_USER = re.compile(r"/run/user/([0-9]{1,10})/.+")


def read(path: str, largest: int = LARGEST) -> bytes | None:
    """The content of a file of the kernel or the system, at most `largest` bytes; None where it is gone or cannot
    be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    try:
        # The kernel's own files are regular ones too.
        return _content(descriptor, largest) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    except OSError:
        # The process ended between open and read (ESRCH).
        return None
    finally:
        os.close(descriptor)


class Tree:
    """Files that a process controls, below its root or a folder there. The calling thread must have the rights of
    that process. What cannot be read safely is None, or left out."""

    def __init__(self, descriptor: int, resolve: int) -> None:
        self._descriptor = descriptor
        self._resolve = resolve

    @classmethod
    @contextmanager
    def of_process(cls, process: str) -> Iterator[Tree]:
        """The root of the process whose folder in /proc is `process`. Raises OSError. Open it before taking the
        rights of the process, which are not enough for that."""
        descriptor = os.open(f"{process}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Its links lead where they lead for the process.
            yield cls(descriptor, _IN_ROOT | _NO_MAGICLINKS)
        finally:
            os.close(descriptor)

    @contextmanager
    def below(self, folder: str) -> Iterator[Tree]:
        """A folder below it. Links in that folder are not followed. Raises OSError."""
        descriptor = self._open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            yield Tree(descriptor, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)
        finally:
            os.close(descriptor)

    def names(self, folder: str = ".", most: int = MOST_ENTRIES) -> list[str]:
        """The names in a folder, sorted; only `most` of them where there are more."""
        try:
            descriptor = self._open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)
        except OSError:
            return []
        try:
            with os.scandir(descriptor) as entries:
                return sorted(entry.name for entry in islice(entries, most))
        except OSError:
            return []
        finally:
            os.close(descriptor)

    def read(self, path: str, largest: int = LARGEST_OF_PROCESS) -> bytes | None:
        """The content of a regular file of at most `largest` bytes; None for anything else."""
        try:
            found = self._open(path, os.O_PATH)
        except OSError:
            return None
        try:
            # Opening a pipe or a device can have an effect; O_PATH has none. The same descriptor is then read.
            about = os.fstat(found)
            if not stat.S_ISREG(about.st_mode) or not 0 < about.st_size <= largest or _is_kernels(found):
                return None
            descriptor = os.open(
                f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            )
        except OSError:
            return None
        finally:
            os.close(found)
        try:
            content = _content(descriptor, largest + 1)
            # The file may have grown meanwhile.
            return content if len(content) <= largest else None
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def _open(self, path: str, flags: int) -> int:
        return _openat2(self._descriptor, path, flags, self._resolve)


@contextmanager
def socket_at(path: str) -> Iterator[tuple[str, int | None]]:
    """A path to connect to a Unix socket, and the user that must be at its other end, or None. Raises OSError.

    A socket in a user's own folder must belong to that user, and must not be a link to a socket of the system."""
    found = _OF_USER.fullmatch(path)
    if found is None:
        yield path, None
        return
    uid = int(found[1])
    descriptor = _openat2(_AT_FDCWD, path, os.O_PATH, _NO_SYMLINKS | _NO_MAGICLINKS)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISSOCK(about.st_mode) or about.st_uid != uid:
            raise PermissionError(errno.EPERM, "is not a socket of its user", path)
        yield f"/proc/self/fd/{descriptor}", uid
    finally:
        os.close(descriptor)


def _content(descriptor: int, largest: int) -> bytes:
    # /proc/stat of a large machine needs several reads: it counts the interrupts of every line.
    parts, size = [], 0
    while size < largest and (part := os.read(descriptor, min(65536, largest - size))):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _openat2(folder: int, path: str, flags: int, resolve: int) -> int:
    """Open a file by openat2(2). Raises OSError, also where the kernel (before 5.6) or a filter of system calls
    lacks it: gpumon opens nothing that it cannot open safely."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "needs Linux", path)
    if "\0" in path:
        raise OSError(errno.EINVAL, "has a NUL", path)
    how = _How(flags | os.O_CLOEXEC, 0, resolve)
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(
        ctypes.c_long(_OPENAT2),
        ctypes.c_int(folder),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return int(descriptor)


def _is_kernels(descriptor: int) -> bool:
    """Whether a file is on a file system of the kernel: the first field of statfs(2) is the kind of file
    system."""
    about = (ctypes.c_long * 32)()
    if ctypes.CDLL(None, use_errno=True).fstatfs(ctypes.c_int(descriptor), about):
        return True
    return about[0] & 0xFFFFFFFF in _KERNELS
