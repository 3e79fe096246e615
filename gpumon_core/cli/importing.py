"""Import the history of bigsk1/gpu-monitor (the original), which is the SQLite
file gpu_metrics.db: its readings, processes and process snapshots.

The file is only read. A second import of the same file, or of one that has
grown, takes what is new. What gpumon itself has recorded does not change. A
recorder can run meanwhile, and the next run continues one that was interrupted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from gpumon_core.cli import stored, terminal
from gpumon_core.settings import Settings

if TYPE_CHECKING:
    from gpumon_core.legacy_import.importer import Report

SUMMARY = "Import the history of bigsk1/gpu-monitor (its gpu_metrics.db)."
EXAMPLES = (
    ("history/gpu_metrics.db --dry-run", "say what would be taken, and change nothing"),
    ("history/gpu_metrics.db", "take it; again later for what is new"),
    ("gpu_metrics.db --gpu 1", "a file that does not say which GPU it is about"),
    ("gpu_metrics.db --gpu 0=GPU-5f2c --gpu 1=0", "a file of several GPUs"),
)
STAYS = "What was taken before stays: run the same command again to go on."


def add(parser: argparse.ArgumentParser) -> None:
    """Add this verb's arguments."""
    parser.add_argument(
        "file", type=terminal.named_file, metavar="FILE", help="the original's gpu_metrics.db; it is only read"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be taken, and change nothing")
    parser.add_argument(
        "--gpu",
        action="append",
        default=[],
        metavar="[INDEX=]GPU",
        help=f"which of this host's GPUs the file (or its GPU INDEX) is about: {stored.SPELLINGS}; may be given "
        "several times",
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Import, and print what was taken; 1 where the import stopped early, 2 where --gpu is needed."""
    from gpumon_core.legacy_import import importer
    from gpumon_core.legacy_import.import_records import ImportRefused
    from gpumon_core.legacy_import.sqlite_file import SqliteFileError

    dry = arguments.dry_run
    began = time.monotonic()
    bar = terminal.Bar("hours")
    try:
        report = importer.run(settings, arguments.file, arguments.gpu, dry, bar.show)
    except ImportRefused as refused:
        if refused.status == terminal.WRONG:
            raise terminal.Usage(str(refused)) from refused
        raise terminal.Failure(f"{refused}.") from refused
    except SqliteFileError as error:
        raise terminal.Failure(str(error)) from error
    except SQLAlchemyError as error:
        what = f"the database refuses it: {getattr(error, 'orig', None) or error}. {STAYS}"
        raise terminal.Failure(what) from error
    except OSError as error:
        raise terminal.Failure(f"{error.filename or arguments.file}: {error.strerror or error}.") from error
    except KeyboardInterrupt:
        bar.end()
        terminal.say(f"interrupted. {STAYS}")
        return terminal.INTERRUPTED
    finally:
        bar.end()
    print("\n".join(_lines(arguments.file, report, dry, time.monotonic() - began)))
    if report.problem is not None:
        raise terminal.Failure(f"{report.problem} What was read before that was taken.")
    return terminal.FINE


def _lines(path: Path, report: Report, dry: bool, took_s: float) -> Iterator[str]:
    from gpumon_core.legacy_import.importer import CALLED, COUNTED, moment

    contents = report.contents
    counted = ", ".join(f"{contents.rows.get(table, 0):,} {CALLED[name]}" for name, table in COUNTED)
    yield f"{path}: {counted}, from {moment(contents.first)} to {moment(contents.last)}"
    for index, target in sorted(report.targets.items()):
        which = f"its GPU {index}" if contents.several else "it"
        yield f"{which} is about GPU {target.index}, {target.name or 'of unknown model'}, {target.uuid}"
    new = [f"{count:,} {CALLED[name]}" for name, count in report.taken.items() if count]
    if not new:
        yield "Nothing in it is new."
    elif dry:
        yield f"Would be taken: {', '.join(new)}. Nothing was changed."
    else:
        yield f"Taken: {', '.join(new)}, in {took_s:.1f} s."
    if report.left_out:
        yield "Left out:"
        yield from (f"  {sentence}" for sentence in report.left_out)
