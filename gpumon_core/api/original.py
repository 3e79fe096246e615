"""The files of bigsk1/gpu-monitor, from which gpumon grew, under its keys, types and units.

The original monitors one GPU, and writes 0 where the hardware offers nothing. Its times are to the second, without
an offset. The keys are those of its newest version, which has all keys of older ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from sqlalchemy.engine import Engine
from starlette.requests import Request
from starlette.responses import Response

from gpumon_core.api import ranges
from gpumon_core.api.resource import (
    HEADERS,
    MEDIA_TYPES,
    ParameterValues,
    Resource,
    ResourceMissing,
    Schema,
    as_json,
    object_schema,
    streamed,
    written,
)
from gpumon_core.safety import parameters
from gpumon_core.safety.parameters import TZ, Parameter, one_of

if TYPE_CHECKING:
    import pandas as pd

GPU = Parameter("gpu", f"This GPU, {parameters.GPU_SPELLINGS}; without it, the first one.", parameters.GPU)
SHAPE = Parameter(
    "shape",
    "`rows`, an object for each sample, or `columns`, as versions without processes wrote it.",
    one_of("rows", "columns"),
    default="rows",
)
# key -> metric of the catalogue.
METRICS = {key: key for key in ("temperature", "utilization", "memory", "power")}
# The same in versions without processes. Their times had no year.
COLUMNS = {"temperatures": "temperature", "utilizations": "utilization", "memory": "memory", "power": "power"}
TIME, TIME_OF_COLUMNS = "%Y-%m-%d %H:%M:%S", "%m-%d %H:%M:%S"
RANGE_S = 3 * 86400
MOST_PROCESSES = 100
# A piece is a multiple of the coarsest rollup's bucket, so that no bucket is in two pieces. A history of this many
# points has every tick of a piece.
PIECE_S = 14400


def current(_: Request, values: ParameterValues, engine: Engine) -> Response:
    """The GPU's newest sample, with its processes, the one seen last first."""
    from gpumon_core.store.queries import frames

    gpu = _gpu(values, engine)
    processes = frames.active_processes(engine)
    processes = processes[processes["gpu_id"] == gpu["id"]]
    return as_json(
        {
            "timestamp": _texts([gpu["last_seen"]], values["tz"])[0],
            # Integers except the power, as nvidia-smi prints them.
            **{key: round(_number(gpu[metric])) for key, metric in METRICS.items()},
            "power": round(_number(gpu["power"]), 2),
            "memory_total": round(_number(gpu["memory_total_mib"])),
            "memory_percent": _percent(gpu["memory"], gpu["memory_total_mib"]),
            "current_processes": [
                {**row, **more}
                for row, more in zip(
                    _processes(processes, values["tz"]), _now(processes, values["tz"]), strict=True
                )
            ],
        }
    )


def history(_: Request, values: ParameterValues, engine: Engine) -> Response:
    """The last three days, tick by tick, the oldest first."""
    gpu = _gpu(values, engine)
    frames = _ticks(engine, gpu["id"], ranges.newest(engine))
    if values["shape"] == "columns":
        return as_json(_in_columns(frames, values["tz"]))
    rows = (_rows(frame, values["tz"]) for frame in frames if len(frame))
    return streamed(_array(rows), HEADERS, MEDIA_TYPES["json"])


def processes(_: Request, values: ParameterValues, engine: Engine) -> Response:
    """The hundred processes that were seen last."""
    from gpumon_core.store.queries import processes as ledger
    from gpumon_core.store.queries.process_filter import ProcessFilter

    gpu = _gpu(values, engine)
    wanted = ProcessFilter(start=ranges.newest(engine) - RANGE_S, gpu_ids=(gpu["id"],))
    frame = ledger.seen_last(engine, wanted, MOST_PROCESSES)
    totals = ledger.memory_totals(engine, frame["process_id"].tolist())
    found = _processes(frame, values["tz"])
    for row, process_id in zip(found, _newest_first(frame)["process_id"].tolist(), strict=True):
        for name in ("avg_memory", "max_memory"):
            row[f"{name}_percent"] = _percent(row[name], totals.get(process_id))
    return as_json(found)


def _gpu(values: ParameterValues, engine: Engine) -> dict[Any, Any]:
    """The row of frames.gpu_table that the query means. Raises ResourceMissing."""
    from gpumon_core.store.queries import frames

    table = frames.gpu_table(engine)
    if values["gpu"] is not None:
        table = table[table["id"] == values["gpu"]]
        if table.empty:
            raise ResourceMissing(f"GPU {values['gpu']} is gone: /api/v1/gpus has those that are there.", "gpu")
    if table.empty:
        raise ResourceMissing("No GPU has been recorded yet.")
    return table.head(1).to_dict("records")[0]


def _ticks(engine: Engine, gpu_id: int, newest: int) -> Iterator[pd.DataFrame]:
    from gpumon_core.store.queries.history import metrics_history

    start = newest - RANGE_S
    while start <= newest:
        end = min(newest, start - start % PIECE_S + PIECE_S - 1)
        frame = metrics_history(engine, [gpu_id], list(METRICS.values()), start, end, PIECE_S)
        # A gap has no sample.
        yield frame.dropna(subset=list(METRICS.values()), how="all")
        start = end + 1


def _rows(frame: pd.DataFrame, zone: ZoneInfo) -> list[dict[str, Any]]:
    names = ("timestamp", *METRICS)
    columns = [
        _texts(frame["timestamp_epoch"], zone),
        *([_number(value) for value in frame[metric].tolist()] for metric in METRICS.values()),
    ]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _in_columns(frames: Iterable[pd.DataFrame], zone: ZoneInfo) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"timestamps": [], **{key: [] for key in COLUMNS}}
    for frame in frames:
        found["timestamps"] += _texts(frame["timestamp_epoch"], zone, TIME_OF_COLUMNS)
        for key, metric in COLUMNS.items():
            found[key] += [_number(value) for value in frame[metric].tolist()]
    return found


