"""GPUs and processes at one moment, from a recorder's newest tick or from the driver, as lines of text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from gpumon_core import format as fmt
from gpumon_core import gpu_state
from gpumon_core.attribution.records import NOTHING, ProcessIdentity
from gpumon_core.cli.terminal import painted
from gpumon_core.export.text_columns import GAP, aligned, cut, padded, width
from gpumon_core.metrics import GPU_METRICS_BY_KEY, Level
from gpumon_core.telemetry import remedies
from gpumon_core.telemetry.records import GpuValues, Snapshot

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

One = TypeVar("One")
METRICS = ("temperature", "utilization", "memory", "power")
# The columns of processes: those that are aligned right, and those that are never cut.
TITLES = ("GPU", "PID", "Type", "Memory", "SM", "User", "Container", "Workload", "Model", "Name")
RIGHT, FIXED = {1, 3, 4}, {0, 1, 2, 3, 4}
# The type of a process is shown from this width on.
TYPE_FROM = 100
NARROWEST_NAME, SHORTEST_BAR, LONGEST_BAR = 8, 4, 40
# The least lines for processes, however many GPUs there are.
PROCESS_LINES = 4


@dataclass(frozen=True, slots=True)
class GpuView:
    """A GPU: its label (3, or 3:1), name, state (ok, or why it has no values), its METRICS, and where its
    memory is (gpus.memory_from)."""

    label: str
    name: str
    state: str
    values: GpuValues
    memory_total_mib: float | None
    power_limit_w: float | None
    memory_from: str | None = None


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A process on a GPU; texts are empty where not known, memory is in MiB, sm in %."""

    gpu: str
    pid: int
    kind: str
    memory: float | None
    sm: float | None
    user: str
    container: str
    workload: str
    model: str
    name: str


@dataclass(frozen=True, slots=True)
class View:
    """What is shown: a headline, the GPUs in the driver's order, and the processes, most memory first."""

    headline: str
    gpus: tuple[GpuView, ...]
    processes: tuple[ProcessView, ...]


# ---- Sources -----------------------------------------------------------------------------------------


def of_snapshot(snapshot: Snapshot, identities: Mapping[int, ProcessIdentity], simulated: bool) -> View:
    """The view of a snapshot from the driver."""
    snapshot = snapshot.with_nameless()
    values = {reading.uuid: reading.values for reading in snapshot.readings}
    labels = {gpu.uuid: fmt.gpu_label(gpu.index, gpu.mig_index) for gpu in snapshot.gpus}
    shown = []
    for gpu in snapshot.gpus:
        totals = (gpu.memory_total_mib, gpu.power_limit_w, gpu.memory_from)
        shown.append(
            GpuView(
                labels[gpu.uuid], _short(gpu.name), snapshot.state_of(gpu.uuid), values.get(gpu.uuid, {}), *totals
            )
        )
    processes = []
    for process in snapshot.processes:
        who = identities.get(process.pid, ProcessIdentity(process.pid))
        runs = who.program or NOTHING
        container = fmt.container(runs.pod, runs.container_name, runs.container_id)
        texts = (who.user, container, runs.workload, runs.model, who.name)
        processes.append(
            ProcessView(
                *(labels[process.gpu_uuid], process.pid, process.kind, process.memory_mib, process.sm_utilization),
                *(text or "" for text in texts),
            )
        )
    host = snapshot.host
    origin = "simulated GPUs" if simulated else "asked of the driver"
    return View(
        _headline(host.name, host.driver_version, host.cuda_version, origin), tuple(shown), _ranked(processes)
    )


