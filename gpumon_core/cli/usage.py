"""Who used how much of the GPUs: the ranking of the usage page.

Use is counted by the hour: every hour that the range touches counts whole.
Rows for what belongs to no process (idle GPUs, time without a recorder, ...)
come last, so that all rows together are what the GPUs took. Where the driver
does not tell processes apart, their GPU's use is split by the memory that they
held, and marked as an estimate. Costs need GPUMON_PRICE_PER_KWH or
GPUMON_PRICE_PER_GPU_HOUR.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gpumon_core import format as fmt
from gpumon_core.cli import stored, terminal
from gpumon_core.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from gpumon_core.ledger import Prices
    from gpumon_core.store.usage import Scope

SUMMARY = "Who used how much of the GPUs, and what it cost."
EXAMPLES = (
    ("", "the users of the last seven days"),
    ("--by model --since 30d", "the models of a month"),
    ("--by job --since 24h --format csv > jobs.csv", "the jobs of a day, for a spreadsheet"),
    ("--by user --format json | jq '.rows[0].name'", "who used most"),
)
# usage.Dimension, which is not imported for a help text: a test holds the two to each other.
DIMENSIONS = ("user", "container", "workload", "model", "process", "gpu", "job")
# Column of ledger.ranked -> its key in JSON, and how a terminal shows it.
SHOWN = {
    "Processes": ("processes", "{:.0f}"),
    "GPU-hours": ("gpu_hours", "{:,.2f}"),
    "On GPU": ("on_gpu_s", ""),
    "Held idle": ("held_idle_s", ""),
    "Memory-hours": ("memory_gib_hours", "{:,.1f}"),
    "Energy": ("energy_kwh", "{:,.3f}"),
    "Share": ("energy_share_percent", "{:.1f} %"),
    "Cost": ("cost", "{:,.2f}"),
}
UNITS = {"Memory-hours": "GiB·h", "Energy": "kWh"}
# Of these a sum says something.
ADDED = ("GPU-hours", "Memory-hours", "Energy", "Share", "Cost")


def add(parser: argparse.ArgumentParser) -> None:
    """By what, of when, and how."""
    parser.add_argument("--by", choices=DIMENSIONS, default="user", help="whose use is added up (user)")
    terminal.add_range(parser, "7d")
    stored.add_gpu(parser)
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="how (table)")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Add up and print."""
    from gpumon_core import ledger
    from gpumon_core.export import csv
    from gpumon_core.store import usage

    prices = ledger.Prices(settings.price_per_kwh, settings.price_per_gpu_hour, settings.currency)
    now = time.time()
    start, end = terminal.span(arguments, now)
    with stored.history(settings) as engine:
        scope = usage.Scope(
            start=start or 0, end=int(now) if end is None else end, gpu_ids=stored.gpu_ids(engine, arguments.gpu)
        )
        ranking = usage.ranking(engine, arguments.by, scope)
        keys = ranking.loc[ranking["kind"] == "part", "key"].dropna().tolist()
        names = usage.labels(engine, arguments.by, keys)
    title = "GPU" if arguments.by == "gpu" else arguments.by.capitalize()
    ranked = ledger.ranked(ranking, names, title, prices)
    if arguments.format == "csv":
        print(csv.usage_csv(ranked, prices.currency).decode(), end="")
    elif arguments.format == "json":
        print(json.dumps(_as_json(ranking, ranked, arguments, scope, prices), indent=2, ensure_ascii=False))
    else:
        print(_as_text(ranking, ranked, arguments, scope, prices))
    return terminal.FINE


def _as_json(
    ranking: pd.DataFrame, ranked: pd.DataFrame, arguments: argparse.Namespace, scope: Scope, prices: Prices
) -> dict[str, Any]:
    """The rows with their kind (part: somebody's; the others are the GPUs' own), and their sums."""
    columns = {title: key for title, (key, _) in SHOWN.items() if title in ranked}
    rows = []
    for kind, row in zip(ranking["kind"], ranked.to_dict("records"), strict=True):
        numbers = {key: None if fmt.missing(row[title]) else row[title] for title, key in columns.items()}
        if numbers["processes"] is not None:
            numbers["processes"] = int(numbers["processes"])
        rows.append({"name": row[ranked.columns[0]], "kind": kind, **numbers, "estimate": bool(row["Estimate"])})
    return {
        "by": arguments.by,
        "from": _iso(scope.first_hour, arguments),
        "to": _iso(scope.end, arguments),
        "currency": prices.currency if prices.known else None,
        "rows": rows,
        "total": {columns[title]: float(ranked[title].sum()) for title in ADDED if title in columns},
    }


def _as_text(
    ranking: pd.DataFrame, ranked: pd.DataFrame, arguments: argparse.Namespace, scope: Scope, prices: Prices
) -> str:
    from gpumon_core.columns import aligned

    head = (
        f"Use of the GPUs by {arguments.by}, from {_iso(scope.first_hour, arguments)} to "
        f"{_iso(scope.end, arguments)}, counted by the hour"
    )
    if ranking.empty:
        return f"{head}\n\nNothing was recorded in this time range: choose a longer one with --since."
    titles = [title for title in SHOWN if title in ranked]
    units = UNITS | {"Cost": prices.currency}
    who = ranked.columns[0]
    rows = [[who, *(f"{title} ({units[title]})" if title in units else title for title in titles)]]

    def shown(title: str, number: float) -> str:
        how = SHOWN[title][1]
        if fmt.missing(number):
            return fmt.MISSING
        return how.format(number) if how else fmt.duration(number)

    for row in ranked.to_dict("records"):
        mark = " ~" if row["Estimate"] else ""
        rows.append([f"{row[who]}{mark}", *(shown(title, row[title]) for title in titles)])
    total = [shown(title, float(ranked[title].sum())) if title in ADDED else "" for title in titles]
    rows.append(["Together", *total])
    room = terminal.columns() if sys.stdout.isatty() else None
    lines = aligned(rows, right=range(1, len(titles) + 1), most=room, fixed=range(1, len(titles) + 1))
    notes = ["", "~ split by memory: an estimate"] if ranked["Estimate"].any() else []
    return "\n".join([head, "", *lines, *notes])


def _iso(epoch: int, arguments: argparse.Namespace) -> str:
    return datetime.fromtimestamp(epoch, arguments.tz).isoformat(timespec="minutes")
