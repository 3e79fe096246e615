"""Writes the tables of docs/metrics.md from the catalogue and from the families of /metrics:

.venv/bin/python docs/metrics_tables.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpumon_core.metrics import GPU_METRICS, PROCESS_METRICS, Metric, NvmlCall, NvmlQuery
from gpumon_core.prometheus.families import FAMILIES, LABELS, unit_of

PAGE = ROOT / "docs" / "metrics.md"
NONE = "–"
PROCESS_CALLS = {
    "memory": "nvmlDeviceGet…RunningProcesses",
    None: "nvmlDeviceGetProcessesUtilizationInfo, or nvmlDeviceGetProcessUtilization",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _way(way: NvmlQuery) -> str:
    if not isinstance(way, NvmlCall):
        return f"`{way.name}`"
    constants = [argument for argument in way.arguments if isinstance(argument, str)]
    return f"`{way.function}`" + (f" ({', '.join(constants)})" if constants else "")


def _ways(metric: Metric) -> str:
    if not metric.nvml:
        return PROCESS_CALLS.get(metric.key, PROCESS_CALLS[None])
    ways = "; else ".join(dict.fromkeys(_way(way) for way in metric.nvml))
    return ways + (f"; between ticks `{metric.samples}`" if metric.samples else "")


def _level(metric: Metric, value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:g} " + ("% of its limit" if metric.share_of else metric.unit)


def _exported(metric: Metric) -> str:
    names = ", ".join(f"`{name}`" for name in (metric.prometheus, *metric.prometheus_too))
    return " ".join(filter(None, (names, metric.prometheus_type, unit_of(metric))))


def metrics_table(metrics: Iterable[Metric]) -> str:
    """Everything that the catalogue says of its metrics."""
    head = ("metric", "key", "unit", "from NVML", "aggregates to", "since", "warning", "critical", "Prometheus")
    return table(
        head,
        (
            (
                metric.label,
                f"`{metric.key}`",
                metric.unit or NONE,
                _ways(metric),
                metric.aggregate.value,
                metric.since or NONE,
                _level(metric, metric.warning),
                _level(metric, metric.critical),
                _exported(metric),
            )
            for metric in metrics
        ),
    )


def families_table() -> str:
    """The families of /metrics that are not in the catalogue."""
    known = {
        name for metric in (*GPU_METRICS, *PROCESS_METRICS) for name in (metric.prometheus, *metric.prometheus_too)
    }
    rows = ((f"`{one.name}`", one.type, one.labels, one.help) for one in FAMILIES if one.name not in known)
    return table(("family", "type", "labels", "meaning"), rows)


def labels_table() -> str:
    """The labels that the samples may have."""
    return table(
        ("labels", "what they are"), ((name, ", ".join(f"`{one}`" for one in LABELS[name])) for name in LABELS)
    )


TABLES: dict[str, Callable[[], str]] = {
    "gpu metrics": lambda: metrics_table(GPU_METRICS),
    "process metrics": lambda: metrics_table(PROCESS_METRICS),
    "families": families_table,
    "labels": labels_table,
}


def filled(page: str) -> str:
    """The page with its tables between their marks."""
    for name, made in TABLES.items():
        place = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        page = place.sub(lambda _, made=made: made() + "\n", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
