"""Tables as pages show them. Each is made once per tick or minute and view, for all viewers."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow as pa

from gpumon_core.store.queries import costs
from gpumon_core.store.queries.dimensions import Dimension
from gpumon_core.store.queries.usage import Scope
from pages.components import data, tables


@data.shared(max_entries=8)
def active(at: data.Tick, zone_name: str) -> pa.Table:
    """tables.active of data.active_processes."""
    return tables.active(data.active_processes(at), ZoneInfo(zone_name))


@data.shared(max_entries=24, hash_funcs=data.SCOPES)
def ranked(at: data.Tick, by: Dimension, title: str, scope: Scope) -> pd.DataFrame:
    """tables.usage of data.usage_ranking."""
    ranking = data.usage_ranking(at, by, scope)
    names = data.usage_labels(at, by, ranking)
    return tables.usage(costs.ranked(ranking, names, title, data.prices()))


@data.shared(max_entries=24, hash_funcs=data.SCOPES)
def idle_holders(at: data.Tick, scope: Scope, idle_s: float, zone_name: str, _newest: int) -> pd.DataFrame:
    """tables.idle_holders of data.idle_holders."""
    return tables.idle_holders(data.idle_holders(at, scope, idle_s), ZoneInfo(zone_name), _newest)


@data.shared(max_entries=24, hash_funcs=data.SCOPES)
def model_sessions(at: data.Tick, scope: Scope, zone_name: str) -> pd.DataFrame:
    """tables.sessions of data.model_sessions."""
    return tables.sessions(data.model_sessions(at, scope), ZoneInfo(zone_name))
