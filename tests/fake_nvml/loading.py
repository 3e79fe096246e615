"""Building the library, and pointing pynvml at it: in this process or in a subprocess."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import FakeNvml

_HERE = Path(__file__).parent
_SOURCES = ("nvml.c", "call.h", "readings.h", "state.h")


def build() -> Path:
    """Compile the library where it is missing or older than its source, and return its path.

    Raises RuntimeError when there is no C compiler or when compiling fails. Several test processes
    may build at once: each compiles to a name of its own, and the last rename wins.
    """
    library = _HERE / "build" / "libnvidia-ml.so.1"
    newest = max((_HERE / source).stat().st_mtime_ns for source in _SOURCES)
    if library.exists() and library.stat().st_mtime_ns >= newest:
        return library
    named = os.environ.get("CC")
    compiler = next(filter(None, map(shutil.which, [named] if named else ["gcc", "cc", "clang"])), None)
    if compiler is None:
        raise RuntimeError("The fake NVML needs a C compiler and found none: install gcc, or name one in CC.")
    library.parent.mkdir(exist_ok=True)
    unfinished = library.with_name(f"{library.name}.{os.getpid()}")
    warnings = ("-Wall", "-Wextra", "-Werror")
    command = [compiler, "-O2", "-shared", "-fPIC", *warnings, "-o", str(unfinished), str(_HERE / "nvml.c")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"The fake NVML does not compile ({' '.join(command)}):\n{result.stderr}")
    os.replace(unfinished, library)
    return library


@cache
def library() -> ctypes.CDLL:
    """The library, loaded into this process. One copy serves all state files, one after another."""
    lib = ctypes.CDLL(str(build()))
    lib.fake_nvml_attach.argtypes = [ctypes.c_char_p]
    lib.fake_nvml_state_size.restype = ctypes.c_size_t
    lib.fake_nvml_function_name.restype = ctypes.c_char_p
    return lib


@cache
def functions() -> dict[str, int]:
    """The NVML functions that the fake has, with their numbers."""
    numbers: dict[str, int] = {}
    while name := library().fake_nvml_function_name(len(numbers)):
        numbers[name.decode()] = len(numbers)
    return numbers


def environment(fake: FakeNvml) -> dict[str, str]:
    """What to add to a subprocess's environment, so that its pynvml finds this fake."""
    inherited = os.environ.get("LD_LIBRARY_PATH")
    directory = str(build().parent)
    path = f"{directory}{os.pathsep}{inherited}" if inherited else directory
    return {"LD_LIBRARY_PATH": path, "FAKE_NVML_STATE": str(fake.path)}


_attached: list[Path] = []


@contextmanager
def loaded(fake: FakeNvml) -> Iterator[FakeNvml]:
    """Point this process's pynvml at the fake. Sessions begun inside end with the block."""
    import pynvml

    lib = library()
    before = pynvml.nvmlLib, dict(pynvml._nvmlGetFunctionPointer_cache), pynvml._nvmlLib_refcount
    _attached.append(fake.path)
    try:
        _point_pynvml(lib, {}, 0)
        if not lib.fake_nvml_attach(os.fsencode(fake.path)):
            raise RuntimeError(f"The fake NVML cannot map its state file {fake.path}.")
        yield fake
    finally:
        _attached.pop()
        lib.fake_nvml_attach(os.fsencode(_attached[-1]) if _attached else None)
        _point_pynvml(*before)


def _point_pynvml(lib: Any, pointers: dict[str, Any], refcount: int) -> None:
    import pynvml

    with pynvml.libLoadLock:
        pynvml.nvmlLib = lib
        pynvml._nvmlLib_refcount = refcount
        pynvml._nvmlGetFunctionPointer_cache.clear()
        pynvml._nvmlGetFunctionPointer_cache.update(pointers)
