"""The time range of a query: from, to and range, for routes that need a beginning and an end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine

from gpumon_core.api.resource import ParameterValues, Schema
from gpumon_core.safety.parameters import LAST_MOMENT, LENGTH, MOMENT, BadParameter, Parameter, length_s

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo


def parameters(default: str) -> tuple[Parameter, ...]:
    """from, to and range, which is `default` where the query does not say."""
    return (
        Parameter("from", "The beginning; without it, `range` before the end.", MOMENT),
        Parameter(
            "to",
            "The end; without it, `range` after the beginning if both are given, or else the newest sample.",
            MOMENT,
        ),
        Parameter(
            "range",
            f"How long it is: a number with s, m, h, d, w or y behind it, or of seconds. Otherwise {default}.",
            LENGTH,
        ),
    )


def span(values: ParameterValues, engine: Engine, default: str) -> tuple[int, int]:
    """From when to when the query means, in UTC seconds. Raises BadParameter."""
    start, end, length = values["from"], values["to"], values["range"]
    if None not in (start, end, length):
        raise BadParameter("range", "“range” can be given with “from” or “to”, not with both.")
    if start is not None and end is not None and start > end:
        raise BadParameter("to", "“to” must not be earlier than “from”.")
    if start is None:
        end = newest(engine) if end is None else end
        return max(0, end - (length or length_s(default))), end
    if end is None:
        end = max(start, newest(engine)) if length is None else min(LAST_MOMENT, start + length)
    return start, end


def newest(engine: Engine) -> int:
    """When the newest sample of any host was taken; now, where there is none."""
    from gpumon_core.store.queries import frames

    seen = frames.host_table(engine)["last_seen"]
    return int(max(seen)) if len(seen) else int(time.time())


def moments(start: int, end: int, zone: ZoneInfo) -> dict[str, Any]:
    """A range as an answer has it."""
    import pandas as pd

    from gpumon_core.export.csv import iso

    first, last = iso(pd.Series([start, end]), zone)
    return {"from": first, "to": last, "from_epoch": start, "to_epoch": end}


MOMENTS_SCHEMA: dict[str, Schema] = {
    "from": {"type": "string", "format": "date-time"},
    "to": {"type": "string", "format": "date-time"},
    "from_epoch": {"type": "integer", "description": "The same in UTC seconds."},
    "to_epoch": {"type": "integer", "description": "The same in UTC seconds."},
}
