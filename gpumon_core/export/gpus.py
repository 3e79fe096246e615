"""GPUs and their metrics in other programs' formats: as they are now, and over time."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gpumon_core.export.processes import GPU
from gpumon_core.export.tables import FLAG, MOMENT, NUMBER, TEXT, WHOLE, Column, Table, plain
from gpumon_core.metrics import GPU_METRICS, GPU_METRICS_BY_KEY, Metric

# More digits than any sensor has.
DIGITS = 3
# The values of each step of a history: the end of the column's name in a frame -> the name of the value.
AGGREGATES = {"": "mean", "_min": "min", "_max": "max"}


def _number(key: str, title: str, metric: Metric) -> Column:
    return Column(key, title, NUMBER, lambda frame: frame[key].round(DIGITS), metric.unit or None)


def _now(metric: Metric) -> list[Column]:
    """The value of the newest tick, and the highest within it where the driver stores samples."""
    found = [_number(metric.key, metric.label, metric)]
    return found + ([_number(metric.peak, f"{metric.label}, highest", metric)] if metric.peak else [])


# For frames of frames.gpu_table with `fresh` (bool) and its host's driver_version and cuda_version.
GPUS = Table(
    (
        plain("host", "Host", TEXT, sure=True),
        GPU,
        plain("gpu_index", "Index", WHOLE, sure=True),
        plain("mig_index", "MIG index", WHOLE),
        plain("uuid", "UUID", TEXT, sure=True),
        plain("name", "Name", TEXT),
        plain("memory_total_mib", "Memory", WHOLE, unit="MiB"),
        plain("memory_from", "Memory from", TEXT),
        plain("power_limit_w", "Board power limit", NUMBER, unit="W"),
        plain("pci_bus_id", "PCI bus id", TEXT),
        plain("architecture", "Architecture", TEXT),
        plain("compute_capability", "Compute capability", TEXT),
        plain("driver_version", "Driver", TEXT),
        plain("cuda_version", "CUDA", TEXT),
        plain("state", "State", TEXT, sure=True),
        plain("fresh", "Fresh", FLAG, sure=True),
        plain("sampling", "Sampling", TEXT),
        plain("first_seen", "First seen", MOMENT, sure=True),
        plain("last_seen", "Last seen", MOMENT, sure=True),
        plain("last_seen_epoch", "Last seen, UTC seconds", WHOLE, "last_seen", sure=True),
        *(column for metric in GPU_METRICS for column in _now(metric)),
        plain("gpu_id", "Id in gpumon", WHOLE, "id", sure=True),
        plain("parent_id", "Id of its GPU", WHOLE),
    )
)
METRIC_KEYS = [column.key for metric in GPU_METRICS for column in _now(metric)]


def history_table(metrics: Sequence[str]) -> Table:
    """For frames of metrics_history of these metrics with host, gpu_index and mig_index."""
    numbers = [
        _number(key + suffix, f"{GPU_METRICS_BY_KEY[key].label}, {name}", GPU_METRICS_BY_KEY[key])
        for key in metrics
        for suffix, name in AGGREGATES.items()
    ]
    return Table(
        (
            plain("host", "Host", TEXT, sure=True),
            GPU,
            plain("time", "Time", MOMENT, "timestamp_epoch", sure=True),
            *numbers,
            plain("gpu_id", "Id of the GPU in gpumon", WHOLE, sure=True),
        )
    )


def numbers(values: pd.Series) -> list[float | None]:
    """A metric as plain numbers: None in a gap, and where the hardware does not offer it."""
    return [None if value != value else value for value in values.round(DIGITS).tolist()]  # noqa: PLR0124 - NaN
