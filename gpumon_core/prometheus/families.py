"""The metric families of /metrics: the catalogue's metrics under DCGM's names, and gpumon's own.

Names, types, units and labels of DCGM_*: the counters in etc/*.csv of NVIDIA's dcgm-exporter, its
internal/pkg/rendermetrics, and dcgm_fields.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import Metric as ClientFamily
from prometheus_client.core import Sample

from gpumon_core.metrics import GPU_METRICS, PROCESS_METRICS, Metric
from gpumon_core.prometheus.samples import (
    Samples,
    build_info,
    counter_of_recorder,
    driver_up,
    gpu_asleep,
    gpu_energy,
    gpu_info,
    gpu_processes,
    gpu_up,
    host_info,
    memory_free,
    memory_total,
    one_number,
    process_readings,
    process_start,
    readings,
    recorder_info,
    sums,
)
from gpumon_core.prometheus.scrape_data import ScrapeData

DCGM = "DCGM_"
MIB = float(2**20)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family: its name in Prometheus, its type, what it is with its unit, the row of LABELS that its
    samples have, and the function that makes them."""

    name: str
    type: Literal["gauge", "counter"]
    help: str
    labels: str
    samples: Callable[[ScrapeData], Samples]

    def collect(self, data: ScrapeData) -> ClientFamily | None:
        """The family as an object of the client library; None where it has no sample."""
        samples = [Sample(self.name, labels, value) for labels, value in self.samples(data)]
        if not samples:
            return None
        kind: str = self.type
        # The client library has no counter without _total, as DCGM's are: exposition.render writes their type.
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


def _of_gpus(metric: Metric) -> Iterator[Family]:
    """A metric of the catalogue under each of its names."""
    for name in (metric.prometheus, *metric.prometheus_too):
        labelled: Literal["dcgm", "gpu"] = "dcgm" if name.startswith(DCGM) else "gpu"
        samples = readings(metric.key, metric.prometheus_scale, labelled)
        yield Family(name, metric.prometheus_type, _help(metric), labelled, samples)


# The highest values within a tick are named in base units: unit -> end of the name, scale, unit in words.
_PEAKS = {"%": ("_ratio", 0.01, "from 0 to 1"), "W": ("_watts", 1.0, "in W")}


def _peak(metric: Metric) -> Family:
    suffix, scale, unit = _PEAKS[metric.unit]
    name = f"gpumon_gpu_{metric.key}_peak{suffix}"
    help_text = f"{metric.label}, the highest since the tick before ({unit})."
    return Family(name, "gauge", help_text, "gpu", readings(metric.peak or "", scale, "gpu"))


def _of_processes(metric: Metric) -> Family:
    field = "memory_mib" if metric.key == "memory" else metric.key
    samples = process_readings(field, metric.prometheus_scale)
    text = _help(metric, " of a process on a GPU")
    return Family(metric.prometheus, metric.prometheus_type, text, "process", samples)


