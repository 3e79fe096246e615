"""The one gate to NVML: every call passes here, and every error becomes one of a few outcomes.

Error meanings: NVML API reference, nvmlReturn_t.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pynvml

from gpumon_core.safety.text import clean
from gpumon_core.telemetry.limits import LONGEST_TEXT

log = logging.getLogger(__name__)

# The driver, this device, or this generation of the API does not have the call.
UNSUPPORTED = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        pynvml.NVML_ERROR_DEPRECATED,
        # Once NVML itself is loaded, it is libcuda that is missing: the CUDA version is not known then.
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    }
)
# The device is no longer there: it fell off the bus, or waits for a reset.
LOST = frozenset(
    {pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_GPU_NOT_FOUND}
)
# The whole session is over: the driver was unloaded or replaced under us.
SESSION_OVER = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
# NVML marks a value it cannot give with all bits set, in whatever width the field has.
NOT_AVAILABLE = frozenset({0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF})


class DeviceLost(Exception):
    """The device asked no longer answers."""


class SessionOver(Exception):
    """NVML must be initialised anew before it answers anything."""


class Unsupported(Exception):
    """This way of asking does not exist here; it need not be tried again."""


class Gate:
    """Calls NVML and sorts its errors.

    A failure that costs one reading is returned as None and logged once for its device, call
    and error; one that concerns the device or the session is raised.
    """

    def __init__(self) -> None:
        self._said: set[tuple[str, str, str]] = set()
        # What was asked last, so that a call that hangs can be named.
        self.calling = ""
        # How many calls brought an answer, and how many failed; and the error of the last that did.
        self.answered = 0
        self.failed = 0
        self.error: int | None = None

    def ask(self, subject: str, call: Callable[..., Any], *arguments: Any, name: str | None = None) -> Any:
        """The call's result, or None when it failed this time.

        Raises Unsupported, DeviceLost or SessionOver. `subject` and `name` are for the log.
        """
        self.calling = name or call.__name__
        try:
            result = call(*arguments)
        except pynvml.NVMLError as error:
            code = error.value
            if code in UNSUPPORTED:
                raise Unsupported(str(error)) from None
            if code in LOST:
                raise DeviceLost(str(error)) from None
            if code in SESSION_OVER:
                raise SessionOver(str(error)) from None
            self.failed += 1
            self.error = code
            self.say_once(subject, name or call.__name__, str(error))
            return None
        except UnicodeDecodeError:
            # pynvml decodes names as UTF-8; a damaged board memory can hold anything.
            self.answered += 1
            self.say_once(subject, name or call.__name__, "the text it returned is not UTF-8")
            return None
        except (Unsupported, DeviceLost, SessionOver):
            raise
        except Exception as error:
            # An answer that nobody can make sense of costs what was asked for, and not the tick.
            self.answered += 1
            self.say_once(subject, name or call.__name__, f"its answer makes no sense ({error!r})")
            return None
        self.answered += 1
        return None if isinstance(result, int) and result in NOT_AVAILABLE else result

    def fact(self, subject: str, call: Callable[..., Any], *arguments: Any, name: str | None = None) -> Any:
        """Like `ask`, for facts that may be missing: Unsupported is None as well."""
        try:
            return self.ask(subject, call, *arguments, name=name)
        except Unsupported:
            return None

    def text(self, subject: str, call: Callable[..., Any], *arguments: Any, name: str | None = None) -> str | None:
        """A fact that is a text; None where it is empty, has no end, or has signs that no name has."""
        found = self.fact(subject, call, *arguments, name=name)
        if not isinstance(found, str) or not found:
            return None
        if clean(found, LONGEST_TEXT) != found:
            self.say_once(subject, name or call.__name__, "what it returned is no text")
            return None
        return found

    def say_once(self, subject: str, call: str, problem: str) -> None:
        """Log a problem the first time it is seen."""
        key = (subject, call, problem)
        if key not in self._said:
            self._said.add(key)
            log.warning("%s: %s failed: %s (further failures of this kind are not logged)", subject, call, problem)

    def forget(self, subject: str) -> None:
        """Let problems of `subject` be logged again, after it has recovered."""
        self._said = {key for key in self._said if key[0] != subject}
