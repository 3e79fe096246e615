"""The overview's cards, as HTML: rows of GPUs and of processes in, text out.

Colours follow the page's light or dark scheme through CSS light-dark(); a level or state is never told by colour
alone, but by a sign and a word as well. Everything that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pandas as pd

from gpumon_core import figures, gpu_state
from gpumon_core import format as fmt
from gpumon_core.metrics import GPU_METRICS_BY_KEY, Level, Metric
from gpumon_core.recording.health import fresh_within_s

# What is drawn over time, and what is a word at the foot of a card.
TRENDS = ("utilization", "temperature", "power")
DETAIL = ("fan_speed", "sm_clock", "memory_clock")
TREND_METRICS: Sequence[str] = TRENDS
SIGNS = {Level.WARNING: ("▲", "warning"), Level.CRITICAL: ("◆", "critical")}
# The card of a GPU that says nothing says why instead.
SILENT = ("lost", "asleep")
# So many processes are named on a card.
NAMED = 2

# Up to so many cards -> so many columns on a wide screen: even rows look best.
COLUMNS = ((1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 4), (9, 3), (math.inf, 4))

# Keeps a drawing's place, so that nothing moves when it appears.
NO_SPARK = '<div class="gm-spark gm-blank"></div>'
SPARK_WIDTH, SPARK_HEIGHT = 160, 32
# A drawing as a quoted URL within an attribute; what is filled in are numbers, letters and blanks.
SPARK = quote(
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SPARK_WIDTH} {SPARK_HEIGHT}" '
    'preserveAspectRatio="none"><path d="{area}" fill-opacity=".16"/><path d="{line}" fill="none" '
    'stroke="#000" stroke-width="1.5" stroke-linejoin="round" vector-effect="non-scaling-stroke"/></svg>',
    safe=" =:/.,-{}",
)
# Stands in a drawing for the end of its line, where the newest sample is; and so old the last of its other points
# may be.
PRESENT = "\0"
PRESENT_WITHIN_S = 60
# A row of store.now, and the columns of frames.history of one GPU.
Row = Mapping[str, Any]
Trend = Mapping[str, Any]

STYLE = f"<style>{Path(__file__).with_suffix('.css').read_text(encoding='utf-8')}</style>"


@dataclass(frozen=True, slots=True)
class Scene:
    """What cards have beside their GPU: `sparks` and processes by GPU id, the place of each workload's colour,
    whether there are several hosts, and the time of the newest sample of any."""

    sparks: Mapping[int, Mapping[str, Spark]] = field(default_factory=dict)
    processes: Mapping[int, Sequence[Row]] = field(default_factory=dict)
    workloads: Mapping[str, int] = field(default_factory=dict)
    with_host: bool = False
    latest: float = 0.0


def overview(
    gpus: Sequence[Row],
    sparks: Mapping[int, Mapping[str, Spark]],
    processes: Sequence[Row],
    workloads: Sequence[str],
    latest: float,
    with_host: bool | None = None,
) -> str:
    """All cards. `gpus` and `processes` as from store.now, `sparks` as from `sparks` below, `workloads` in the
    order that gives them their colours, `latest` the time of the newest sample in UTC seconds."""
    scene = Scene(
        sparks,
        _by_gpu(processes),
        {name: place for place, name in enumerate(workloads)},
        len({row["host"] for row in gpus}) > 1 if with_host is None else with_host,
        latest,
    )
    instances: dict[int, list[Row]] = {}
    for row in gpus:
        if row["parent_id"] is not None:
            instances.setdefault(row["parent_id"], []).append(row)
    known = {row["id"] for row in gpus}
    # An instance whose GPU is gone stands for itself.
    whole = [row for row in gpus if row["parent_id"] not in known]
    cards = [card(row, scene, instances.get(row["id"], ())) for row in whole]
    columns = next(count for most, count in COLUMNS if len(cards) <= most)
    return (
        f'{STYLE}<div class="gm-cards gm-{"solo" if len(cards) == 1 else "many"}" style="--columns:{columns}" '
        f'role="list" aria-label="GPUs">{"".join(cards)}</div>'
    )


def _by_gpu(processes: Sequence[Row]) -> dict[int, list[Row]]:
    """Who is on each GPU, most memory first, as they come."""
    found: dict[int, list[Row]] = {}
    for row in processes:
        found.setdefault(row["gpu_id"], []).append(row)
    return found


def sparks(gpus: Sequence[Row], trend: pd.DataFrame, span: tuple[int, int]) -> dict[int, dict[str, Spark]]:
    """The drawings of the cards' trends, by GPU id and metric. `gpus` as from store.now, `trend` as from
    frames.history of TREND_METRICS over `span` (UTC seconds)."""
    drawn = {}
    for row in gpus:
        mine = trend["gpu_id"].to_numpy() == row["id"]
        if mine.any():
            columns = {name: trend[name].to_numpy()[mine] for name in trend.columns}
            metrics = (GPU_METRICS_BY_KEY[key] for key in TREND_METRICS)
            mine_drawn = {
                metric.key: sparkline(columns, metric, row[metric.share_of] if metric.share_of else None, span)
                for metric in metrics
            }
            drawn[row["id"]] = {key: spark for key, spark in mine_drawn.items() if spark is not None}
    return drawn


def host_line(hosts: Sequence[Row], gpus: Sequence[Row]) -> str:
    """Each machine with its driver and CUDA versions and its GPUs, all as from store.now."""
    lines = []
    for host in hosts:
        mine = (gpu for gpu in gpus if gpu["host"] == host["name"] and gpu["parent_id"] is None)
        models = Counter(gpu["name"] or "unknown model" for gpu in mine)
        facts = {
            "Host": host["name"],
            "Driver": host["driver_version"],
            "CUDA": host["cuda_version"],
            "GPUs": ", ".join(f"{count} × {name}" if count > 1 else name for name, count in models.items()),
        }
        lines.append(
            '<div class="gm-host">'
            + "".join(
                f"<span>{label} <b>{escape(text or fmt.MISSING)}</b></span>" for label, text in facts.items()
            )
            + "</div>"
        )
    return "".join(lines)


def card(gpu: Row, scene: Scene, instances: Sequence[Row] = ()) -> str:
    """One GPU's card, with its MIG instances on it."""
    inside = [condition(part, scene.latest, scene.processes.get(part["id"], ())) for part in instances]
    mine = [one for row in (gpu, *instances) for one in scene.processes.get(row["id"], ())]
    found = condition(gpu, scene.latest, mine, inside)
    word, css, why = found.word, found.css, found.why
    title = _title(gpu, scene.with_host)
    name = gpu["name"] or "unknown model"
    body = f'<div class="gm-note">{escape(why)}</div>' if css in SILENT else _body(gpu, scene, instances)
    # What a GPU said last is not what it does now.
    facts = (
        [title, word]
        if css in SILENT
        else [title, word]
        + [
            f"{metric.label} {fmt.value(metric, gpu[metric.key])}"
            for metric in (GPU_METRICS_BY_KEY[key] for key in ("utilization", "memory", "temperature"))
        ]
    )
    link = "gpu?" + urlencode({"gpu": _title(gpu, scene.with_host).replace(" · ", " ")})
    return (
        f'<div class="gm-card {css}" role="listitem" aria-label="{escape(", ".join(facts))}" '
        f'data-uuid="{escape(gpu["uuid"])}"><div class="gm-head">'
        f'<span class="gm-state {css}" title="{escape(why)}">{escape(word)}</span>'
        f'<a class="gm-title" href="{escape(link)}" target="_self">{escape(title)}</a>'
        f'<span class="gm-name" title="{escape(name)}">{escape(name)}</span></div>{body}</div>'
    )


