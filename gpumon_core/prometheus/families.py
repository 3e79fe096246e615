"""The metric families of /metrics: what the catalogue has under DCGM's names, and what DCGM does not know.

Names, types, units and labels of DCGM_*: the counters in etc/*.csv of NVIDIA's dcgm-exporter, its
internal/pkg/rendermetrics, and dcgm_fields.h.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import Metric as ClientFamily
from prometheus_client.core import Sample

from gpumon_core import __version__, gpu_state
from gpumon_core.metrics import GPU_METRICS, PROCESS_METRICS, Metric
from gpumon_core.prometheus.scrape_data import Labels, ScrapeData, labels_of
from gpumon_core.telemetry.records import GpuInfo

DCGM = "DCGM_"
MIB = float(2**20)

Samples = Iterable[tuple[Labels, float]]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family: its name as Prometheus has it, its type, what it is with its unit, which of LABELS its
    samples have, and where they come from."""

    name: str
    type: Literal["gauge", "counter"]
    help: str
    labels: str
    samples: Callable[[ScrapeData], Samples]

    def collect(self, scene: ScrapeData) -> ClientFamily | None:
        """It as the client library wants it; None where nobody has a value."""
        samples = [Sample(self.name, labels, value) for labels, value in self.samples(scene)]
        if not samples:
            return None
        kind: str = self.type
        # The client library has no counter without _total, as DCGM's are: prometheus.render says what they are.
        if kind == "counter" and self.name.startswith(DCGM):
            kind = "unknown"
        family = ClientFamily(self.name.removesuffix("_total"), self.help, kind)
        family.samples = samples
        return family


# The labels that the samples of a family may have.
_GPU = ("gpu", "UUID", "pci_bus_id", "device", "Hostname", "GPU_I_PROFILE", "GPU_I_ID", "GPU_I_UUID")
_PROCESS = ("pid", "type", "name", "user", "container", "namespace", "pod", "workload", "model")
LABELS: Mapping[str, tuple[str, ...]] = {
    "dcgm": (*_GPU, "modelName", "DCGM_FI_DRIVER_VERSION"),
    "gpu": _GPU,
    "gpu_info": (*_GPU, "model_name", "architecture", "compute_capability"),
    "process": (*_GPU, *_PROCESS),
    "workload": ("workload", "Hostname"),
    "model": ("model", "Hostname"),
    "host": ("Hostname",),
    "recorder_info": ("Hostname", "role", "source"),
    "host_info": ("Hostname", "driver_version", "cuda_version", "nvml_version"),
    "build_info": ("version", "python"),
}

# A unit of the catalogue and what it is multiplied by -> the unit that comes out, in words.
UNITS = {
    ("°C", 1.0): "in °C",
    ("%", 1.0): "in %",
    ("%", 0.01): "from 0 to 1",
    ("MiB", 1.0): "in MiB",
    ("MiB", MIB): "in bytes",
    ("W", 1.0): "in W",
    ("MHz", 1.0): "in MHz",
    ("MHz", 1e6): "in Hz",
    ("MiB/s", MIB): "in bytes per second",
    ("J", 1e3): "in mJ",
}


def unit_of(metric: Metric) -> str:
    """The unit in which a metric is exported, in words; empty for a plain number."""
    return UNITS.get((metric.unit, metric.prometheus_scale), "")


def _help(metric: Metric, more: str = "") -> str:
    unit = unit_of(metric)
    return f"{metric.label}{more}{f' ({unit})' if unit else ''}."


def _scaled(value: float, scale: float) -> float:
    # 42.3 % are 0.423, and not 0.42300000000000004.
    return value if scale == 1 else round(value * scale, 6)


def _readings(key: str, scale: float, labelled: Literal["dcgm", "gpu"]) -> Callable[[ScrapeData], Samples]:
    """What the GPUs that answer say, by the key of a value."""

    def samples(scene: ScrapeData) -> Samples:
        labels = scene.dcgm_labels if labelled == "dcgm" else scene.own_labels
        for gpu in scene.answering:
            value = scene.values(gpu).get(key)
            if value is not None:
                yield labels[gpu.uuid], _scaled(value, scale)

    return samples


