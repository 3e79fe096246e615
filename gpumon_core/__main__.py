"""The command line: python -m gpumon_core VERB."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from sqlalchemy.exc import SQLAlchemyError

from gpumon_core import __version__, logs, observer
from gpumon_core.cli import importing
from gpumon_core.settings import Settings, SettingsError, check_data_dir, load, unknown_variables
from gpumon_core.store.database import DatabaseError
from gpumon_core.telemetry.records import SourceUnavailable

# So long `snapshot` waits for what servers and container engines say.
PATIENCE_S = 2.0


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
        taken, identities = chosen.observe_once(PATIENCE_S)
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


def fill(settings: Settings, arguments: argparse.Namespace) -> int:
    """Write simulated history of any length into demo.db, for demos and measurements."""
    from gpumon_core import fill as filling
    from gpumon_core.store import database
    from gpumon_core.store.lock import recorder_lock
    from gpumon_core.store.writer import Writer

    check_data_dir(settings)
    # Simulated readings never enter a real history, whatever GPUMON_DATABASE_URL says.
    url = settings.demo_database_url
    lock = recorder_lock(url, settings.host_name)
    if not lock.acquire():
        return _fail(f"{lock.holder() or 'another program'} is recording into {url}: stop it first")
    engine = database.open_for_writing(url)
    try:
        if not Writer(engine, settings.host_name, "demo", settings.interval).is_new():
            return _fail(f"{url} holds a history of {settings.host_name} already: move it away first")
        bar = _Bar(sys.stderr)
        began = time.monotonic()
        ticks = filling.fill(engine, settings, arguments.days, arguments.gpus, arguments.processes, bar.show)
        bar.end()
    except ValueError as error:
        return _fail(str(error))
    except SQLAlchemyError as error:
        return _fail(f"{url} does not take the history: {getattr(error, 'orig', None) or error}")
    finally:
        size = database.size_bytes(engine) or 0
        engine.dispose()
        lock.release()
    took = time.monotonic() - began
    print(
        f"{ticks:,} ticks of {arguments.gpus} GPUs over {arguments.days:g} days in {took:.0f} s "
        f"({arguments.days * 24 * 60 / max(took, 0.001):,.0f} hours per minute); {size / 1e6:.1f} MB in {url}"
    )
    return 0


class _Bar:
    """A bar on a terminal; nothing where the output goes elsewhere."""

    WIDTH = 40

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = stream.isatty()
        self._next = 0.0

    def show(self, done: float, whole: float) -> None:
        """Draw it, a few times a second."""
        now = time.monotonic()
        if not self._shown or (now < self._next and done < whole):
            return
        self._next = now + 0.2
        part = done / whole if whole else 1.0
        full = "#" * round(self.WIDTH * part)
        self._stream.write(f"\r[{full:<{self.WIDTH}}] {part:4.0%}  {done:,.0f} of {whole:,.0f} hours ")
        self._stream.flush()

    def end(self) -> None:
        """Leave its line."""
        if self._shown:
            self._stream.write("\n")


def _number(low: float, high: float, kind: type[float] | type[int]) -> Callable[[str], float]:
    """A parser of numbers between two limits."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            whole = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {whole} from {low:g} to {high:g}")
        return number

    return parse


VERBS: dict[str, Callable[[Settings, argparse.Namespace], int]] = {
    "record": record,
    "snapshot": snapshot,
    "doctor": doctor,
    "fill": fill,
    "import": importing.run,
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
        if function is importing.run:
            importing.add(verb)
        if function is snapshot:
            verb.add_argument("--json", action="store_true", help="print JSON instead of a table")
        if function is fill:
            verb.add_argument(
                "--days", type=_number(0.01, 3650, float), default=3.0, help="how far back, 0.01 to 3650 (3)"
            )
            verb.add_argument("--gpus", type=_number(1, 64, int), default=4, help="how many GPUs, 1 to 64 (4)")
            verb.add_argument(
                "--processes",
                type=_number(0, 4096, int),
                help="about how many processes at once over all GPUs, 0 to 4096 (as the story has it)",
            )
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