def _title(gpu: Row, with_host: bool) -> str:
    mig = gpu["mig_index"]
    title = f"GPU {gpu['gpu_index']}" + ("" if fmt.missing(mig) else f":{int(mig)}")
    return f"{gpu['host']} · {title}" if with_host else title


def _body(gpu: Row, scene: Scene, instances: Sequence[Row]) -> str:
    drawn = scene.sparks.get(gpu["id"], {})
    utilization, temperature, power = (_tile(GPU_METRICS_BY_KEY[key], gpu, drawn.get(key)) for key in TRENDS)
    detail = "".join(
        f'<span data-metric="{key}">{escape(GPU_METRICS_BY_KEY[key].label)} '
        f"<b>{escape(fmt.value(GPU_METRICS_BY_KEY[key], gpu[key]))}</b></span>"
        for key in DETAIL
    )
    if instances:
        inside = "".join(_instance(instance, scene) for instance in instances)
        held = f'{_memory(gpu, scene, ())}<div class="gm-parts">{inside}</div>'
    else:
        mine = scene.processes.get(gpu["id"], ())
        held = _memory(gpu, scene, mine) + _who(mine, scene)
    return (
        f'<div class="gm-first">{utilization}</div>{held}'
        f'<div class="gm-pair">{temperature}{power}</div><div class="gm-detail">{detail}</div>'
    )


