"""What a scrape of /metrics reports, all of it from memory: the recorder's state, and its latest tick."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest

from gpumon_core import format as fmt
from gpumon_core.attribution.records import ProcessIdentity, Program, is_placeholder
from gpumon_core.recording.counters import Counters
from gpumon_core.recording.latest_tick import LatestTick
from gpumon_core.recording.state import State
from gpumon_core.telemetry.records import GpuInfo, GpuValues, ProcessReading

# The longest label, in characters: users choose the names of processes and models.
LONGEST_LABEL = 128
# How many models have series of their own: those with the most memory.
MOST_MODELS = 100
UNKNOWN = "unknown"
# Line breaks are escaped; other control characters and halves of surrogate pairs are replaced.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
# "1g.24gb", with what may follow in a profile: "+me", "+gfx", "-me", "+me.all".
_PROFILE = re.compile(r" MIG (\S+)$")

Labels = dict[str, str]


@dataclass(frozen=True)
class ScrapeData:
    """What the recorder reports about itself, and its latest tick, which is shown as long as it is `is_fresh`.
    `processes` is how many processes have series."""

    host: str
    state: State
    counters: Counters | None
    interval_s: float
    processes: int
    latest: LatestTick | None
    is_fresh: bool

    @property
    def shown(self) -> LatestTick | None:
        """The latest tick, as long as it is fresh."""
        return self.latest if self.is_fresh else None

    @cached_property
    def gpus(self) -> tuple[GpuInfo, ...]:
        """Every GPU known."""
        return self.shown.snapshot.gpus if self.shown else ()

    @cached_property
    def answering(self) -> tuple[GpuInfo, ...]:
        """The GPUs with a reading in this tick."""
        if self.shown is None:
            return ()
        read = {reading.uuid for reading in self.shown.snapshot.readings}
        return tuple(gpu for gpu in self.gpus if gpu.uuid in read)

    def values(self, gpu: GpuInfo) -> GpuValues:
        """What a GPU has reported, by catalogue key."""
        return self.shown.values.get(gpu.uuid, {}) if self.shown else {}

    @cached_property
    def own_labels(self) -> Mapping[str, Labels]:
        """By UUID, the labels of a GPU's gpumon_* series: DCGM's without the names of GPU and driver."""
        return {gpu.uuid: _gpu_labels(gpu, self.host) for gpu in self.gpus}

    @cached_property
    def dcgm_labels(self) -> Mapping[str, Labels]:
        """By UUID, the labels that DCGM's exporter gives a GPU's series."""
        if self.shown is None:
            return {}
        names = {gpu.uuid: gpu.name for gpu in self.gpus}
        driver = self.shown.snapshot.host.driver_version
        return {
            gpu.uuid: self.own_labels[gpu.uuid]
            | labels_of(modelName=names.get(gpu.parent_uuid or gpu.uuid, gpu.name), DCGM_FI_DRIVER_VERSION=driver)
            for gpu in self.gpus
        }

    @cached_property
    def processes_on(self) -> Mapping[str, int]:
        """By UUID, how many processes a GPU has."""
        counts: dict[str, int] = dict.fromkeys((gpu.uuid for gpu in self.answering), 0)
        for process in self._running:
            counts[process.gpu_uuid] += 1
        return counts

    @cached_property
    def _running(self) -> tuple[ProcessReading, ...]:
        known = {gpu.uuid for gpu in self.answering}
        return tuple(one for one in self.shown.snapshot.processes if one.gpu_uuid in known) if self.shown else ()

    def identity(self, pid: int) -> ProcessIdentity:
        """The identity of a process."""
        found = self.shown.identities.get(pid) if self.shown else None
        return found or ProcessIdentity(pid)

    @cached_property
    def largest(self) -> Sequence[tuple[ProcessReading, Labels]]:
        """The processes that have series, each on each of its GPUs, and their labels."""
        chosen = nlargest(self.processes, self._running, key=lambda one: (one.memory_mib or 0, -one.pid))
        return [
            (one, self.own_labels[one.gpu_uuid] | _process_labels(one, self.identity(one.pid))) for one in chosen
        ]

    @cached_property
    def left_out(self) -> int:
        """How many processes have no series."""
        return len(self._running) - len(self.largest)

    def by(self, key: Callable[[Program], str | None]) -> Mapping[str, tuple[int | None, int]]:
        """Memory in MiB and number of the processes with the same key, those with the most memory first."""
        memory: dict[str, int | None] = {}
        pids: dict[str, set[int]] = defaultdict(set)
        for one in self._running:
            name = key(self.identity(one.pid).program)
            if name is None:
                continue
            pids[name].add(one.pid)
            known = memory.setdefault(name, None)
            if one.memory_mib is not None:
                memory[name] = (known or 0) + one.memory_mib
        return {name: (memory[name], len(pids[name])) for name in sorted(memory, key=lambda n: -(memory[n] or 0))}

    @cached_property
    def workloads(self) -> Mapping[str, tuple[int | None, int]]:
        """Memory and number of processes by workload; unknown is one of them, so that the sum is complete."""
        return self.by(lambda program: clean(program.workload) or UNKNOWN)

    @cached_property
    def models(self) -> Mapping[str, tuple[int | None, int]]:
        """Memory and number of processes of the models with a known name."""
        return dict(list(self.by(_model).items())[:MOST_MODELS])


def clean(text: str | None) -> str:
    """A text as a label has it: printable, of a bounded length, and nothing where it is not known."""
    if not text:
        return ""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text if len(text) <= LONGEST_LABEL else _short(text))


def _short(text: str) -> str:
    return text[: LONGEST_LABEL - 1] + "…"


def labels_of(**texts: str | int | None) -> Labels:
    """The labels that have a value: to Prometheus an empty one is none."""
    cleaned = {name: clean(str(text)) for name, text in texts.items() if text is not None}
    return {name: text for name, text in cleaned.items() if text}


def _gpu_labels(gpu: GpuInfo, host: str) -> Labels:
    """As with DCGM's exporter, a MIG instance has the labels of its GPU, its profile and its number. Several of
    its compute instances would be the same then, so each has its own UUID as well."""
    labels = labels_of(
        gpu=gpu.index,
        UUID=gpu.parent_uuid or gpu.uuid,
        pci_bus_id=gpu.pci_bus_id,
        device=f"nvidia{gpu.index}",
        Hostname=host,
    )
    if gpu.parent_uuid is None:
        return labels
    profile = _PROFILE.search(gpu.name or "")
    return labels | labels_of(
        GPU_I_PROFILE=profile[1] if profile else None, GPU_I_ID=gpu.gpu_instance, GPU_I_UUID=gpu.uuid
    )


def _process_labels(process: ProcessReading, identity: ProcessIdentity) -> Labels:
    program = identity.program
    return labels_of(
        pid=process.pid,
        type=process.kind,
        name=identity.name,
        user=identity.user,
        # Without its pod, which has a label of its own: the label is the container's, as with DCGM's exporter.
        container=fmt.container(None, program.container_name, program.container_id),
        namespace=program.namespace,
        pod=program.pod,
        workload=program.workload,
        model=_model(program),
    )


def _model(program: Program) -> str | None:
    model = program.model
    return None if model is None or is_placeholder(model) else clean(model) or None
