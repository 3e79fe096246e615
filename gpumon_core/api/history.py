"""What the GPUs did: their metrics over any range of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine
from starlette.requests import Request
from starlette.responses import Response

from gpumon_core.api import ranges
from gpumon_core.api.gpus import GPU, HOST, chosen
from gpumon_core.api.resource import (
    FORMAT,
    UNITS_SCHEMA,
    ParameterValues,
    Resource,
    Schema,
    file,
    listed,
    object_schema,
    written,
)
from gpumon_core.format import gpu_label
from gpumon_core.metrics import GPU_METRICS_BY_KEY
from gpumon_core.safety.parameters import TZ, BadParameter, Parameter, one_of, whole

if TYPE_CHECKING:
    import pandas as pd

DEFAULT = ("utilization", "memory", "temperature", "power")
DEFAULT_RANGE = "1h"
MOST_POINTS = 10_000
# A cell is a metric of a GPU at a step. All cells of a GPU are read at once; for JSON, those of all GPUs.
MOST_CELLS = 400_000
# The number of cells that are written at once: as text they need many times the memory of the frame.
PIECE_CELLS = 50_000
METRIC = Parameter(
    "metric",
    f"A metric of the catalogue. Without one: {', '.join(DEFAULT)}. Of a counter, such as energy, each step "
    "has what it grew by.",
    one_of(*GPU_METRICS_BY_KEY),
    is_repeatable=True,
)
POINTS = Parameter(
    "points",
    "About how many steps a GPU has at most, as fine as they are stored.",
    whole(1, MOST_POINTS),
    default=600,
)


def history(request: Request, values: ParameterValues, engine: Engine) -> Response:
    """The chosen metrics of the chosen GPUs. One GPU is in memory at a time. Raises BadParameter."""
    from gpumon_core.export.gpus import history_table
    from gpumon_core.export.tables import in_pieces

    start, end = ranges.span(values, engine, DEFAULT_RANGE)
    metrics = values["metric"] or DEFAULT
    # A GPU that is no longer there is shown where the query names it.
    gpus = chosen(values, engine, gone=bool(values["gpu"]))
    _check_size(values, len(gpus), len(metrics), end - start)
    parts = _parts(engine, gpus, metrics, start, end, values["points"])
    if values["format"] != "json":
        rows = max(1, PIECE_CELLS // len(metrics))
        frames = (piece for _, frame in parts for piece in in_pieces(frame, rows))
        return file(request, values, history_table(metrics), frames, "history", None)
    units = {key: GPU_METRICS_BY_KEY[key].unit for key in metrics if GPU_METRICS_BY_KEY[key].unit}
    head = {**ranges.moments(start, end, values["tz"]), "units": units}
    return listed("gpus", head, (_written(gpu, frame, metrics, values) for gpu, frame in parts))


def _check_size(values: ParameterValues, gpus: int, metrics: int, range_s: int) -> None:
    """Raises BadParameter for more than an answer may have."""
    together = gpus if values["format"] == "json" else min(1, gpus)
    # A step is a second at least.
    steps = min(values["points"], range_s + 1)
    if together * metrics * steps <= MOST_CELLS:
        return
    asked = f"{together} GPUs x {metrics} metrics x {steps:,} points"
    most = MOST_CELLS // (together * metrics)
    fewer = "fewer metrics, or" if together == 1 else "fewer metrics or GPUs, a file (csv, parquet), or"
    raise BadParameter(
        "points",
        f"{asked} are more than the {MOST_CELLS:,} values of an answer. Ask for {fewer} points={most}.",
    )


def _parts(
    engine: Engine, gpus: pd.DataFrame, metrics: tuple[str, ...], start: int, end: int, points: int
) -> Iterator[tuple[dict[Any, Any], pd.DataFrame]]:
    """Each GPU with its history."""
    from gpumon_core.store.queries.history import metrics_history

    facts = gpus[["id", "host", "gpu_index", "mig_index", "uuid", "name"]]
    for gpu in facts.to_dict("records"):
        frame = metrics_history(engine, [gpu["id"]], metrics, start, end, points)
        # Pandas stores a frame of many metrics in many blocks, and would warn about one more.
        yield gpu, frame.copy().assign(**{name: gpu[name] for name in ("host", "gpu_index", "mig_index")})


def _written(
    gpu: dict[Any, Any], frame: pd.DataFrame, metrics: tuple[str, ...], values: ParameterValues
) -> Iterator[str]:
    """A GPU's history as JSON of columns of equal length, a metric at a time: plain values need many times the
    memory of the frame."""
    from gpumon_core.export.csv import iso
    from gpumon_core.export.gpus import AGGREGATES, numbers

    facts = {
        "gpu_id": gpu["id"],
        "host": gpu["host"],
        "gpu": gpu_label(gpu["gpu_index"], gpu["mig_index"]),
        "uuid": gpu["uuid"],
        "name": gpu["name"],
        "times": iso(frame["timestamp_epoch"], values["tz"]).tolist(),
        "epochs": frame["timestamp_epoch"].tolist(),
    }
    yield f'{written(facts)[:-1]},"metrics":{{'
    for number, key in enumerate(metrics):
        columns = {name: numbers(frame[key + suffix]) for suffix, name in AGGREGATES.items()}
        yield f"{',' if number else ''}{written(key)}:{written(columns)}"
    yield "}}"


def _schema() -> Schema:
    column: Schema = {"type": "array", "items": {"type": ["number", "null"]}}
    gpu: dict[str, Schema] = {
        "gpu_id": {"type": "integer"},
        "host": {"type": "string"},
        "gpu": {"type": "string"},
        "uuid": {"type": "string"},
        "name": {"type": ["string", "null"]},
        "times": {
            "type": "array",
            "items": {"type": "string", "format": "date-time"},
            "description": "The middle of each step; where a step holds one tick, the tick.",
        },
        "epochs": {"type": "array", "items": {"type": "integer"}, "description": "The same in UTC seconds."},
        "metrics": {
            "type": "object",
            "propertyNames": {"enum": list(GPU_METRICS_BY_KEY)},
            "additionalProperties": object_schema(dict.fromkeys(("mean", "min", "max"), column)),
            "description": "As long as `times`; null in a gap, and where the hardware does not offer it.",
        },
    }
    return object_schema(
        {**ranges.MOMENTS_SCHEMA, "units": UNITS_SCHEMA, "gpus": {"type": "array", "items": object_schema(gpu)}}
    )


RESOURCES = (
    Resource(
        "/api/v1/history",
        "Metrics of GPUs over any range of time: mean, minimum and maximum of each step, of a counter three times "
        "what it grew by. A pause in the recording is one step without values.",
        (*ranges.parameters(DEFAULT_RANGE), GPU, HOST, METRIC, POINTS, TZ, FORMAT),
        history,
        _schema,
        "gpu=1&metric=utilization&metric=power&range=15m&points=3",
        takes_turns=True,
    ),
)
