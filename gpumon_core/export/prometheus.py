"""/metrics for Prometheus: the newest tick under DCGM's names, and what DCGM does not know as gpumon_*.

Everything comes from memory: a scrape asks neither the driver nor the database. What the catalogue has is derived
from it; the rest is the table FAMILIES. An exposition is rendered once for each tick and format, and its bytes are
sent to whoever asks.

Names, types, units and labels of DCGM_*: the counters in etc/*.csv of NVIDIA's dcgm-exporter, its
internal/pkg/rendermetrics, and dcgm_fields.h.
"""

from __future__ import annotations

import gzip
import platform
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from typing import Literal

from prometheus_client import exposition
from prometheus_client.core import Metric as ClientFamily
from prometheus_client.core import Sample
from prometheus_client.openmetrics import exposition as openmetrics
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gpumon_core import __version__, runtime
from gpumon_core.attribution.records import NOTHING, ProcessIdentity, Program, is_placeholder
from gpumon_core.health import fresh_within_s
from gpumon_core.metrics import GPU_METRICS, PROCESS_METRICS, Metric
from gpumon_core.newest import Newest, Values
from gpumon_core.recorder import State
from gpumon_core.telemetry.records import GpuInfo, ProcessReading
from gpumon_core.vitals import Vitals

PATH = "/metrics"
DCGM = "DCGM_"
MIB = float(2**20)
# What a label has at most, in characters: names and models are whatever a user called them.
LONGEST_LABEL = 128
# So many models have series of their own, those with the most memory.
MOST_MODELS = 100
UNKNOWN = "unknown"
# Line breaks are escaped; other control characters and halves of surrogate pairs have no place in text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
# Unlike DCGM's exporter, Prometheus's client calls every counter ..._total: DCGM's are made without a type, and
# get it in the text format. OpenMetrics allows no counter without _total, so there they stay without one.
_UNTYPED = re.compile(rb"^(# TYPE DCGM_\w+) untyped$", re.MULTILINE)
_PROFILE = re.compile(r" MIG ([\w.+]+)$")

Labels = dict[str, str]
Samples = Iterable[tuple[Labels, float]]


@dataclass(frozen=True)
class Scene:
    """All that an exposition tells of: what the recorder says of itself, and its newest tick as long as that is
    fresh. `processes` is how many of them have series."""

    host: str
    state: State
    vitals: Vitals | None
    interval_s: float
    processes: int
    newest: Newest | None
    fresh: bool

    @property
    def shown(self) -> Newest | None:
        """The tick whose readings are still true."""
        return self.newest if self.fresh else None

    @cached_property
    def gpus(self) -> tuple[GpuInfo, ...]:
        """Every GPU known."""
        return self.shown.snapshot.gpus if self.shown else ()

    @cached_property
    def answering(self) -> tuple[GpuInfo, ...]:
        """The GPUs that have said something in this tick."""
        if self.shown is None:
            return ()
        read = {reading.uuid for reading in self.shown.snapshot.readings}
        return tuple(gpu for gpu in self.gpus if gpu.uuid in read)

    def values(self, gpu: GpuInfo) -> Values:
        """What a GPU has said, by catalogue key."""
        return self.shown.values.get(gpu.uuid, {}) if self.shown else {}

    @cached_property
    def own_labels(self) -> Mapping[str, Labels]:
        """By UUID, the labels of a GPU's gpumon_* series: DCGM's without the words."""
        return {gpu.uuid: _gpu_labels(gpu, self.host) for gpu in self.gpus}

    @cached_property
    def dcgm_labels(self) -> Mapping[str, Labels]:
        """By UUID, the labels that DCGM's exporter gives a GPU's series."""
        if self.shown is None:
            return {}
        names = {gpu.uuid: gpu.name for gpu in self.gpus}
        driver = self.shown.snapshot.host.driver_version
        return {
            gpu.uuid: self.own_labels[gpu.uuid]
            | _labels(modelName=names.get(gpu.parent_uuid or gpu.uuid, gpu.name), DCGM_FI_DRIVER_VERSION=driver)
            for gpu in self.gpus
        }

    @cached_property
    def processes_on(self) -> Mapping[str, int]:
        """By UUID, how many processes a GPU has."""
        counts: dict[str, int] = dict.fromkeys((gpu.uuid for gpu in self.answering), 0)
        for process in self._running:
            counts[process.gpu_uuid] += 1
        return counts

    @cached_property
    def _running(self) -> tuple[ProcessReading, ...]:
        known = {gpu.uuid for gpu in self.answering}
        return tuple(one for one in self.shown.snapshot.processes if one.gpu_uuid in known) if self.shown else ()

    def who(self, pid: int) -> ProcessIdentity:
        """Who a process is."""
        found = self.shown.identities.get(pid) if self.shown else None
        return found or ProcessIdentity(pid)

    @cached_property
    def largest(self) -> Sequence[tuple[ProcessReading, Labels]]:
        """The processes that have series, each on each of its GPUs, and their labels."""
        chosen = nlargest(self.processes, self._running, key=lambda one: (one.memory_mib or 0, -one.pid))
        return [(one, self.own_labels[one.gpu_uuid] | _process_labels(one, self.who(one.pid))) for one in chosen]

    @cached_property
    def left_out(self) -> int:
        """How many processes have none."""
        return len(self._running) - len(self.largest)

    def by(self, key: Callable[[Program], str | None]) -> Mapping[str, tuple[int | None, int]]:
        """The memory in MiB and the number of the processes that have the same key, those with the most first."""
        memory: dict[str, int | None] = {}
        pids: dict[str, set[int]] = defaultdict(set)
        for one in self._running:
            name = key(self.who(one.pid).program)
            if name is None:
                continue
            pids[name].add(one.pid)
            known = memory.setdefault(name, None)
            if one.memory_mib is not None:
                memory[name] = (known or 0) + one.memory_mib
        return {name: (memory[name], len(pids[name])) for name in sorted(memory, key=lambda n: -(memory[n] or 0))}

    @cached_property
    def workloads(self) -> Mapping[str, tuple[int | None, int]]:
        """Memory and processes by workload; what is not known is one of them, so that the sum is all there is."""
        return self.by(lambda program: clean(program.workload) or UNKNOWN)

    @cached_property
    def models(self) -> Mapping[str, tuple[int | None, int]]:
        """Memory and processes of the models that are known by name."""
        return dict(list(self.by(_model).items())[:MOST_MODELS])


