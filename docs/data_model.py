"""Writes the column tables of docs/data-model.md from the schema and the catalogue:

.venv/bin/python docs/data_model.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import sqlalchemy as sa

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpumon_core.metrics import CHANGE_METRICS, PROCESS_METRICS, TICK_METRICS, Aggregate, Metric
from gpumon_core.store.schema import TIERS, gpu_metrics, known_ms, metadata, scale

PAGE = ROOT / "docs" / "data-model.md"
ROLLUPS = tuple(tier.table.name for tier in TIERS)
AFFINITIES = ((sa.Integer, "integer"), (sa.Float, "real"), (sa.Text, "text"))

TICK = "time of the tick"
HALF_HOUR = "first second of the half hour; of rows of older versions, of the hour"
GPU = "`gpus.id`"
PROCESS = "`gpu_processes.id`"
PROGRAM = "`programs.id`"

# Table -> column -> meaning, of all columns that are no metric.
MEANINGS: dict[str, dict[str, str]] = {
    "hosts": {
        "id": "number of the row",
        "name": "the machine's name, or GPUMON_HOST_NAME",
        "source": "`nvml` or `demo`",
        "driver_version": "as text",
        "cuda_version": "as text",
        "nvml_version": "as text",
        "interval_s": "seconds between two ticks",
        "first_seen": "time of its first tick",
        "last_seen": "time of its newest tick",
    },
    "gpus": {
        "id": "number of the row",
        "host_id": "`hosts.id`",
        "uuid": "the driver's; it stays when the index changes",
        "gpu_index": "last index of the GPU, as in nvidia-smi",
        "mig_index": "of a MIG instance: its place on its GPU",
        "parent_id": "of a MIG instance: its GPU, `gpus.id`",
        "name": "model, as the driver calls it",
        "memory_total_mib": "MiB",
        "power_limit_w": "W",
        "pci_bus_id": "as the driver writes it",
        "architecture": "such as Hopper",
        "compute_capability": "such as 9.0",
        "state": "`ok`; `lost`: no longer answers; `hung`: the driver does not return from a call about it; "
        "`asleep`: switched off while nothing uses it, and not asked; `quiet`: not asked for a while, so that it "
        "can switch itself off; `gone`: no longer listed",
        "first_seen": "time of its first tick",
        "last_seen": "time of its newest row in `gpu_metrics`",
        "sampling": "`interval`: utilization is the mean since the last tick; `partial`: the mean over the end "
        "of that time, because the driver had no older samples; `point`: the driver's value at the tick",
        "energy_j": "J since it was first seen",
        "energy_counter_j": "the driver's counter at that time, J",
        "energy_from": "`counter`: energy is read from the driver's counter; `power`: it follows from the power",
        "energy_ahead_j": "of `energy_j`: estimated by power while the counter could not be read, J",
        "memory_from": "`device`: the GPU has memory of its own; `unified`: it shares the machine's, used is the "
        "sum of its processes' memory, total the machine's",
    },
    "gpu_metrics": {
        "gpu_id": GPU,
        "timestamp_epoch": TICK,
        "recorded_ms": "time before the tick that it speaks of, ms; NULL where an older version recorded it",
    },
    "gpu_changes": {
        "gpu_id": GPU,
        "metric": "its name: see the list below",
        "timestamp_epoch": "time of the tick at which it was new",
        "value": "NULL where it is not known from then on",
    },
    "gpu_processes": {
        "id": "number of the row",
        "host_id": "`hosts.id`",
        "pid": "as the driver gives it: the host's",
        "start_key": "different for two processes with the same PID; NULL where the start cannot be read",
        "start_time": "when it was started, UTC seconds with fractions",
        "name": "what people call it: of `python train.py` it is `train.py`",
        "username": "its owner",
        "program_id": f"what it ran last, {PROGRAM}",
        "first_seen": "time of the first tick with it",
        "last_seen": "time of the last one; of a running process the row is brought up to date now and then",
        "max_memory": "MiB, the most over all its GPUs together",
        "avg_memory": "MiB over all its GPUs together, weighted by time",
        "sample_count": "ticks with it",
        "seconds": "how long it was seen",
    },
    "programs": {
        "id": "number of the row",
        "digest": "hash of the columns that follow, different for each program",
        "executable": "path of the program file",
        "command": "command line, secrets masked",
        "working_directory": "where it was started",
        "parents": "who started it, from the session or service down: `sshd > bash > tmux`",
        "container_engine": "`docker`, `podman`, ...",
        "container_id": "the engine's",
        "container_name": "the engine's",
        "container_image": "the engine's",
        "pod": "Kubernetes'",
        "namespace": "Kubernetes'",
        "unit": "systemd's",
        "job_id": "Slurm's",
        "job_name": "Slurm's",
        "job_user": "Slurm's",
        "notebook": "path of a Jupyter notebook",
        "workload": "such as vLLM or PyTorch training",
        "category": "inference, training, image generation, notebook, rendering, media, desktop, game or other",
        "model": "the model that it runs",
        "last_used": "when a process was last said to run it, or to run it no more",
    },
    "process_gpus": {
        "process_id": PROCESS,
        "gpu_id": GPU,
        "kind": "`C` computes, `G` draws, `M` is an MPS client, or a sum such as `C+G`",
        "first_seen": "time of its first tick on this GPU",
        "last_seen": "time of its last one; of a running process it is brought up to date now and then",
        "max_memory": "MiB on this GPU",
        "avg_memory": "MiB on this GPU, weighted by time",
        "sample_count": "ticks with it",
        "active": "1 while it is on the GPU",
        "seconds": "how long it was seen there",
        "busy_s": "its part of the GPU's busy time: a GPU at 100 % for a second is 1",
        "energy_j": "its part of the GPU's energy, J",
        "sm_percent_s": "SM utilization times seconds: divided by `sm_told_s` it is the mean in %",
        "sm_told_s": "seconds for which the driver reported it",
        "max_sm": "highest SM utilization, %",
        "estimated": "1 where busy time and energy are split by memory: the driver reports no parts of processes",
        "last_busy": "when it last did something, or came",
    },
    "process_snapshots": {
        "timestamp_epoch": "time of the tick from which on the row holds",
        "process_id": PROCESS,
        "gpu_id": GPU,
        "present": "1; 0 at the first tick without the process",
    },
    "process_hours": {
        "timestamp_epoch": HALF_HOUR,
        "process_id": PROCESS,
        "gpu_id": GPU,
        "program_id": f"what it ran, {PROGRAM}; 0 where that is not known",
        "seconds": "how long it was there",
        "busy_s": "its part of the GPU's busy time",
        "idle_s": "time in which it did nothing for longer than GPUMON_IDLE_MINUTES",
        "memory_mib_s": "memory that it held, in MiB times seconds: divided by `seconds` it is the mean",
        "energy_j": "its part of the GPU's energy, J",
        "max_memory": "MiB",
        "estimated": "1 where busy time and energy are split by memory",
    },
    "gpu_usage": {
        "timestamp_epoch": HALF_HOUR,
        "gpu_id": GPU,
        "seconds": "how long it was recorded",
        "busy_s": "its utilization times the time",
        "held_s": "seconds in which it was not busy although a process that computes held it",
        "unattributed_s": "of the busy seconds, those of no known process",
        "energy_j": "its energy, J; the three that follow are parts of it",
        "idle_j": "what it took while nothing ran",
        "unattributed_j": "what belongs to no known process",
        "unrecorded_j": "energy of the time without a recorder",
        "unknown_s": "of the recorded seconds, those in which the driver said nothing of its utilization",
    },
    "model_sessions": {
        "id": "number of the row",
        "process_id": f"the server, {PROCESS}",
        "gpu_id": GPU,
        "model": "as the server calls it",
        "first_seen": "when it was loaded",
        "last_seen": "when it was last seen loaded",
        "max_memory": "MiB, the process's while it had the model",
        "avg_memory": "MiB, the process's while it had the model",
        "sample_count": "ticks with it",
        "seconds": "how long it was seen",
        "active": "1 while it is loaded",
    },
    "imports": {
        "gpu_id": GPU,
        "first": "its first tick",
        "last": "its last tick",
        "ticks": "how many were taken",
        "source": "the file it came from",
        "imported_at": "when it was taken",
    },
    "imported_files": {
        "gpu_id": GPU,
        "source": "the file's path",
        "source_index": "the GPU's index in the file",
        "until": "time of the last tick that was looked at",
        "imported_at": "when it was last read",
    },
    "recorder_health": {
        "host_id": "`hosts.id`",
        "timestamp_epoch": "when the minute ended",
        "ticks": "committed in it",
        "skipped": "fell out because the tick before was not done",
        "failed": "nothing could be read",
        "dropped": "waited too long for the database, or while another recorder wrote",
        "buffered": "wait for the database",
        "duration_ms": "mean time of a tick, ms",
        "duration_max_ms": "longest tick, ms",
        "database_bytes": "size of the database",
        "last_error": "newest error in that minute",
    },
}
ROLLUP_MEANINGS = {
    "gpu_id": GPU,
    "timestamp_epoch": "first second of the bucket",
    "samples": "ticks in it",
    "recorded_ms": "how much of its time was recorded, ms; NULL where an older version recorded it",
}
METRICS = {
    **{metric.key: metric for metric in TICK_METRICS},
    **{metric.peak: metric for metric in TICK_METRICS if metric.peak},
}
OF_PROCESSES = {metric.key: metric for metric in PROCESS_METRICS}


def kind_of(column: sa.Column[object]) -> str:
    """A column's type as SQLite has it, and whether it may be NULL."""
    name = next(name for kind, name in AFFINITIES if isinstance(column.type, kind))
    return name + (" or NULL" if column.nullable else "")


