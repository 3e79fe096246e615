"""Laptops switch a GPU off while nothing uses it; a GPU that is asked stays on, for 5 to 7 W of the battery.

So a GPU that is off is not asked, and one that nothing uses is left alone long enough to switch itself off.
Reading /sys wakes no GPU. Sources: the driver's README, chapter "PCI-Express Runtime D3 (RTD3) Power Management";
Documentation/power/runtime_pm.rst and Documentation/ABI/testing/sysfs-devices-power of the kernel. A program that
has /dev/nvidia* open counts as a user of the GPU, so to leave it alone is to give back its handle as well.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gpumon_core.telemetry import sysfs

Mode = Literal["auto", "true", "false"]
# Asked as ever, left alone so that it can switch itself off, or off.
Rest = Literal["", "quiet", "asleep"]

# A GPU on which nothing happened for so long is left alone.
IDLE_S = 60.0
# The driver looks twice, five seconds apart, before it lets go (its open source, dynamic-power.c), and the kernel
# and the GPU's sound device have delays of their own: some take a minute.
PATIENCE_S = 60.0
# One that does not fall asleep (it drives a display, or something holds it that nobody sees) is left alone again
# after so long, then after twice that, and so on.
PAUSE_S = 600.0
LONGEST_PAUSE_S = 6 * 3600.0
# Autosuspend delays longer than this are taken for this.
LONGEST_DELAY_S = 600.0

NVIDIA = "0x10de"
DISPLAY = "0x03"
OFF = frozenset({"suspended", "suspending"})
_BUS_ID = re.compile(r"([0-9A-Fa-f]{1,8}):([0-9A-Fa-f]{2}):([0-9A-Fa-f]{2})\.([0-7])")


def address(bus_id: str | None) -> str | None:
    """A bus id as the kernel writes it ("0000:01:00.0"), of NVML's ("00000000:01:00.0")."""
    found = _BUS_ID.fullmatch(bus_id or "")
    if found is None:
        return None
    domain, bus, device, function = (int(part, 16) for part in found.groups())
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


@dataclass(slots=True)
class _Gpu:
    """What is known of one GPU's sleep: times are those of a clock that nobody sets."""

    rest: Rest = ""
    idle_since: float | None = None
    quiet_since: float = 0.0
    awake_until: float = 0.0
    failures: int = 0
    had_driver: bool = False


@dataclass(slots=True)
class Sleep:
    """Says which GPUs are to be left alone.

    mode: `false` lets none sleep; `auto` those whose driver says that it manages their sleep; `true` all that may
    sleep according to the kernel. A GPU that is off is left alone unless that is `false`.
    """

    mode: Mode = "auto"
    sys_root: Path = sysfs.SYS
    proc_root: Path = sysfs.PROC
    clock: Callable[[], float] = time.monotonic
    _gpus: dict[str, _Gpu] = field(default_factory=dict)

    def look(self, bus_id: str | None) -> Rest:
        """Whether a GPU is to be left alone now, and why."""
        folder = self._folder(bus_id)
        if folder is None:
            return ""
        gpu, now = self._gpus.setdefault(folder.name, _Gpu()), self.clock()
        has_driver = sysfs.link(folder / "driver").startswith("nvidia")
        if gpu.had_driver and not has_driver:
            # It was unloaded, or gave the GPU to a virtual machine: the driver is to say so.
            gpu.rest, gpu.idle_since = "", None
            return gpu.rest
        gpu.had_driver = has_driver
        if sysfs.text(folder / "power" / "runtime_status") in OFF:
            gpu.rest, gpu.failures = "asleep", 0
        elif gpu.rest == "asleep":
            # Somebody uses it.
            gpu.rest, gpu.idle_since = "", None
        elif gpu.rest == "quiet":
            if now - gpu.quiet_since >= PATIENCE_S + 2 * _delay_s(folder):
                gpu.rest, gpu.idle_since = "", None
                gpu.awake_until = now + min(LONGEST_PAUSE_S, PAUSE_S * 2**gpu.failures)
                gpu.failures = min(gpu.failures + 1, 16)
        elif gpu.idle_since is not None and now - gpu.idle_since >= IDLE_S and now >= gpu.awake_until:
            if self._may_sleep(folder):
                gpu.rest, gpu.quiet_since = "quiet", now
            else:
                # It is looked at again after the same time.
                gpu.idle_since = now
        return gpu.rest

    def saw(self, bus_id: str | None, is_idle: bool) -> None:
        """Take note of a reading: whether nothing was done on the GPU, and nothing held."""
        folder = self._folder(bus_id)
        if folder is not None:
            gpu = self._gpus.setdefault(folder.name, _Gpu())
            if not is_idle:
                gpu.idle_since = None
            elif gpu.idle_since is None:
                gpu.idle_since = self.clock()

    def is_fine_grained(self, bus_id: str | None) -> bool:
        """Whether the driver switches the GPU off although programs have it open, as a desktop does."""
        folder = self._folder(bus_id)
        return folder is not None and "fine" in (self._driver_says(folder) or "")

    def all_asleep(self) -> int:
        """How many GPUs of NVIDIA there are, if every one of them is off; otherwise 0."""
        if self.mode == "false":
            return 0
        try:
            devices = sorted((self.sys_root / "bus" / "pci" / "devices").iterdir())
        except OSError:
            return 0
        mine = [one for one in devices if _is_gpu(one)]
        states = [sysfs.text(one / "power" / "runtime_status") for one in mine]
        return len(mine) if all(state in OFF for state in states) else 0

    def _folder(self, bus_id: str | None) -> Path | None:
        """A GPU's folder in /sys; None where it has none, or is not to be let sleep."""
        name = None if self.mode == "false" else address(bus_id)
        if name is None:
            return None
        folder = self.sys_root / "bus" / "pci" / "devices" / name
        return folder if name in self._gpus or sysfs.text(folder / "vendor") == NVIDIA else None

    def _may_sleep(self, folder: Path) -> bool:
        if sysfs.text(folder / "power" / "control") != "auto":
            return False
        return self.mode == "true" or (self._driver_says(folder) or "").startswith("enabled")

    def _driver_says(self, folder: Path) -> str | None:
        """The driver's "Runtime D3 status" of a GPU that is on: "enabled (fine-grained)", "disabled", ..."""
        lines = sysfs.text(self.proc_root / "driver" / "nvidia" / "gpus" / folder.name / "power") or ""
        pairs = (line.partition(":") for line in lines.lower().splitlines())
        return next((value.strip() for name, _, value in pairs if name.strip() == "runtime d3 status"), None)


def _is_gpu(device: Path) -> bool:
    kind = sysfs.text(device / "class") or ""
    return sysfs.text(device / "vendor") == NVIDIA and kind.startswith(DISPLAY)


def _delay_s(folder: Path) -> float:
    """How long the kernel waits before it switches a device off; where it does not wait, reading that fails."""
    delay_ms = sysfs.number(folder / "power" / "autosuspend_delay_ms") or 0
    return min(LONGEST_DELAY_S, delay_ms / 1000)