FAMILIES: tuple[Family, ...] = (
    *(family for metric in GPU_METRICS for family in _of_gpus(metric)),
    Family("DCGM_FI_DEV_FB_FREE", "gauge", "Memory free (in MiB).", "dcgm", memory_free),
    Family("DCGM_FI_DEV_FB_TOTAL", "gauge", "Memory altogether (in MiB).", "dcgm", memory_total),
    Family("gpumon_gpu_up", "gauge", "Whether a GPU answers: 0 for one that is lost or hangs.", "gpu", gpu_up),
    Family(
        "gpumon_gpu_asleep",
        "gauge",
        "1 of a GPU that is switched off while nothing uses it; others have none.",
        "gpu",
        gpu_asleep,
    ),
    Family(
        "gpumon_gpu_info",
        "gauge",
        "What a GPU is: model_name, architecture, compute_capability.",
        "gpu_info",
        gpu_info,
    ),
    *(_peak(metric) for metric in GPU_METRICS if metric.peak),
    Family(
        "gpumon_gpu_energy_joules_total",
        "counter",
        "Energy since gpumon first saw the GPU (in J); where it counts none itself, estimated from its power.",
        "gpu",
        gpu_energy,
    ),
    Family("gpumon_gpu_processes", "gauge", "How many processes are on a GPU.", "gpu", gpu_processes),
    *(_of_processes(metric) for metric in PROCESS_METRICS),
    Family(
        "gpumon_process_start_time_seconds",
        "gauge",
        "When a process on a GPU started (in UTC seconds since 1970).",
        "process",
        process_start,
    ),
    Family(
        "gpumon_processes_left_out",
        "gauge",
        "How many processes on GPUs have no series, because GPUMON_METRICS_PROCESSES others have more memory.",
        "host",
        one_number(lambda data: data.left_out if data.shown else None),
    ),
    Family(
        "gpumon_workload_memory_bytes",
        "gauge",
        "Memory of all processes of a kind of workload (in bytes).",
        "workload",
        sums("workload", 0, MIB),
    ),
    Family(
        "gpumon_workload_processes",
        "gauge",
        "How many processes on GPUs are of a kind of workload.",
        "workload",
        sums("workload", 1, 1.0),
    ),
    Family(
        "gpumon_model_memory_bytes",
        "gauge",
        "Memory of all processes that serve or train a model (in bytes).",
        "model",
        sums("model", 0, MIB),
    ),
    Family(
        "gpumon_model_processes",
        "gauge",
        "How many processes on GPUs serve or train a model.",
        "model",
        sums("model", 1, 1.0),
    ),
    Family(
        "gpumon_recorder_up",
        "gauge",
        "Whether this server records, and its newest tick is fresh.",
        "host",
        one_number(lambda data: data.is_fresh),
    ),
    Family(
        "gpumon_recorder_info",
        "gauge",
        "What the recorder does (role: recording, standby, viewing, stopped) and reads (source: nvml, demo).",
        "recorder_info",
        recorder_info,
    ),
    Family(
        "gpumon_simulated",
        "gauge",
        "Whether the GPUs are simulated.",
        "host",
        one_number(lambda data: data.state.source == "demo"),
    ),
    Family("gpumon_driver_up", "gauge", "Whether NVIDIA's driver answers.", "host", one_number(driver_up)),
    Family("gpumon_host_info", "gauge", "Versions of the driver, CUDA and NVML.", "host_info", host_info),
    Family(
        "gpumon_recorder_newest_tick_timestamp_seconds",
        "gauge",
        "When the newest tick was taken (in UTC seconds since 1970): time() less this is its age.",
        "host",
        one_number(lambda data: data.latest.snapshot.timestamp if data.latest else None),
    ),
    Family(
        "gpumon_recorder_interval_seconds",
        "gauge",
        "How often a tick is taken (in seconds).",
        "host",
        one_number(lambda data: data.interval_s),
    ),
    Family(
        "gpumon_recorder_tick_duration_seconds",
        "gauge",
        "How long the newest tick took, from the first call of the driver to the commit (in seconds).",
        "host",
        counter_of_recorder("duration_ms", 1e-3),
    ),
    Family(
        "gpumon_recorder_ticks_total",
        "counter",
        "Ticks that were written to the database since gpumon started.",
        "host",
        counter_of_recorder("ticks"),
    ),
    Family(
        "gpumon_recorder_skipped_ticks_total",
        "counter",
        "Ticks that were skipped because the one before was not done.",
        "host",
        counter_of_recorder("skipped"),
    ),
    Family(
        "gpumon_recorder_failed_ticks_total",
        "counter",
        "Ticks that failed: nothing could be read, or what was read not be written.",
        "host",
        counter_of_recorder("failed"),
    ),
    Family(
        "gpumon_recorder_dropped_ticks_total",
        "counter",
        "Ticks that were dropped because too many waited for the database.",
        "host",
        counter_of_recorder("dropped"),
    ),
    Family(
        "gpumon_recorder_buffered_ticks",
        "gauge",
        "Ticks that wait in memory for the database.",
        "host",
        counter_of_recorder("buffered"),
    ),
    Family("gpumon_build_info", "gauge", "The version of gpumon and of Python.", "build_info", build_info),
)


@dataclass(frozen=True, slots=True)
class Families:
    """The families that have samples, as the client library asks for them."""

    collected: Sequence[ClientFamily]

    def collect(self) -> Sequence[ClientFamily]:
        """All of them."""
        return self.collected

    def named(self, names: frozenset[str]) -> Families:
        """The families with a sample of one of these names."""
        return Families([one for one in self.collected if one.samples[0].name in names])


def collect(data: ScrapeData) -> Families:
    """Every family that has a sample."""
    found = (family.collect(data) for family in FAMILIES)
    return Families([family for family in found if family is not None])