def clean(text: str | None) -> str:
    """A text as a label has it: printable, of a bounded length, and nothing where it is not known."""
    if not text:
        return ""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text if len(text) <= LONGEST_LABEL else _short(text))


def _short(text: str) -> str:
    return text[: LONGEST_LABEL - 1] + "…"


def _labels(**texts: str | int | None) -> Labels:
    """The labels that have a value: to Prometheus an empty one is none."""
    cleaned = {name: clean(str(text)) for name, text in texts.items() if text is not None}
    return {name: text for name, text in cleaned.items() if text}


def _gpu_labels(gpu: GpuInfo, host: str) -> Labels:
    """As with DCGM's exporter, a MIG instance has the labels of its GPU, its profile and its number. Several of
    its compute instances would be the same then, so each has its own UUID as well."""
    labels = _labels(
        gpu=gpu.index,
        UUID=gpu.parent_uuid or gpu.uuid,
        pci_bus_id=gpu.pci_bus_id,
        device=f"nvidia{gpu.index}",
        Hostname=host,
    )
    if gpu.parent_uuid is None:
        return labels
    profile = _PROFILE.search(gpu.name or "")
    return labels | _labels(
        GPU_I_PROFILE=profile[1] if profile else None, GPU_I_ID=gpu.gpu_instance, GPU_I_UUID=gpu.uuid
    )


def _process_labels(process: ProcessReading, who: ProcessIdentity) -> Labels:
    program = who.program or NOTHING
    return _labels(
        pid=process.pid,
        type=process.kind,
        name=who.name,
        user=who.user,
        container=program.container_name or (program.container_id or "")[:12],
        namespace=program.namespace,
        pod=program.pod,
        workload=program.workload,
        model=_model(program),
    )


