"""The cards of GPUs, as HTML: rows of GPUs and of processes in, text out.

Colours follow the light or dark scheme of the page through CSS light-dark(). A level or state has a sign and a
word, never a colour alone. Everything that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from gpumon_core import figures, gpu_state
from gpumon_core import format as fmt
from gpumon_core.metrics import GPU_METRICS_BY_KEY, Level, Metric
from gpumon_core.recording.health import fresh_within_s
from gpumon_core.store.queries.current import NamedRow
from pages.components import sparks
from pages.components.sparks import Spark

# The metrics at the foot of a card.
DETAIL = ("fan_speed", "sm_clock", "memory_clock")
SIGNS = {Level.WARNING: ("▲", "warning"), Level.CRITICAL: ("◆", "critical")}
# On the card of a GPU in one of these states there is only the reason.
SILENT = ("lost", "asleep")
# The most processes that a card names.
NAMED = 2

# Up to this many cards, this many columns on a wide screen: even rows look best.
COLUMNS = ((1, 1), (2, 2), (3, 3), (4, 2), (6, 3), (8, 4), (9, 3), (math.inf, 4))

# Holds the place of a drawing, so that nothing moves when it appears.
NO_SPARK = '<div class="gm-spark gm-blank"></div>'
# A row of store.queries.current.

STYLE = f"<style>{Path(__file__).with_suffix('.css').read_text(encoding='utf-8')}</style>"


@dataclass(frozen=True, slots=True)
class Context:
    """What cards need beside their GPU: `trends` and processes by GPU id, the place of each workload's colour,
    whether there are several hosts, and the time of the newest sample of any."""

    trends: Mapping[int, Mapping[str, Spark]] = field(default_factory=dict)
    processes: Mapping[int, Sequence[NamedRow]] = field(default_factory=dict)
    workloads: Mapping[str, int] = field(default_factory=dict)
    with_host: bool = False
    latest: float = 0.0


def overview(
    gpus: Sequence[NamedRow],
    trends: Mapping[int, Mapping[str, Spark]],
    processes: Sequence[NamedRow],
    workloads: Sequence[str],
    latest: float,
    with_host: bool | None = None,
) -> str:
    """All cards. `gpus` and `processes` as from store.queries.current, `trends` as from sparks.of_gpus,
    `workloads` in the order that gives them their colours, `latest` the time of the newest sample in UTC
    seconds."""
    context = Context(
        trends,
        _by_gpu(processes),
        {name: place for place, name in enumerate(workloads)},
        len({row["host"] for row in gpus}) > 1 if with_host is None else with_host,
        latest,
    )
    instances: dict[int, list[NamedRow]] = {}
    for row in gpus:
        if row["parent_id"] is not None:
            instances.setdefault(row["parent_id"], []).append(row)
    known = {row["id"] for row in gpus}
    # A MIG instance without its GPU gets a card of its own.
    with_card = [row for row in gpus if row["parent_id"] not in known]
    cards = [card(row, context, instances.get(row["id"], ())) for row in with_card]
    columns = next(count for most, count in COLUMNS if len(cards) <= most)
    return (
        f'{STYLE}<div class="gm-cards gm-{"solo" if len(cards) == 1 else "many"}" style="--columns:{columns}" '
        f'role="list" aria-label="GPUs">{"".join(cards)}</div>'
    )


def _by_gpu(processes: Sequence[NamedRow]) -> dict[int, list[NamedRow]]:
    """The processes by GPU, in their order: most memory first."""
    found: dict[int, list[NamedRow]] = {}
    for row in processes:
        found.setdefault(row["gpu_id"], []).append(row)
    return found


def host_line(hosts: Sequence[NamedRow], gpus: Sequence[NamedRow]) -> str:
    """Each machine with its driver and CUDA versions and its GPUs, all as from store.queries.current."""
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


def card(gpu: NamedRow, context: Context, instances: Sequence[NamedRow] = ()) -> str:
    """One GPU's card, with its MIG instances on it."""
    inside = [condition(part, context.latest, context.processes.get(part["id"], ())) for part in instances]
    mine = [one for row in (gpu, *instances) for one in context.processes.get(row["id"], ())]
    found = condition(gpu, context.latest, mine, inside)
    word, css, why = found.word, found.css, found.why
    title = _title(gpu, context.with_host)
    name = gpu["name"] or "unknown model"
    body = f'<div class="gm-note">{escape(why)}</div>' if css in SILENT else _body(gpu, context, instances)
    # The newest values of a silent GPU are not its present ones.
    facts = (
        [title, word]
        if css in SILENT
        else [title, word]
        + [
            f"{metric.label} {fmt.value(metric, gpu[metric.key])}"
            for metric in (GPU_METRICS_BY_KEY[key] for key in ("utilization", "memory", "temperature"))
        ]
    )
    link = "gpu?" + urlencode({"gpu": _title(gpu, context.with_host).replace(" · ", " ")})
    return (
        f'<div class="gm-card {css}" role="listitem" aria-label="{escape(", ".join(facts))}" '
        f'data-uuid="{escape(gpu["uuid"])}"><div class="gm-head">'
        f'<span class="gm-state {css}" title="{escape(why)}">{escape(word)}</span>'
        f'<a class="gm-title" href="{escape(link)}" target="_self">{escape(title)}</a>'
        f'<span class="gm-name" title="{escape(name)}">{escape(name)}</span></div>{body}</div>'
    )


def _title(gpu: NamedRow, with_host: bool) -> str:
    mig = gpu["mig_index"]
    title = f"GPU {gpu['gpu_index']}" + ("" if fmt.missing(mig) else f":{int(mig)}")
    return f"{gpu['host']} · {title}" if with_host else title


