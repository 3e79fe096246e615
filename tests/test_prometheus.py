"""/metrics: what a scrape brings, to whom, in which format, and that neither driver nor database is asked."""

from __future__ import annotations

import gzip
import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import fake_nvml
import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, ROOT, Server, eventually
from fake_nvml import FakeNvml
from prometheus_client import exposition as client_exposition
from prometheus_client.core import Metric as ClientFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from rig import free_port
from starlette.requests import Request

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.metrics import GPU_METRICS, PROCESS_METRICS
from gpumon_core.prometheus import exposition
from gpumon_core.prometheus.families import FAMILIES, LABELS, collect, unit_of
from gpumon_core.prometheus.scrape_data import LONGEST_LABEL, MOST_MODELS, ScrapeData, clean
from gpumon_core.recording import runtime
from gpumon_core.recording.counters import Counters
from gpumon_core.recording.latest_tick import LatestTick, follow
from gpumon_core.recording.state import Problem, State
from gpumon_core.settings import load
from gpumon_core.telemetry.records import GpuInfo, GpuReading, HostInfo, ProcessReading, Snapshot

Serve = Callable[..., Server]
GIB = 2**30
BOARD = GpuInfo(0, "GPU-0", "NVIDIA H100", 81559, 700.0, "00000000:1A:00.0", "Hopper", "9.0")
SLICE = GpuInfo(0, "MIG-a", "NVIDIA H100 MIG 1g.10gb", 9856, None, BOARD.pci_bus_id, None, None, "GPU-0", 0, 9)
EVERYTHING = {metric.key: 50.0 for metric in GPU_METRICS} | {m.peak: 60.0 for m in GPU_METRICS if m.peak}
NEED_PROMTOOL = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool is installed")


def snapshot(
    gpus: tuple[GpuInfo, ...] = (BOARD,), processes: tuple[ProcessReading, ...] = (), **more: Any
) -> Snapshot:
    readings = tuple(GpuReading(gpu.uuid, EVERYTHING) for gpu in gpus)
    return replace(
        Snapshot(1_800_000_000.25, HostInfo("here", "580.1", "13.0", "13.580"), gpus, readings, processes), **more
    )


def scrape_data(
    newest: LatestTick | None = None, processes: int = 20, role: str = "recording", **more: Any
) -> ScrapeData:
    state = State(role, more.pop("source", "nvml"), "sqlite:///x", **more)  # type: ignore[arg-type]
    return ScrapeData("here", state, Counters(ticks=3, duration_ms=2.5), 4, processes, newest, newest is not None)


def exposed(shown: ScrapeData, as_openmetrics: bool = False) -> str:
    return exposition.render(collect(shown), as_openmetrics).decode()


def read(parsed: Iterable[ClientFamily]) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name -> labels and values."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in parsed:
        for sample in family.samples:
            # The client's parser gives every counter its _total, also one that has none.
            name = sample.name.removesuffix("_total") if sample.name.startswith("DCGM_") else sample.name
            found.setdefault(name, []).append((sample.labels, sample.value))
    return found


def families(shown: ScrapeData) -> dict[str, list[tuple[dict[str, str], float]]]:
    """What a client reads; both formats say the same."""
    found = read(parse_text(exposed(shown)))
    assert found == read(parse_openmetrics(exposed(shown, True)))
    return found


