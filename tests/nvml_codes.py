"""NVML's error codes, the outcomes that gpumon's gate folds them into, and which calls are tested with which.

The gate (telemetry/gate.py) knows four outcomes, and tests/test_gate.py holds every code to its own. A call that
passes the gate and nothing else is therefore tested with one code of each outcome. Where something looks at a code
before the gate sees it, the call is tested with every code; a test holds this list to the sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pynvml
import pytest

from gpumon_core import telemetry

CODES: dict[str, int] = {
    name.removeprefix("NVML_ERROR_"): value
    for name, value in sorted(vars(pynvml).items())
    if name.startswith("NVML_ERROR_") and isinstance(value, int)
}
# What the gate makes of a code. Whatever is not named here fails this time and is asked again.
OUTCOMES: dict[str, tuple[str, ...]] = {
    "unsupported": (
        "NOT_SUPPORTED",
        "FUNCTION_NOT_FOUND",
        "ARGUMENT_VERSION_MISMATCH",
        "DEPRECATED",
        "LIBRARY_NOT_FOUND",
    ),
    "lost": ("GPU_IS_LOST", "RESET_REQUIRED", "GPU_NOT_FOUND"),
    "session over": ("UNINITIALIZED", "DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH"),
}
OUTCOME = {name: outcome for outcome, names in OUTCOMES.items() for name in names}
ONE_OF_EACH = ("NOT_SUPPORTED", "GPU_IS_LOST", "UNINITIALIZED", "UNKNOWN")

# Beside the gate: module of telemetry -> the codes that it looks at, and the calls for which it does.
LOOKED_AT: dict[str, tuple[set[str], set[str]]] = {
    # The start has a remedy for each, and the end forgives each.
    "nvml.py": (
        {"LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH", "NO_PERMISSION", "UNKNOWN"},
        {"nvmlInitWithFlags", "nvmlShutdown"},
    ),
    # Some say that nothing is there.
    "devices.py": (
        {"NO_PERMISSION", "NOT_FOUND"},
        {"nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetMigDeviceHandleByIndex"},
    ),
    # Raised as a function that this pynvml lacks; and room that is too small.
    "plan.py": (
        {"FUNCTION_NOT_FOUND", "INSUFFICIENT_SIZE", "INVALID_ARGUMENT"},
        {"nvmlDeviceGetFieldValues", "nvmlDeviceGetRetiredPages"},
    ),
    "gpm.py": (
        {"INVALID_ARGUMENT", "NO_PERMISSION"},
        {"nvmlGpmSampleGet", "nvmlGpmMigSampleGet", "nvmlGpmMetricsGet"},
    ),
    # One function asks all nine: see ALIKE.
    "running.py": ({"INSUFFICIENT_SIZE"}, {"nvmlDeviceGetComputeRunningProcesses_v3"}),
    "samples.py": ({"INSUFFICIENT_SIZE", "NOT_FOUND"}, {"nvmlDeviceGetSamples"}),
    "usage.py": (
        {"INSUFFICIENT_SIZE", "NOT_FOUND"},
        {"nvmlDeviceGetProcessesUtilizationInfo", "nvmlDeviceGetProcessUtilization"},
    ),
}
EVERY_CODE = frozenset(call for _, calls in LOOKED_AT.values() for call in calls)
# Asked by the same lines as a call that is tested with every code -> the code that those lines look at.
ALIKE = re.compile(r"nvmlDeviceGet(Compute|Graphics|MPSCompute)RunningProcesses(_v\d)?")

each_code = pytest.mark.parametrize("code", CODES.values(), ids=CODES)
each_outcome = pytest.mark.parametrize("code", [CODES[name] for name in ONE_OF_EACH], ids=ONE_OF_EACH)


def codes_of(function: str) -> Iterable[str]:
    """The names of the codes that a call is tested with."""
    if function in EVERY_CODE:
        return CODES
    return (*ONE_OF_EACH, "INSUFFICIENT_SIZE") if ALIKE.fullmatch(function) else ONE_OF_EACH


def each_error_of(functions: Iterable[str]) -> Any:
    """Parametrizes a test with `function` and `code`: every call, with every code that may matter to it."""
    return pytest.mark.parametrize(
        ("function", "code"),
        [
            pytest.param(function, CODES[name], id=f"{function}-{name}")
            for function in functions
            for name in codes_of(function)
        ],
    )


def looked_at_by_gpumon() -> dict[str, set[str]]:
    """Module of telemetry -> the codes that it names. The gate is left out."""
    folder = Path(str(telemetry.__file__)).parent
    found = {
        path.name: set(re.findall(r"\bNVML_ERROR_(\w+)", re.sub(r"#.*", "", path.read_text())))
        for path in folder.rglob("*.py")
        if path.name != "gate.py"
    }
    return {name: codes for name, codes in found.items() if codes}


def looked_at_by_pynvml() -> set[str]:
    """The functions of NVML of which pynvml's wrapper looks at the code that came back."""
    found = set()
    for definition in re.split(r"\n(?=def )", Path(pynvml.__file__).read_text()):
        if re.search(r"\bret\s*[!=]=|\bexcept\b|\.value\s*[!=]=", definition):
            found |= set(re.findall(r'"(nvml\w+)"', definition))
    return found
