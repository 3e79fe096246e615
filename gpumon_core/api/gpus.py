"""What the GPUs are, and what they do now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine
from starlette.requests import Request
from starlette.responses import Response

from gpumon_core import gpu_state
from gpumon_core.api.resource import (
    FORMAT,
    UNITS_SCHEMA,
    ParameterValues,
    Resource,
    Schema,
    as_json,
    file,
    object_schema,
)
from gpumon_core.recording.health import fresh_within_s
from gpumon_core.safety import parameters
from gpumon_core.safety.parameters import TZ, Parameter, words

if TYPE_CHECKING:
    import pandas as pd

GPU = Parameter("gpu", f"This GPU, {parameters.GPU_SPELLINGS}.", parameters.GPU, is_repeatable=True)
HOST = Parameter("host", "The GPUs of this machine.", words(), is_repeatable=True)


def gpus(request: Request, values: ParameterValues, engine: Engine) -> Response:
    """Every GPU that is present, in the driver's order."""
    from gpumon_core.export.gpus import GPUS
    from gpumon_core.store.queries import frames

    table = chosen(values, engine)
    hosts = frames.host_table(engine).set_index("name")
    table = table.assign(**{name: table["host"].map(hosts[name]) for name in ("driver_version", "cuda_version")})
    if values["format"] != "json":
        return file(request, values, GPUS, [table], "gpus", len(table))
    return as_json({"gpus": GPUS.plain_rows(table, values["tz"]), "units": GPUS.units})


def chosen(values: ParameterValues, engine: Engine, gone: bool = False) -> pd.DataFrame:
    """frames.gpu_table of the GPUs that the query means, with `fresh`: whether one answers, and its newest sample
    is as new as the interval promises. The metrics of a GPU that does not answer are None: its last ones are not
    what it does now."""
    from gpumon_core.export.gpus import METRIC_KEYS
    from gpumon_core.store.queries import frames

    table = frames.gpu_table(engine, gone)
    for name, column in (("gpu", "id"), ("host", "host")):
        if values[name]:
            table = table[table[column].isin(values[name])]
    answers = table["state"].map(gpu_state.answers).astype(bool)
    within = table["host_interval_s"].map(fresh_within_s)
    table = table.assign(fresh=answers & ((time.time() - table["last_seen"]).abs() <= within))
    table[METRIC_KEYS] = table[METRIC_KEYS].where(answers)
    return table


def _schema() -> Schema:
    from gpumon_core.export.gpus import GPUS

    return object_schema({"gpus": {"type": "array", "items": GPUS.row_schema}, "units": UNITS_SCHEMA})


RESOURCES = (
    Resource(
        "/api/v1/gpus",
        "Every GPU and MIG instance: its facts, its state, and its metrics as they are now.",
        (GPU, HOST, TZ, FORMAT),
        gpus,
        _schema,
        "gpu=1",
    ),
)
