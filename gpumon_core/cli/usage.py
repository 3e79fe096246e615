"""Who used how much of the GPUs: the ranking of the usage page.

Use is counted by the half hour: each half hour in the range counts completely.
Rows that belong to no process (idle GPUs, time without a recorder, ...) come
last, so that all rows add up to the use of the GPUs. Where the driver does not
report processes one by one, the use of a GPU is split by their memory, and
marked as an estimate. Costs need GPUMON_PRICE_PER_KWH or
GPUMON_PRICE_PER_GPU_HOUR. CSV and JSON have the columns of /api/v1/usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from gpumon_core import format as fmt
from gpumon_core.cli import stored, terminal
from gpumon_core.settings import Settings
from gpumon_core.store.queries.dimensions import DIMENSIONS

if TYPE_CHECKING:
    pass

SUMMARY = "Who used how much of the GPUs, and what it cost."
EXAMPLES = (
    ("", "the users of the last seven days"),
    ("--by model --since 30d", "the models of a month"),
    ("--by job --since 24h --format csv > jobs.csv", "the jobs of a day, for a spreadsheet"),
    ("--by user --format json | jq '.usage[0].name'", "who used most"),
)
# Key of export.usage.ranking_table -> its title on a terminal, and how it is shown there.
SHOWN = {
    "processes": ("Processes", "{:.0f}"),
    "gpu_hours": ("GPU-hours", "{:,.2f}"),
    "on_gpu_s": ("On GPU", ""),
    "held_idle_s": ("Held idle", ""),
    "memory_gib_hours": ("Memory-hours (GiB·h)", "{:,.1f}"),
    "energy_kwh": ("Energy (kWh)", "{:,.3f}"),
    "energy_share_percent": ("Share", "{:.1f} %"),
    "cost": ("Cost", "{:,.2f}"),
}
# The columns to add up.
ADDED = ("gpu_hours", "memory_gib_hours", "energy_kwh", "energy_share_percent", "cost")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--by", choices=DIMENSIONS, default="user", help="what the use is added up by (user)")
    terminal.add_range(parser, "7d")
    stored.add_gpu(parser)
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="how (table)")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Add up the use, and print it."""
    from gpumon_core.export import usage as export
    from gpumon_core.store.queries import costs, usage

    prices = costs.Prices(settings.price_per_kwh, settings.price_per_gpu_hour, settings.currency)
    now = time.time()
    start, end = terminal.span(arguments, now)
    with stored.history(settings) as engine:
        scope = usage.Scope(
            start=start or 0, end=int(now) if end is None else end, gpu_ids=stored.gpu_ids(engine, arguments.gpu)
        )
        ranking = usage.ranking(engine, arguments.by, scope)
        keys = ranking.loc[ranking["kind"] == "part", "key"].dropna().tolist()
        names = usage.labels(engine, arguments.by, keys)
    whole = export.named(ranking, names)
    table = export.ranking_table(prices)
    if arguments.format == "csv":
        print(table.csv(whole, arguments.tz).decode(), end="")
        return terminal.FINE
    [sums] = table.plain_rows(export.together(whole), arguments.tz)
    result = {
        "by": arguments.by,
        "from": _iso(scope.first_step, arguments),
        "to": _iso(scope.end, arguments),
        "currency": prices.currency if prices.known else None,
        # The rows of /api/v1/usage, and their sums before rounding.
        "usage": table.plain_rows(whole, arguments.tz),
        "together": {key: sums[key] for key in ADDED},
    }
    shown = _as_text(result) if arguments.format == "table" else json.dumps(result, indent=2, ensure_ascii=False)
    print(shown)
    return terminal.FINE


def _as_text(result: Mapping[str, Any]) -> str:
    from gpumon_core.export.text_columns import aligned

    by, currency = result["by"], result["currency"]
    head = f"Use of the GPUs by {by}, from {result['from']} to {result['to']}, counted by the half hour"
    if not result["usage"]:
        return f"{head}\n\nNothing was recorded in this time range: choose a longer one with --since."
    keys = [key for key in SHOWN if key != "cost" or currency]
    titles = [SHOWN[key][0] + (f" ({currency})" if key == "cost" else "") for key in keys]
    rows = [["GPU" if by == "gpu" else by.capitalize(), *titles]]

    def shown(key: str, number: float | None) -> str:
        how = SHOWN[key][1]
        if number is None:
            return fmt.MISSING
        return how.format(number) if how else fmt.duration(number)

    for row in result["usage"]:
        mark = " ~" if row["estimated"] else ""
        rows.append([row["name"] + mark, *(shown(key, row[key]) for key in keys)])
    together = result["together"]
    rows.append(["Together", *(shown(key, together[key]) if key in together else "" for key in keys)])
    room = terminal.columns() if sys.stdout.isatty() else None
    lines = aligned(rows, right=range(1, len(keys) + 1), most=room, fixed=range(1, len(keys) + 1))
    estimated = any(row["estimated"] for row in result["usage"])
    notes = ["", "~ split by memory: an estimate"] if estimated else []
    return "\n".join([head, "", *lines, *notes])


def _iso(epoch: int, arguments: argparse.Namespace) -> str:
    return datetime.fromtimestamp(epoch, arguments.tz).isoformat(timespec="minutes")
