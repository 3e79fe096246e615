"""The catalogue is right about pynvml, about the stored columns and about the names it gives out."""

from __future__ import annotations

import re

import fake_nvml
import pynvml
import pytest
import sqlalchemy as sa
from fake_nvml import FakeNvml

from gpumon_core.metrics import (
    CHANGE_METRICS,
    GPU_METRICS,
    GPU_METRICS_BY_KEY,
    PROCESS_METRICS,
    TICK_COLUMNS,
    TICK_METRICS,
    Aggregate,
    Level,
    Metric,
    NvmlCall,
    NvmlField,
    NvmlGpm,
)
from gpumon_core.store.schema import TIERS, gpu_metrics, process_snapshots
from gpumon_core.telemetry.records import GpuInfo

EACH_METRIC = pytest.mark.parametrize("metric", [*GPU_METRICS, *PROCESS_METRICS], ids=lambda m: m.prometheus)
CALLS = [way for metric in GPU_METRICS for way in metric.nvml if isinstance(way, NvmlCall)]
OTHERS = [way for metric in GPU_METRICS for way in metric.nvml if not isinstance(way, NvmlCall)]
EACH_CALL = pytest.mark.parametrize("call", CALLS, ids=lambda c: "-".join(map(str, (c.function, *c.arguments))))


def test_keys_are_unique_and_valid_names() -> None:
    for metrics in (GPU_METRICS, PROCESS_METRICS):
        keys = [metric.key for metric in metrics]
        assert len(keys) == len(set(keys))
        assert all(re.fullmatch(r"[a-z][a-z0-9_]*", key) for key in keys)
    assert list(GPU_METRICS_BY_KEY.values()) == list(GPU_METRICS)


def test_every_row_has_its_column_and_every_column_its_row() -> None:
    for table, metrics, own in (
        (gpu_metrics, TICK_METRICS, {"gpu_id", "timestamp_epoch", "recorded_ms"}),
        (process_snapshots, PROCESS_METRICS, {"gpu_id", "timestamp_epoch", "process_id", "present"}),
    ):
        peaks = {metric.peak for metric in metrics if metric.peak}
        assert set(table.columns.keys()) == own | {metric.key for metric in metrics} | peaks
        for metric in metrics:
            kind = sa.Integer if metric.column == "integer" else sa.Float
            assert isinstance(table.columns[metric.key].type, kind)
            assert table.columns[metric.key].nullable, "a metric that a board lacks is NULL"


def test_every_metric_is_stored_with_the_ticks_or_when_it_changes() -> None:
    assert sorted((*TICK_METRICS, *CHANGE_METRICS), key=lambda m: m.key) == sorted(
        GPU_METRICS, key=lambda m: m.key
    )
    assert all(metric.stored == "change" for metric in GPU_METRICS if metric.every_s)


def test_a_rollup_has_four_columns_of_every_metric_and_one_of_a_counter() -> None:
    for tier in TIERS:
        wanted = {"gpu_id", "timestamp_epoch", "samples", "recorded_ms"}
        for metric in TICK_METRICS:
            counter = metric.aggregate is Aggregate.COUNTER
            wanted |= {metric.key + suffix for suffix in (("",) if counter else ("", "_min", "_max", "_known_ms"))}
        assert set(tier.table.columns.keys()) == wanted


@pytest.mark.parametrize("way", OTHERS, ids=lambda way: way.name)
def test_a_field_or_a_gpm_metric_names_what_pynvml_has(way: NvmlField | NvmlGpm) -> None:
    assert isinstance(getattr(pynvml, way.name), int)


