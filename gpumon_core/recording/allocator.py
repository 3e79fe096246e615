"""How a process takes memory from the system and gives it back, where that is up to it."""

from __future__ import annotations

import ctypes
import platform

# malloc.h of the GNU C library. What is set stays, where else the threshold would rise with what is freed.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
ARENAS = 2
MMAP_FROM_BYTES = 1024 * 1024


def limit_arenas() -> bool:
    """Keep a process of many short threads from holding on to what they have freed; False where the C library has
    nothing to set.

    Every page is drawn in a thread of its own. The GNU C library would have up to eight arenas for each core, of
    which none returns what lies below a block in use, and within minutes a server held 350 MB of which it used 65.
    Sources: mallopt(3); https://sourceware.org/glibc/manual/latest/html_node/Malloc-Tunable-Parameters.html.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_ARENA_MAX, ARENAS) and mallopt(_M_MMAP_THRESHOLD, MMAP_FROM_BYTES))


def give_back_memory() -> None:
    """Return what was freed to the system, which the C library would keep; only glibc can (malloc_trim(3))."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