def _of_gpus(metric: Metric) -> Iterator[Family]:
    """A metric of the catalogue under each of its names."""
    for name in (metric.prometheus, *metric.prometheus_too):
        labelled: Literal["dcgm", "gpu"] = "dcgm" if name.startswith(DCGM) else "gpu"
        samples = _readings(metric.key, metric.prometheus_scale, labelled)
        yield Family(name, metric.prometheus_type, _help(metric), labelled, samples)


# The highest values within a tick are named in base units: unit -> end of the name, scale, unit in words.
_PEAKS = {"%": ("_ratio", 0.01, "from 0 to 1"), "W": ("_watts", 1.0, "in W")}


def _peak(metric: Metric) -> Family:
    suffix, scale, unit = _PEAKS[metric.unit]
    name = f"gpumon_gpu_{metric.key}_peak{suffix}"
    help_text = f"{metric.label}, the highest since the tick before ({unit})."
    return Family(name, "gauge", help_text, "gpu", _readings(metric.peak or "", scale, "gpu"))


def _of_processes(metric: Metric) -> Family:
    def samples(scene: ScrapeData) -> Samples:
        for process, labels in scene.largest:
            value = getattr(process, "memory_mib" if metric.key == "memory" else metric.key)
            if value is not None:
                yield labels, _scaled(value, metric.prometheus_scale)

    return Family(
        metric.prometheus, metric.prometheus_type, _help(metric, " of a process on a GPU"), "process", samples
    )


def _memory_total(scene: ScrapeData) -> Samples:
    for gpu in scene.answering:
        if gpu.memory_total_mib is not None:
            yield scene.dcgm_labels[gpu.uuid], gpu.memory_total_mib


def _memory_free(scene: ScrapeData) -> Samples:
    """nvmlMemory_v2_t: total = reserved + used + free; where a driver does not tell reserved apart, it is used."""
    for gpu in scene.answering:
        values = scene.values(gpu)
        used, reserved = values.get("memory"), values.get("memory_reserved") or 0
        # Of memory that a GPU shares with the machine, nobody knows how much is free for it.
        shared = gpu_state.shares_memory(gpu.memory_from)
        if gpu.memory_total_mib is not None and used is not None and not shared:
            yield scene.dcgm_labels[gpu.uuid], max(0, gpu.memory_total_mib - round(used) - round(reserved))


def _gpu_up(scene: ScrapeData) -> Samples:
    if scene.shown is None:
        return
    up = {gpu.uuid for gpu in scene.answering}
    for gpu in scene.gpus:
        # One that is asleep is no trouble, and no alert.
        fine = gpu.uuid in up or _state(scene, gpu) in gpu_state.LEFT_ALONE
        yield scene.own_labels[gpu.uuid], float(fine)
    for index in sorted(scene.shown.snapshot.nameless):
        yield labels_of(gpu=index, device=f"nvidia{index}", Hostname=scene.host), 0.0


def _state(scene: ScrapeData, gpu: GpuInfo) -> str:
    return scene.shown.snapshot.state_of(gpu.uuid) if scene.shown else ""


def _gpu_asleep(scene: ScrapeData) -> Samples:
    for gpu in scene.gpus:
        if _state(scene, gpu) == "asleep":
            yield scene.own_labels[gpu.uuid], 1.0


def _gpu_info(scene: ScrapeData) -> Samples:
    for gpu in scene.gpus:
        facts = labels_of(
            model_name=gpu.name, architecture=gpu.architecture, compute_capability=gpu.compute_capability
        )
        yield scene.own_labels[gpu.uuid] | facts, 1.0


def _gpu_energy(scene: ScrapeData) -> Samples:
    if scene.shown is not None:
        for gpu in scene.answering:
            if gpu.uuid in scene.shown.energy_j:
                yield scene.own_labels[gpu.uuid], round(scene.shown.energy_j[gpu.uuid], 3)


