"""All that a run has: the boards, the programs with their databases, the hostile processes, the visitors."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fake_nvml import GIB, FakeNvml, environment
from fake_nvml.readings import Reading, Readings

from .cluster import Cluster
from .programs import Program, Server, recorder
from .stores import ServerStore, Store
from .visitors import Visitors
from .zoo import Secrets, Zoo

INTERVAL_S = 1.0
# Small, so that it is soon full.
DISK_MIB = 48
UUIDS = ("GPU-0", "GPU-1")


@dataclass(slots=True)
class Event:
    """A trouble: from when to when it was there, in seconds since the run began."""

    name: str
    program: str
    began: float
    ended: float | None = None

    def __str__(self) -> str:
        ended = "…" if self.ended is None else f"{self.ended:.1f}"
        return f"{self.name}({self.program}) {self.began:.1f}–{ended}"


class World:
    """See above. `faketime` is libfaketime's file, or None to leave the clocks alone; without `postgres` each
    program has a SQLite file of its own."""

    def __init__(self, folder: Path, seed: int, faketime: str | None, postgres: Cluster | None) -> None:
        self.postgres = postgres
        self.folder, self.seed, self.rng = folder, seed, random.Random(seed)
        self.began = time.monotonic()
        self.events: list[Event] = []
        self.failures: list[str] = []
        # Of a slot, from when to when its driver was at fault.
        self.driver_faults: list[tuple[int | None, float, float]] = []
        self.backups: dict[str, Path] = {}
        self.fake = FakeNvml(folder / "nvml-state")
        for uuid in UUIDS:
            self.fake.add_gpu(uuid=uuid, gpu_utilization=50, memory_used=4 * GIB, power_mw=150_000, energy_mj=None)
        self.readings = Readings(folder / "readings")
        self.secrets = Secrets(*(self._secret() for _ in range(4)))
        self.zoo = Zoo(folder / "zoo", self.fake, self.secrets, self.rng)
        self.offsets: dict[str, Path] = {}
        self.recorder = recorder(*self._parts("recorder", faketime))
        self.server = Server(*self._parts("server", faketime))
        self.programs: tuple[Program, ...] = (self.recorder, self.server)
        self.visitors = Visitors(self.server, self.secrets, self.rng)

    def _secret(self) -> str:
        # A label of DNS, so that nothing but its way keeps it out of where such a label belongs.
        return "s3cr3t" + "".join(self.rng.choices("abcdefghjkmnpqrstuvwxyz23456789", k=26))

    def _parts(self, name: str, faketime: str | None) -> tuple[Store, Path, dict[str, str]]:
        """A program's database, log and environment."""
        data = self.folder / name
        data.mkdir()
        if os.geteuid() == 0:
            command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(data)]
            subprocess.run(command, check=False, capture_output=True)
        values = {key: value for key, value in os.environ.items() if not key.startswith(("GPUMON_", "STREAMLIT_"))}
        values |= environment(self.fake) | self.readings.environment()
        values |= {
            "GPUMON_DATA_DIR": str(data),
            "GPUMON_HOST_NAME": name,
            "GPUMON_INTERVAL": f"{INTERVAL_S:g}",
            "GPUMON_SOURCE": "nvml",
            "CHAOS_PASSWORD": self.secrets.own,
        }
        if faketime is not None:
            self.offsets[name] = self.folder / f"{name}-clock"
            self.offsets[name].write_text("+0")
            values |= {
                "LD_PRELOAD": faketime,
                "FAKETIME_TIMESTAMP_FILE": str(self.offsets[name]),
                # Not read at every look at the clock: that is the most of what a program does then.
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        store = Store(data)
        if self.postgres is not None:
            store = ServerStore(data, name, self.postgres.url)
            values["GPUMON_DATABASE_URL"] = store.url
        return store, self.folder / f"{name}.log", values

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    def say(self, text: str) -> None:
        """A line of the report."""
        with suppress(BrokenPipeError):
            os.write(1, f"{self.now:7.1f}  {text}\n".encode())

    def fail(self, text: str) -> None:
        """Something that was promised did not hold."""
        self.failures.append(f"at {self.now:.1f} s: {text}")
        self.say(f"FAILED: {text}")

    def other(self, program: Program) -> Program:
        """The one that is not this one."""
        return self.server if program is self.recorder else self.recorder

    def read_by(self, program: Program, since: int = 0) -> list[Reading]:
        """What the driver answered to a program, in all its lives, from the reading `since` on."""
        pids = {life.pid for life in program.lives}
        return [reading for reading in self.readings.all()[since:] if reading.pid in pids]

    def ticks_of(self, program: Program) -> int:
        """How many ticks its process has taken: readings of the GPU that was asked most often."""
        counts = dict.fromkeys(range(len(UUIDS)), 0)
        for reading in self.readings.all():
            if reading.pid == program.pid:
                counts[reading.gpu] += 1
        return max(counts.values())

    def age_s(self, program: Program) -> float:
        """How long ago the driver answered its process; since its start where it never did."""
        newest = next((one for one in reversed(self.readings.all()) if one.pid == program.pid), None)
        return time.monotonic() - (newest.monotonic_s if newest else program.lives[-1].began)

    def close(self, keep: bool) -> None:
        """End what runs. What was on disks of its own is copied, to be looked at."""
        for program in self.programs:
            if program.runs:
                program.end(signal.SIGKILL, 60)
            for grave in program.store.graves:
                grave.connection.close()
            data = program.store.folder
            if os.path.ismount(data):
                if keep:
                    shutil.copytree(data, data.with_name(f"{data.name}-kept"))
                subprocess.run(["umount", "--lazy", str(data)], check=False, capture_output=True)
