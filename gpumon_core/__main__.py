"""The command line: python -m gpumon_core VERB."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from gpumon_core import __version__, logs, observer
from gpumon_core.settings import Settings, SettingsError, check_data_dir, load, unknown_variables
from gpumon_core.store.database import DatabaseError
from gpumon_core.telemetry.records import SourceUnavailable


def record(settings: Settings, _: argparse.Namespace) -> int:
    """Record without a server, until SIGTERM or Ctrl-C."""
    from gpumon_core.recorder import run_until

    if not settings.record:
        return _fail("GPUMON_RECORD=false forbids what `record` is for: set it to true")
    check_data_dir(settings)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    run_until(settings, stopped)
    return 0


def snapshot(settings: Settings, arguments: argparse.Namespace) -> int:
    """Read every GPU once and print it."""
    from gpumon_core.export import snapshot as export

    try:
        chosen = observer.SimulatedObserver(settings) if settings.source == "demo" else observer.real(settings)
    except SourceUnavailable as error:
        if settings.source == "nvml":
            raise
        print(f"gpumon: {error}. These GPUs are simulated. {error.remedy}", file=sys.stderr)
        chosen = observer.SimulatedObserver(settings)
    try:
        taken, identities = chosen.observe()
    finally:
        chosen.close()
    if arguments.json:
        tick = export.as_json(taken, identities, chosen.source.name)
        print(json.dumps(tick, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(export.as_text(taken, identities, chosen.source.name))
    return 0


def doctor(settings: Settings, _: argparse.Namespace) -> int:
    """Examine this machine; ends with 1 where something needs mending."""
    from gpumon_core.doctor import examine, render

    problems = 0
    for finding in examine(settings):
        print(render(finding), flush=True)
        problems += finding.verdict == "problem"
    return 1 if problems else 0


VERBS: dict[str, Callable[[Settings, argparse.Namespace], int]] = {
    "record": record,
    "snapshot": snapshot,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the result is the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gpumon_core",
        description="gpumon, the GPU Model Monitor, without its server.",
        epilog="Settings come from GPUMON_* variables and .env: see the README.",
    )
    parser.add_argument("--version", action="version", version=f"gpumon {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, function in VERBS.items():
        verb = verbs.add_parser(name, help=function.__doc__, description=function.__doc__)
        if function is snapshot:
            verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    try:
        settings = load()
        logs.configure(settings.log_level)
        if chosen.verb != "doctor":
            for sentence in unknown_variables():
                print(f"gpumon: {sentence}", file=sys.stderr)
        return VERBS[chosen.verb](settings, chosen)
    except SourceUnavailable as error:
        return _fail(f"{error}. {error.remedy}")
    except (SettingsError, DatabaseError) as error:
        return _fail(str(error))


def _fail(sentence: str) -> int:
    print(f"gpumon: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
