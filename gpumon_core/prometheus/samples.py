"""The samples of each family, labels and a value, from what a scrape reports."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Literal

from gpumon_core import __version__, gpu_state
from gpumon_core.prometheus.scrape_data import Labels, ScrapeData, labels_of
from gpumon_core.telemetry.records import GpuInfo

Samples = Iterable[tuple[Labels, float]]


def scaled(value: float, scale: float) -> float:
    """A value of the catalogue in the unit of its series."""
    # 42.3 % are 0.423, and not 0.42300000000000004.
    return value if scale == 1 else round(value * scale, 6)


def readings(key: str, scale: float, labelled: Literal["dcgm", "gpu"]) -> Callable[[ScrapeData], Samples]:
    """What the GPUs that answer report, by the key of a value."""

    def samples(data: ScrapeData) -> Samples:
        labels = data.dcgm_labels if labelled == "dcgm" else data.own_labels
        for gpu in data.answering:
            value = data.values(gpu).get(key)
            if value is not None:
                yield labels[gpu.uuid], scaled(value, scale)

    return samples


def process_readings(key: str, scale: float) -> Callable[[ScrapeData], Samples]:
    """What the driver reports of each process that has series, by the name of a field of ProcessReading."""

    def samples(data: ScrapeData) -> Samples:
        for process, labels in data.largest:
            value = getattr(process, key)
            if value is not None:
                yield labels, scaled(value, scale)

    return samples


def memory_total(data: ScrapeData) -> Samples:
    """What a GPU has, in MiB."""
    for gpu in data.answering:
        if gpu.memory_total_mib is not None:
            yield data.dcgm_labels[gpu.uuid], gpu.memory_total_mib


def memory_free(data: ScrapeData) -> Samples:
    """nvmlMemory_v2_t: total = reserved + used + free. A driver without reserved counts it as used."""
    for gpu in data.answering:
        values = data.values(gpu)
        used, reserved = values.get("memory"), values.get("memory_reserved") or 0
        # How much of the memory that it shares with the machine is free for a GPU is not known.
        shared = gpu_state.shares_memory(gpu.memory_from)
        if gpu.memory_total_mib is not None and used is not None and not shared:
            yield data.dcgm_labels[gpu.uuid], max(0, gpu.memory_total_mib - round(used) - round(reserved))


def gpu_up(data: ScrapeData) -> Samples:
    """1 for a GPU that answers, or is left alone so that it may sleep; 0 for others."""
    if data.shown is None:
        return
    up = {gpu.uuid for gpu in data.answering}
    for gpu in data.gpus:
        # A GPU that is asleep is no problem, and no alert.
        fine = gpu.uuid in up or _state(data, gpu) in gpu_state.LEFT_ALONE
        yield data.own_labels[gpu.uuid], float(fine)
    for index in sorted(data.shown.snapshot.nameless):
        yield labels_of(gpu=index, device=f"nvidia{index}", Hostname=data.host), 0.0


def _state(data: ScrapeData, gpu: GpuInfo) -> str:
    return data.shown.snapshot.state_of(gpu.uuid) if data.shown else ""


def gpu_asleep(data: ScrapeData) -> Samples:
    """1 for a GPU that is switched off."""
    for gpu in data.gpus:
        if _state(data, gpu) == "asleep":
            yield data.own_labels[gpu.uuid], 1.0


def gpu_info(data: ScrapeData) -> Samples:
    """1 for each GPU, with its facts as labels."""
    for gpu in data.gpus:
        facts = labels_of(
            model_name=gpu.name, architecture=gpu.architecture, compute_capability=gpu.compute_capability
        )
        yield data.own_labels[gpu.uuid] | facts, 1.0


def gpu_energy(data: ScrapeData) -> Samples:
    """What a GPU has taken since gpumon first saw it, in joules."""
    if data.shown is not None:
        for gpu in data.answering:
            if gpu.uuid in data.shown.energy_j:
                yield data.own_labels[gpu.uuid], round(data.shown.energy_j[gpu.uuid], 3)


def gpu_processes(data: ScrapeData) -> Samples:
    """How many processes a GPU has."""
    return ((data.own_labels[uuid], float(count)) for uuid, count in data.processes_on.items())


def process_start(data: ScrapeData) -> Samples:
    """When a process started, in UTC seconds."""
    for process, labels in data.largest:
        start = data.identity(process.pid).start_time
        if start is not None:
            yield labels, start


def sums(kind: Literal["workload", "model"], item: int, scale: float) -> Callable[[ScrapeData], Samples]:
    """The sum over workloads or models: item 0 is their memory, 1 the number of their processes."""

    def samples(data: ScrapeData) -> Samples:
        found = data.workloads if kind == "workload" else data.models
        for name, figures in found.items():
            figure = figures[item]
            if figure is not None:
                yield {kind: name} | labels_of(Hostname=data.host), figure * scale

    return samples


def one_number(value: Callable[[ScrapeData], float | bool | None]) -> Callable[[ScrapeData], Samples]:
    """One number for the host; no sample where it is None."""

    def samples(data: ScrapeData) -> Samples:
        found = value(data)
        if found is not None:
            yield labels_of(Hostname=data.host), float(found)

    return samples


def counter_of_recorder(name: str, scale: float = 1.0) -> Callable[[ScrapeData], Samples]:
    """One of the recorder's counters; no sample where this process has no recorder."""

    def value(data: ScrapeData) -> float | None:
        found = getattr(data.counters, name, None)
        return None if found is None or data.state.role == "viewing" else scaled(found, scale)

    return one_number(value)


def driver_up(data: ScrapeData) -> bool | None:
    """Whether the driver answers; None where it was not asked."""
    if data.state.driver is not None:
        return False
    # Simulated GPUs, or another recorder's, say nothing about a driver here.
    return True if data.shown is not None and data.state.source == "nvml" else None


def build_info(_: ScrapeData) -> Samples:
    """1, with the versions as labels."""
    yield labels_of(version=__version__, python=platform.python_version()), 1.0


def recorder_info(data: ScrapeData) -> Samples:
    """1, with what the recorder does as labels."""
    yield labels_of(Hostname=data.host, role=data.state.role, source=data.state.source), 1.0


def host_info(data: ScrapeData) -> Samples:
    """1, with the versions of the driver's parts as labels."""
    if data.shown is not None:
        host = data.shown.snapshot.host
        yield (
            labels_of(
                Hostname=data.host,
                driver_version=host.driver_version,
                cuda_version=host.cuda_version,
                nvml_version=host.nvml_version,
            ),
            1.0,
        )