def _body(gpu: NamedRow, context: Context, instances: Sequence[NamedRow]) -> str:
    drawn = context.trends.get(gpu["id"], {})
    utilization, temperature, power = (
        _tile(GPU_METRICS_BY_KEY[key], gpu, drawn.get(key)) for key in sparks.METRICS
    )
    detail = "".join(
        f'<span data-metric="{key}">{escape(GPU_METRICS_BY_KEY[key].label)} '
        f"<b>{escape(fmt.value(GPU_METRICS_BY_KEY[key], gpu[key]))}</b></span>"
        for key in DETAIL
    )
    if instances:
        inside = "".join(_instance(instance, context) for instance in instances)
        held = f'{_memory(gpu, context, ())}<div class="gm-parts">{inside}</div>'
    else:
        mine = context.processes.get(gpu["id"], ())
        held = _memory(gpu, context, mine) + _holders(mine, context)
    return (
        f'<div class="gm-first">{utilization}</div>{held}'
        f'<div class="gm-pair">{temperature}{power}</div><div class="gm-detail">{detail}</div>'
    )


def _instance(gpu: NamedRow, context: Context) -> str:
    """A MIG instance on its GPU's card."""
    mine = context.processes.get(gpu["id"], ())
    found = condition(gpu, context.latest, mine)
    word, css = found.word, found.css
    name = str(gpu["name"] or "").rsplit(" MIG ", 1)[-1]
    return (
        f'<div class="gm-part" role="group" aria-label="MIG instance {int(gpu["mig_index"])}, {escape(word)}" '
        f'data-uuid="{escape(gpu["uuid"])}"><div class="gm-label"><b>MIG {int(gpu["mig_index"])}</b> '
        f'<span class="gm-name">{escape(name)}</span> <span class="gm-state {css}">{escape(word)}</span></div>'
        f"{_memory(gpu, context, mine)}{_holders(mine, context, 1)}</div>"
    )


def condition(
    gpu: NamedRow,
    latest: float = 0.0,
    processes: Sequence[NamedRow] | None = None,
    instances: Sequence[gpu_state.GpuCondition] = (),
) -> gpu_state.GpuCondition:
    """gpu_state.of a row of current.gpus; a GPU whose machine is silent is stale, whatever it reported last.
    `processes` are those on the GPU, None where they are not known; `instances` are the states of its MIG
    instances."""
    if latest - gpu["host_last_seen"] > fresh_within_s(gpu["host_interval_s"]):
        silent = fmt.duration(latest - gpu["host_last_seen"])
        return gpu_state.GpuCondition(
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


def _tile(metric: Metric, gpu: NamedRow, spark: Spark | None) -> str:
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


def _memory(gpu: NamedRow, context: Context, processes: Sequence[NamedRow]) -> str:
    """The memory in use, as a bar of the processes that hold it."""
    metric = GPU_METRICS_BY_KEY["memory"]
    used, whole = gpu["memory"], gpu["memory_total_mib"]
    known = None if fmt.missing(used) else float(used)
    level = metric.level(known, None if fmt.missing(whole) else whole)
    number, rest = fmt.value_of(metric, used, whole)
    if gpu_state.shares_memory(gpu.get("memory_from")):
        rest += f", {gpu_state.SHARED}"
    bar = ""
    if known is not None and whole and not fmt.missing(whole):
        parts, shown = [], 0.0
        for process in processes:
            held = 0.0 if fmt.missing(process["memory"]) else min(float(process["memory"]), known - shown)
            if held <= 0:
                continue
            shown += held
            what = f"{_name(process)}: {fmt.memory(held)}"
            parts.append(
                f'<i style="width:{100 * held / whole:.2f}%;background:{_ink(process, context)}" '
                f'title="{escape(what)}"></i>'
            )
        rest_of = min(100.0, 100 * max(0.0, known - shown) / whole)
        parts.append(f'<i class="gm-other" style="width:{rest_of:.2f}%" title="{fmt.memory(known - shown)}"></i>')
        bar = f'<div class="gm-bar gm-thick">{"".join(parts)}</div>'
    return (
        f'<div class="gm-tile gm-row gm-{level}" data-metric="memory"><div class="gm-label">Memory</div>'
        f'<div class="gm-value">{number} <small>{escape(rest)}</small>{_mark(level)}</div>{bar}</div>'
    )


def _holders(processes: Sequence[NamedRow], context: Context, most: int = NAMED) -> str:
    """The processes that hold most memory, and their models."""
    lines = []
    more = len(processes) - most
    for number, process in enumerate(processes[:most], 1):
        rest = f' <span class="gm-more" title="{more} more">+{more}</span>' if more > 0 and number == most else ""
        user = f'<span class="gm-user">{escape(process["username"])}</span>' if process["username"] else ""
        lines.append(
            f'<li><i style="background:{_ink(process, context)}"></i><span class="gm-what">'
            f"{escape(_name(process))}</span>{rest}{user}<span>{fmt.memory(process['memory'])}</span></li>"
        )
    if not lines:
        lines.append('<li class="gm-more">no process</li>')
    return f'<ul class="gm-holders">{"".join(lines)}</ul>'


def _name(process: NamedRow) -> str:
    name = process["workload"] or process["name"] or f"PID {process['pid']}"
    return f"{name} · {process['model']}" if process["model"] else str(name)


def _ink(process: NamedRow, context: Context) -> str:
    """The colour of the workload, the same as in charts."""
    place = context.workloads.get(process["workload"] or "")
    if place is None:
        return f"light-dark({figures.GREYS[False][0]},{figures.GREYS[True][0]})"
    return f"light-dark({figures.hue(place, False)},{figures.hue(place, True)})"
