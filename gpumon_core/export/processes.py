"""The columns of processes in files and answers: all recorded processes, and those on the GPUs now."""

from __future__ import annotations

import pandas as pd

from gpumon_core.export.tables import FLAG, MOMENT, NUMBER, TEXT, WHOLE, Column, Table, plain, scaled
from gpumon_core.format import JOULES_PER_KWH, MIB_PER_GIB
from gpumon_core.metrics import PROCESS_METRICS
from gpumon_core.store.queries.frames import gpu_labels

HOUR_S = 3600
# Unit -> the end of the name of a number in it.
SUFFIXES = {"MiB": "mib", "%": "percent"}

# What a process runs: title -> column of `programs`.
PROGRAM = {
    "Workload": "workload",
    "Model": "model",
    "Container engine": "container_engine",
    "Container id": "container_id",
    "Container": "container_name",
    "Image": "container_image",
    "Pod": "pod",
    "Namespace": "namespace",
    "Unit": "unit",
    "Job id": "job_id",
    "Job": "job_name",
    "Job user": "job_user",
    "Notebook": "notebook",
    "Started by": "parents",
    "Executable": "executable",
    "Working directory": "working_directory",
    "Command": "command",
}

COLUMNS = (
    plain("host", "Host", TEXT, sure=True),
    plain("gpus", "GPU", TEXT, sure=True),
    plain("pid", "PID", WHOLE, sure=True),
    plain("name", "Name", TEXT),
    plain("user", "User", TEXT, "username"),
    plain("type", "Type", TEXT, "kind", sure=True),
    Column(
        "state", "State", TEXT, lambda frame: frame["running"].map({True: "running", False: "ended"}), sure=True
    ),
    plain("started", "Started", MOMENT, "start_time"),
    plain("first_seen", "First seen", MOMENT, sure=True),
    plain("last_seen", "Last seen", MOMENT, sure=True),
    plain("lifetime_s", "Lifetime", WHOLE, unit="s", sure=True),
    plain("max_memory_mib", "Maximum memory", WHOLE, "max_memory", "MiB"),
    scaled("avg_memory_mib", "Average memory", "MiB", "avg_memory", 1, 1),
    scaled("memory_gib_hours", "Memory-hours", "GiB h", "memory_mib_s", MIB_PER_GIB * HOUR_S, 6),
    scaled("gpu_hours", "GPU-hours", "h", "busy_s", HOUR_S, 6),
    scaled("energy_kwh", "Energy", "kWh", "energy_j", JOULES_PER_KWH, 9),
    plain("estimated", "Estimate", FLAG, sure=True),
    scaled("sm_mean_percent", "SM mean", "%", "sm_mean", 1, 2),
    plain("sm_max_percent", "SM maximum", WHOLE, "max_sm", "%"),
    plain("sample_count", "Samples", WHOLE, sure=True),
    *(plain(column, title, TEXT) for title, column in PROGRAM.items()),
    plain("process_id", "Id in gpumon", WHOLE, sure=True),
)
# For frames of processes.process_history.
LEDGER = Table(COLUMNS)


def _label(frame: pd.DataFrame) -> pd.Series:
    return gpu_labels(frame["gpu_index"], frame["mig_index"])


# For frames whose rows are about one GPU each.
GPU = Column("gpu", "GPU", TEXT, _label, sure=True)

# For frames of frames.active_processes.
ACTIVE = Table(
    (
        plain("host", "Host", TEXT, sure=True),
        GPU,
        plain("pid", "PID", WHOLE, sure=True),
        plain("name", "Name", TEXT),
        plain("user", "User", TEXT, "username"),
        plain("type", "Type", TEXT, "kind", sure=True),
        *(
            plain(f"{metric.key}_{SUFFIXES[metric.unit]}", metric.label, NUMBER, metric.key, metric.unit)
            for metric in PROCESS_METRICS
        ),
        plain("started", "Started", MOMENT, "start_time"),
        plain("first_seen", "First seen", MOMENT, sure=True),
        plain("last_seen", "Last seen", MOMENT, sure=True),
        Column(
            "lifetime_s", "Lifetime", WHOLE, lambda frame: frame["last_seen"] - frame["first_seen"], "s", sure=True
        ),
        plain("max_memory_mib", "Maximum memory", NUMBER, "max_memory", "MiB"),
        scaled("avg_memory_mib", "Average memory", "MiB", "avg_memory", 1, 1),
        plain("sample_count", "Samples", WHOLE, sure=True),
        *(plain(column, title, TEXT) for title, column in PROGRAM.items()),
        plain("gpu_id", "Id of the GPU in gpumon", WHOLE, sure=True),
        plain("process_id", "Id in gpumon", WHOLE, sure=True),
    )
)