def _instance(gpu: Row, scene: Scene) -> str:
    """A MIG instance on its GPU's card."""
    mine = scene.processes.get(gpu["id"], ())
    found = condition(gpu, scene.latest, mine)
    word, css = found.word, found.css
    name = str(gpu["name"] or "").rsplit(" MIG ", 1)[-1]
    return (
        f'<div class="gm-part" role="group" aria-label="MIG instance {int(gpu["mig_index"])}, {escape(word)}" '
        f'data-uuid="{escape(gpu["uuid"])}"><div class="gm-label"><b>MIG {int(gpu["mig_index"])}</b> '
        f'<span class="gm-name">{escape(name)}</span> <span class="gm-state {css}">{escape(word)}</span></div>'
        f"{_memory(gpu, scene, mine)}{_who(mine, scene, 1)}</div>"
    )


def state(
    gpu: Row,
    latest: float = 0.0,
    processes: Sequence[Row] | None = None,
    instances: Sequence[gpu_state.Condition] = (),
) -> tuple[str, str, str]:
    """What a GPU is doing in a word, the CSS class of that word, and a sentence about it. `processes` are those on
    it, None where they are not known; `instances` what its MIG instances are doing."""
    found = condition(gpu, latest, processes, instances)
    return found.word, found.css, found.why


def condition(
    gpu: Row,
    latest: float = 0.0,
    processes: Sequence[Row] | None = None,
    instances: Sequence[gpu_state.Condition] = (),
) -> gpu_state.Condition:
    """gpu_state.of a row of store.now; a GPU whose machine is silent is stale, whatever it said last."""
    if latest - gpu["host_last_seen"] > fresh_within_s(gpu["host_interval_s"]):
        silent = fmt.duration(latest - gpu["host_last_seen"])
        return gpu_state.Condition(
            "Stale", "lost", f"No sample from its machine for {silent}. Look at the recorder there."
        )
    holders = None if processes is None else [_number(process["memory"]) for process in processes]
    facts = gpu_state.Facts(
        state=gpu["state"],
        utilization=_number(gpu["utilization"]),
        memory_mib=_number(gpu["memory"]),
        total_mib=_number(gpu["memory_total_mib"]),
        holders=holders,
        part="whole" if gpu["mig_index"] is None or fmt.missing(gpu["mig_index"]) else "instance",
        instances=instances,
        clocks_event_reasons=_number(gpu.get("clocks_event_reasons")),
    )
    return gpu_state.of(facts, fmt.duration(gpu["host_last_seen"] - gpu["last_seen"]))


def _number(value: Any) -> float | None:
    """A number that may be missing, as None or as pandas' NaN."""
    return None if value is None or fmt.missing(value) else float(value)


def _tile(metric: Metric, gpu: Row, spark: Spark | None) -> str:
    value = gpu[metric.key]
    whole = gpu[metric.share_of] if metric.share_of else None
    known = None if fmt.missing(value) else float(value)
    level = metric.level(known, None if fmt.missing(whole) else whole)
    number, rest = fmt.value_of(metric, value, whole)
    bar = ""
    if metric.key == "power" and known is not None and whole and not fmt.missing(whole):
        bar = f'<div class="gm-bar"><i style="width:{min(100.0, 100 * known / whole):.1f}%"></i></div>'
    drawing = NO_SPARK if known is None or spark is None else spark.up_to(known)
    return (
        f'<div class="gm-tile gm-{level}" data-metric="{metric.key}">'
        f'<div class="gm-label">{escape(metric.label)}</div>'
        f'<div class="gm-value">{number} <small>{escape(rest)}</small>{_mark(level)}</div>{bar}{drawing}</div>'
    )


def _mark(level: Level) -> str:
    sign, word = SIGNS.get(level, ("", ""))
    return f' <small class="gm-sign" title="{word}" aria-label="{word}">{sign}</small>' if sign else ""


def _memory(gpu: Row, scene: Scene, processes: Sequence[Row]) -> str:
    """The memory in use, in a bar of the processes that hold it."""
    metric = GPU_METRICS_BY_KEY["memory"]
    used, whole = gpu["memory"], gpu["memory_total_mib"]
    known = None if fmt.missing(used) else float(used)
    level = metric.level(known, None if fmt.missing(whole) else whole)
    number, rest = fmt.value_of(metric, used, whole)
    if gpu_state.shares_memory(gpu.get("memory_from")):
        rest += f", {gpu_state.SHARED}"
    bar = ""
    if known is not None and whole and not fmt.missing(whole):
        parts, told = [], 0.0
        for process in processes:
            held = 0.0 if fmt.missing(process["memory"]) else min(float(process["memory"]), known - told)
            if held <= 0:
                continue
            told += held
            what = f"{_called(process)}: {fmt.memory(held)}"
            parts.append(
                f'<i style="width:{100 * held / whole:.2f}%;background:{_ink(process, scene)}" '
                f'title="{escape(what)}"></i>'
            )
        rest_of = min(100.0, 100 * max(0.0, known - told) / whole)
        parts.append(f'<i class="gm-other" style="width:{rest_of:.2f}%" title="{fmt.memory(known - told)}"></i>')
        bar = f'<div class="gm-bar gm-thick">{"".join(parts)}</div>'
    return (
        f'<div class="gm-tile gm-row gm-{level}" data-metric="memory"><div class="gm-label">Memory</div>'
        f'<div class="gm-value">{number} <small>{escape(rest)}</small>{_mark(level)}</div>{bar}</div>'
    )


