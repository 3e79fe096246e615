"""What is on the GPUs now: cards and tables, drawn once a tick for all viewers."""

from __future__ import annotations

import time
from zoneinfo import ZoneInfo

import pyarrow as pa

from gpumon_core.store.queries import current, processes
from gpumon_core.store.queries.current import NamedRow
from gpumon_core.store.queries.history import metrics_history
from pages.components import cards, data, sparks, tables

TREND_S = 900
TREND_POINTS = 90
# How often trends are drawn again; their ends follow the tick.
TREND_EVERY_S = 20


@data.shared(max_entries=4)
def overview_html(at: data.Tick) -> str:
    """The machines, and a card for each GPU."""
    gpus = data.ask(at, current.gpus)
    return cards.host_line(data.ask(at, current.hosts), gpus) + _cards(at, gpus, TREND_POINTS)


@data.shared(max_entries=16)
def gpu_html(at: data.Tick, gpu_id: int) -> str:
    """One GPU's card, with its MIG instances."""
    gpus = data.ask(at, current.gpus)
    several_hosts = len({row["host"] for row in gpus}) > 1
    mine = [row for row in gpus if gpu_id in (row["id"], row["parent_id"])]
    return _cards(at, mine, 2 * TREND_POINTS, several_hosts)


def _cards(at: data.Tick, gpus: list[NamedRow], points: int, with_host: bool | None = None) -> str:
    end = at[1] or int(time.time())
    known = {row["id"] for row in gpus}
    # A MIG instance on its GPU's card has no trends.
    with_trends = [row for row in gpus if row["parent_id"] not in known]
    step = (at[0], end // TREND_EVERY_S)
    trends = _trends(step, tuple(row["id"] for row in with_trends), points, end, with_trends)
    running, workloads = data.ask(at, current.processes), data.ask(at, processes.workloads)
    return cards.overview(gpus, trends, running, workloads, end, with_host)


@data.shared(max_entries=16)
def _trends(
    step: data.Tick, gpu_ids: tuple[int, ...], points: int, _end: int, _gpus: list[NamedRow]
) -> dict[int, dict[str, sparks.Spark]]:
    """The cards' trends, read and drawn once for each of their steps."""
    span = (_end - TREND_S, _end)
    trend = metrics_history(data.engine(step), gpu_ids, sparks.METRICS, *span, points)
    return sparks.of_gpus(_gpus, trend, span)


@data.shared(max_entries=8)
def active_processes(at: data.Tick, zone_name: str) -> pa.Table:
    """The processes of the newest tick as a table."""
    return tables.active(data.ask(at, current.processes), ZoneInfo(zone_name))