def lint(text: str) -> list[str]:
    found = subprocess.run(["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False)
    assert found.returncode in (0, 3), found.stderr
    return found.stderr.decode().splitlines()


# ---- What DCGM's exporter says, word for word ----------------------------------------------------

# etc/default-counters.csv and dcp-metrics-included.csv of dcgm-exporter, what gpumon has of them: type, and what
# the value in them is for one of 50 in the catalogue's unit.
DCGM_COUNTERS = {
    **dict.fromkeys(
        (
            *("DCGM_FI_DEV_SM_CLOCK", "DCGM_FI_DEV_MEM_CLOCK", "DCGM_FI_DEV_MEMORY_TEMP", "DCGM_FI_DEV_GPU_TEMP"),
            *("DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_GPU_UTIL", "DCGM_FI_DEV_MEM_COPY_UTIL"),
            *("DCGM_FI_DEV_ENC_UTIL", "DCGM_FI_DEV_DEC_UTIL", "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_RESERVED"),
            "DCGM_FI_DEV_ROW_REMAP_FAILURE",
            # A counter there, though it is 0 or 1: docs/metrics.md says so.
            "DCGM_FI_DEV_RETIRED_PENDING",
        ),
        ("gauge", 50),
    ),
    **dict.fromkeys(
        (
            "DCGM_FI_DEV_PCIE_REPLAY_COUNTER",
            *(f"DCGM_FI_DEV_ECC_{kind}_{life}_TOTAL" for kind in ("SBE", "DBE") for life in ("VOL", "AGG")),
            *("DCGM_FI_DEV_RETIRED_SBE", "DCGM_FI_DEV_RETIRED_DBE"),
            *(
                f"DCGM_FI_DEV_NVLINK_{kind}_ERROR_COUNT_TOTAL"
                for kind in ("CRC_FLIT", "CRC_DATA", "REPLAY", "RECOVERY")
            ),
            *("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS"),
        ),
        ("counter", 50),
    ),
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": ("counter", 50_000),
    "DCGM_FI_DEV_FB_FREE": ("gauge", 81559 - 50 - 50),
    **dict.fromkeys(
        (
            *("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "DCGM_FI_PROF_SM_ACTIVE", "DCGM_FI_PROF_SM_OCCUPANCY"),
            *("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", "DCGM_FI_PROF_DRAM_ACTIVE"),
        ),
        ("gauge", 0.5),
    ),
    **dict.fromkeys(("DCGM_FI_PROF_PCIE_TX_BYTES", "DCGM_FI_PROF_PCIE_RX_BYTES"), ("gauge", 50 * 2**20)),
}
DCGM_LABELS = {
    "gpu": "0",
    "UUID": "GPU-0",
    "pci_bus_id": "00000000:1A:00.0",
    "device": "nvidia0",
    "modelName": "NVIDIA H100",
    "Hostname": "here",
    "DCGM_FI_DRIVER_VERSION": "580.1",
}


@pytest.mark.parametrize("name", DCGM_COUNTERS)
def test_a_counter_of_dcgm_has_its_name_type_unit_and_labels(name: str) -> None:
    text = exposed(scrape_data(follow(None, snapshot(), {})))
    kind, value = DCGM_COUNTERS[name]
    assert f"\n# TYPE {name} {kind}\n" in text
    assert families(scrape_data(follow(None, snapshot(), {})))[name] == [(DCGM_LABELS, value)]


def test_a_mig_instance_has_its_gpus_labels_and_its_own_number() -> None:
    found = families(scrape_data(follow(None, snapshot((BOARD, SLICE)), {})))["DCGM_FI_DEV_FB_USED"]
    instance = DCGM_LABELS | {"GPU_I_ID": "9", "GPU_I_PROFILE": "1g.10gb", "GPU_I_UUID": "MIG-a"}
    assert sorted((labels for labels, _ in found), key=len) == [DCGM_LABELS, instance]


@pytest.mark.parametrize(
    "profile",
    [
        *("1g.24gb", "1c.2g.48gb", "1g.24gb+me", "1g.24gb+gfx", "1g.24gb+me.all", "1g.24gb-me", "2g.48gb-me"),
        *("1g.12gb+me-gfx", "1g.10gb+me,gfx"),
    ],
)
def test_a_mig_instance_has_its_profile_whatever_is_added_to_it_or_left_out(profile: str) -> None:
    board = "NVIDIA RTX PRO 6000 Blackwell Server Edition"
    found = families(
        scrape_data(follow(None, snapshot((BOARD, replace(SLICE, name=f"{board} MIG {profile}"))), {}))
    )
    assert profile in [labels.get("GPU_I_PROFILE") for labels, _ in found["DCGM_FI_DEV_FB_USED"]]


def test_two_compute_instances_of_one_gpu_instance_are_two_series() -> None:
    other = replace(SLICE, uuid="MIG-b", mig_index=1)
    found = families(scrape_data(follow(None, snapshot((SLICE, other)), {})))["DCGM_FI_DEV_FB_USED"]
    assert len({str(labels) for labels, _ in found}) == 2


def test_reserved_memory_that_a_driver_does_not_report_counts_as_used() -> None:
    reported = replace(snapshot(), readings=(GpuReading("GPU-0", {"memory": 1559.0, "memory_reserved": None}),))
    assert families(scrape_data(follow(None, reported, {})))["DCGM_FI_DEV_FB_FREE"] == [(DCGM_LABELS, 80_000)]


def test_every_metric_of_the_catalogue_is_exported_in_a_known_unit() -> None:
    process = ProcessReading("GPU-0", 7, "C", 1024, 50, 50, 50, 50)
    found = families(scrape_data(follow(None, snapshot(processes=(process,)), {})))
    for metric in (*GPU_METRICS, *PROCESS_METRICS):
        assert {metric.prometheus, *metric.prometheus_too} <= found.keys()
        assert unit_of(metric) or metric.prometheus_scale == 1
        # Ours are in Prometheus's base units, DCGM's in DCGM's. A number of things has no unit.
        if metric.prometheus.startswith("gpumon_"):
            is_counter = metric.prometheus_type == "counter"
            assert metric.prometheus.endswith("_total") == is_counter
            if unit_of(metric) and not is_counter:
                assert metric.prometheus.endswith(("_hertz", "_ratio", "_bytes"))


# ---- What is not known has no series -------------------------------------------------------------


def test_what_the_hardware_does_not_offer_is_absent_and_never_zero() -> None:
    bare = replace(BOARD, memory_total_mib=None)
    nothing = replace(snapshot((bare,)), readings=(GpuReading("GPU-0", dict.fromkeys(EVERYTHING)),))
    found = families(scrape_data(follow(None, nothing, {})))
    assert not [name for name in found if name.startswith("DCGM_")]
    assert {name for name in found if name.startswith("gpumon_gpu_")} == {
        *("gpumon_gpu_up", "gpumon_gpu_info", "gpumon_gpu_processes")
    }


def test_what_is_asked_rarely_is_there_at_every_tick() -> None:
    rarely = {"power_limit": 700.0, "temperature": 60.0}
    first = follow(None, replace(snapshot(), readings=(GpuReading("GPU-0", rarely),)), {})
    second = follow(first, replace(snapshot(), readings=(GpuReading("GPU-0", {"temperature": None}),)), {})
    found = families(scrape_data(second))
    assert found["DCGM_FI_DEV_ENFORCED_POWER_LIMIT"] == [(DCGM_LABELS, 700.0)]
    assert "DCGM_FI_DEV_GPU_TEMP" not in found


@pytest.mark.parametrize("state", ["asleep", "quiet"])
def test_a_gpu_that_is_left_alone_is_no_alert_and_has_no_values(state: str) -> None:
    left = snapshot(readings=(), **{state: frozenset({"GPU-0"})})
    found = families(scrape_data(follow(follow(None, snapshot(), {}), left, {})))
    assert not [name for name in found if name.startswith("DCGM_")]
    assert [value for _, value in found["gpumon_gpu_up"]] == [1]
    assert [value for _, value in found.get("gpumon_gpu_asleep", [])] == ([1] if state == "asleep" else [])


def test_of_memory_that_is_shared_with_the_machine_none_is_said_to_be_free() -> None:
    shared = snapshot((replace(BOARD, memory_from="unified"),))
    found = families(scrape_data(follow(None, shared, {})))
    assert "DCGM_FI_DEV_FB_USED" in found
    assert "DCGM_FI_DEV_FB_TOTAL" in found
    assert "DCGM_FI_DEV_FB_FREE" not in found


def test_a_lost_gpus_series_vanish_and_a_nameless_one_is_down() -> None:
    lost = snapshot(lost=frozenset({"GPU-0"}), readings=(), nameless=frozenset({3}))
    found = families(scrape_data(follow(follow(None, snapshot(), {}), lost, {})))
    assert not [name for name in found if name.startswith("DCGM_")]
    assert sorted((labels["gpu"], value) for labels, value in found["gpumon_gpu_up"]) == [("0", 0.0), ("3", 0.0)]


def test_without_a_fresh_tick_the_recorder_is_down_and_no_reading_is_shown() -> None:
    stale = replace(scrape_data(follow(None, snapshot(), {})), is_fresh=False)
    found = families(stale)
    assert found["gpumon_recorder_up"][0][1] == 0
    assert found["gpumon_recorder_newest_tick_timestamp_seconds"][0][1] == 1_800_000_000.25
    assert not [name for name in found if name.startswith(("DCGM_", "gpumon_gpu", "gpumon_process"))]


@pytest.mark.parametrize("role", ["viewing", "standby", "stopped"])
def test_where_another_records_the_exposition_says_so(role: str) -> None:
    found = families(scrape_data(None, role=role))
    assert found["gpumon_recorder_up"][0][1] == 0
    assert found["gpumon_recorder_info"][0][0]["role"] == role
    assert "gpumon_driver_up" not in found, "nobody has asked for it"
    assert ("gpumon_recorder_ticks_total" in found) == (role != "viewing")


def test_a_missing_driver_and_simulated_gpus_are_reported() -> None:
    found = families(
        scrape_data(follow(None, snapshot(), {}), source="demo", driver=Problem("no driver", "load it"))
    )
    assert (found["gpumon_driver_up"][0][1], found["gpumon_simulated"][0][1]) == (0, 1)
    found = families(scrape_data(follow(None, snapshot(), {})))
    assert (found["gpumon_driver_up"][0][1], found["gpumon_simulated"][0][1]) == (1, 0)


# ---- Processes, workloads, models ----------------------------------------------------------------


def people(count: int) -> LatestTick:
    """So many processes; the PID is the memory in MiB as well."""
    processes = tuple(ProcessReading("GPU-0", pid, "C", pid, 10) for pid in range(1, count + 1))
    programs = [Program(workload="vLLM", model="qwen3"), Program(workload="PyTorch", model="sha256-0"), Program()]
    identities = {pid: ProcessIdentity(pid, "k", 5.5, "x", "me", programs[pid % 3]) for pid in range(1, count + 1)}
    return follow(None, snapshot(processes=processes), identities)


@pytest.mark.parametrize("most", [0, 1, 3, 1000])
def test_the_processes_with_the_most_memory_have_series(most: int) -> None:
    found = families(scrape_data(people(30), most))
    shown = {int(labels["pid"]) for labels, _ in found.get("gpumon_process_memory_bytes", [])}
    assert shown == set(range(30, 30 - min(most, 30), -1))
    assert found["gpumon_processes_left_out"][0][1] == 30 - len(shown)
    assert found["gpumon_gpu_processes"][0][1] == 30


def test_workloads_and_models_are_sums_over_all_processes() -> None:
    newest = people(5)
    # A process on two GPUs is one, with the memory of both.
    two = (*newest.snapshot.processes, ProcessReading("GPU-1", 3, "C", 100))
    board = replace(BOARD, index=1, uuid="GPU-1")
    found = families(scrape_data(follow(None, snapshot((BOARD, board), two), newest.identities), 0))
    by_workload = {labels["workload"]: value / 2**20 for labels, value in found["gpumon_workload_memory_bytes"]}
    assert by_workload == {"vLLM": 103, "PyTorch": 5, "unknown": 7}
    counts = {labels["workload"]: value for labels, value in found["gpumon_workload_processes"]}
    assert counts == {"vLLM": 1, "PyTorch": 2, "unknown": 2}
    assert found["gpumon_model_memory_bytes"] == [({"model": "qwen3", "Hostname": "here"}, 103 * 2**20)]


def test_models_are_bounded_too() -> None:
    processes = tuple(ProcessReading("GPU-0", pid, "C", pid) for pid in range(1, 301))
    who = {pid: ProcessIdentity(pid, program=Program(model=f"m{pid}")) for pid in range(1, 301)}
    found = families(scrape_data(follow(None, snapshot(processes=processes), who)))
    assert len(found["gpumon_model_processes"]) == MOST_MODELS
    assert {"model": "m300", "Hostname": "here"} in [labels for labels, _ in found["gpumon_model_processes"]]


HOSTILE = [
    'a"b',
    "a\nb\r\nc",
    "a\\",
    "\\n",
    "a\\\nb",
    'x"} 1\nfake_metric{a="',
    "a\0b",
    "\x1b[31mred",
    "\ud800",
    "a\udcffb",
    "𝔊röße",
    "n" * 10_000,
    "\ud800" * 10_000,
    "# EOF",
    "{{.}}",
    " ",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_hostile_names_are_labels_and_nothing_else(text: str) -> None:
    who = ProcessIdentity(
        7, None, None, text, text, Program(container_name=text, workload=text, model=text, pod=text)
    )
    gpu = replace(BOARD, name=text)
    newest = follow(None, snapshot((gpu,), (ProcessReading("GPU-0", 7, "C", 1),)), {7: who})
    shown = replace(scrape_data(newest), host=text)
    found = families(shown)
    plain = families(
        scrape_data(follow(None, snapshot((gpu,), (ProcessReading("GPU-0", 7, "C", 1),)), {7: ProcessIdentity(7)}))
    )
    assert found.keys() - plain.keys() == {"gpumon_model_memory_bytes", "gpumon_model_processes"}
    [(labels, _)] = found["gpumon_process_memory_bytes"]
    expected = clean(text)
    assert {labels[name] for name in ("name", "user", "container", "workload", "model", "pod")} == {expected}
    assert len(expected) <= LONGEST_LABEL
    assert not re.search("[\0\ud800-\udfff]", expected)
    if len(text) < 100 and text.isprintable():
        assert expected == text


def test_it_is_line_for_line_what_the_client_library_writes() -> None:
    who = {
        pid: ProcessIdentity(pid, None, 5.5, text, text, Program(model=text)) for pid, text in enumerate(HOSTILE)
    }
    processes = tuple(ProcessReading("GPU-0", pid, "C", pid, 1) for pid in who)
    newest = replace(follow(None, snapshot((BOARD, SLICE), processes), who), energy_j={"GPU-0": 1e9 + 0.125})
    found = collect(scrape_data(newest, 1000))
    assert exposition.render(found, True) == openmetrics.generate_latest(found)
    reported = re.sub(
        rb"(?m)^(# TYPE DCGM_\w+) untyped$", rb"\1 counter", client_exposition.generate_latest(found)
    )
    assert exposition.render(found, False) == reported


@NEED_PROMTOOL
def test_promtool_reads_hostile_names_and_has_nothing_to_say_of_gpumon() -> None:
    who = {
        pid: ProcessIdentity(pid, None, 5.5, text, text, Program(workload=text, model=text, container_name=text))
        for pid, text in enumerate(HOSTILE, 1)
    }
    processes = tuple(ProcessReading("GPU-0", pid, "C", pid, 1, 1, 1, 1) for pid in who)
    newest = replace(follow(None, snapshot((BOARD, SLICE), processes), who), energy_j={"GPU-0": 5.0})
    text = exposed(scrape_data(newest, 1000))
    # NVIDIA's names are what they are: a label in camelCase, counters without _total, a type in a name.
    reported = {(line.split()[0][:5], line.split(" ", 1)[1]) for line in lint(text)}
    assert reported == {
        ("DCGM_", "label names should be written in 'snake_case' not 'camelCase'"),
        ("DCGM_", 'counter metrics should have "_total" suffix'),
        ("DCGM_", "metric name should not include type 'counter'"),
    }
    own = collect(scrape_data(newest, 1000))
    names = frozenset(family.name for family in FAMILIES if not family.name.startswith("DCGM_"))
    assert lint(exposition.render(own.named(names), False).decode()) == []
    shown = {family.samples[0].name for family in own.named(names).collect()}
    # It has a series only while a GPU sleeps.
    assert shown == names - {"gpumon_gpu_asleep"}, "every family was looked at"


# ---- Who asks for what ---------------------------------------------------------------------------

NEW_PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;"
    "version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "as_openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; Version=1.0.0", True),
        (NEW_PROMETHEUS, True),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ('application/openmetrics-text; version="1.0.0"', True),
        ("application/openmetrics-text;q=0.1,text/plain", False),
        ("application/openmetrics-text;q=0.1,*/*", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;version=9", False),
        ("application/openmetrics-text;q=nan", False),
        ("application/openmetrics-text;version==;;=;q", False),
        (",;,=;;q=;" * 500, False),
    ],
)
def test_the_format_is_what_accept_prefers(accept: str, as_openmetrics: bool) -> None:
    assert exposition.wants_openmetrics([accept]) is as_openmetrics


@pytest.mark.parametrize(
    ("accept", "zipped"),
    [
        ("", False),
        ("gzip", True),
        ("br, GZIP;q=0.5", True),
        ("gzip;q=0", False),
        ("*", True),
        ("gzip;q=0, *", False),
        ("identity", False),
        ("identity, gzip;q=0.5", False),
        ("gzip;q=x", False),
    ],
)
def test_it_is_compressed_for_who_takes_gzip(accept: str, zipped: bool) -> None:
    assert exposition.wants_gzip([accept]) is zipped


def test_a_scene_is_rendered_once_in_each_format(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[bool] = []
    real = exposition.render
    monkeypatch.setattr(exposition, "render", lambda *given: rendered.append(given[1]) or real(*given))
    cache, newest = exposition.ExpositionCache(), people(3)
    for _ in range(5):
        for as_openmetrics in (False, True):
            plain = cache.body(scrape_data(newest), as_openmetrics, False)
            assert gzip.decompress(cache.body(scrape_data(newest), as_openmetrics, True)) == plain
    assert rendered == [False, True]
    cache.body(scrape_data(people(3)), False, False)
    assert rendered == [False, True, False], "another tick is another exposition"


def test_a_scrape_runs_no_statement_and_calls_no_driver(
    fake: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add_gpu().add_process(os.getpid(), GIB)
    chosen = load(source="nvml", data_dir=tmp_path, host_name="here", interval=3600)
    monkeypatch.setattr(runtime, "settings", lambda: chosen)
    touched: list[str] = []

    def note(*given: Any) -> None:
        touched.append(str(given))

    with fake_nvml.loaded(fake):
        recorder = runtime.start()
        try:
            eventually(lambda: recorder.counters.duration_ms)
            for name in ("engine_connect", "before_cursor_execute"):
                sa.event.listen(sa.Engine, name, note)
            fake.reset_calls()
            for query in (b"", b"name[]=DCGM_FI_DEV_GPU_TEMP", b"name[]=gpumon_recorder_up"):
                scope = {"type": "http", "method": "GET", "path": "/metrics", "query_string": query, "headers": []}
                assert b"# TYPE" in exposition.metrics(Request(scope)).body
            assert touched == []
            assert fake.total_calls() == 0
            with runtime.engine().connect():
                assert touched, "what a scrape must not do is seen"
        finally:
            for name in ("engine_connect", "before_cursor_execute"):
                if sa.event.contains(sa.Engine, name, note):
                    sa.event.remove(sa.Engine, name, note)
            runtime.stop()


# ---- The real server -----------------------------------------------------------------------------


def get(
    server: Server, query: str = "", method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        connection.request(
            method, "/metrics" + query, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def scraped(server: Server) -> dict[str, ClientFamily]:
    status, _, body = get(server)
    assert status == 200
    return {family.name: family for family in parse_text(body.decode())}


def wait_for(server: Server, condition: Callable[[dict[str, ClientFamily]], bool]) -> dict[str, ClientFamily]:
    deadline = time.monotonic() + PATIENCE_S
    while not condition(found := scraped(server)):
        assert time.monotonic() < deadline, found.keys()
        time.sleep(0.2)
    return found


def test_the_server_answers_every_client_from_memory_alone(serve: Serve, fake: FakeNvml) -> None:
    gpu = fake.add_gpu(name="NVIDIA A100", energy_mj=123_456)
    gpu.add_process(os.getpid(), 3 * GIB, sm=40)
    gpu.add_mig(uuid="MIG-a", memory_total=10 * GIB, memory_used=3 * GIB, gpu_instance_id=7)
    fake.add_gpu(fan=None)
    server = serve(fake, GPUMON_INTERVAL="600").ready()
    wait_for(server, lambda found: "gpumon_gpu_energy_joules" in found)
    fake.reset_calls()
    # Neither the driver nor a database is there any more, and nobody notices.
    shutil.move(server.data_dir, server.data_dir.with_name("away"))
    plain = get(server)[2]
    for _ in range(20):
        status, headers, body = get(server)
        assert (status, body) == (200, plain)
        assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    status, headers, body = get(server, Accept=NEW_PROMETHEUS, Accept_Encoding="gzip")
    assert headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert headers["Content-Encoding"] == "gzip"
    assert list(parse_openmetrics(gzip.decompress(body).decode()))
    assert gzip.decompress(get(server, Accept_Encoding="gzip")[2]) == plain
    assert fake.total_calls() == 0
    assert not server.data_dir.exists()

    found = {family.name: family for family in parse_text(plain.decode())}
    used = {str(sample.labels.get("GPU_I_ID")): sample for sample in found["DCGM_FI_DEV_FB_USED"].samples}
    assert used["7"].labels["UUID"] == gpu.uuid
    assert used["7"].value == 3 * 1024
    assert {sample.labels["gpu"] for sample in found["DCGM_FI_DEV_FAN_SPEED"].samples} == {"0"}
    [memory] = found["gpumon_process_memory_bytes"].samples
    assert (memory.labels["pid"], memory.value) == (str(os.getpid()), 3 * GIB)

    status, headers, body = get(server, method="HEAD")
    assert (status, body, int(headers["Content-Length"])) == (200, b"", len(plain))
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert get(server, method=method)[0] == 405
    for hostile in ("\xff\xfe", ";q=" + "9" * 3000, "application/openmetrics-text;version=1.0.0x\t", "," * 5000):
        assert get(server, Accept=hostile, Accept_Encoding=hostile)[0] == 200
    query = "?" + urllib.parse.urlencode(
        [("name[]", "DCGM_FI_DEV_GPU_TEMP"), ("name[]", "gpumon_recorder_ticks_total")]
    )
    families_named = {family.name for family in parse_text(get(server, query)[2].decode())}
    assert families_named == {"DCGM_FI_DEV_GPU_TEMP", "gpumon_recorder_ticks"}
    assert get(server, "?name[]=nothing")[2] == b""
    assert get(server, "?name[]=%FF%00&other=1")[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_a_gpu_that_is_lost_and_a_driver_that_goes_are_seen(serve: Serve, fake: FakeNvml) -> None:
    fake.add_gpu()
    lost = fake.add_gpu()
    server = serve(fake).ready()
    wait_for(server, lambda found: len(found["gpumon_gpu_up"].samples) == 2)
    lost.lost = True
    found = wait_for(server, lambda found: {s.value for s in found["gpumon_gpu_up"].samples} == {0.0, 1.0})
    assert [sample.labels["gpu"] for sample in found["DCGM_FI_DEV_GPU_TEMP"].samples] == ["0"]
    fake.driver_loaded = False
    found = wait_for(server, lambda found: found["gpumon_recorder_up"].samples[0].value == 0)
    assert found["gpumon_driver_up"].samples[0].value == 0
    assert found["gpumon_recorder_failed_ticks"].samples[0].value >= 1
    assert "DCGM_FI_DEV_GPU_TEMP" not in found


def test_a_server_that_does_not_record_answers_all_the_same(serve: Serve, fake: FakeNvml) -> None:
    fake.driver_loaded = False
    viewer = serve(fake, GPUMON_RECORD="false")
    viewer.wait(lambda status, _: status != 0)
    found = scraped(viewer)
    assert found["gpumon_recorder_up"].samples[0].value == 0
    assert found["gpumon_recorder_info"].samples[0].labels["role"] == "viewing"
    assert lint_is_about_dcgm_alone(viewer)


def lint_is_about_dcgm_alone(server: Server) -> bool:
    if shutil.which("promtool") is None:
        return True
    return all(line.startswith("DCGM_") for line in lint(get(server)[2].decode()))


@pytest.fixture
def prometheus_of(tmp_path: Path) -> Iterator[Callable[[Server], str]]:
    """Starts a Prometheus that scrapes a server every second; its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no Prometheus is installed (Debian and Ubuntu: sudo apt-get install prometheus)")
    started: list[subprocess.Popen[bytes]] = []

    def start(server: Server) -> str:
        config = tmp_path / "prometheus.yml"
        target = {"job_name": "gpumon", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}
        # JSON is YAML.
        config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [target]}))
        address = f"127.0.0.1:{free_port()}"
        options = [
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address={address}",
        ]
        with (tmp_path / "prometheus.log").open("wb") as log:
            started.append(subprocess.Popen([program, *options], stdout=log, stderr=log))
        return f"http://{address}"

    yield start
    for process in started:
        process.kill()
        process.wait()


# What the panels of NVIDIA's board 12239 and common alert rules ask for.
QUERIES = [
    'max(DCGM_FI_DEV_GPU_TEMP{Hostname=~"testhost", gpu=~"0|1"}) by (Hostname, gpu, uuid)',
    'sum(max(DCGM_FI_DEV_POWER_USAGE{Hostname=~"testhost", gpu=~".*"}) by (gpu))',
    'max(DCGM_FI_DEV_SM_CLOCK{Hostname=~"testhost", gpu=~"0"} * 1000000) by (Hostname, UUID, gpu)',
    "max(DCGM_FI_PROF_GR_ENGINE_ACTIVE) by (Hostname, gpu, GPU_I_ID, GPU_I_PROFILE)",
    "max(DCGM_FI_PROF_PIPE_TENSOR_ACTIVE) by (gpu)",
    'max(DCGM_FI_DEV_FB_USED{Hostname=~"testhost"}) by (Hostname, gpu, GPU_I_ID, GPU_I_PROFILE)',
    "DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE)",
    "rate(DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION[1m]) >= 0",
    "sum by (user) (gpumon_process_memory_bytes)",
    "gpumon_recorder_up == 1",
]


def test_a_real_prometheus_scrapes_it_and_answers_what_boards_ask(
    serve: Serve, fake: FakeNvml, prometheus_of: Callable[[Server], str]
) -> None:
    gpu = fake.add_gpu(gpm_supported=1, energy_mj=5000)
    for metric in (1, 2, 3, 5, 10):
        gpu.set_gpm(metric, 40.0)
    # A process that calls itself what could break an exposition.
    evil = subprocess.Popen(["bash", "-c", "exec -a $'evil\"\\n\\\\} 1' sleep 600"])
    try:
        gpu.add_process(evil.pid, GIB, sm=10)
        server = serve(fake).ready()
        address = prometheus_of(server)

        def asked(query: str) -> list[Any]:
            url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            try:
                with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
                    return list(json.load(answer)["data"]["result"])
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError) and error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
                # It is still starting.
                return []

        for query in QUERIES:
            eventually(partial(asked, query), every_s=0.3)
        eventually(lambda: [up["value"][1] for up in asked("up")] == ["1"], every_s=0.3)
        # Of the newest scrape, which one that was late leaves empty.
        [process] = eventually(partial(asked, "gpumon_process_memory_bytes"), every_s=0.3)
        assert (process["metric"]["pid"], process["value"][1]) == (str(evil.pid), str(GIB))
    finally:
        evil.kill()
        evil.wait()


# ---- The recorder alone, and the documentation ---------------------------------------------------


def test_the_recorder_alone_does_without_prometheus() -> None:
    code = "import gpumon_core.recording.recorder, gpumon_core.recording.latest_tick\n"
    code += "import sys; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# dcgm-exporter's etc/default-counters.csv, without the version of the driver, which is a label.
DEFAULT_LIST = {
    *(f"DCGM_FI_DEV_{name}" for name in ("SM_CLOCK", "MEM_CLOCK", "MEMORY_TEMP", "GPU_TEMP", "POWER_USAGE")),
    *(f"DCGM_FI_DEV_{name}" for name in ("TOTAL_ENERGY_CONSUMPTION", "PCIE_REPLAY_COUNTER", "GPU_UTIL")),
    *(f"DCGM_FI_DEV_{name}" for name in ("MEM_COPY_UTIL", "ENC_UTIL", "DEC_UTIL", "XID_ERRORS", "FB_FREE")),
    *(f"DCGM_FI_DEV_{name}" for name in ("FB_USED", "FB_RESERVED", "NVLINK_BANDWIDTH_TOTAL")),
    *(f"DCGM_FI_DEV_{name}" for name in ("VGPU_LICENSE_STATUS", "UNCORRECTABLE_REMAPPED_ROWS")),
    *(f"DCGM_FI_DEV_{name}" for name in ("CORRECTABLE_REMAPPED_ROWS", "ROW_REMAP_FAILURE")),
    *(f"DCGM_FI_PROF_{name}" for name in ("GR_ENGINE_ACTIVE", "PIPE_TENSOR_ACTIVE", "DRAM_ACTIVE")),
    *(f"DCGM_FI_PROF_{name}" for name in ("PCIE_TX_BYTES", "PCIE_RX_BYTES")),
}


def test_what_dcgm_exporter_serves_by_default_is_served_or_said_to_be_missing() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    missing = page.partition("Of dcgm-exporter's default list gpumon does not have:")[2].partition("\n## ")[0]
    said = set(re.findall(r"^- `(DCGM_\w+)`", missing, re.MULTILINE))
    assert said == DEFAULT_LIST - {family.name for family in FAMILIES}


def test_the_tables_of_the_documentation_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("metrics_tables", ROOT / "docs" / "metrics_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text()
    assert tables.filled(page) == page, "run docs/metrics_tables.py"
    assert all(f"`{family.name}`" in page for family in FAMILIES)


def test_every_label_that_a_sample_has_is_documented() -> None:
    who = ProcessIdentity(
        7, "k", 5.5, "x", "me", Program(container_name="c", pod="p", namespace="n", workload="w", model="m")
    )
    newest = follow(None, snapshot((BOARD, SLICE), (ProcessReading("MIG-a", 7, "C", 1, 1, 1, 1, 1),)), {7: who})
    shown = scrape_data(newest)
    for family in FAMILIES:
        for labels, _ in family.samples(shown):
            assert labels.keys() <= set(LABELS[family.labels]), family.name


@NEED_PROMTOOL
def test_the_alert_rules_of_the_documentation_are_rules_about_series_that_exist(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    [rules] = re.findall(r"```yaml\n(groups:\n.*?)```", page, re.DOTALL)
    path = tmp_path / "rules.yml"
    path.write_text(rules)
    reported = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, check=False)
    assert reported.returncode == 0, reported.stderr
    assert f"SUCCESS: {rules.count('- alert:')} rules found" in reported.stdout
    names = {family.name for family in FAMILIES}
    assert set(re.findall(r"\b(?:DCGM|gpumon)_\w+", rules)) <= names
