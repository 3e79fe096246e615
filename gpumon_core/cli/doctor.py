"""Examine this machine: driver, GPUs, permissions, disk, database and
recorder, and say what to do about each thing that is missing.

It changes nothing without --fix. The exit status is 1 where something needs to
be repaired.
"""

from __future__ import annotations

import argparse
from itertools import chain

from gpumon_core.cli import terminal
from gpumon_core.settings import Settings

SUMMARY = "Examine this machine, and say what needs to be repaired."
EXAMPLES = (
    ("", "everything that it looks at"),
    ("--fix", "the same, and make the history private on this machine"),
    ("| grep -A1 PROBLEM", "only what needs mending"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the argument for repairs."""
    parser.add_argument(
        "--fix",
        action="store_true",
        help="make the history, its copies and the log private: files that gpumon made and this user owns, and "
        "their folder if it has no other files",
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Print every finding at once."""
    from gpumon_core.doctor import examine, fix, render

    problems = 0
    for finding in chain(fix(settings) if arguments.fix else (), examine(settings)):
        print(render(finding), flush=True)
        problems += finding.verdict == "problem"
    return terminal.FAILED if problems else terminal.FINE
