"""The gate to NVML: every error code has one outcome, and what looks at a code before the gate is known."""

from __future__ import annotations

import logging
from typing import Any

import pynvml
import pytest
from full_driver import CALLS
from nvml_codes import (
    ALIKE,
    CODES,
    EVERY_CODE,
    LOOKED_AT,
    ONE_OF_EACH,
    OUTCOME,
    each_code,
    looked_at_by_gpumon,
    looked_at_by_pynvml,
)

from gpumon_core.telemetry.gate import DeviceLost, Gate, SessionOver, Unsupported

RAISED = {"unsupported": Unsupported, "lost": DeviceLost, "session over": SessionOver}
NAMES = {value: name for name, value in CODES.items()}


def failing(code: int) -> Any:
    """A call of the driver that returns the code."""

    def call(handle: object) -> int:
        raise pynvml.NVMLError(code)

    call.__name__ = "nvmlDeviceGetPowerUsage"
    return call


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(logging.getLogger("gpumon_core"), "propagate", True)
    caplog.set_level(logging.DEBUG, logger="gpumon_core")


@each_code
def test_an_error_code_has_one_outcome(code: int, caplog: pytest.LogCaptureFixture) -> None:
    gate, expected = Gate(), RAISED.get(OUTCOME.get(NAMES[code], ""))
    for _ in range(2):
        if expected is None:
            assert gate.ask("GPU 0", failing(code), "handle") is None
        else:
            with pytest.raises(expected) as caught:
                gate.ask("GPU 0", failing(code), "handle")
            assert type(caught.value) is expected
            assert str(caught.value) == str(pynvml.NVMLError(code))
    assert gate.calling == "nvmlDeviceGetPowerUsage"
    assert gate.answered == 0
    assert (gate.failed, gate.error) == ((0, None) if expected else (2, code))
    # What fails is logged once; what is raised is for the caller to name.
    assert len(caplog.messages) == (expected is None)


@each_code
def test_a_fact_that_is_not_supported_is_not_known(code: int) -> None:
    outcome = OUTCOME.get(NAMES[code])
    if outcome in ("lost", "session over"):
        with pytest.raises(RAISED[outcome]):
            Gate().fact("GPU 0", failing(code), "handle")
    else:
        assert Gate().fact("GPU 0", failing(code), "handle") is None
        assert Gate().text("GPU 0", failing(code), "handle") is None


def test_the_calls_are_tested_with_a_code_of_each_outcome() -> None:
    outcomes = [OUTCOME.get(name) for name in ONE_OF_EACH]
    assert len(set(outcomes)) == len(outcomes) == len(RAISED) + 1


def test_whatever_looks_at_a_code_itself_is_tested_with_every_code() -> None:
    """A module that begins to look at a code, or an update of pynvml that does, belongs into LOOKED_AT."""
    assert looked_at_by_gpumon() == {module: codes for module, (codes, _) in LOOKED_AT.items()}
    assert CALLS.keys() >= EVERY_CODE
    by_pynvml = looked_at_by_pynvml() & CALLS.keys()
    assert {call for call in by_pynvml - EVERY_CODE if not ALIKE.fullmatch(call)} == set()


def test_a_code_that_nobody_knows_fails_this_time() -> None:
    gate = Gate()
    assert gate.ask("GPU 0", failing(4711), "handle") is None
    assert (gate.failed, gate.error) == (1, 4711)