def test_prometheus_names_are_unique_and_valid() -> None:
    names = [metric.prometheus for metric in (*GPU_METRICS, *PROCESS_METRICS)]
    assert len(names) == len(set(names))
    # Prometheus data model, "Metric names".
    assert all(re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", name) for name in names)


@EACH_METRIC
def test_a_counter_is_one_for_prometheus_too(metric: Metric) -> None:
    if metric.aggregate is Aggregate.COUNTER:
        assert metric.prometheus_type == "counter"
    elif metric.prometheus_type == "counter":
        # Rows and pages are shown as how many there are, and are never fewer.
        assert metric.unit in ("rows", "pages")


@EACH_METRIC
def test_every_row_has_words_for_its_chart(metric: Metric) -> None:
    assert metric.label
    assert metric.unit or metric.stored == "change"
    assert metric.digits >= 0


@EACH_METRIC
def test_a_warning_comes_before_it_is_critical(metric: Metric) -> None:
    assert (metric.warning is None) == (metric.critical is None)
    if metric.warning is not None and metric.critical is not None:
        assert 0 < metric.warning < metric.critical


@EACH_METRIC
def test_a_whole_is_a_fact_of_a_gpu(metric: Metric) -> None:
    assert metric.share_of is None or metric.share_of in GpuInfo.__slots__
    assert metric.share_of is None or metric.maximum is None, "a metric has one 100 %"


@EACH_METRIC
def test_the_level_rises_at_its_limits(metric: Metric) -> None:
    whole = None if metric.share_of is None else 2000.0
    scale = 1.0 if whole is None else whole / 100
    assert metric.level(None, whole) is Level.UNKNOWN
    assert metric.level(0, whole) is Level.CALM
    if metric.warning is None or metric.critical is None:
        assert metric.level(1e9, whole) is Level.CALM
        return
    assert metric.level((metric.warning - 0.01) * scale, whole) is Level.CALM
    assert metric.level(metric.warning * scale, whole) is Level.WARNING
    assert metric.level((metric.critical - 0.01) * scale, whole) is Level.WARNING
    assert metric.level(metric.critical * scale, whole) is Level.CRITICAL


def test_a_share_of_an_unknown_whole_alarms_nobody() -> None:
    memory = GPU_METRICS_BY_KEY["memory"]
    assert memory.level(1e9, None) is Level.CALM
    assert memory.level(1e9, 0) is Level.CALM
    assert memory.level(None, None) is Level.UNKNOWN


@pytest.mark.parametrize(
    ("key", "value", "whole", "level"),
    [
        ("memory", 45_000, 48_000, Level.WARNING),
        ("memory", 47_900, 48_000, Level.CRITICAL),
        ("power", 300, 300, Level.CALM),
        ("power", 340, 300, Level.CRITICAL),
        ("temperature", 79.9, None, Level.CALM),
        ("temperature", 90, None, Level.CRITICAL),
        ("utilization", 100, None, Level.CALM),
        ("fan_speed", 100, None, Level.WARNING),
    ],
)
def test_levels_mean_what_an_operator_means(key: str, value: float, whole: float | None, level: Level) -> None:
    assert GPU_METRICS_BY_KEY[key].level(value, whole) is level


@EACH_CALL
def test_a_call_names_what_pynvml_has(call: NvmlCall) -> None:
    assert callable(getattr(pynvml, call.function))
    for argument in call.arguments:
        if isinstance(argument, str):
            assert isinstance(getattr(pynvml, argument), int)


@EACH_CALL
def test_a_call_works_and_has_its_field(fake: FakeNvml, call: NvmlCall) -> None:
    fake.add_gpu(retired_pending=0)
    with fake_nvml.loaded(fake):
        pynvml.nvmlInit()
        arguments = [getattr(pynvml, a) if isinstance(a, str) else a for a in call.arguments]
        try:
            result = getattr(pynvml, call.function)(pynvml.nvmlDeviceGetHandleByIndex(0), *arguments)
        except pynvml.NVMLError_FunctionNotFound:
            # The arguments are right, or pynvml would not have looked for the function. No more can be tested.
            assert call.function not in fake_nvml.functions()
            return
    if call.count:
        result = len(result)
    elif call.field is not None:
        result = result[call.field] if isinstance(call.field, int) else getattr(result, call.field)
    assert isinstance(result, int)
    assert call.scale > 0


def test_every_metric_of_a_gpu_can_be_asked_for() -> None:
    assert all(metric.nvml for metric in GPU_METRICS)


def test_the_catalogue_is_the_schema_and_consistent() -> None:
    keys = [metric.key for metric in GPU_METRICS]
    assert len(set(keys)) == len(keys)
    assert [column.name for column in gpu_metrics.columns][2:] == [*TICK_COLUMNS, "recorded_ms"]
    assert len({metric.prometheus for metric in GPU_METRICS}) == len(keys)
    for metric in GPU_METRICS:
        assert metric.critical is None or (metric.warning or 0) < metric.critical


@pytest.mark.parametrize(
    ("key", "value", "whole", "level"),
    [
        ("temperature", 79, None, Level.CALM),
        ("temperature", 80, None, Level.WARNING),
        ("temperature", 90, None, Level.CRITICAL),
        ("memory", 90, 100, Level.WARNING),
        ("memory", 90, None, Level.CALM),
        ("power", 300, 300, Level.CALM),
        ("power", None, 300, Level.UNKNOWN),
        ("utilization", 100, None, Level.CALM),
    ],
)
def test_levels(key: str, value: float | None, whole: float | None, level: Level) -> None:
    assert GPU_METRICS_BY_KEY[key].level(value, whole) is level