def _model(program: Program) -> str | None:
    model = program.model
    return None if model is None or is_placeholder(model) else clean(model) or None


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family: its name as Prometheus has it, its type, what it is with its unit, which of LABELS its
    samples have, and where they come from."""

    name: str
    type: Literal["gauge", "counter"]
    help: str
    labels: str
    samples: Callable[[Scene], Samples]

    def collect(self, scene: Scene) -> ClientFamily | None:
        """It as the client library wants it; None where nobody has a value."""
        samples = [Sample(self.name, labels, value) for labels, value in self.samples(scene)]
        if not samples:
            return None
        kind: str = self.type
        if kind == "counter" and self.name.startswith(DCGM):
            kind = "unknown"
        family = ClientFamily(self.name.removesuffix("_total"), self.help, kind)
        family.samples = samples
        return family


# The labels that the samples of a family may have.
_GPU = ("gpu", "UUID", "pci_bus_id", "device", "Hostname", "GPU_I_PROFILE", "GPU_I_ID", "GPU_I_UUID")
_PROCESS = ("pid", "type", "name", "user", "container", "namespace", "pod", "workload", "model")
LABELS: Mapping[str, tuple[str, ...]] = {
    "dcgm": (*_GPU, "modelName", "DCGM_FI_DRIVER_VERSION"),
    "gpu": _GPU,
    "gpu_info": (*_GPU, "model_name", "architecture", "compute_capability"),
    "process": (*_GPU, *_PROCESS),
    "workload": ("workload", "Hostname"),
    "model": ("model", "Hostname"),
    "host": ("Hostname",),
    "recorder_info": ("Hostname", "role", "source"),
    "host_info": ("Hostname", "driver_version", "cuda_version", "nvml_version"),
    "build_info": ("version", "python"),
}

# A unit of the catalogue and what it is multiplied by -> the unit that comes out, in words.
UNITS = {
    ("°C", 1.0): "in °C",
    ("%", 1.0): "in %",
    ("%", 0.01): "from 0 to 1",
    ("MiB", 1.0): "in MiB",
    ("MiB", MIB): "in bytes",
    ("W", 1.0): "in W",
    ("MHz", 1.0): "in MHz",
    ("MHz", 1e6): "in Hz",
    ("MiB/s", MIB): "in bytes per second",
    ("J", 1e3): "in mJ",
}


def unit_of(metric: Metric) -> str:
    """The unit in which a metric is exported, in words; empty for a plain number."""
    return UNITS.get((metric.unit, metric.prometheus_scale), "")


def _help(metric: Metric, more: str = "") -> str:
    unit = unit_of(metric)
    return f"{metric.label}{more}{f' ({unit})' if unit else ''}."


def _scaled(value: float, scale: float) -> float:
    # 42.3 % are 0.423, and not 0.42300000000000004.
    return value if scale == 1 else round(value * scale, 6)


def _readings(key: str, scale: float, labelled: Literal["dcgm", "gpu"]) -> Callable[[Scene], Samples]:
    """What the GPUs that answer say, by the key of a value."""

    def samples(scene: Scene) -> Samples:
        labels = scene.dcgm_labels if labelled == "dcgm" else scene.own_labels
        for gpu in scene.answering:
            value = scene.values(gpu).get(key)
            if value is not None:
                yield labels[gpu.uuid], _scaled(value, scale)

    return samples


def _of_gpus(metric: Metric) -> Iterator[Family]:
    """A metric of the catalogue under each of its names."""
    for name in (metric.prometheus, *metric.prometheus_too):
        labelled: Literal["dcgm", "gpu"] = "dcgm" if name.startswith(DCGM) else "gpu"
        samples = _readings(metric.key, metric.prometheus_scale, labelled)
        yield Family(name, metric.prometheus_type, _help(metric), labelled, samples)


# The highest values within a tick are named in base units: unit -> end of the name, scale, unit in words.
_PEAKS = {"%": ("_ratio", 0.01, "from 0 to 1"), "W": ("_watts", 1.0, "in W")}


def _peak(metric: Metric) -> Family:
    suffix, scale, unit = _PEAKS[metric.unit]
    name = f"gpumon_gpu_{metric.key}_peak{suffix}"
    help_text = f"{metric.label}, the highest since the tick before ({unit})."
    return Family(name, "gauge", help_text, "gpu", _readings(metric.peak or "", scale, "gpu"))


def _of_processes(metric: Metric) -> Family:
    def samples(scene: Scene) -> Samples:
        for process, labels in scene.largest:
            value = getattr(process, "memory_mib" if metric.key == "memory" else metric.key)
            if value is not None:
                yield labels, _scaled(value, metric.prometheus_scale)

    return Family(
        metric.prometheus, metric.prometheus_type, _help(metric, " of a process on a GPU"), "process", samples
    )


def _memory_total(scene: Scene) -> Samples:
    for gpu in scene.answering:
        if gpu.memory_total_mib is not None:
            yield scene.dcgm_labels[gpu.uuid], gpu.memory_total_mib


def _memory_free(scene: Scene) -> Samples:
    """nvmlMemory_v2_t: total = reserved + used + free; where a driver does not tell reserved apart, it is used."""
    for gpu in scene.answering:
        values = scene.values(gpu)
        used, reserved = values.get("memory"), values.get("memory_reserved") or 0
        if gpu.memory_total_mib is not None and used is not None:
            yield scene.dcgm_labels[gpu.uuid], max(0, gpu.memory_total_mib - round(used) - round(reserved))


def _gpu_up(scene: Scene) -> Samples:
    if scene.shown is None:
        return
    up = {gpu.uuid for gpu in scene.answering}
    for gpu in scene.gpus:
        yield scene.own_labels[gpu.uuid], float(gpu.uuid in up)
    for index in sorted(scene.shown.snapshot.nameless):
        yield _labels(gpu=index, device=f"nvidia{index}", Hostname=scene.host), 0.0


def _gpu_info(scene: Scene) -> Samples:
    for gpu in scene.gpus:
        facts = _labels(
            model_name=gpu.name, architecture=gpu.architecture, compute_capability=gpu.compute_capability
        )
        yield scene.own_labels[gpu.uuid] | facts, 1.0


def _gpu_energy(scene: Scene) -> Samples:
    if scene.shown is not None:
        for gpu in scene.answering:
            if gpu.uuid in scene.shown.energy_j:
                yield scene.own_labels[gpu.uuid], round(scene.shown.energy_j[gpu.uuid], 3)


def _gpu_processes(scene: Scene) -> Samples:
    return ((scene.own_labels[uuid], float(count)) for uuid, count in scene.processes_on.items())


def _process_start(scene: Scene) -> Samples:
    for process, labels in scene.largest:
        start = scene.who(process.pid).start_time
        if start is not None:
            yield labels, start


def _parts(kind: Literal["workload", "model"], item: int, scale: float) -> Callable[[Scene], Samples]:
    """What workloads or models have together: item 0 is their memory, 1 the number of their processes."""

    def samples(scene: Scene) -> Samples:
        found = scene.workloads if kind == "workload" else scene.models
        for name, figures in found.items():
            figure = figures[item]
            if figure is not None:
                yield {kind: name} | _labels(Hostname=scene.host), figure * scale

    return samples


def _count(value: Callable[[Scene], float | bool | None]) -> Callable[[Scene], Samples]:
    """One number of the whole host; none where it is None."""

    def samples(scene: Scene) -> Samples:
        found = value(scene)
        if found is not None:
            yield _labels(Hostname=scene.host), float(found)

    return samples


def _vital(name: str, scale: float = 1.0) -> Callable[[Scene], Samples]:
    """A number out of the recorder's own; none where this process has no recorder."""

    def value(scene: Scene) -> float | None:
        found = getattr(scene.vitals, name, None)
        return None if found is None or scene.state.role == "viewing" else _scaled(found, scale)

    return _count(value)


