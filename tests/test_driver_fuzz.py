"""Ten thousand answers of a driver, from the whole range of each C type: no lost tick, nothing impossible stored.

Answers are drawn at the boundary to C: the fake library answers first, and then what it wrote is overwritten.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import fake_nvml
import pynvml
import pytest
import sqlalchemy as sa
from fake_nvml import GIB, FakeNvml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.metrics import GPU_METRICS, PROCESS_METRICS
from gpumon_core.recording.collector import Observer
from gpumon_core.store import database, schema
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry import devices, nvml
from gpumon_core.telemetry.gate import SESSION_OVER
from gpumon_core.telemetry.limits import MOST_MEMORY_MIB, PID_LIMIT
from gpumon_core.telemetry.nvml import NvmlSource

EXAMPLES, ANSWERS = 150, 100
READINGS = 2
# What a driver says of the whole session ends the tick rightly, and is not drawn.
CODES = sorted(
    {value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_") and isinstance(value, int)}
    - SESSION_OVER
)
EDGES = sorted(
    {
        each
        for bits in (8, 16, 22, 31, 32, 53, 63, 64)
        for each in (2**bits - 2, 2**bits - 1, 2**bits, 2**bits + 1)
        if each < 2**64
    }
    | {0, 1, 2, 100, 101, 255, 1_000_000_000_000}
    | {struct.unpack("<Q", struct.pack("<d", each))[0] for each in (float("nan"), float("inf"), -1.0, 1e308, -0.0)}
)
# The session itself, and what hands out memory of the library's own.
TRUE = ("nvmlInit", "nvmlShutdown", "nvmlErrorString", "nvmlGpmSampleAlloc", "nvmlGpmSampleFree")
HANDLES = ("nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetMigDeviceHandleByIndex", "nvmlGpmSampleGet")
RANGES = {key: metric.range for metric in GPU_METRICS for key in (metric.key, metric.peak) if key}


@dataclass(frozen=True)
class Answer:
    """What a call returns, and the words that it writes; None: what it wrote stays."""

    code: int
    words: tuple[int, ...] | None


def answer(random: Random) -> Answer:
    """One in twenty calls fails; of the others every fourth is left as it is."""
    code = random.choice(CODES) if random.random() < 0.05 else pynvml.NVML_SUCCESS
    words = [random.choice(EDGES) if random.random() < 0.6 else random.getrandbits(64) for _ in range(3)]
    return Answer(code, tuple(words) if random.random() < 0.75 else None)


class Mad:
    """Stands between pynvml and the library."""

    def __init__(self, answers: list[Answer]) -> None:
        self.real = pynvml._nvmlGetFunctionPointer
        self.answers = itertools.cycle(answers)

    def pointer(self, name: str) -> Any:
        real = self.real(name)
        if name.startswith(TRUE):
            return real

        def call(*arguments: Any) -> int:
            code = int(real(*arguments))
            answer = next(self.answers)
            if answer.code != pynvml.NVML_SUCCESS:
                return answer.code
            if name in HANDLES or answer.words is None:
                return code
            words = itertools.cycle(answer.words)
            for argument in arguments:
                scribble(getattr(argument, "_obj", argument), words)
            return int(pynvml.NVML_SUCCESS)

        return call


def scribble(target: Any, words: Iterator[int]) -> None:
    """Write words over everything that a driver may write, but pointers and a structure's version."""
    if isinstance(target, pynvml.c_nvmlGpmMetricsGet_t):
        for metric in target.metrics[: target.numMetrics]:
            metric.nvmlReturn = next(words) % 40 if next(words) % 3 else 0
            metric.value = struct.unpack("<d", struct.pack("<Q", next(words)))[0]
    elif isinstance(target, pynvml.c_nvmlProcessesUtilizationInfo_v1_t):
        room = target.processSamplesCount
        size = ctypes.sizeof(pynvml.c_nvmlProcessUtilizationInfo_v1_t)
        overwrite(ctypes.cast(target.procUtilArray, ctypes.c_void_p).value or 0, min(room, 8) * size, words)
        target.processSamplesCount = next(words) & 0xFFFFFFFF
    elif isinstance(target, ctypes.Array):
        overwrite(ctypes.addressof(target), min(ctypes.sizeof(target), 2000), words)
    elif isinstance(target, ctypes.Structure):
        for field, kind, *_ in target._fields_:
            if field != "version" and issubclass(kind, ctypes._SimpleCData):
                put(kind, target, field, next(words))
            elif issubclass(kind, ctypes.Array):
                scribble(getattr(target, field), words)
    elif isinstance(target, ctypes.c_uint | ctypes.c_int | ctypes.c_ulonglong):
        target.value = next(words)


