"""The processes that are on the GPUs now, and all that ever were."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine
from starlette.requests import Request
from starlette.responses import Response

from gpumon_core.api.resource import (
    FORMAT,
    PAGING,
    ParameterValues,
    Resource,
    Schema,
    after,
    as_json,
    cursor,
    file,
    object_schema,
    page_schema,
)
from gpumon_core.safety.parameters import TZ
from gpumon_core.store.queries.process_filter import EVERYTHING, PARAMETERS, from_query

if TYPE_CHECKING:
    import pandas as pd

# The parameters that choose among the processes on a GPU now.
NOW_FILTERS = tuple(one for one in PARAMETERS if one.name not in ("from", "to", "state"))


def process_history(request: Request, values: ParameterValues, engine: Engine) -> Response:
    """The recorded processes that meet the filters, newest first."""
    # These import pandas, which the server loads after its first answer.
    from gpumon_core.export.processes import LEDGER
    from gpumon_core.store.queries import processes

    wanted = from_query(values)
    if values["format"] != "json":
        total = processes.count(engine, wanted)
        return file(request, values, LEDGER, processes.pages(engine, wanted), "processes", total)
    at, limit = after(values), values["limit"]
    total = processes.count(engine, wanted)
    # One row more than asked for: where it exists, there is a next page.
    frame = processes.page(engine, wanted, limit + 1, at)
    shown = frame.head(limit)
    following = cursor(processes.position(shown)) if len(frame) > limit else None
    rows = LEDGER.plain_rows(shown, values["tz"])
    return as_json({"processes": rows, "total": total, "next": following})


def active(request: Request, values: ParameterValues, engine: Engine) -> Response:
    """The processes of every host's newest tick, most memory first."""
    from gpumon_core.export.processes import ACTIVE

    frame = _active(values, engine)
    if values["format"] != "json":
        return file(request, values, ACTIVE, [frame], "active", len(frame))
    return as_json({"processes": ACTIVE.plain_rows(frame, values["tz"])})


def _active(values: ParameterValues, engine: Engine) -> pd.DataFrame:
    from gpumon_core.store.queries import frames, processes

    frame = frames.active_processes(engine)
    wanted = from_query(values)
    if wanted != EVERYTHING:
        # A parameter means the same here as in the history.
        wanted = replace(wanted, states=("running",))
        frame = frame[frame["process_id"].isin(processes.process_history(engine, wanted)["process_id"])]
    if values["gpu"]:
        frame = frame[frame["gpu_id"].isin(values["gpu"])]
    return frame


def _active_schema() -> Schema:
    from gpumon_core.export.processes import ACTIVE

    return object_schema({"processes": {"type": "array", "items": ACTIVE.row_schema}})


def _history_schema() -> Schema:
    from gpumon_core.export.processes import LEDGER

    return page_schema("processes", LEDGER.row_schema)


RESOURCES = (
    Resource(
        "/api/v1/processes",
        "The processes that are on the GPUs now, most memory first: a row for each process and GPU.",
        (*NOW_FILTERS, TZ, FORMAT),
        active,
        _active_schema,
        "min_memory_mib=1000",
    ),
    Resource(
        "/api/v1/processes/history",
        "Every process that was seen on a GPU, newest first.",
        (*PARAMETERS, TZ, FORMAT, *PAGING),
        process_history,
        _history_schema,
        "state=running&limit=1",
        takes_turns=True,
    ),
)