def _gpu_processes(scene: ScrapeData) -> Samples:
    return ((scene.own_labels[uuid], float(count)) for uuid, count in scene.processes_on.items())


def _process_start(scene: ScrapeData) -> Samples:
    for process, labels in scene.largest:
        start = scene.who(process.pid).start_time
        if start is not None:
            yield labels, start


def _parts(kind: Literal["workload", "model"], item: int, scale: float) -> Callable[[ScrapeData], Samples]:
    """What workloads or models have together: item 0 is their memory, 1 the number of their processes."""

    def samples(scene: ScrapeData) -> Samples:
        found = scene.workloads if kind == "workload" else scene.models
        for name, figures in found.items():
            figure = figures[item]
            if figure is not None:
                yield {kind: name} | labels_of(Hostname=scene.host), figure * scale

    return samples


def _count(value: Callable[[ScrapeData], float | bool | None]) -> Callable[[ScrapeData], Samples]:
    """One number of the whole host; none where it is None."""

    def samples(scene: ScrapeData) -> Samples:
        found = value(scene)
        if found is not None:
            yield labels_of(Hostname=scene.host), float(found)

    return samples


def _vital(name: str, scale: float = 1.0) -> Callable[[ScrapeData], Samples]:
    """A number out of the recorder's own; none where this process has no recorder."""

    def value(scene: ScrapeData) -> float | None:
        found = getattr(scene.counters, name, None)
        return None if found is None or scene.state.role == "viewing" else _scaled(found, scale)

    return _count(value)


def _driver_up(scene: ScrapeData) -> bool | None:
    if scene.state.driver is not None:
        return False
    # What is simulated on purpose, or recorded by another, says nothing of a driver here.
    return True if scene.shown is not None and scene.state.source == "nvml" else None


def _build(_: ScrapeData) -> Samples:
    yield labels_of(version=__version__, python=platform.python_version()), 1.0


def _recorder_info(scene: ScrapeData) -> Samples:
    yield labels_of(Hostname=scene.host, role=scene.state.role, source=scene.state.source), 1.0


def _host_info(scene: ScrapeData) -> Samples:
    if scene.shown is not None:
        host = scene.shown.snapshot.host
        yield (
            labels_of(
                Hostname=scene.host,
                driver_version=host.driver_version,
                cuda_version=host.cuda_version,
                nvml_version=host.nvml_version,
            ),
            1.0,
        )


