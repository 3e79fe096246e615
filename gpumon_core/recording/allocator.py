"""How this process takes memory from the system and gives it back."""

from __future__ import annotations

import ctypes
import platform

# malloc.h of the GNU C library. A threshold that is set stays; otherwise it rises with what is freed.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
ARENAS = 2
MMAP_FROM_BYTES = 1024 * 1024


def limit_arenas() -> bool:
    """Make threads share few arenas, so that freed memory is used again; False where the C library has none.

    Every page is drawn in a thread of its own. The GNU C library makes up to eight arenas for each core, and none
    of them returns memory below a block in use: within minutes a server held 350 MB, and used 65.
    Sources: mallopt(3); https://sourceware.org/glibc/manual/latest/html_node/Malloc-Tunable-Parameters.html.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_ARENA_MAX, ARENAS) and mallopt(_M_MMAP_THRESHOLD, MMAP_FROM_BYTES))


def give_back_memory() -> None:
    """Return freed memory to the system. Only the GNU C library can (malloc_trim(3))."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
