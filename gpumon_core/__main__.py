"""The command line: ./gpumon VERB, or python -m gpumon_core VERB."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

from gpumon_core import __version__
from gpumon_core.cli import terminal

# Verb -> its module in gpumon_core.cli.
VERBS = {
    "record": "record",
    "snapshot": "snapshot",
    "top": "top",
    "usage": "usage",
    "export": "export",
    "backup": "backup",
    "import": "importing",
    "doctor": "doctor",
    "fill": "fill",
}


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where to find help."""
        terminal.say(f"{message} (see {self.prog} --help)")
        sys.exit(terminal.WRONG)


def module(verb: str) -> Any:
    """The module of a verb: see gpumon_core.cli."""
    return import_module(f"gpumon_core.cli.{VERBS[verb]}")


def parser(verbs: Sequence[str] = tuple(VERBS)) -> Parser:
    """A parser of command lines with one of these verbs."""
    statuses = "".join(f"  {status:>3}  {meaning}\n" for status, meaning in terminal.STATUSES.items())
    whole = Parser(
        prog=terminal.PROGRAM,
        description="gpumon, the GPU Model Monitor, without its server.",
        epilog=f"Settings are GPUMON_* variables, also in .env: see docs/settings.md.\n\nexit status:\n{statuses}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"gpumon {__version__}")
    parsers = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in verbs:
        verb = module(name)
        examples = "".join(
            f"  {terminal.PROGRAM} {name} {command}".rstrip() + f"\n      {why}\n"
            for command, why in verb.EXAMPLES
        )
        one = parsers.add_parser(
            name,
            help=verb.SUMMARY,
            description=verb.__doc__,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add(one)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _prepare_output()
        # Load only the module of the verb, not the modules of all verbs.
        chosen = parser(given[:1] if given and given[0] in VERBS else tuple(VERBS)).parse_args(given)
        status = _run(chosen)
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "gpumon_core":
            raise
        # The installation was interrupted, or is older than this tree.
        terminal.say(f"the package {error.name} is not installed for {sys.executable}; ./setup.sh run installs it")
        return terminal.FAILED
    except KeyboardInterrupt:
        # Nobody reads the rest of the output, and writing it could block.
        _give_up_output()
        return terminal.INTERRUPTED
    except SystemExit as error:
        if error.code == terminal.TERMINATED:
            _give_up_output()
        raise
    except BrokenPipeError:
        _give_up_output()
        return terminal.NO_READER
    except OSError as error:
        terminal.say(f"{error.filename or 'the output'} cannot be read or written: {error.strerror or error}")
        _give_up_output()
        return terminal.FAILED


def _prepare_output() -> None:
    """Write UTF-8 whatever the locale is, because names may have any characters."""
    # A stream that was closed before the program started is None.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _give_up_output() -> None:
    """Send the rest of the output to /dev/null: Python would try to write it once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(chosen: argparse.Namespace) -> int:
    from gpumon_core import logs
    from gpumon_core.settings import SettingsError, load, unknown_variables
    from gpumon_core.store.database import DatabaseError
    from gpumon_core.telemetry.records import SourceUnavailable

    try:
        settings = load()
        logs.configure(settings.log_level)
        if chosen.verb != "doctor":
            for sentence in unknown_variables():
                terminal.say(sentence)
        terminal.ends_with_cleanup()
        return int(module(chosen.verb).run(settings, chosen))
    except terminal.Usage as error:
        terminal.say(f"{error} (see {terminal.PROGRAM} {chosen.verb} --help)")
        return terminal.WRONG
    except SourceUnavailable as error:
        terminal.say(f"{error}. {error.remedy}")
    except (SettingsError, DatabaseError, terminal.Failure) as error:
        terminal.say(str(error))
    return terminal.FAILED


if __name__ == "__main__":
    sys.exit(main())
