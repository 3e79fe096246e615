"""Who is on the GPUs, and who ever was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine
from starlette.requests import Request
from starlette.responses import Response

from gpumon_core.api.resource import (
    FORMAT,
    PAGING,
    Resource,
    Schema,
    Values,
    after,
    as_json,
    cursor,
    file,
    object_schema,
    page_schema,
)
from gpumon_core.export import parameters
from gpumon_core.export.parameters import (
    LARGEST,
    LAST_MOMENT,
    MOMENT,
    TZ,
    BadParameter,
    Parameter,
    one_of,
    whole,
    words,
)

if TYPE_CHECKING:
    import pandas as pd

    from gpumon_core.store.queries.processes import ProcessFilter

GPU = Parameter("gpu", f"Processes that were on this GPU, {parameters.GPU_SPELLINGS}.", parameters.GPU, many=True)
WHAT = (
    Parameter("user", "Processes of this user.", words(), many=True),
    Parameter(
        "container",
        "Processes in this container, by pod, name, or the first 12 digits of its id.",
        words(),
        many=True,
    ),
    Parameter("workload", "Processes of this kind of workload, such as vLLM.", words(), many=True),
    Parameter("model", "Processes that serve this model.", words(), many=True),
    Parameter(
        "type",
        "Processes that compute (C), draw (G), or share a GPU through MPS (M).",
        one_of("C", "G", "M"),
        many=True,
    ),
)
HOW_MUCH = (
    Parameter("min_memory_mib", "Processes that held at least so much memory, in MiB.", whole(0, LARGEST)),
    Parameter(
        "min_lifetime_s", "Processes that were seen for at least so long, in seconds.", whole(0, LAST_MOMENT)
    ),
    Parameter("q", "A part of the name or of the command line, in any case, or the PID.", words(0), default=""),
)
PROCESS_FILTERS = (
    Parameter("from", "Processes that were seen at this time or later.", MOMENT),
    Parameter("to", "Processes that were seen at this time or earlier.", MOMENT),
    GPU,
    *WHAT,
    Parameter("state", "Processes that are on a GPU now, or no longer.", one_of("running", "ended"), many=True),
    *HOW_MUCH,
)


def process_history(request: Request, values: Values, engine: Engine) -> Response:
    """The ledger's rows that the filters leave, newest first."""
    # What reads the database needs pandas, which the server loads once it has answered its first visitor.
    from gpumon_core.export.processes import LEDGER
    from gpumon_core.store.queries import processes

    wanted = process_filter(values)
    if values["format"] != "json":
        total = processes.count(engine, wanted)
        return file(request, values, LEDGER, processes.pages(engine, wanted), "processes", total)
    at, limit = after(values), values["limit"]
    total = processes.count(engine, wanted)
    # One more than asked for tells whether there is more.
    frame = processes.page(engine, wanted, limit + 1, at)
    shown = frame.head(limit)
    following = cursor(processes.position(shown)) if len(frame) > limit else None
    rows = LEDGER.plain_rows(shown, values["tz"])
    return as_json({"processes": rows, "total": total, "next": following})


def process_filter(values: Values) -> ProcessFilter:
    """What PROCESS_FILTERS choose. Raises BadParameter."""
    from gpumon_core.store.queries.processes import ProcessFilter

    start, end = values["from"], values["to"]
    if start is not None and end is not None and start > end:
        raise BadParameter("to", "“to” must not be earlier than “from”.")
    return ProcessFilter(
        start=start,
        end=end,
        gpu_ids=values["gpu"],
        users=values["user"],
        containers=values["container"],
        programs_with=tuple((name, values[name]) for name in ("workload", "model") if values[name]),
        kinds=values["type"],
        states=values["state"],
        min_memory_mib=values["min_memory_mib"],
        min_lifetime_s=values["min_lifetime_s"],
        text=values["q"],
    )


def active(request: Request, values: Values, engine: Engine) -> Response:
    """The processes of every host's newest tick, most memory first."""
    from gpumon_core.export.processes import ACTIVE

    frame = _active(values, engine)
    if values["format"] != "json":
        return file(request, values, ACTIVE, [frame], "active", len(frame))
    return as_json({"processes": ACTIVE.plain_rows(frame, values["tz"])})


def _active(values: Values, engine: Engine) -> pd.DataFrame:
    from gpumon_core.store.queries import frames, processes

    frame = frames.active_processes(engine)
    wanted = process_filter({**values, "from": None, "to": None, "state": ()})
    if wanted != processes.EVERYTHING:
        # The same words mean the same as in the history.
        wanted = process_filter({**values, "from": None, "to": None, "state": ("running",)})
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
        (GPU, *WHAT, *HOW_MUCH, TZ, FORMAT),
        active,
        _active_schema,
        "min_memory_mib=1000",
    ),
    Resource(
        "/api/v1/processes/history",
        "Every process that was seen on a GPU, newest first.",
        (*PROCESS_FILTERS, TZ, FORMAT, *PAGING),
        process_history,
        _history_schema,
        "state=running&limit=1",
        takes_turns=True,
    ),
)