def put(kind: Any, target: Any, field: str, word: int) -> None:
    if kind in (ctypes.c_double, ctypes.c_float):
        setattr(target, field, struct.unpack("<d", struct.pack("<Q", word))[0])
    elif kind not in (ctypes.c_char, ctypes.c_char_p, ctypes.c_void_p):
        setattr(target, field, word)


def overwrite(address: int, size: int, words: Iterator[int]) -> None:
    written = b"".join(struct.pack("<Q", next(words)) for _ in range(size // 8))
    if address and written:
        ctypes.memmove(address, written, len(written))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeNvml]:
    """Two GPUs that offer everything, one with a MIG instance."""
    fake = FakeNvml(tmp_path_factory.mktemp("nvml") / "state")
    for index in range(2):
        gpu = fake.add_gpu(gpm_supported=1, memory_temperature=70, retired_pending=0, nvlink_count=4)
        gpu.set_gpm(pynvml.NVML_GPM_METRIC_SM_UTIL, 44.0)
        for pid, kind in ((1, "C"), (2, "G")):
            gpu.add_process(10 * index + pid, GIB, kind, sm=10)
    fake.gpus[1].add_mig()
    with fake_nvml.loaded(fake):
        yield fake


def test_no_answer_of_a_driver_costs_a_tick_or_is_stored_where_it_cannot_be(
    driver: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("gpumon_core"), "propagate", True)
    for name in ("RETRY_S", "RECOUNT_S"):
        monkeypatch.setattr(nvml, name, 0.0)
    for name in ("FACTS_S", "AGAIN_S"):
        monkeypatch.setattr(devices, name, 0.0)
    engine = database.open_for_writing(f"sqlite:///{tmp_path}/t.db")
    writer = Writer(engine, "here", "nvml", 1)
    seconds = itertools.count(1_000_000)
    drawn: set[Answer] = set()
    real = pynvml._nvmlGetFunctionPointer

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(random=st.randoms(use_true_random=True))
    def tick(random: Random) -> None:
        answers = [answer(random) for _ in range(ANSWERS)]
        mad = Mad(answers)
        mad.real = real
        source = NvmlSource("here", clock=lambda: float(next(seconds)))
        observer = Observer(source, LocalAttribution(trusted=True))
        pynvml._nvmlGetFunctionPointer = mad.pointer
        try:
            for _ in range(READINGS):
                snapshot, who = observer.observe()
                for reading in snapshot.readings:
                    for key, value in reading.values.items():
                        lowest, highest = RANGES[key]
                        assert value is None or lowest <= value <= highest, f"{key} is {value}"
                assert len({gpu.uuid for gpu in snapshot.gpus}) == len(snapshot.gpus)
                assert writer.write(snapshot, who), "the tick is lost"
        finally:
            pynvml._nvmlGetFunctionPointer = real
            observer.close()
        drawn.update(one for one in answers if one.words)

    tick()
    assert len(drawn) >= 10_000, "answers, of which no two are the same"
    assert not [record.message for record in caplog.records if record.exc_info]
    holds(engine)
    engine.dispose()


def holds(engine: sa.Engine) -> None:
    """Everything in the database is within its range."""
    with engine.connect() as connection:
        for row in connection.execute(sa.select(schema.gpu_metrics)).mappings():
            for key, (lowest, highest) in RANGES.items():
                if key in row and key != "energy":
                    assert row[key] is None or lowest <= row[key] <= highest
        for row in connection.execute(sa.select(schema.gpu_changes)).mappings():
            lowest, highest = RANGES[row["metric"]]
            assert row["value"] is None or lowest <= row["value"] <= highest
        for row in connection.execute(sa.select(schema.process_snapshots)).mappings():
            assert row["memory"] is None or 0 <= row["memory"] <= MOST_MEMORY_MIB
            assert all(row[m.key] is None or 0 <= row[m.key] <= 100 for m in PROCESS_METRICS if m.unit == "%")
        for pid in connection.execute(sa.select(schema.gpu_processes.c.pid)).scalars():
            assert 0 < pid <= PID_LIMIT
        for row in connection.execute(sa.select(schema.gpus)).mappings():
            assert row["memory_total_mib"] is None or 0 < row["memory_total_mib"] <= MOST_MEMORY_MIB
            texts = (row["name"], row["uuid"], row["pci_bus_id"])
            assert all(text is None or (text.isprintable() and len(text) <= 255) for text in texts)
