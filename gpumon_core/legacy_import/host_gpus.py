"""The GPUs of this host: from the database, or from the driver where the database has none yet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from gpumon_core.legacy_import.import_records import ImportRefused, TargetGpu, TargetHost
from gpumon_core.settings import Settings
from gpumon_core.store.lock import recorder_lock
from gpumon_core.store.schema import gpus, hosts
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import Snapshot, SourceUnavailable


@dataclass(frozen=True, slots=True)
class DriverReading:
    """One tick of the source called `source`, and the GPUs in it."""

    snapshot: Snapshot
    source: str
    targets: list[TargetGpu]


def ask_driver(settings: Settings) -> DriverReading:
    """Read the driver once. Raises ImportRefused."""
    from gpumon_core.recording.collector import real

    try:
        observer = real(settings)
    except SourceUnavailable as error:
        raise ImportRefused(
            f"gpumon has recorded no GPU of {settings.host_name} yet, and cannot ask the driver for its GPUs "
            f"({error}): start gpumon on the machine with the GPUs first, or set GPUMON_HOST_NAME to a name that "
            "it has recorded"
        ) from error
    try:
        snapshot, _ = observer.observe()
    except SourceUnavailable as error:
        remedy = error.remedy.removesuffix(".")
        raise ImportRefused(f"the driver does not say which GPUs there are ({error}). {remedy}") from error
    finally:
        observer.close()
    now = int(snapshot.timestamp)
    # No row has a negative id, so that these GPUs never match the rows of another host.
    targets = [
        TargetGpu(-number, gpu.index, gpu.uuid, gpu.name, gpu.memory_total_mib, now, now)
        for number, gpu in enumerate(snapshot.gpus, 1)
        if gpu.parent_uuid is None
    ]
    if not targets:
        raise ImportRefused(f"{settings.host_name} has no GPU: compare with nvidia-smi -L")
    return DriverReading(snapshot, observer.source.name, targets)


def store_gpus(settings: Settings, engine: Engine, reading: DriverReading) -> None:
    """Write the GPUs that the driver reported into the database. Raises ImportRefused.

    Their readings are not written: they would be a tick of gpumon's own, and the file's last ticks beside it would
    be left out; how many would depend on how long after the dry run the import runs.
    """
    lock = recorder_lock(settings.real_database_url, settings.host_name)
    if not lock.acquire():
        raise ImportRefused("a recorder is about to take its first tick: try again in a few seconds")
    try:
        writer = Writer(engine, settings.host_name, reading.source, settings.interval)
        writer.write(replace(reading.snapshot, readings=(), processes=()), {})
    finally:
        lock.release()


def recorded_gpus(name: str, engine: Engine | None) -> tuple[TargetHost, list[TargetGpu]]:
    """A host and its recorded GPUs, without MIG instances, which the original does not know."""
    if engine is None:
        return TargetHost(None, 0.0), []
    columns = ("id", "gpu_index", "uuid", "name", "memory_total_mib", "first_seen", "last_seen")
    with engine.connect() as connection:
        host = connection.execute(sa.select(hosts.c.id, hosts.c.interval_s).where(hosts.c.name == name)).first()
        if host is None:
            return TargetHost(None, 0.0), []
        query = sa.select(*(gpus.c[column] for column in columns), gpus.c.energy_from, gpus.c.state).where(
            gpus.c.host_id == host.id, gpus.c.mig_index.is_(None)
        )
        rows = connection.execute(query.order_by(gpus.c.gpu_index, gpus.c.id)).all()
    present = [row for row in rows if row.state != "gone"] or rows
    return TargetHost(host.id, host.interval_s), [
        TargetGpu(*row[: len(columns)], row.energy_from == "counter")  # type: ignore[call-arg]
        for row in present
    ]
