"""GPUs that share the machine's memory: what NVML does not say of them, and where else it is said.

Jetson boards (Tegra), DGX Spark (GB10), and Grace Hopper and Grace Blackwell where the driver gives the memory to
the kernel. Total is then the machine's, used the sum of what the GPU's processes hold. What the kernel calls
available is nobody's free GPU memory: it can be taken by any program at any time, and page cache is a part of it.

Sources: NVIDIA's DGX Spark user guide (nvidia-smi has no memory use there); "Understanding Memory Management on
Hardware-Coherent Platforms" on NVIDIA's developer blog; the CUDA for Tegra application note, "Memory Management";
and what owners saw: XuehaiPan/nvitop#208, Syllo/nvtop#449 and #511, wookayin/gpustat#179,
rbonghi/jetson_stats#698, #885 and #889, wentbackward/nv-monitor#17.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpumon_core.telemetry import sysfs

# Names, as drivers write them, of GPUs that may share the machine's memory, and those of Tegra's among them. Any
# other one has memory of its own: that its driver once says nothing of it makes it no shared one.
TEGRA = re.compile(r"\b(orin|thor|xavier|tegra|jetson|nvgpu)", re.IGNORECASE)
MAY_SHARE = re.compile(TEGRA.pattern + r"|\b(gb10|gh200|gb200|gb300|grace|dgx spark|n1x?)\b", re.IGNORECASE)
# Thor has the driver of the larger boards, which says how busy it is; of the older ones' words there only zeros.
THOR = re.compile(r"\bthor", re.IGNORECASE)
# Where Tegra's driver says how busy the GPU was, in permille: by device-tree address, or by name.
LOADS = (
    "class/devfreq/*gpu*/device/load",
    "class/devfreq/*.g[avp]*/device/load",
    "devices/platform/*gpu*/load",
    "devices/platform/bus@0/*gpu*/load",
    "devices/gpu.0/load",
)
# Tegra's driver answers some questions with success and nothing but zeros. No chip that runs has 0 °C and 0 W.
NEVER_ZERO = ("temperature", "power", "power_max")
# PID_MAX_LIMIT of the kernel's include/linux/threads.h.
HIGHEST_PID = 2**22
# What a driver gives as a GPU's memory is the machine's from this part of it on.
SAME_AS = 0.9
MIB_PER_KIB = 1 / 1024


@dataclass(frozen=True, slots=True)
class System:
    """Where the kernel's files are."""

    sys_root: Path = sysfs.SYS
    proc_root: Path = sysfs.PROC

    def memory_total_mib(self) -> int | None:
        """MemTotal: the memory of the machine, in MiB."""
        lines = (sysfs.text(self.proc_root / "meminfo") or "").splitlines()
        found = next((line.split() for line in lines if line.startswith("MemTotal:")), [])
        if len(found) != 3 or found[2] != "kB" or not (found[1].isascii() and found[1].isdigit()):
            return None
        return round(int(found[1][:15]) * MIB_PER_KIB) or None

    def is_tegra(self) -> bool:
        """Whether this is one of NVIDIA's own chips, with its GPU within."""
        compatible = sysfs.text(self.proc_root / "device-tree" / "compatible") or ""
        return "nvidia,tegra" in compatible

    def gpu_load_percent(self) -> float | None:
        """How busy Tegra's GPU was, in percent of the last moment; None where its driver says nothing."""
        for pattern in LOADS:
            for path in sorted(self.sys_root.glob(pattern))[:8]:
                permille = sysfs.number(path)
                if permille is not None and permille <= 1000:
                    return permille / 10
        return None


def is_tegra(name: str | None, system: System) -> bool:
    """Whether a GPU is the one within a Tegra chip."""
    return TEGRA.search(name or "") is not None or (name is None and system.is_tegra())


def memory_facts(
    name: str | None, is_supported: bool, total_mib: float | None, system: System
) -> tuple[int | None, str | None]:
    """A GPU's memory in MiB, and `gpus.memory_from`: device, unified, or None where nobody knows.

    is_supported: whether the driver has the call at all. total_mib: what it answered; None where it failed.
    """
    if total_mib:
        # Some drivers of GB10 answer with the machine's memory, and with what the whole machine uses of it.
        machines = system.memory_total_mib() if MAY_SHARE.search(name or "") else None
        is_machines = machines is not None and total_mib >= SAME_AS * machines
        return (machines, "unified") if is_machines else (int(total_mib), "device")
    if MAY_SHARE.search(name or "") or (name is None and system.is_tegra()):
        # A call that is not there, and zeros that it answers with success, say the same; a failure says nothing.
        is_shared = not is_supported or total_mib == 0
        return (system.memory_total_mib(), "unified") if is_shared else (None, None)
    # A board with memory of its own, which failed to say how much.
    return None, "device" if name and total_mib is None else None


def held_mib(held: Iterable[tuple[int, int | None]] | None) -> int | None:
    """What processes hold together, in MiB, of (PID, bytes): a PID that is listed twice counts once. None where
    nobody knows who is there, or what any of them holds."""
    if held is None:
        return None
    by_pid: dict[int, int | None] = {}
    for pid, size in held:
        before = by_pid.get(pid)
        by_pid[pid] = size if before is None else max(before, size or 0)
    known = [size for size in by_pid.values() if size is not None]
    return None if by_pid and not known else round(sum(known) / 2**20)


def complete(
    values: dict[str, float | None],
    name: str | None,
    held: Iterable[tuple[int, int | None]] | None,
    system: System,
) -> None:
    """Put what is known from elsewhere into the `values` that the driver said of a GPU that shares the machine's
    memory, and take out the zeros that say nothing."""
    values["memory"] = held_mib(held)
    if not is_tegra(name, system):
        return
    for key in NEVER_ZERO:
        if values.get(key) == 0:
            values[key] = None
    said = values.get("utilization")
    if said is None or (not said and THOR.search(name or "") is None):
        values["utilization"] = values["utilization_max"] = system.gpu_load_percent()


def is_pid(pid: int, system: System) -> bool:
    """Whether a number can be a PID of this machine: Tegra's driver has been seen to list others."""
    highest = sysfs.number(system.proc_root / "sys" / "kernel" / "pid_max") or HIGHEST_PID
    return 0 < pid <= min(highest, HIGHEST_PID)
