"""Runs jobs at fixed intervals of the monotonic clock: setting the wall clock neither stops nor hurries them.

APScheduler compares the times at which jobs are due with the wall clock. So a job's trigger computes by the
monotonic clock how long it is until the job is due. When the wall clock is set, all times are computed again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from math import floor
from queue import SimpleQueue

from apscheduler.events import EVENT_JOB_MAX_INSTANCES, JobSubmissionEvent
from apscheduler.executors.base import BaseExecutor, run_job
from apscheduler.job import Job
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

# How often the two clocks are compared, and what counts as set: less is drift that NTP corrects.
LOOK_S = 2.0
SET_BY_S = 0.1


class SteadyTrigger(BaseTrigger):  # type: ignore[misc]  # APScheduler 3 has no types
    """Due every `interval_s` seconds of the monotonic clock, for the first time after `first_s`."""

    def __init__(self, interval_s: float, first_s: float) -> None:
        self._interval_s = interval_s
        self._first = time.monotonic() + first_s

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """When it is due next, by the wall clock as it is now."""
        passed = time.monotonic() - self._first
        # A job that the scheduler starts a little early is not due a second time.
        early_s = min(2 * SET_BY_S, self._interval_s / 4)
        due = max(0, floor((passed + early_s) / self._interval_s) + 1)
        return datetime.now(UTC) + timedelta(seconds=due * self._interval_s - passed)


class _Executor(BaseExecutor):  # type: ignore[misc]  # APScheduler 3 has no types
    """Runs its jobs one after another on a daemon thread: a job may hang in a driver or a file system forever, and
    the program must still end."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._jobs: SimpleQueue[tuple[Job, list[datetime]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self, scheduler: BackgroundScheduler, alias: str) -> None:
        """Start the thread."""
        super().start(scheduler, alias)
        self.thread.start()

    def shutdown(self, wait: bool = True) -> None:
        """End after the jobs that are waiting; `wait` for that."""
        self._jobs.put(None)
        if wait:
            self.thread.join()

    def _do_submit_job(self, job: Job, run_times: list[datetime]) -> None:
        self._jobs.put((job, run_times))

    def _work(self) -> None:
        while (work := self._jobs.get()) is not None:
            job, run_times = work
            try:
                events = run_job(job, job._jobstore_alias, run_times, self._logger.name)
            except BaseException as error:
                self._run_job_error(job.id, error, error.__traceback__)
            else:
                self._run_job_success(job.id, events)


class Clockwork:
    """Jobs, each on a thread of its executor; a job that is due while it still runs is left out."""

    def __init__(self, executors: tuple[str, ...], skipped: Callable[[str], None]) -> None:
        """`skipped` is called with the name of a job that was left out."""
        self._executors = {name: _Executor(name) for name in executors}
        self._scheduler = BackgroundScheduler(timezone=UTC, executors=self._executors)
        self._skipped = skipped
        self._scheduler.add_listener(self._left_out, EVENT_JOB_MAX_INSTANCES)
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._watch_clocks, name="clocks", daemon=True)

    def add(self, name: str, job: Callable[[], None], interval_s: float, first_s: float, executor: str) -> None:
        """Run `job` every `interval_s` seconds, for the first time after `first_s`."""
        self._scheduler.add_job(
            job,
            SteadyTrigger(interval_s, first_s),
            id=name,
            executor=executor,
            max_instances=1,
            coalesce=True,
            misfire_grace_time=None,
            next_run_time=datetime.now(UTC) + timedelta(seconds=first_s),
        )

    def start(self) -> None:
        """Start the scheduler."""
        self._scheduler.start()
        self._watch.start()

    def stop(self, patience_s: float = 2.0) -> list[str]:
        """Start no more jobs, and wait for those that run. Returns the executors with a job that still runs."""
        ends = time.monotonic() + patience_s
        self._stopping.set()
        self._watch.join()
        self._scheduler.shutdown(wait=False)
        for executor in self._executors.values():
            executor.thread.join(max(0.0, ends - time.monotonic()))
        return [name for name, executor in self._executors.items() if executor.thread.is_alive()]

    def _left_out(self, event: JobSubmissionEvent) -> None:
        for _ in event.scheduled_run_times:
            self._skipped(event.job_id)

    def _watch_clocks(self) -> None:
        between = time.time() - time.monotonic()
        while not self._stopping.wait(LOOK_S):
            now_between = time.time() - time.monotonic()
            if abs(now_between - between) > SET_BY_S:
                for job in self._scheduler.get_jobs():
                    job.reschedule(job.trigger)
            between = now_between