FAMILIES: tuple[Family, ...] = (
    *(family for metric in GPU_METRICS for family in _of_gpus(metric)),
    Family("DCGM_FI_DEV_FB_FREE", "gauge", "Memory free (in MiB).", "dcgm", _memory_free),
    Family("DCGM_FI_DEV_FB_TOTAL", "gauge", "Memory altogether (in MiB).", "dcgm", _memory_total),
    Family("gpumon_gpu_up", "gauge", "Whether a GPU answers: 0 for one that is lost or hangs.", "gpu", _gpu_up),
    Family(
        "gpumon_gpu_asleep",
        "gauge",
        "1 of a GPU that is switched off while nothing uses it; others have none.",
        "gpu",
        _gpu_asleep,
    ),
    Family(
        "gpumon_gpu_info",
        "gauge",
        "What a GPU is: model_name, architecture, compute_capability.",
        "gpu_info",
        _gpu_info,
    ),
    *(_peak(metric) for metric in GPU_METRICS if metric.peak),
    Family(
        "gpumon_gpu_energy_joules_total",
        "counter",
        "Energy since gpumon first saw the GPU (in J); where it counts none itself, estimated from its power.",
        "gpu",
        _gpu_energy,
    ),
    Family("gpumon_gpu_processes", "gauge", "How many processes are on a GPU.", "gpu", _gpu_processes),
    *(_of_processes(metric) for metric in PROCESS_METRICS),
    Family(
        "gpumon_process_start_time_seconds",
        "gauge",
        "When a process on a GPU started (in UTC seconds since 1970).",
        "process",
        _process_start,
    ),
    Family(
        "gpumon_processes_left_out",
        "gauge",
        "How many processes on GPUs have no series, because GPUMON_METRICS_PROCESSES others have more memory.",
        "host",
        _count(lambda scene: scene.left_out if scene.shown else None),
    ),
    Family(
        "gpumon_workload_memory_bytes",
        "gauge",
        "Memory of all processes of a kind of workload (in bytes).",
        "workload",
        _parts("workload", 0, MIB),
    ),
    Family(
        "gpumon_workload_processes",
        "gauge",
        "How many processes on GPUs are of a kind of workload.",
        "workload",
        _parts("workload", 1, 1.0),
    ),
    Family(
        "gpumon_model_memory_bytes",
        "gauge",
        "Memory of all processes that serve or train a model (in bytes).",
        "model",
        _parts("model", 0, MIB),
    ),
    Family(
        "gpumon_model_processes",
        "gauge",
        "How many processes on GPUs serve or train a model.",
        "model",
        _parts("model", 1, 1.0),
    ),
    Family(
        "gpumon_recorder_up",
        "gauge",
        "Whether this server records, and its newest tick is fresh.",
        "host",
        _count(lambda scene: scene.fresh),
    ),
    Family(
        "gpumon_recorder_info",
        "gauge",
        "What the recorder does (role: recording, standby, viewing, stopped) and reads (source: nvml, demo).",
        "recorder_info",
        _recorder_info,
    ),
    Family(
        "gpumon_simulated",
        "gauge",
        "Whether the GPUs are simulated.",
        "host",
        _count(lambda scene: scene.state.source == "demo"),
    ),
    Family("gpumon_driver_up", "gauge", "Whether NVIDIA's driver answers.", "host", _count(_driver_up)),
    Family("gpumon_host_info", "gauge", "Versions of the driver, CUDA and NVML.", "host_info", _host_info),
    Family(
        "gpumon_recorder_newest_tick_timestamp_seconds",
        "gauge",
        "When the newest tick was taken (in UTC seconds since 1970): time() less this is its age.",
        "host",
        _count(lambda scene: scene.latest.snapshot.timestamp if scene.latest else None),
    ),
    Family(
        "gpumon_recorder_interval_seconds",
        "gauge",
        "How often a tick is taken (in seconds).",
        "host",
        _count(lambda scene: scene.interval_s),
    ),
    Family(
        "gpumon_recorder_tick_duration_seconds",
        "gauge",
        "How long the newest tick took, from the first call of the driver to the commit (in seconds).",
        "host",
        _vital("duration_ms", 1e-3),
    ),
    Family(
        "gpumon_recorder_ticks_total",
        "counter",
        "Ticks that were written to the database since gpumon started.",
        "host",
        _vital("ticks"),
    ),
    Family(
        "gpumon_recorder_skipped_ticks_total",
        "counter",
        "Ticks that fell out because the one before was not done.",
        "host",
        _vital("skipped"),
    ),
    Family(
        "gpumon_recorder_failed_ticks_total",
        "counter",
        "Ticks that failed: nothing could be read, or what was read not be written.",
        "host",
        _vital("failed"),
    ),
    Family(
        "gpumon_recorder_dropped_ticks_total",
        "counter",
        "Ticks that had to make room while the database was away.",
        "host",
        _vital("dropped"),
    ),
    Family(
        "gpumon_recorder_buffered_ticks",
        "gauge",
        "Ticks that wait in memory for the database.",
        "host",
        _vital("buffered"),
    ),
    Family("gpumon_build_info", "gauge", "The version of gpumon and of Python.", "build_info", _build),
)


@dataclass(frozen=True, slots=True)
class Families:
    """What the client library asks for its families."""

    collected: Sequence[ClientFamily]

    def collect(self) -> Sequence[ClientFamily]:
        """All of them."""
        return self.collected

    def named(self, names: frozenset[str]) -> Families:
        """Those of which a sample has one of the names."""
        return Families([one for one in self.collected if one.samples[0].name in names])


def collect(scene: ScrapeData) -> Families:
    """Every family that has a sample."""
    found = (family.collect(scene) for family in FAMILIES)
    return Families([family for family in found if family is not None])
