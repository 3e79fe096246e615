"""What to do where the driver, or one of its GPUs, does not answer."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

# NVML_ERROR_UNKNOWN; pages, which want to know what to do, do without NVML.
UNKNOWN_ERROR = 999
LOST = "Look at dmesg for Xid; reset the GPU or reboot."
HANGS = "Look at dmesg for Xid; a driver that hangs needs a reboot."
# NVIDIA Container Toolkit, troubleshooting: "Containers losing access to GPUs".
CONTAINER = (
    "Restart this container: where systemd manages its cgroup, `systemctl daemon-reload` on the host takes its "
    "GPUs away. To prevent it, request the GPUs through CDI or with --device for every /dev/nvidia* file, or let "
    "Docker use the cgroupfs driver."
)
# Files that container engines make, and how the cgroup of a container's first process is called.
_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
_CGROUPS = (b"docker", b"containerd", b"kubepods", b"libpod", b"crio", b"lxc")
_FIRST_PROCESS = Path("/proc/1")


@cache
def is_container() -> bool:
    """Whether this program runs in a container."""
    # Kubernetes names its API to every container.
    if any(mark.exists() for mark in _MARKS) or "KUBERNETES_SERVICE_HOST" in os.environ:
        return True
    # systemd's container interface names every kind of container in its first process's environment, which may be
    # read by root alone.
    environment = _read("environ")
    named = environment.startswith(b"container=") or b"\0container=" in environment
    return named or any(name in _read("cgroup") for name in _CGROUPS)


def _read(name: str) -> bytes:
    try:
        return (_FIRST_PROCESS / name).read_bytes()
    except OSError:
        return b""


def of_lost(code: int | None = UNKNOWN_ERROR) -> str:
    """What to do where a GPU answers with nothing but this error, or, where it is None, in another way does not
    answer. In a container it may be the container that has lost its GPUs."""
    if code == UNKNOWN_ERROR and is_container():
        return f"{CONTAINER} Where other GPUs still answer: {LOST[0].lower()}{LOST[1:]}"
    return LOST
