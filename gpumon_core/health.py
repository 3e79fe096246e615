"""Whether the recording can be relied on right now: for /healthz, the pages and `doctor`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core import __version__
from gpumon_core.recorder import State
from gpumon_core.store.schema import gpus, hosts
from gpumon_core.vitals import Vitals

Status = Literal["ok", "stale", "degraded", "no_driver"]


@dataclass(frozen=True, slots=True)
class Health:
    """status: ok; degraded (fresh samples, but something is wrong: a lost GPU, failing ticks);
    stale (no fresh sample); no_driver (none because NVML cannot be used). `newest` is the time of the
    newest sample in UTC seconds, `age_s` its age; `lost` counts GPUs that do not answer, `hung` those of
    them in whose driver call a thread still waits; `interval` those whose utilization is a mean."""

    status: Status
    state: State
    newest: int | None
    age_s: float | None
    interval_s: float
    gpus: int
    lost: int
    hung: int = 0
    by_interval: int = 0
    vitals: Vitals | None = None

    @property
    def fresh(self) -> bool:
        """Whether the newest sample is as new as the interval promises."""
        return self.age_s is not None and self.age_s <= fresh_within_s(self.interval_s)

    def as_json(self) -> dict[str, Any]:
        """The answer of /healthz."""
        return {
            "status": self.status,
            "source": self.state.source,
            "age_seconds": None if self.age_s is None else round(self.age_s, 1),
            "interval_seconds": self.interval_s,
            "gpus": self.gpus,
            "gpus_lost": self.lost,
            "gpus_hung": self.hung,
            "gpus_sampled_by_interval": self.by_interval,
            "role": self.state.role,
            "driver_problem": self.state.driver and self.state.driver.reason,
            "recording_problem": self.state.recording and self.state.recording.reason,
            "notice": self.state.notice and self.state.notice.reason,
            "recorder": self.vitals and asdict(self.vitals),
            "version": __version__,
        }


def fresh_within_s(interval_s: float) -> float:
    """How old the newest sample may be before sampling counts as stopped: two ticks may be late."""
    return 3 * interval_s + 2


def check(engine: Engine, state: State, host: str, interval_s: float, vitals: Vitals | None = None) -> Health:
    """Read this host's newest tick and judge it; a database without the host's ticks is judged
    by its newest host. Raises sqlalchemy.exc.DBAPIError."""
    with engine.connect() as connection:
        newest = connection.execute(
            sa.select(hosts.c.id, hosts.c.last_seen, hosts.c.interval_s)
            .order_by((hosts.c.name == host).desc(), hosts.c.last_seen.desc())
            .limit(1)
        ).first()
        states: list[str] = []
        by_interval = 0
        age = None
        if newest is not None:
            age = max(0.0, time.time() - newest.last_seen)
            interval_s = newest.interval_s
            query = sa.select(gpus.c.state, gpus.c.sampling).where(
                gpus.c.host_id == newest.id, gpus.c.state != "gone"
            )
            found = connection.execute(query).all()
            states = [row.state for row in found]
            by_interval = sum(row.sampling == "interval" for row in found)
    hung = states.count("hung")
    lost = states.count("lost") + hung
    fresh = age is not None and age <= fresh_within_s(interval_s)
    status: Status
    if not fresh:
        status = "no_driver" if state.driver is not None and state.source == "nvml" else "stale"
    elif lost or (state.recording is not None and state.role == "recording"):
        status = "degraded"
    else:
        status = "ok"
    last = newest and newest.last_seen
    return Health(status, state, last, age, interval_s, len(states), lost, hung, by_interval, vitals)