def _driver_up(scene: Scene) -> bool | None:
    if scene.state.driver is not None:
        return False
    # What is simulated on purpose, or recorded by another, says nothing of a driver here.
    return True if scene.shown is not None and scene.state.source == "nvml" else None


def _build(_: Scene) -> Samples:
    yield _labels(version=__version__, python=platform.python_version()), 1.0


def _recorder_info(scene: Scene) -> Samples:
    yield _labels(Hostname=scene.host, role=scene.state.role, source=scene.state.source), 1.0


def _host_info(scene: Scene) -> Samples:
    if scene.shown is not None:
        host = scene.shown.snapshot.host
        yield (
            _labels(
                Hostname=scene.host,
                driver_version=host.driver_version,
                cuda_version=host.cuda_version,
                nvml_version=host.nvml_version,
            ),
            1.0,
        )


FAMILIES: tuple[Family, ...] = (
    *(family for metric in GPU_METRICS for family in _of_gpus(metric)),
    Family("DCGM_FI_DEV_FB_FREE", "gauge", "Memory free (in MiB).", "dcgm", _memory_free),
    Family("DCGM_FI_DEV_FB_TOTAL", "gauge", "Memory altogether (in MiB).", "dcgm", _memory_total),
    Family("gpumon_gpu_up", "gauge", "Whether a GPU answers: 0 for one that is lost or hangs.", "gpu", _gpu_up),
    Family(
        "gpumon_gpu_info",
        "gauge",
        "What a GPU is: model_name, architecture, compute_capability.",
        "gpu_info",
        _gpu_info,
    ),
    *(_peak(metric) for metric in GPU_METRICS if metric.peak),
    Family(
        "gpumon_gpu_energy_joules_total",
        "counter",
        "Energy since gpumon first saw the GPU (in J); where it counts none itself, estimated from its power.",
        "gpu",
        _gpu_energy,
    ),
    Family("gpumon_gpu_processes", "gauge", "How many processes are on a GPU.", "gpu", _gpu_processes),
    *(_of_processes(metric) for metric in PROCESS_METRICS),
    Family(
        "gpumon_process_start_time_seconds",
        "gauge",
        "When a process on a GPU started (in UTC seconds since 1970).",
        "process",
        _process_start,
    ),
    Family(
        "gpumon_processes_left_out",
        "gauge",
        "How many processes on GPUs have no series, because GPUMON_METRICS_PROCESSES others have more memory.",
        "host",
        _count(lambda scene: scene.left_out if scene.shown else None),
    ),
    Family(
        "gpumon_workload_memory_bytes",
        "gauge",
        "Memory of all processes of a kind of workload (in bytes).",
        "workload",
        _parts("workload", 0, MIB),
    ),
    Family(
        "gpumon_workload_processes",
        "gauge",
        "How many processes on GPUs are of a kind of workload.",
        "workload",
        _parts("workload", 1, 1.0),
    ),
    Family(
        "gpumon_model_memory_bytes",
        "gauge",
        "Memory of all processes that serve or train a model (in bytes).",
        "model",
        _parts("model", 0, MIB),
    ),
    Family(
        "gpumon_model_processes",
        "gauge",
        "How many processes on GPUs serve or train a model.",
        "model",
        _parts("model", 1, 1.0),
    ),
    Family(
        "gpumon_recorder_up",
        "gauge",
        "Whether this server records, and its newest tick is fresh.",
        "host",
        _count(lambda scene: scene.fresh),
    ),
    Family(
        "gpumon_recorder_info",
        "gauge",
        "What the recorder does (role: recording, standby, viewing, stopped) and reads (source: nvml, demo).",
        "recorder_info",
        _recorder_info,
    ),
    Family(
        "gpumon_simulated",
        "gauge",
        "Whether the GPUs are simulated.",
        "host",
        _count(lambda scene: scene.state.source == "demo"),
    ),
    Family("gpumon_driver_up", "gauge", "Whether NVIDIA's driver answers.", "host", _count(_driver_up)),
    Family("gpumon_host_info", "gauge", "Versions of the driver, CUDA and NVML.", "host_info", _host_info),
    Family(
        "gpumon_recorder_newest_tick_timestamp_seconds",
        "gauge",
        "When the newest tick was taken (in UTC seconds since 1970): time() less this is its age.",
        "host",
        _count(lambda scene: scene.newest.snapshot.timestamp if scene.newest else None),
    ),
    Family(
        "gpumon_recorder_interval_seconds",
        "gauge",
        "How often a tick is taken (in seconds).",
        "host",
        _count(lambda scene: scene.interval_s),
    ),
    Family(
        "gpumon_recorder_tick_duration_seconds",
        "gauge",
        "How long the newest tick took, from the first call of the driver to the commit (in seconds).",
        "host",
        _vital("duration_ms", 1e-3),
    ),
    Family("gpumon_recorder_ticks_total", "counter", "Ticks that are in the database.", "host", _vital("ticks")),
    Family(
        "gpumon_recorder_skipped_ticks_total",
        "counter",
        "Ticks that fell out because the one before was not done.",
        "host",
        _vital("skipped"),
    ),
    Family(
        "gpumon_recorder_failed_ticks_total",
        "counter",
        "Ticks that failed: nothing could be read, or what was read not be written.",
        "host",
        _vital("failed"),
    ),
    Family(
        "gpumon_recorder_dropped_ticks_total",
        "counter",
        "Ticks that had to make room while the database was away.",
        "host",
        _vital("dropped"),
    ),
    Family(
        "gpumon_recorder_buffered_ticks",
        "gauge",
        "Ticks that wait in memory for the database.",
        "host",
        _vital("buffered"),
    ),
    Family("gpumon_build_info", "gauge", "The version of gpumon and of Python.", "build_info", _build),
)


