"""The Python mirror of state.h: the structure in the shared file, field for field."""

from __future__ import annotations

import re
from ctypes import Structure, c_char, c_double, c_int32, c_int64, c_uint32, c_uint64
from pathlib import Path

MAGIC = 0x4C4D5646
GPUS = 16
MIGS = 8
PROCESSES = 256
SAMPLE_KINDS = 10
SAMPLES = 128
FIELDS = 64
GPM_VALUES = 32
RETIRED_PAGES = 64
NVLINKS = 18
FANS = 4
RULES = 64
FUNCTIONS = 160
UNSUPPORTED = -(2**63)


def _numbers(macro: str) -> tuple[str, ...]:
    """The names in one of the header's lists, so that there is one place where they are ordered."""
    header = (Path(__file__).parent / "state.h").read_text()
    found = re.search(rf"#define {macro}\(X\)((?:.*\\\n)+.*\n)", header)
    assert found, f"state.h has no list {macro}"
    return tuple(re.findall(r"X\((\w+)\)", found[1]))


GPU_NUMBERS = _numbers("GPU_NUMBERS")
MIG_NUMBERS = _numbers("MIG_NUMBERS")


class Text(Structure):
    _fields_ = [("form", c_uint32), ("length", c_uint32), ("bytes", c_char * 120)]


class Field(Structure):
    _fields_ = [
        *((name, c_uint32) for name in ("used", "id", "any_scope", "scope", "type", "result")),
        ("value", c_uint64),
    ]


class GpmValue(Structure):
    _fields_ = [("used", c_uint32), ("id", c_uint32), ("value", c_double)]


class Sample(Structure):
    _fields_ = [("time_us", c_uint64), ("value", c_uint64)]


class Ring(Structure):
    _fields_ = [("written", c_uint64), ("samples", Sample * SAMPLES)]


class RetiredPage(Structure):
    _fields_ = [(name, c_uint64) for name in ("used", "cause", "address", "time_us")]


class Mig(Structure):
    _fields_ = [
        ("used", c_uint32),
        ("reserved", c_uint32),
        ("name", Text),
        ("uuid", Text),
        *((name, c_int64) for name in MIG_NUMBERS),
        ("gpm", GpmValue * GPM_VALUES),
    ]


class Gpu(Structure):
    _fields_ = [
        ("used", c_uint32),
        ("lost", c_uint32),
        *((name, Text) for name in ("name", "uuid", "serial", "vbios", "pci_bus_id")),
        *((name, c_int64) for name in GPU_NUMBERS),
        ("clock", c_int64 * 4),
        ("max_clock", c_int64 * 4),
        ("threshold", c_int64 * 8),
        ("fan_speed", c_int64 * FANS),
        ("ecc", c_int64 * 8 * 2 * 2),
        ("nvlink_active", c_int64 * NVLINKS),
        ("nvlink_errors", c_int64 * 5 * NVLINKS),
        ("retired", RetiredPage * RETIRED_PAGES),
        ("fields", Field * FIELDS),
        ("gpm", GpmValue * GPM_VALUES),
        ("rings", Ring * SAMPLE_KINDS),
        ("migs", Mig * MIGS),
    ]


class Process(Structure):
    _fields_ = [
        ("presence", c_uint32),
        ("gpu", c_int32),
        ("mig", c_int32),
        *((name, c_uint32) for name in ("pid", "kind", "gpu_instance", "compute_instance")),
        *((name, c_uint32) for name in ("sm", "memory_utilization", "encoder", "decoder", "jpeg", "ofa")),
        ("reserved", c_uint32),
        *((name, c_uint64) for name in ("memory", "protected_memory", "time_us")),
        ("name", Text),
    ]


class Rule(Structure):
    _fields_ = [
        ("action", c_uint32),
        ("function", c_int32),
        ("gpu", c_int32),
        ("mig", c_int32),
        ("result", c_uint32),
        ("times", c_int32),
        ("seconds", c_double),
    ]


class State(Structure):
    _fields_ = [
        ("magic", c_uint32),
        ("bytes", c_uint32),
        ("driver_loaded", c_uint32),
        ("process_struct_bytes_v3", c_uint32),
        ("driver_generation", c_uint64),
        ("cuda_version", c_int64),
        ("driver_version", Text),
        ("nvml_version", Text),
        ("time_calls", c_uint32),
        ("rule_count", c_uint32),
        ("nanoseconds", c_uint64),
        ("hangs", c_uint64),
        ("calls", c_uint64 * (GPUS + 1) * FUNCTIONS),
        ("rules", Rule * RULES),
        ("processes", Process * PROCESSES),
        ("gpus", Gpu * GPUS),
    ]
