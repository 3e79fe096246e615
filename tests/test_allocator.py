"""How much freed memory the server's threads leave unused (recording/allocator.py)."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Threads that take small and large blocks, and keep a little of each.
WORK = """
import ctypes, sys, threading
from gpumon_core.recording import allocator

if sys.argv[1] == "settled":
    assert allocator.limit_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def work(together):
    blocks = [libc.malloc(100_000 + 10_000 * number) for number in range(60)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    together.wait()
    stays = libc.malloc(2_000)
    for block in blocks:
        libc.free(block)

for _ in range(3):
    together = threading.Barrier(16)
    threads = [threading.Thread(target=work, args=(together,)) for _ in range(16)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def arenas(how: str) -> int:
    printed = subprocess.run([sys.executable, "-c", WORK, how], capture_output=True, text=True, check=True).stdout
    return printed.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library has arenas to limit")
def test_many_threads_share_few_arenas() -> None:
    assert arenas("as it is") > 3
    assert arenas("settled") <= 3