@dataclass(frozen=True, slots=True)
class Families:
    """What the client library asks for its families."""

    collected: Sequence[ClientFamily]

    def collect(self) -> Sequence[ClientFamily]:
        """All of them."""
        return self.collected

    def named(self, names: frozenset[str]) -> Families:
        """Those of which a sample has one of the names."""
        return Families([one for one in self.collected if one.samples[0].name in names])


def render(families: Families, as_openmetrics: bool) -> bytes:
    """The exposition, as OpenMetrics or in Prometheus's text format."""
    if as_openmetrics:
        return bytes(openmetrics.generate_latest(families))  # type: ignore[no-untyped-call]
    return _UNTYPED.sub(rb"\1 counter", exposition.generate_latest(families))


def collect(scene: Scene) -> Families:
    """Every family that has a sample."""
    found = (family.collect(scene) for family in FAMILIES)
    return Families([family for family in found if family is not None])


def scene() -> Scene:
    """What is to be told now, from memory."""
    settings, newest = runtime.settings(), runtime.newest()
    fresh = newest is not None and time.monotonic() - newest.at <= fresh_within_s(settings.interval)
    return Scene(
        host=settings.host_name,
        state=runtime.state(),
        vitals=runtime.vitals(),
        interval_s=settings.interval,
        processes=settings.metrics_processes,
        newest=newest,
        fresh=fresh,
    )


