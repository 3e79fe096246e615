"""Looks for what keeps this machine from being recorded well, and says what to do about each finding."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import sqlalchemy as sa

from gpumon_core import __version__, gpu_state
from gpumon_core.attribution.local import is_wsl, sees_host_processes, user_name
from gpumon_core.format import duration, memory
from gpumon_core.recording import health
from gpumon_core.recording.state import State
from gpumon_core.safety import private_files
from gpumon_core.safety.masking import hide
from gpumon_core.settings import Settings, mask_password, unknown_variables
from gpumon_core.store import database, database_file
from gpumon_core.store.lock import RecorderLock
from gpumon_core.telemetry import remedies
from gpumon_core.telemetry.records import SourceUnavailable

log = logging.getLogger(__name__)

# A recorder that runs out of disk loses history; this much lasts for weeks.
FREE_BYTES = 512 * 2**20

SECOND_LOOK_S = 1.2
# How long findings are shown before the machine is examined again, and how long a driver may take to answer.
EXAMINED_FOR_S = 600.0
PATIENCE_S = 20.0
DEVICES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `remedy` says what to do where the verdict is not ok."""

    verdict: Literal["ok", "warning", "problem"]
    topic: str
    text: str
    remedy: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at everything; slow calls to a sick driver included, so not for a page's path."""
    for finding in _examine(settings):
        yield replace(finding, text=hide(finding.text))


def _examine(settings: Settings) -> Iterator[Finding]:
    yield Finding("ok", "gpumon", f"{__version__} on Python {sys.version.split()[0]}, as user {_user()}")
    for sentence in unknown_variables():
        yield Finding("warning", "settings", sentence, "Correct or remove it.")
    has_driver = yield from _driver(settings)
    yield from _devices()
    yield _pid_namespace()
    # As the recorder chooses it.
    simulates = settings.source == "demo" or (settings.source == "auto" and not has_driver)
    yield from _database(settings, simulates)
    for reason, remedy in private_files.sentences(_exposed(settings)):
        yield Finding("warning", "privacy", reason, remedy)


def _user() -> str:
    return user_name(os.getuid())


def _driver(settings: Settings) -> Generator[Finding, None, bool]:
    """Returns whether there is a driver to record from."""
    if settings.source == "demo":
        yield Finding("ok", "source", "demo: GPUs are simulated, the driver is not asked")
        return False
    from gpumon_core.telemetry.nvml import NvmlSource
    from gpumon_core.telemetry.sleep import Sleep

    sleep = Sleep(settings.let_sleep)
    asleep = sleep.all_asleep()
    if asleep:
        # A session would wake them, and the System page asks often.
        yield Finding(
            "ok", "GPUs", f"{asleep} switched off while nothing uses them: not asked, which would wake them"
        )
        return True
    try:
        source = NvmlSource(settings.host_name, sleep=sleep)
    except SourceUnavailable as error:
        fallback = "; GPUs are simulated meanwhile" if settings.source == "auto" else ""
        yield Finding("problem", "NVML", f"{error}{fallback}", error.remedy)
        return False
    try:
        host = source.host
        yield Finding(
            "ok",
            "NVML",
            f"{host.nvml_version or 'version unknown'}, driver {host.driver_version or 'unknown'}, "
            f"CUDA {host.cuda_version or 'unknown'}",
        )
        first = source.read()
        # Only a second reading shows whether the driver has samples of the time in between.
        time.sleep(SECOND_LOOK_S)
        snapshot = source.read().completed_by(first)
        if not snapshot.gpus and not snapshot.nameless:
            yield Finding("problem", "GPUs", "the driver lists none", "Compare with nvidia-smi -L and lspci.")
        for index in sorted(snapshot.nameless):
            yield Finding(
                "problem", f"GPU {index}", "answers no question, not even for its UUID", remedies.of_lost()
            )
        offers = {offer[0].uuid: offer[1:] for offer in source.offers()}
        for gpu in snapshot.gpus:
            name = f"GPU {gpu.index}" + ("" if gpu.mig_index is None else f" MIG {gpu.mig_index}")
            if gpu_state.is_lost(snapshot.state_of(gpu.uuid)):
                yield Finding("problem", name, f"{gpu.uuid} does not answer", source.remedy(gpu.uuid))
                continue
            if not gpu_state.answers(snapshot.state_of(gpu.uuid)):
                yield Finding("ok", name, f"{gpu.name or 'unknown model'}, switched off to save power: not asked")
                continue
            by_interval, counts_energy, lacking = offers[gpu.uuid]
            sampling = "interval (the driver's own samples)" if by_interval else "point (one reading per tick)"
            energy = "counted by the driver" if counts_energy else "follows from the power"
            size = memory(gpu.memory_total_mib)
            shared = f" {gpu_state.SHARED}" if gpu_state.shares_memory(gpu.memory_from) else ""
            without = f"; does not offer {', '.join(lacking)}" if lacking else ""
            yield Finding(
                "ok",
                name,
                f"{gpu.name or 'unknown model'}, {size}{shared}; sampling: {sampling}; energy: {energy}{without}",
            )
        yield Finding("ok", "processes", f"{len(snapshot.processes)} on the GPUs now")
    except SourceUnavailable as error:
        yield Finding("problem", "NVML", str(error), error.remedy)
    finally:
        source.close()
    return True


def _devices() -> Iterator[Finding]:
    for path in DEVICES:
        if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
            yield Finding(
                "problem",
                "permissions",
                f"{path} may not be read and written by this user",
                "Add the user to its group.",
            )


def _pid_namespace() -> Finding:
    if sees_host_processes():
        return Finding("ok", "PID namespace", "the host's: processes can be named")
    if is_wsl():
        return Finding(
            "ok",
            "PID namespace",
            "WSL's own: the Windows driver names few processes or none, and no setting changes it",
        )
    return Finding(
        "warning",
        "PID namespace",
        "a container's own: the driver reports no process outside it, and none can be named",
        "Start the container with --pid=host.",
    )