def _array(pieces: Iterable[list[Any]]) -> Iterator[bytes]:
    """Lists as one JSON array, piece by piece."""
    yield b"["
    for number, rows in enumerate(pieces):
        yield f"{',' if number else ''}{written(rows)[1:-1]}".encode()
    yield b"]"


def _newest_first(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("last_seen", ascending=False, kind="stable")


def _processes(frame: pd.DataFrame, zone: ZoneInfo) -> list[dict[str, Any]]:
    frame = _newest_first(frame)
    columns = {
        "pid": frame["pid"].tolist(),
        "process_name": [name if isinstance(name, str) else "" for name in frame["name"]],
        "first_seen": _texts(frame["first_seen"], zone),
        "last_seen": _texts(frame["last_seen"], zone),
        "lifetime_seconds": (frame["last_seen"] - frame["first_seen"]).tolist(),
        "max_memory": [_number(value) for value in frame["max_memory"]],
        "avg_memory": [_number(value) for value in frame["avg_memory"]],
        "sample_count": frame["sample_count"].tolist(),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _now(frame: pd.DataFrame, zone: ZoneInfo) -> list[dict[str, Any]]:
    """What running processes have besides: the memory that they hold, and how long they have been running."""
    found = []
    for row in _newest_first(frame).to_dict("records"):
        started = row["start_time"]
        is_known = started is not None and started == started  # noqa: PLR0124 - NaN
        lifetime = max(0, int(row["last_seen"] - (started if is_known else row["first_seen"])))
        found.append(
            {
                "memory": _number(row["memory"]),
                "memory_percent": _percent(row["memory"], row["memory_total_mib"]),
                "process_start_time": _texts([int(started)], zone)[0] if is_known else None,
                "actual_lifetime_seconds": lifetime,
                "lifetime_formatted": _lifetime(lifetime),
            }
        )
    return found


def _lifetime(seconds: int) -> str:
    """In its two largest units, as the original writes it: 1d 2h, 2h 3m, 3m 4s, 4s."""
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {seconds % 60}s" if minutes else f"{seconds}s"


def _percent(part: Any, total: Any) -> float:
    """With two decimals; 0 where not known."""
    known = _number(total)
    return round(100 * _number(part) / known, 2) if known else 0.0


def _number(value: Any) -> float:
    return 0.0 if value is None or value != value else round(float(value), 3)  # noqa: PLR0124 - NaN


def _texts(epochs: Iterable[int], zone: ZoneInfo, form: str = TIME) -> list[str]:
    import pandas as pd

    moments = pd.to_datetime(pd.Series(list(epochs), dtype="int64"), unit="s", utc=True)
    return moments.dt.tz_convert(zone).dt.strftime(form).tolist()


_NUMBER: Schema = {"type": "number"}
_TIME: Schema = {"type": "string", "description": "In `tz`, as 2026-03-29 12:00:00."}
_SAMPLE: dict[str, Schema] = {"timestamp": _TIME, **dict.fromkeys(METRICS, _NUMBER)}
_PROCESS: dict[str, Schema] = {
    "pid": {"type": "integer"},
    "process_name": {"type": "string"},
    "first_seen": _TIME,
    "last_seen": _TIME,
    "lifetime_seconds": {"type": "integer"},
    "max_memory": _NUMBER,
    "avg_memory": _NUMBER,
    "sample_count": {"type": "integer"},
}
_CURRENT: dict[str, Schema] = {
    **_PROCESS,
    "memory": _NUMBER,
    "memory_percent": _NUMBER,
    "process_start_time": {"type": ["string", "null"], "description": "In `tz`; null where it is not known."},
    "actual_lifetime_seconds": {
        "type": "integer",
        "description": "Since it started; where that is not known, since it was first seen.",
    },
    "lifetime_formatted": {"type": "string", "description": "The same in its two largest units: 2h 3m."},
}
_ENDED: dict[str, Schema] = {**_PROCESS, "avg_memory_percent": _NUMBER, "max_memory_percent": _NUMBER}
_COLUMNS: Schema = object_schema(
    {
        "timestamps": {"type": "array", "items": {"type": "string", "description": "In `tz`, without the year."}},
        **{key: {"type": "array", "items": _NUMBER} for key in COLUMNS},
    }
)

RESOURCES = (
    Resource(
        "/api/v1/original/current",
        "The newest sample of one GPU, with its processes, under the original's keys: °C, %, MiB and W.",
        (GPU, TZ),
        current,
        lambda: object_schema(
            {
                **_SAMPLE,
                "memory_total": _NUMBER,
                "memory_percent": _NUMBER,
                "current_processes": {"type": "array", "items": object_schema(_CURRENT)},
            }
        ),
        "gpu=1",
        "gpu_current_stats.json",
    ),
    Resource(
        "/api/v1/original/history",
        "The last three days of one GPU, tick by tick, under the original's keys.",
        (GPU, SHAPE, TZ),
        history,
        lambda: {"oneOf": [{"type": "array", "items": object_schema(_SAMPLE)}, _COLUMNS]},
        "gpu=1",
        "history/history.json",
        takes_turns=True,
    ),
    Resource(
        "/api/v1/original/processes",
        "The hundred processes that were seen last on one GPU in the last three days, under the original's keys.",
        (GPU, TZ),
        processes,
        lambda: {"type": "array", "items": object_schema(_ENDED)},
        "gpu=1",
        "history/process_history.json",
        takes_turns=True,
    ),
)