class Kept:
    """The exposition of one scene in each format, made when it is first asked for and kept until another scene."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._scene: Scene | None = None
        self._families = Families(())
        self._bodies: dict[tuple[bool, bool], bytes] = {}

    def families(self, now: Scene) -> Families:
        """The families of a scene."""
        with self._guard:
            return self._of(now)

    def body(self, now: Scene, as_openmetrics: bool, zipped: bool) -> bytes:
        """The exposition of a scene, as it is or compressed."""
        # Those who come together wait for the one who renders.
        with self._guard:
            families = self._of(now)
            for packed in (False, True) if zipped else (False,):
                if (as_openmetrics, packed) not in self._bodies:
                    made = (
                        compress(self._bodies[as_openmetrics, False])
                        if packed
                        else render(families, as_openmetrics)
                    )
                    self._bodies[as_openmetrics, packed] = made
            return self._bodies[as_openmetrics, zipped]

    def _of(self, now: Scene) -> Families:
        if self._scene != now:
            self._scene, self._families, self._bodies = now, collect(now), {}
        return self._families


def compress(body: bytes) -> bytes:
    """Fast rather than small: label sets that repeat shrink to a twentieth all the same."""
    return gzip.compress(body, compresslevel=1, mtime=0)


kept = Kept()


def _weights(header: Iterable[str]) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """Every choice of an Accept or Accept-Encoding header: its name, its parameters and its weight (RFC 9110)."""
    for part in ",".join(header).split(","):
        name, *rest = (piece.strip().lower() for piece in part.split(";"))
        parameters = {key.strip(): value.strip() for key, _, value in (piece.partition("=") for piece in rest)}
        weight = parameters.pop("q", "1")
        yield name, parameters, float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight, re.ASCII) else 0.0


def wants_openmetrics(accept: Iterable[str]) -> bool:
    """Whether a client would rather have OpenMetrics 1.0 than the text format."""
    best = {"openmetrics": 0.0, "text": 0.0}
    for name, parameters, weight in _weights(accept):
        if name == "application/openmetrics-text" and parameters.get("version", "1.0.0") == "1.0.0":
            best["openmetrics"] = max(best["openmetrics"], weight)
        elif name in ("text/plain", "text/*"):
            best["text"] = max(best["text"], weight)
    return best["openmetrics"] > 0 and best["openmetrics"] >= best["text"]


def wants_gzip(accept_encoding: Iterable[str]) -> bool:
    """Whether a client takes gzip."""
    return any(name in ("gzip", "x-gzip") and weight > 0 for name, _, weight in _weights(accept_encoding))


def metrics(request: Request) -> Response:
    """The exposition; `name[]` names the only families that are wanted."""
    as_openmetrics = wants_openmetrics(request.headers.getlist("accept"))
    zipped = wants_gzip(request.headers.getlist("accept-encoding"))
    names = frozenset(request.query_params.getlist("name[]"))
    now = scene()
    if names:
        body = render(kept.families(now).named(names), as_openmetrics)
        body = compress(body) if zipped else body
    else:
        body = kept.body(now, as_openmetrics, zipped)
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Vary": "Accept, Accept-Encoding"}
    if zipped:
        headers["Content-Encoding"] = "gzip"
    media_type = openmetrics.CONTENT_TYPE_LATEST if as_openmetrics else exposition.CONTENT_TYPE_PLAIN_0_0_4
    return Response(body, headers=headers | {"Content-Type": media_type})


ROUTES = [Route(PATH, metrics, methods=["GET"])]