def of_recorder(engine: Engine, host: str, now: float, simulated: bool) -> View | None:
    """The view of the newest tick of this machine's recorder; None without a recorder. Raises
    sqlalchemy.exc.DBAPIError."""
    from gpumon_core.recording.health import fresh_within_s
    from gpumon_core.store.queries import current as newest

    machines = {row["name"]: row for row in newest.hosts(engine)}
    machine = machines.get(host)
    if machine is None or abs(now - machine["last_seen"]) > fresh_within_s(machine["interval_s"]):
        return None
    gpus, processes = [], []
    for row in newest.gpus(engine):
        if row["host"] == host:
            values = {key: row[key] for key in METRICS}
            totals = (row["memory_total_mib"], row["power_limit_w"], row["memory_from"])
            label = fmt.gpu_label(row["gpu_index"], row["mig_index"])
            gpus.append(GpuView(label, _short(row["name"]), row["state"], values, *totals))
    for row in newest.processes(engine):
        if row["host"] == host:
            container = fmt.container(row["pod"], row["container_name"], row["container_id"])
            texts = (row["username"], container, row["workload"], row["model"], row["name"])
            numbers = (row["memory"], row["sm_utilization"])
            label = fmt.gpu_label(row["gpu_index"], row["mig_index"])
            processes.append(
                ProcessView(label, row["pid"], row["kind"], *numbers, *(text or "" for text in texts))
            )
    age = max(0, round(now - machine["last_seen"]))
    origin = f"recorded {age} s ago" + (", simulated GPUs" if simulated else "")
    return View(
        _headline(host, machine["driver_version"], machine["cuda_version"], origin),
        tuple(gpus),
        _ranked(processes),
    )


def _headline(host: str, driver: str | None, cuda: str | None, origin: str) -> str:
    return fmt.printable(f"{host}  driver {driver or fmt.MISSING}  CUDA {cuda or fmt.MISSING}  {origin}")


def _ranked(processes: Sequence[ProcessView]) -> tuple[ProcessView, ...]:
    return tuple(sorted(processes, key=lambda process: (-(process.memory or 0), process.pid)))


def _short(name: str | None) -> str:
    # All names begin with NVIDIA.
    return fmt.printable(name or fmt.MISSING).removeprefix("NVIDIA ")


# ---- Lines -------------------------------------------------------------------------------------------


def trouble(view: View) -> str:
    """The GPUs that do not answer, and what to do; an empty text where all answer."""
    lost = [gpu.label for gpu in view.gpus if gpu.state == "lost"]
    return f"GPU {', '.join(lost)}: no answer. {remedies.of_lost()}" if lost else ""


def lines(view: View, columns: int | None, rows: int | None, colours: bool, note: str = "") -> list[str]:
    """The view as lines for a terminal with so many columns and rows; None means without a limit.

    `note` is a problem to show at the top.
    """
    clock = time.strftime("%H:%M:%S")
    head = view.headline
    if columns is not None:
        head = padded(head, max(0, columns - width(clock) - GAP)) + " " * GAP + clock
        head = cut(head, columns)
    shown = [head]
    if note:
        warning = _fitted(fmt.printable(note), columns)
        shown.append(painted(warning, Level.CRITICAL) if colours else warning)
    shown.append("")
    # Below the GPUs come titles, a blank line and the processes.
    room = None if rows is None else max(1, rows - len(shown) - 2 - PROCESS_LINES)
    gpus, left_out = _first(view.gpus, room)
    shown += _gpu_lines(gpus, columns, colours)
    shown += [_fitted(f"… and {left_out} more GPUs", columns)] if left_out else []
    shown.append("")
    room = None if rows is None else max(0, rows - len(shown) - 1)
    processes, left_out = _first(view.processes, room)
    no_processes = [_fitted("No process is using a GPU.", columns)]
    shown += _process_lines(processes, columns) if view.processes else no_processes
    shown += [_fitted(f"… and {left_out} more processes", columns)] if left_out else []
    return shown if rows is None else shown[:rows]


def _first(all_of_them: Sequence[One], room: int | None) -> tuple[Sequence[One], int]:
    """The first ones that fit, and how many are left out, which needs a line itself: so never only one is left
    out."""
    if room is None or len(all_of_them) <= room:
        return all_of_them, 0
    shown = max(0, room - 1)
    return all_of_them[:shown], len(all_of_them) - shown


def _fitted(text: str, columns: int | None) -> str:
    return text if columns is None else cut(text, columns)


@dataclass(frozen=True, slots=True)
class _Cell:
    """A text in a column, and its level."""

    text: str
    level: Level = Level.CALM


