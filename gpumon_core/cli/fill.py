"""Write simulated history of any length into demo.db, for demos and
measurements.

A history of real GPUs is never changed, whatever GPUMON_DATABASE_URL says.
demo.db must have no history of this host yet: otherwise choose another folder
with GPUMON_DATA_DIR.
"""

from __future__ import annotations

import argparse
import time

from gpumon_core.cli import terminal
from gpumon_core.settings import Settings, check_data_dir

SUMMARY = "Write simulated history into demo.db, to try gpumon."
EXAMPLES = (
    ("--days 30", "a month of four GPUs; ./setup.sh demo shows it"),
    ("--days 3 --gpus 8 --processes 64", "a larger machine"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the length and the GPUs."""
    parser.add_argument(
        "--days", type=terminal.number(0.01, 3650, float), default=3.0, help="how far back, 0.01 to 3650 (3)"
    )
    parser.add_argument("--gpus", type=terminal.number(1, 64, int), default=4, help="how many GPUs, 1 to 64 (4)")
    parser.add_argument(
        "--processes",
        type=terminal.number(0, 4096, int),
        help="about how many processes at once over all GPUs, 0 to 4096 (as many as the simulation has)",
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Write the history, and print how long it took."""
    from sqlalchemy.exc import SQLAlchemyError

    from gpumon_core.simulation import past
    from gpumon_core.store import database
    from gpumon_core.store.lock import recorder_lock
    from gpumon_core.store.writer import Writer

    check_data_dir(settings)
    url = settings.demo_database_url
    lock = recorder_lock(url, settings.host_name)
    if not lock.acquire():
        raise terminal.Failure(
            f"{lock.holder() or 'another program'} is recording into {url}, and only one program can: stop "
            "it first"
        )
    engine = database.open_for_writing(url)
    bar = terminal.Bar("hours")
    try:
        if not Writer(engine, settings.host_name, "demo", settings.interval).is_new():
            raise terminal.Failure(
                f"{url} already has a history of {settings.host_name}, which was not changed: move the file "
                "away first"
            )
        began = time.monotonic()
        ticks = past.fill(engine, settings, arguments.days, arguments.gpus, arguments.processes, bar.show)
    except ValueError as error:
        raise terminal.Failure(str(error)) from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise terminal.Failure(f"{url} cannot store the history ({cause}): check the file and the disk") from error
    finally:
        bar.end()
        size = database.size_bytes(engine) or 0
        engine.dispose()
        lock.release()
    took = time.monotonic() - began
    print(
        f"{ticks:,} ticks of {arguments.gpus} GPUs over {arguments.days:g} days in {took:.0f} s "
        f"({arguments.days * 24 * 60 / max(took, 0.001):,.0f} hours per minute); {size / 1e6:.1f} MB in {url}"
    )
    return terminal.FINE
