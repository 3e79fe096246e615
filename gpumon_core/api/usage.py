"""How much of the GPUs each user, model, ... used, and which models were loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine
from starlette.requests import Request
from starlette.responses import Response

from gpumon_core.api import ranges
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
    page_schema,
)
from gpumon_core.recording import runtime
from gpumon_core.safety import parameters
from gpumon_core.safety.parameters import TZ, Parameter, one_of, words
from gpumon_core.store.queries.dimensions import DIMENSIONS, Dimension

if TYPE_CHECKING:
    import pandas as pd

    from gpumon_core.store.queries.costs import Prices
    from gpumon_core.store.queries.usage import Scope

DEFAULT_RANGE = "7d"
BY = Parameter("by", "Whose use is added up.", one_of(*DIMENSIONS), default="user")


def _filters(what: str) -> tuple[Parameter, ...]:
    return (
        Parameter("gpu", f"{what} on this GPU, {parameters.GPU_SPELLINGS}.", parameters.GPU, is_repeatable=True),
        Parameter("user", f"{what} of this user.", words(), is_repeatable=True),
        Parameter("workload", f"{what} of this kind of workload, such as vLLM.", words(), is_repeatable=True),
        Parameter("model", f"{what} with this model.", words(), is_repeatable=True),
    )


def _scope(values: ParameterValues, engine: Engine) -> Scope:
    """The scope of the query's range and filters. Raises BadParameter."""
    from gpumon_core.store.queries.usage import Scope

    start, end = ranges.span(values, engine, DEFAULT_RANGE)
    programs_with = {name: values[name] for name in ("workload", "model") if values[name]}
    return Scope(start, end, values["gpu"] or None, values["user"] or None, programs_with)


def _prices() -> Prices:
    from gpumon_core.store.queries.costs import Prices

    settings = runtime.settings()
    return Prices(settings.price_per_kwh, settings.price_per_gpu_hour, settings.currency)


def ranking(request: Request, values: ParameterValues, engine: Engine) -> Response:
    """How much each of a dimension used, the busiest first, and the GPUs' own rows after them."""
    from gpumon_core.export.tables import in_pieces
    from gpumon_core.export.usage import ranking_table
    from gpumon_core.store.queries import usage
    from gpumon_core.store.queries.costs import shares

    scope, prices = _scope(values, engine), _prices()
    table = ranking_table(prices)
    at, limit = after(values), values["limit"]
    ranked = usage.ranking(engine, values["by"], scope)
    ranked = ranked.assign(share=shares(ranked))
    if values["format"] != "json":
        pieces = _named(engine, values["by"], in_pieces(ranked))
        return file(request, values, table, pieces, f"usage-{values['by']}", len(ranked))
    # A ranking is ordered by its sums alone: the cursor is the number of rows so far.
    first = 0 if at is None else at[1]
    pieces = _named(engine, values["by"], [ranked.iloc[first : first + limit]])
    rows = [row for piece in pieces for row in table.plain_rows(piece, values["tz"])]
    following = cursor((0, first + limit)) if first + limit < len(ranked) else None
    return as_json(
        {
            **ranges.moments(scope.first_step, scope.end, values["tz"]),
            "by": values["by"],
            "currency": prices.currency if prices.known else None,
            "usage": rows,
            "total": len(ranked),
            "next": following,
        }
    )


def _named(engine: Engine, by: Dimension, pieces: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Pieces of a ranking with the name of each row."""
    from gpumon_core.store.queries import costs, usage

    for piece in pieces:
        keys = piece.loc[piece["kind"] == "part", "key"].dropna().tolist()
        names = usage.labels(engine, by, keys)
        yield piece.assign(called=costs.called(piece, names))


def models(request: Request, values: ParameterValues, engine: Engine) -> Response:
    """Which models were loaded in the range, the newest first."""
    from gpumon_core.export.usage import SESSIONS
    from gpumon_core.store.queries import model_sessions

    scope = _scope(values, engine)
    if values["format"] != "json":
        total = model_sessions.count(engine, scope)
        return file(request, values, SESSIONS, model_sessions.pages(engine, scope), "models", total)
    at, limit = after(values), values["limit"]
    frame = model_sessions.loaded(engine, scope, limit + 1, at)
    shown = frame.head(limit)
    return as_json(
        {
            **ranges.moments(scope.start, scope.end, values["tz"]),
            "models": SESSIONS.plain_rows(shown, values["tz"]),
            "total": model_sessions.count(engine, scope),
            "next": cursor(model_sessions.position(shown)) if len(frame) > limit else None,
        }
    )


def _ranking_schema() -> Schema:
    from gpumon_core.export.usage import ranking_table

    by = {
        "by": {"type": "string", "enum": list(DIMENSIONS)},
        "currency": {"type": ["string", "null"], "description": "Of `cost`; null where nothing has a price."},
    }
    return page_schema("usage", ranking_table(_prices()).row_schema, {**ranges.MOMENTS_SCHEMA, **by})


def _models_schema() -> Schema:
    from gpumon_core.export.usage import SESSIONS

    return page_schema("models", SESSIONS.row_schema, ranges.MOMENTS_SCHEMA)


RESOURCES = (
    Resource(
        "/api/v1/usage",
        "GPU-hours, memory-hours, energy and cost of each user, container, workload, model, process, GPU or job, "
        "the busiest first. Counted by the half hour: each that the range touches counts.",
        (*ranges.parameters(DEFAULT_RANGE), BY, *_filters("The use by processes"), TZ, FORMAT, *PAGING),
        ranking,
        _ranking_schema,
        "by=workload&range=24h",
        takes_turns=True,
    ),
    Resource(
        "/api/v1/models",
        "Model sessions: which model was loaded on which GPU, from when to when, the newest first.",
        (*ranges.parameters(DEFAULT_RANGE), *_filters("Sessions"), TZ, FORMAT, *PAGING),
        models,
        _models_schema,
        "range=24h&limit=1",
        takes_turns=True,
    ),
)
