"""What the recorder has done, skipped and failed to do since it started, in numbers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from gpumon_core.safety.masking import hide
from gpumon_core.store.recorder_stats import Minute
from gpumon_core.telemetry.records import elapsed


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the start, and the newest tick's duration in milliseconds.

    ticks: committed. skipped: the tick before was not done. failed: nothing could be read, or the tick could not
    be written. dropped: the buffer was full, or another recorder has written since. buffered: they wait for the
    database.
    """

    ticks: int = 0
    skipped: int = 0
    failed: int = 0
    dropped: int = 0
    buffered: int = 0
    duration_ms: float | None = None
    last_error: str | None = None


class LiveCounters:
    """Counts, for all threads of a recorder."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._now = Counters()
        self._minute_before = Counters()
        self._durations: list[float] = []
        self._error: str | None = None
        self._newest: float | None = None

    @property
    def age_s(self) -> float | None:
        """Seconds since the newest tick in the database was read, by a clock that cannot be set."""
        return None if self._newest is None else elapsed() - self._newest

    @property
    def now(self) -> Counters:
        """The counts as they are now."""
        return self._now

    def committed(self, ticks: int, newest: float | None) -> None:
        """So many ticks are in the database, the newest of them read at this time (records.elapsed)."""
        self._add(ticks=ticks)
        self._newest = newest if newest is not None else elapsed()

    def skipped(self, ticks: int) -> None:
        """So many ticks were skipped because the one before was not done."""
        self._add(skipped=ticks)

    def dropped(self, ticks: int, reason: str) -> None:
        """So many ticks that were read will never be in the database."""
        self._add(dropped=ticks)
        self._note(reason)

    def failed(self, reason: str, tick: bool) -> None:
        """Something went wrong; `tick` says that it cost one."""
        self._add(failed=int(tick))
        self._note(reason)

    def took(self, milliseconds: float) -> None:
        """A tick was done in that time."""
        with self._guard:
            self._durations.append(milliseconds)
            self._now = replace(self._now, duration_ms=round(milliseconds, 2))

    def waiting(self, ticks: int) -> None:
        """So many ticks wait for the database."""
        if ticks != self._now.buffered:
            with self._guard:
                self._now = replace(self._now, buffered=ticks)

    def minute(self) -> Minute:
        """What has happened since the last call."""
        with self._guard:
            now, before, durations, error = self._now, self._minute_before, self._durations, self._error
            self._minute_before, self._durations, self._error = now, [], None
        return Minute(
            ticks=now.ticks - before.ticks,
            skipped=now.skipped - before.skipped,
            failed=now.failed - before.failed,
            dropped=now.dropped - before.dropped,
            buffered=now.buffered,
            duration_ms=round(sum(durations) / len(durations), 3) if durations else None,
            duration_max_ms=round(max(durations), 3) if durations else None,
            last_error=error,
        )

    def _note(self, reason: str) -> None:
        # Pages, /healthz and the database show it.
        reason = hide(reason)
        with self._guard:
            self._error = reason
            self._now = replace(self._now, last_error=reason)

    def _add(self, **more: int) -> None:
        with self._guard:
            self._now = replace(
                self._now, **{name: getattr(self._now, name) + count for name, count in more.items()}
            )