def _who(processes: Sequence[Row], scene: Scene, most: int = NAMED) -> str:
    """Who holds most of it, and with which model."""
    lines = []
    more = len(processes) - most
    for number, process in enumerate(processes[:most], 1):
        rest = f' <span class="gm-more" title="{more} more">+{more}</span>' if more > 0 and number == most else ""
        user = f'<span class="gm-user">{escape(process["username"])}</span>' if process["username"] else ""
        lines.append(
            f'<li><i style="background:{_ink(process, scene)}"></i><span class="gm-what">'
            f"{escape(_called(process))}</span>{rest}{user}<span>{fmt.memory(process['memory'])}</span></li>"
        )
    if not lines:
        lines.append('<li class="gm-more">no process</li>')
    return f'<ul class="gm-who">{"".join(lines)}</ul>'


def _called(process: Row) -> str:
    name = process["workload"] or process["name"] or f"PID {process['pid']}"
    return f"{name} · {process['model']}" if process["model"] else str(name)


def _ink(process: Row, scene: Scene) -> str:
    """The workload's colour, which charts give it too."""
    place = scene.workloads.get(process["workload"] or "")
    if place is None:
        return f"light-dark({figures.GREYS[False][0]},{figures.GREYS[True][0]})"
    return f"light-dark({figures.hue(place, False)},{figures.hue(place, True)})"


@dataclass(frozen=True, slots=True)
class Spark:
    """A metric's last minutes, drawn once for several ticks: a text with a place for the end of its line, and the
    value at the top of the drawing. Without a place the line has ended before."""

    text: str
    top: float

    def up_to(self, value: float) -> str:
        """The drawing, whose line ends at the present value."""
        y = _y(min(max(value, 0.0), self.top), self.top)
        return self.text.replace(PRESENT, f"{SPARK_WIDTH} {y}")


def _y(value: float, top: float) -> int:
    return round(SPARK_HEIGHT - 1 - value * (SPARK_HEIGHT - 2) / top)


def sparkline(trend: Trend, metric: Metric, whole: float | None, span: tuple[int, int]) -> Spark | None:
    """The metric's last minutes as a drawing: a line over a shaded area, broken at gaps. None where there is next
    to nothing to draw."""
    times, values = trend["timestamp_epoch"].tolist(), trend[metric.key].tolist()
    known = _known(values)
    if len(known) < 2:
        return None
    top = whole if whole and not fmt.missing(whole) else metric.maximum
    top = max(*known, top or 0.0) or 1.0
    start, end = span
    across = SPARK_WIDTH / max(1, end - start)
    runs: list[list[str]] = [[]]
    edges: list[list[int]] = [[]]
    for time, value in zip(times, values, strict=True):
        if value != value:  # noqa: PLR0124
            runs.append([])
            edges.append([])
        else:
            x = round((time - start) * across)
            runs[-1].append(f"{x} {_y(value, top)}")
            edges[-1].append(x)
    if edges[-1] and end - times[-1] <= PRESENT_WITHIN_S:
        runs[-1].append(PRESENT)
        edges[-1].append(SPARK_WIDTH)
    drawn = [("L".join(run), edge[0], edge[-1]) for run, edge in zip(runs, edges, strict=True) if len(run) > 1]
    line = "".join(f"M{points}" for points, _, _ in drawn)
    area = "".join(f"M{first} {SPARK_HEIGHT}L{points}L{last} {SPARK_HEIGHT}Z" for points, first, last in drawn)
    lowest = fmt.value(metric, min(_known(trend[f"{metric.key}_min"].tolist()), default=None))
    highest = fmt.value(metric, max(_known(trend[f"{metric.key}_max"].tolist()), default=None))
    # Streamlit lets no SVG through, but a mask: the drawing gives the shape, and CSS the colour.
    drawing = SPARK.format(area=area, line=line)
    return Spark(
        f'<div class="gm-spark" role="img" aria-label="{escape(metric.label)} in the last minutes: {lowest} to '
        f'{highest}" style="--drawing:url(\'data:image/svg+xml,{drawing}\')"></div>',
        top,
    )


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if value == value]  # noqa: PLR0124 - NaN is not
