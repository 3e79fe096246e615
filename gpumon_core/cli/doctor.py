"""Examine this machine: driver, GPUs, permissions, disk, database and
recorder, and say what to do about each thing that is missing.

It changes nothing, unless --fix is given. Ends with 1 where something needs
mending.
"""

from __future__ import annotations

import argparse
from itertools import chain

from gpumon_core.cli import terminal
from gpumon_core.settings import Settings

SUMMARY = "Examine this machine, and say what needs mending."
EXAMPLES = (
    ("", "everything that it looks at"),
    ("--fix", "the same, and keep the history from other users of this machine"),
    ("| grep -A1 PROBLEM", "only what needs mending"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Whether it may mend."""
    parser.add_argument(
        "--fix",
        action="store_true",
        help="let nobody else on this machine look into the history, its copies and the log: files that gpumon "
        "made and this user owns, and their folder where nothing else is in it",
    )


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Print every finding as it is made."""
    from gpumon_core.doctor import examine, fix, render

    problems = 0
    for finding in chain(fix(settings) if arguments.fix else (), examine(settings)):
        print(render(finding), flush=True)
        problems += finding.verdict == "problem"
    return terminal.FAILED if problems else terminal.FINE
