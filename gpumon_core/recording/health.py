"""Whether the recording can be relied on right now: for /healthz, the pages and `doctor`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core import __version__, gpu_state
from gpumon_core.recording.consumers import ConsumerHealth
from gpumon_core.recording.counters import Counters
from gpumon_core.recording.state import State
from gpumon_core.store.schema import gpus, hosts

Status = Literal["ok", "stale", "degraded", "no_driver"]


@dataclass(frozen=True, slots=True)
class Health:
    """status: ok; degraded (fresh samples, but something is wrong: a lost GPU, failing ticks);
    stale (no fresh sample); no_driver (no fresh sample because NVML cannot be used). `newest` is the time of the
    newest sample in UTC seconds, `age_s` its age, `interval_s` the seconds between two; `latest` is the time of
    the newest sample of any host; `lost` counts the GPUs that do not answer, `hung` those among them with a driver
    call that has not returned, `by_interval` those with a utilization that is a mean."""

    status: Status
    state: State
    newest: int | None
    age_s: float | None
    interval_s: float
    gpus: int
    lost: int
    hung: int = 0
    by_interval: int = 0
    counters: Counters | None = None
    latest: int | None = None
    consumers: Mapping[str, ConsumerHealth] | None = None

    @property
    def is_fresh(self) -> bool:
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
            "readers_hung": self.state.hung_readers,
            "gpus_sampled_by_interval": self.by_interval,
            "role": self.state.role,
            "driver_problem": self.state.driver and self.state.driver.reason,
            "recording_problem": self.state.recording and self.state.recording.reason,
            "reader_problem": self.state.reader and self.state.reader.reason,
            "notice": self.state.notice and self.state.notice.reason,
            "recorder": self.counters and asdict(self.counters),
            "consumers": {name: one.as_json() for name, one in (self.consumers or {}).items()},
            "version": __version__,
        }


def fresh_within_s(interval_s: float) -> float:
    """How old the newest sample may be before sampling counts as stopped: two ticks may be late."""
    return 3 * interval_s + 2


@dataclass(frozen=True, slots=True)
class RecordedState:
    """What the database says about the recording: the newest sample's time (UTC seconds) and interval, the state
    of every GPU, how many of them have a utilization that is a mean over the interval, and the time of the newest
    sample of any host."""

    newest: int | None = None
    interval_s: float | None = None
    states: tuple[str, ...] = ()
    by_interval: int = 0
    latest: int | None = None


# Every page asks with every tick: put together once.
_NEWEST = (
    sa.select(
        hosts.c.id,
        hosts.c.last_seen,
        hosts.c.interval_s,
        sa.select(sa.func.max(hosts.c.last_seen)).scalar_subquery().label("latest"),
    )
    .order_by(sa.case((hosts.c.name == sa.bindparam("host", type_=sa.Text), 0), else_=1), hosts.c.last_seen.desc())
    .limit(1)
    .subquery()
)
_READ = sa.select(_NEWEST, gpus.c.state, gpus.c.sampling).select_from(
    _NEWEST.outerjoin(gpus, sa.and_(gpus.c.host_id == _NEWEST.c.id, gpus.c.state != "gone"))
)


def read(engine: Engine, host: str | None) -> RecordedState:
    """Read a host's newest tick; without one, or of a database without its ticks, that of the newest host.
    Raises sqlalchemy.exc.DBAPIError."""
    with engine.connect() as connection:
        found = connection.execute(_READ, {"host": host}).all()
    if not found:
        return RecordedState()
    first = found[0]
    # A host without GPUs is one row that has none.
    return RecordedState(
        first.last_seen,
        first.interval_s,
        tuple(row.state for row in found if row.state is not None),
        sum(row.sampling == "interval" for row in found),
        first.latest,
    )


def age_of(newest: int, interval_s: float) -> float | None:
    """How old a sample of that time (UTC seconds) is by the wall clock; None where it lies in the future by more
    than two clocks may differ: one of them is wrong, and nothing can be said."""
    age = time.time() - newest
    return None if age < -fresh_within_s(interval_s) else max(0.0, age)


def judge(
    reading: RecordedState,
    state: State,
    interval_s: float,
    counters: Counters | None = None,
    age_s: float | None = None,
) -> Health:
    """The state of the recording now, from what was read last. `age_s`: the age of its newest sample as this
    process's recorder knows it, without the wall clock."""
    interval_s = reading.interval_s or interval_s
    age = None if reading.newest is None else age_s if age_s is not None else age_of(reading.newest, interval_s)
    hung = reading.states.count("hung")
    lost = sum(map(gpu_state.is_lost, reading.states))
    status: Status
    if age is None or age > fresh_within_s(interval_s):
        status = "no_driver" if state.driver is not None and state.source == "nvml" else "stale"
    elif lost or state.reader or state.consumers or (state.recording and state.role == "recording"):
        status = "degraded"
    else:
        status = "ok"
    return Health(
        status,
        state,
        reading.newest,
        age,
        interval_s,
        len(reading.states),
        lost,
        hung,
        reading.by_interval,
        counters,
        reading.latest,
    )


def check(engine: Engine, state: State, host: str, interval_s: float, vitals: Counters | None = None) -> Health:
    """Read and judge. Raises sqlalchemy.exc.DBAPIError."""
    return judge(read(engine, host), state, interval_s, vitals)
