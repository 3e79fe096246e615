"""One tick as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from gpumon_core import format as fmt
from gpumon_core import gpu_state
from gpumon_core.attribution.records import ProcessIdentity
from gpumon_core.export.text_columns import aligned
from gpumon_core.metrics import CHANGE_METRICS, GPU_METRICS_BY_KEY, TICK_COLUMNS
from gpumon_core.telemetry import remedies
from gpumon_core.telemetry.records import GpuInfo, Snapshot

# What a terminal is wide enough for; JSON has everything.
COLUMNS = (
    *("temperature", "utilization", "memory", "power", "memory_utilization", "fan_speed"),
    *("sm_clock", "memory_clock"),
)


def as_json(snapshot: Snapshot, identities: Mapping[int, ProcessIdentity], source: str) -> dict[str, Any]:
    """The tick as plain values: a GPU's facts and its metrics by catalogue key, None where not offered."""
    snapshot = snapshot.with_nameless()
    values = {reading.uuid: reading.values for reading in snapshot.readings}
    sampling = {reading.uuid: reading.sampling for reading in snapshot.readings}
    nothing = dict.fromkeys((*TICK_COLUMNS, *(metric.key for metric in CHANGE_METRICS)), None)
    indices = {gpu.uuid: gpu.index for gpu in snapshot.gpus}
    return {
        "timestamp_epoch": int(snapshot.timestamp),
        "timestamp": datetime.fromtimestamp(int(snapshot.timestamp), UTC).isoformat(),
        "source": source,
        "host": asdict(snapshot.host),
        "gpus": [
            asdict(gpu)
            | {"state": snapshot.state_of(gpu.uuid), "sampling": sampling.get(gpu.uuid)}
            | nothing
            | dict(values.get(gpu.uuid, {}))
            for gpu in snapshot.gpus
        ],
        "processes": [
            {
                "gpu_uuid": process.gpu_uuid,
                "gpu_index": indices[process.gpu_uuid],
                "pid": process.pid,
                "type": process.kind,
                "memory_mib": process.memory_mib,
                "sm_utilization": process.sm_utilization,
                "memory_utilization": process.memory_utilization,
                "encoder_utilization": process.encoder_utilization,
                "decoder_utilization": process.decoder_utilization,
                "name": identities[process.pid].name,
                "user": identities[process.pid].user,
                "start_time": identities[process.pid].start_time,
                **asdict(identities[process.pid].program),
            }
            for process in snapshot.processes
        ],
    }


def as_text(snapshot: Snapshot, identities: Mapping[int, ProcessIdentity], source: str) -> str:
    """The tick as aligned columns for a terminal."""
    snapshot = snapshot.with_nameless()
    host = snapshot.host
    lines = [
        f"{fmt.printable(host.name)}  driver {host.driver_version or fmt.MISSING}  "
        f"CUDA {host.cuda_version or fmt.MISSING}" + ("  (simulated GPUs)" if source == "demo" else ""),
        "",
    ]
    values = {reading.uuid: reading.values for reading in snapshot.readings}
    labels = {gpu.uuid: fmt.gpu_label(gpu.index, gpu.mig_index) for gpu in snapshot.gpus}
    keys = COLUMNS
    rows = [["GPU", "Name", *(GPU_METRICS_BY_KEY[key].label for key in keys)]]
    for gpu in snapshot.gpus:
        read = values.get(gpu.uuid, {})
        shown = [" ".join(_value(gpu, key, read.get(key))) for key in keys]
        state = snapshot.state_of(gpu.uuid)
        rows.append(
            [
                labels[gpu.uuid],
                gpu.name or fmt.MISSING,
                *(shown if gpu_state.answers(state) else [state]),
            ]
        )
    lines += aligned(rows)
    lost = [labels[gpu.uuid] for gpu in snapshot.gpus if snapshot.state_of(gpu.uuid) == "lost"]
    if lost:
        lines += ["", f"GPU {', '.join(lost)}: no answer. {remedies.of_lost()}"]
    rows = [["GPU", "PID", "Type", "Memory", "SM", "User", "Name", "Workload", "Model"]]
    for process in sorted(snapshot.processes, key=lambda item: -(item.memory_mib or 0)):
        who = identities[process.pid]
        rows.append(
            [
                labels[process.gpu_uuid],
                str(process.pid),
                process.kind,
                fmt.memory(process.memory_mib),
                fmt.MISSING if process.sm_utilization is None else f"{process.sm_utilization} %",
                who.user or fmt.MISSING,
                who.name or fmt.MISSING,
                who.program.workload or fmt.MISSING,
                who.program.model or fmt.MISSING,
            ]
        )
    lines += ["", *(aligned(rows) if len(rows) > 1 else ["No process is using a GPU."])]
    return "\n".join(lines)


def _value(gpu: GpuInfo, key: str, number: float | None) -> list[str]:
    metric = GPU_METRICS_BY_KEY[key]
    whole = getattr(gpu, metric.share_of) if metric.share_of else None
    parts = [part for part in fmt.value_of(metric, number, whole) if part]
    return [*parts, gpu_state.SHARED] if key == "memory" and gpu_state.shares_memory(gpu.memory_from) else parts