def _database(settings: Settings, simulates: bool) -> Iterator[Finding]:
    url = settings.database_of("demo" if simulates else "nvml")
    path = database.file_of(url)
    if path is not None:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not os.access(path if path.exists() else folder, os.W_OK) or not os.access(folder, os.W_OK):
            yield Finding(
                "problem",
                "database",
                f"{path} cannot be written",
                "Give this user access, or set GPUMON_DATA_DIR.",
            )
        free = shutil.disk_usage(folder).free
        verdict: Literal["ok", "problem"] = "ok" if free >= FREE_BYTES else "problem"
        yield Finding(
            verdict,
            "disk",
            f"{memory(free / 2**20)} free for {folder}",
            "" if verdict == "ok" else "Free some space: recording stops when the disk is full.",
        )
    foreign = path and database_file.explain_foreign(path)
    if foreign:
        reason, _, remedy = foreign.partition(". ")
        yield Finding("problem", "database", reason, remedy)
        return
    engine = database.open_for_reading(url)
    state = State("viewing", "demo" if simulates else "nvml", url)
    try:
        damage = database_file.damage(engine) if path is not None and path.exists() else None
        if damage:
            remedy = "The recorder sets it aside at its next start, and makes a new one; nothing is deleted."
            yield Finding("problem", "database", f"{path} is damaged: {damage}", remedy)
            return
        if not database.exists(url):
            yield Finding("ok", "database", f"{mask_password(url)} does not exist yet; the recorder makes it")
            return
        found = health.check(engine, state, settings.host_name, settings.interval)
        with engine.connect() as connection:
            revision = database.revision(connection)
    except sa.exc.DBAPIError as error:
        remedy = (
            "Move the file away; a new one is made."
            if database.is_damage(error)
            else "Look at what else uses it, and at GPUMON_DATABASE_URL."
        )
        yield Finding("problem", "database", f"{mask_password(url)}: {error.orig}", remedy)
        return
    finally:
        engine.dispose()
    size = f", {memory(path.stat().st_size / 2**20)}" if path is not None else ""
    if revision is not None and revision > database.head():
        what = f"{mask_password(url)} was written by a newer gpumon: it has schema {revision}"
        yield Finding("problem", "database", what, "Start the newer one again: this one does not change it.")
        return
    yield Finding("ok", "database", f"{mask_password(url)}{size}, schema {revision}")
    yield _recording(path, settings, found)


def _recording(path: Path | None, settings: Settings, found: health.Health) -> Finding:
    newest = "there is no sample yet"
    if found.newest is not None:
        newest = f"the newest sample is {duration(found.age_s)} old"
        if found.age_s is None:
            newest = "the newest sample is of a time in the future: this clock, or that of the recorder, is wrong"
    if found.is_fresh:
        return Finding("ok", "recording", newest)
    lock = RecorderLock(path, settings.host_name) if path is not None else None
    who = f"{lock.holder()} records, but " if lock is not None and not lock.is_free() else "nobody records, and "
    return Finding("warning", "recording", who + newest, "Start it with ./setup.sh run, or look at its log.")


def _exposed(settings: Settings) -> list[private_files.Exposed]:
    return private_files.exposed(database.files_of(settings), settings.log_file)


def fix(settings: Settings) -> Iterator[Finding]:
    """Correct what can be corrected without asking: take the history from other users. Yields what was done."""
    for one in _exposed(settings):
        if one.obstacle:
            # The examination names it.
            continue
        if why := private_files.mend(one):
            yield Finding(
                "problem", "privacy", f"{one} can still be read by other users: {why}", "Look at the folder."
            )
        else:
            yield Finding("ok", "corrected", f"{one} cannot be read by other users of this machine any more")


def render(finding: Finding) -> str:
    """A finding as lines of text."""
    sign = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}[finding.verdict]
    line = f"{sign}  {finding.topic}: {finding.text}"
    return line + (f"\n         -> {finding.remedy}" if finding.remedy else "")


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found about this machine so far; `is_complete` once everything was looked at, `began` in seconds of
    time.monotonic."""

    findings: tuple[Finding, ...]
    began: float
    is_complete: bool

    @property
    def is_overdue(self) -> bool:
        """Whether something that it asks, such as a driver, does not answer."""
        return not self.is_complete and time.monotonic() - self.began > PATIENCE_S


_guard = threading.Lock()
_examination: Examination | None = None


def examination(settings: Settings) -> Examination:
    """What `examine` finds, for a page: it is made in the background, and all viewers share it. The first one who
    asks gets what is known so far."""
    global _examination  # noqa: PLW0603 - all viewers share it
    with _guard:
        found = _examination
        if found is None or (found.is_complete and time.monotonic() - found.began > EXAMINED_FOR_S):
            # The findings before are shown until the new ones are complete.
            found = _examination = Examination(found.findings if found else (), time.monotonic(), False)
            threading.Thread(
                target=_examine_in_background, args=(settings, found), name="doctor", daemon=True
            ).start()
    return found


def _examine_in_background(settings: Settings, before: Examination) -> None:
    global _examination  # noqa: PLW0603
    findings: list[Finding] = []
    try:
        for finding in examine(settings):
            findings.append(finding)
            if not before.findings:
                _examination = Examination(tuple(findings), before.began, False)
    except Exception as error:
        # Whatever happens, the page says so, and the examination is made again later.
        log.exception("the examination of this machine failed")
        findings.append(Finding("problem", "doctor", f"the examination failed: {error!r}", "Look at the log."))
    _examination = Examination(tuple(findings), before.began, True)
