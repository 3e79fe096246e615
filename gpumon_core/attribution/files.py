"""The one place that opens files about processes: those of the kernel, and those that a process controls.

What the kernel writes (/proc/PID/stat) is read as it is. Whatever a process can put somewhere (a file below its
root, a socket in its user's folder) is hostile: it may be a link to what only gpumon may read, a pipe that nobody
writes to, a device, a file of terabytes, or lie on a file system whose server never answers. It is opened by a
thread of its own (readers.py) with the rights of that process (rights.py), so that no link leads out of its root,
and read only where it is a regular file of a few kilobytes.
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

# A process may have given itself arguments without end.
LARGEST = 1 << 22
# So much of a file that a process controls is read, and so many entries of a folder are looked at.
LARGEST_OF_PROCESS = 1 << 16
MOST_ENTRIES = 2048

# openat2(2): the same number on every architecture, and without a wrapper in the C library.
_OPENAT2 = 437
_NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH, _IN_ROOT = 0x02, 0x04, 0x08, 0x10
_AT_FDCWD = -100
# File systems of the kernel (include/uapi/linux/magic.h): what stands there is no file of a process, wherever it
# was mounted. proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs, bpf, efivarfs, configfs, pstore,
# selinuxfs.
_KERNELS = frozenset(
    {0x9FA0, 0x62656572, 0x27E0EB, 0x63677270, 0x64626720, 0x74726163, 0x73636673, 0xCAFE4A11, 0xDE5E81E4}
    | {0x62656570, 0x6165676C, 0xF97CFF8C}
)
# Where a user's programs put their sockets.
_OF_USER = re.compile(r"/run/user/([0-9]{1,10})/.+")


def read(path: str, largest: int = LARGEST) -> bytes | None:
    """The bytes of a file that the kernel or the system writes, or as many as are of use; None where it is gone or
    may not be read."""
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
    """Files that a process controls, below its root or a folder there. For a thread that has taken that process's
    rights. What is not as it should be is None, or missing."""

    def __init__(self, descriptor: int, resolve: int) -> None:
        self._descriptor = descriptor
        self._resolve = resolve

    @classmethod
    @contextmanager
    def of_process(cls, process: str) -> Iterator[Tree]:
        """The root of the process whose folder in /proc is `process`. Raises OSError. Opened before the rights are
        given up: that takes more than the process has."""
        descriptor = os.open(f"{process}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Its own links lead where they lead for it.
            yield cls(descriptor, _IN_ROOT | _NO_MAGICLINKS)
        finally:
            os.close(descriptor)

    @contextmanager
    def below(self, folder: str) -> Iterator[Tree]:
        """A folder below it, and within that no links at all. Raises OSError."""
        descriptor = self._open(folder, os.O_PATH | os.O_DIRECTORY)
        try:
            yield Tree(descriptor, _BENEATH | _NO_SYMLINKS | _NO_MAGICLINKS)
        finally:
            os.close(descriptor)

    def names(self, folder: str = ".", most: int = MOST_ENTRIES) -> list[str]:
        """The names in a folder, sorted; some of them where there are too many."""
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
        """The content of a regular file of at most so many bytes; None of anything else."""
        try:
            found = self._open(path, os.O_PATH)
        except OSError:
            return None
        try:
            # To open a pipe or a device can do something; to hold it does not. What is held is what is read.
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
            # It has grown meanwhile.
            return content if len(content) <= largest else None
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def _open(self, path: str, flags: int) -> int:
        return _openat2(self._descriptor, path, flags, self._resolve)


@contextmanager
def socket_at(path: str) -> Iterator[tuple[str, int | None]]:
    """A path to connect to for a Unix socket, and the user that has to be at its other end, or None. Raises
    OSError.

    What lies in a user's own folder has to be that user's socket, and no link to the system's."""
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
    # /proc/stat of a large machine takes several reads: it counts every interrupt of every line.
    parts, size = [], 0
    while size < largest and (part := os.read(descriptor, min(65536, largest - size))):
        parts.append(part)
        size += len(part)
    return b"".join(parts)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _openat2(folder: int, path: str, flags: int, resolve: int) -> int:
    """Raises OSError, also where the kernel (before 5.6) or a filter of system calls does not have it: what cannot
    be opened safely is not opened."""
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
    """Whether a file is one of the kernel's own: statfs(2), whose first field is the kind of file system."""
    about = (ctypes.c_long * 32)()
    if ctypes.CDLL(None, use_errno=True).fstatfs(ctypes.c_int(descriptor), about):
        return True
    return about[0] & 0xFFFFFFFF in _KERNELS
