"""The overview's cards, as HTML: a table of a GPU's values in, text out.

Colours follow the page's light or dark scheme through CSS light-dark(); a level is never told by
colour alone, but by a sign and a word as well. Everything that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from gpumon_core import format as fmt
from gpumon_core.metrics import GPU_METRICS, GPU_METRICS_BY_KEY, Level, Metric

# The four that a glance is for, then the details.
MAIN = ("utilization", "memory", "temperature", "power")
DETAIL = ("fan_speed", "sm_clock", "memory_clock")

SIGNS = {Level.WARNING: ("▲", "warning"), Level.CRITICAL: ("◆", "critical")}
# A GPU counts as busy from this utilization on, and as held when idle with this share of memory used.
BUSY_PERCENT = 5.0
HELD_PERCENT = 10.0

# Up to so many GPUs -> so many columns on a wide screen: even rows look best.
COLUMNS = ((1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 4), (9, 3), (math.inf, 4))

# Keeps a drawing's place, so that nothing moves when it appears.
NO_SPARK = '<div class="gm-spark gm-blank"></div>'
SPARK_WIDTH, SPARK_HEIGHT = 120, 28
# What may stand as it is in an SVG within a quoted URL within an attribute.
SVG_SAFE = " =:/.,-"

STYLE = f"<style>{Path(__file__).with_suffix('.css').read_text(encoding='utf-8')}</style>"


def overview(gpus: pd.DataFrame, trend: pd.DataFrame) -> str:
    """All cards. `gpus` as from frames.gpu_table, `trend` as from frames.history of every metric."""
    by_gpu = dict(tuple(trend.groupby("gpu_id"))) if len(trend) else {}
    start, end = (trend["timestamp_epoch"].min(), trend["timestamp_epoch"].max()) if len(trend) else (0, 1)
    several_hosts = gpus["host"].nunique() > 1
    cards = [card(row, by_gpu.get(row["id"]), (start, end), several_hosts) for row in gpus.to_dict("records")]
    columns = next(count for most, count in COLUMNS if len(cards) <= most)
    return (
        f'{STYLE}<div class="gm-cards" style="--columns:{columns}" role="list" aria-label="GPUs">'
        f"{''.join(cards)}</div>"
    )


def host_line(hosts: pd.DataFrame, gpus: pd.DataFrame) -> str:
    """Each machine with its driver and CUDA versions and its GPUs. `hosts` as from frames.host_table."""
    lines = []
    for host in hosts.to_dict("records"):
        mine = gpus[(gpus["host"] == host["name"]) & gpus["parent_id"].isna()]
        models = mine["name"].fillna("unknown model").value_counts(sort=False)
        facts = {
            "Host": host["name"],
            "Driver": host["driver_version"],
            "CUDA": host["cuda_version"],
            "GPUs": ", ".join(f"{count} × {name}" if count > 1 else str(name) for name, count in models.items()),
        }
        lines.append(
            '<div class="gm-host">'
            + "".join(
                f"<span>{label} <b>{escape(text or fmt.MISSING)}</b></span>" for label, text in facts.items()
            )
            + "</div>"
        )
    return "".join(lines)


def card(
    gpu: Mapping[Any, Any], trend: pd.DataFrame | None, span: tuple[int, int], with_host: bool = False
) -> str:
    """One GPU's card."""
    word, css = state(gpu)
    mig = gpu["mig_index"]
    title = f"GPU {gpu['gpu_index']}" + ("" if fmt.missing(mig) else f" · MIG {int(mig)}")
    if with_host:
        title = f"{gpu['host']} · {title}"
    name = gpu["name"] or "unknown model"
    if gpu["state"] == "hung":
        body = (
            f'<div class="gm-note">The driver has not returned from a call about it for '
            f"{fmt.duration(gpu['host_last_seen'] - gpu['last_seen'])}. The other GPUs go on. Look at dmesg; "
            "a driver that hangs needs a reboot.</div>"
        )
    elif gpu["state"] == "lost":
        body = (
            f'<div class="gm-note">No answer since {fmt.duration(gpu["host_last_seen"] - gpu["last_seen"])}. '
            "It may have fallen off the bus: look at dmesg for “Xid”, and reset or reboot.</div>"
        )
    else:
        main, detail = (
            "".join(_tile(GPU_METRICS_BY_KEY[key], gpu, trend, span) for key in keys) for keys in (MAIN, DETAIL)
        )
        body = f'<div class="gm-main">{main}</div><div class="gm-detail">{detail}</div>'
    return (
        f'<div class="gm-card {css}" role="listitem" aria-label="{escape(title)}, {escape(word)}" '
        f'data-uuid="{escape(gpu["uuid"])}"><div class="gm-head"><b>{escape(title)}</b>'
        f'<span class="gm-name" title="{escape(name)}">{escape(name)}</span>'
        f'<span class="gm-state {css}">{escape(word)}</span></div>{body}</div>'
    )