def meaning_of(metric: Metric, column: str) -> str:
    """What a metric's column holds."""
    label = metric.label[0].lower() + metric.label[1:] if not metric.label[:2].isupper() else metric.label
    if column == metric.peak:
        label += ", highest sample within the tick"
    if metric.aggregate is Aggregate.COUNTER:
        label += ", counted since the GPU was first seen"
    return label + (f", {metric.unit}" if metric.unit else "")


def rows(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def columns_of(name: str) -> str:
    """A table's columns. Raises KeyError for one without a meaning, ValueError for a meaning without a column."""
    table, meanings = metadata.tables[name], MEANINGS[name]
    if unknown := set(meanings) - set(table.c.keys()):
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))}")
    metrics = METRICS if table is gpu_metrics else OF_PROCESSES
    body = []
    for column in table.c:
        text = meanings[column.name] if column.name in meanings else meaning_of(metrics[column.name], column.name)
        body.append((f"`{column.name}`", kind_of(column), text))
    return rows(("column", "type", "meaning"), body)


def rollup_columns() -> str:
    """The columns that all rollups have."""
    body = [(f"`{name}`", "", text) for name, text in ROLLUP_MEANINGS.items()]
    for metric in TICK_METRICS:
        times = f"{metric.unit} times {scale(metric)}" if scale(metric) > 1 else metric.unit
        if metric.aggregate is Aggregate.COUNTER:
            body.append((f"`{metric.key}`", metric.unit, "the value at the end of the bucket"))
        else:
            names = ", ".join(f"`{metric.key}{suffix}`" for suffix in ("", "_min", "_max"))
            meaning = "mean by time, lowest and highest"
            body.append((f"{names}, `{known_ms(metric)}`", times, meaning))
    return rows(("columns", "unit", "meaning"), body)


def changes() -> str:
    """The metrics of gpu_changes."""
    body = [(f"`{metric.key}`", metric.unit, metric.label) for metric in CHANGE_METRICS]
    return rows(("metric", "unit", "meaning"), body)


def blocks() -> dict[str, str]:
    """The text between each pair of marks on the page."""
    tables = {name: columns_of(name) for name in metadata.tables if name not in ROLLUPS}
    return tables | {"rollups": rollup_columns(), "changes": changes()}


def filled(page: str) -> str:
    """The page with its tables as they are now. Raises ValueError where the marks of one are missing."""
    for name, table in blocks().items():
        place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        page, found = place.subn(lambda _, text=table: text + "\n", page)
        if found != 1:
            raise ValueError(f"docs/data-model.md needs <!-- {name} --> and <!-- /{name} --> once")
    return page


def main() -> None:
    """Put the tables between their marks."""
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