def _gpu_lines(gpus: Sequence[GpuView], columns: int | None, colours: bool) -> list[str]:
    """The table of GPUs, with bars where the terminal is wide enough."""
    table = [[_Cell(title) for title in ("GPU", "Name", "Temp", "Power", "Memory", "Util")], *map(_cells, gpus)]
    widths = [max(width(row[place].text) for row in table) for place in range(len(table[0]))]
    bar = 0
    if columns is not None:
        rest = columns - sum(widths) - GAP * (len(widths) - 1)
        # Cut long names to make room for short bars.
        least = 2 * (SHORTEST_BAR + 3)
        if rest < least:
            widths[1] = max(NARROWEST_NAME, widths[1] - (least - rest))
            rest = columns - sum(widths) - GAP * (len(widths) - 1)
        bar = min(LONGEST_BAR, rest // 2 - 3) if rest >= least else 0
    drawn = []
    for row, gpu in zip(table, (None, *gpus), strict=True):
        parts: list[_Cell] = []
        for place, cell in enumerate(row):
            parts.append(_Cell(padded(cell.text, widths[place], right=place > 1), cell.level))
            if bar and place in (4, 5):
                parts[-1] = _Cell(parts[-1].text + " " + _bar(gpu, place, bar), cell.level)
        drawn.append(_line(parts, columns, colours))
    return drawn


def _cells(gpu: GpuView) -> list[_Cell]:
    if not gpu_state.answers(gpu.state):
        level = Level.CRITICAL if gpu_state.is_lost(gpu.state) else Level.CALM
        return [_Cell(gpu.label), _Cell(gpu.name), _Cell(gpu.state, level), *[_Cell("")] * 3]
    metrics = {key: GPU_METRICS_BY_KEY[key] for key in METRICS}
    values = {key: gpu.values.get(key) for key in METRICS}
    total_of = {"memory": gpu.memory_total_mib, "power": gpu.power_limit_w}
    cells = [_Cell(gpu.label), _Cell(gpu.name)]
    for key in ("temperature", "power", "memory", "utilization"):
        number, rest = fmt.value_of(metrics[key], values[key], total_of.get(key))
        text = f"{number} {rest}".strip().replace(" of ", "/")
        if key == "memory" and gpu_state.shares_memory(gpu.memory_from):
            text += " shared"
        cells.append(_Cell(text, metrics[key].level(values[key], total_of.get(key))))
    return cells


def _bar(gpu: GpuView | None, place: int, length: int) -> str:
    """A bar for memory or utilization; blank in the line of titles and where the value is not known."""
    part = None
    if gpu is not None and gpu_state.answers(gpu.state):
        memory, busy = gpu.values.get("memory"), gpu.values.get("utilization")
        if place == 5:
            part = None if busy is None else busy / 100
        elif memory is not None and gpu.memory_total_mib:
            part = memory / gpu.memory_total_mib
    if part is None:
        return " " * (length + 2)
    full = "|" * round(length * min(1.0, max(0.0, part)))
    return f"[{full:<{length}}]"


def _line(cells: Sequence[_Cell], columns: int | None, colours: bool) -> str:
    """The cells in one line, cut at the width of the terminal; colours take no width."""
    left, shown = columns, []
    for place, cell in enumerate(cells):
        text = (" " * GAP if place else "") + cell.text
        if left is not None:
            text = cut(text, left)
            left -= width(text)
        shown.append(painted(text, cell.level) if colours else text)
    return "".join(shown).rstrip()


def _process_lines(processes: Sequence[ProcessView], columns: int | None) -> list[str]:
    rows = [list(TITLES)]
    for one in processes:
        memory = fmt.memory(one.memory)
        sm = fmt.MISSING if one.sm is None else f"{one.sm:.0f} %"
        texts = (one.user, one.container, one.workload, one.model, one.name)
        rows.append([one.gpu, str(one.pid), one.kind, memory, sm, *(text or fmt.MISSING for text in texts)])
    right, fixed = RIGHT, FIXED
    if columns is not None and columns < TYPE_FROM:
        rows = [[*row[:2], *row[3:]] for row in rows]
        right, fixed = {1, 2, 3}, {0, 1, 2, 3}
    return aligned(rows, right, columns, fixed)