def state(gpu: Mapping[Any, Any]) -> tuple[str, str]:
    """What a GPU is doing in a word, and the CSS class of that word."""
    if gpu["state"] in ("lost", "hung"):
        return str(gpu["state"]).capitalize(), "lost"
    utilization, used, total = gpu["utilization"], gpu["memory"], gpu["memory_total_mib"]
    if not fmt.missing(utilization) and utilization >= BUSY_PERCENT:
        return "Busy", "busy"
    if not fmt.missing(used) and not fmt.missing(total) and total and 100 * used / total >= HELD_PERCENT:
        # Without a utilization (a MIG instance) nobody knows whether the memory's holder works.
        return ("In use", "busy") if fmt.missing(utilization) else ("Idle, memory held", "held")
    return "Idle", "idle"


def _tile(metric: Metric, gpu: Mapping[Any, Any], trend: pd.DataFrame | None, span: tuple[int, int]) -> str:
    value = gpu[metric.key]
    whole = gpu[metric.share_of] if metric.share_of else None
    known = None if fmt.missing(value) else float(value)
    level = metric.level(known, None if fmt.missing(whole) else whole)
    number, rest = fmt.value_of(metric, value, whole)
    sign, word = SIGNS.get(level, ("", ""))
    mark = f' <small class="gm-sign" title="{word}" aria-label="{word}">{sign}</small>' if sign else ""
    bar = ""
    if metric.key == "memory" and known is not None and whole:
        bar = f'<div class="gm-bar"><i style="width:{min(100.0, 100 * known / whole):.1f}%"></i></div>'
    drawing = NO_SPARK if known is None or trend is None else sparkline(trend, metric, whole, span)
    return (
        f'<div class="gm-tile gm-{level}" data-metric="{metric.key}">'
        f'<div class="gm-label">{escape(metric.label)}</div>'
        f'<div class="gm-value">{number} <small>{escape(rest)}</small>{mark}</div>{bar}{drawing}</div>'
    )


def sparkline(trend: pd.DataFrame, metric: Metric, whole: float | None, span: tuple[int, int]) -> str:
    """The metric's last minutes as a drawing: a line over a shaded area, broken at gaps."""
    values = trend[metric.key].tolist()
    times = trend["timestamp_epoch"].tolist()
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 2:
        return NO_SPARK
    top = whole if whole and not fmt.missing(whole) else metric.maximum
    top = max(*known, top or 0.0) or 1.0
    start, end = span
    across = SPARK_WIDTH / max(1, end - start)
    runs: list[list[tuple[int, int]]] = [[]]
    for time, value in zip(times, values, strict=True):
        if math.isnan(value):
            runs.append([])
        else:
            x, y = round((time - start) * across), round((1 - value / top) * (SPARK_HEIGHT - 2)) + 1
            runs[-1].append((x, y))
    drawn = [run for run in runs if len(run) > 1]
    line = "".join("M" + "L".join(f"{x} {y}" for x, y in run) for run in drawn)
    area = "".join(
        f"M{run[0][0]} {SPARK_HEIGHT}L" + "L".join(f"{x} {y}" for x, y in run) + f"L{run[-1][0]} {SPARK_HEIGHT}Z"
        for run in drawn
    )
    lowest = fmt.value(metric, trend[f"{metric.key}_min"].min())
    highest = fmt.value(metric, trend[f"{metric.key}_max"].max())
    # Streamlit lets no SVG through, but a mask: the drawing gives the shape, and CSS the colour.
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SPARK_WIDTH} {SPARK_HEIGHT}" '
        f'preserveAspectRatio="none"><path d="{area}" fill-opacity=".16"/><path d="{line}" fill="none" '
        'stroke="#000" stroke-width="1.5" stroke-linejoin="round" vector-effect="non-scaling-stroke"/></svg>'
    )
    return (
        f'<div class="gm-spark" role="img" aria-label="{escape(metric.label)} in the last minutes: {lowest} to '
        f'{highest}" style="--drawing:url(\'data:image/svg+xml,{quote(drawing, safe=SVG_SAFE)}\')"></div>'
    )


TREND_METRICS: Sequence[str] = tuple(metric.key for metric in GPU_METRICS if metric.key in MAIN + DETAIL)
