"""Examine this machine: driver, GPUs, permissions, disk, database and
recorder, and say what to do about each thing that is missing.

Ends with 1 where something needs mending.
"""

from __future__ import annotations

import argparse

from gpumon_core.cli import terminal
from gpumon_core.settings import Settings

SUMMARY = "Examine this machine, and say what needs mending."
EXAMPLES = (
    ("", "everything that it looks at"),
    ("| grep -A1 PROBLEM", "only what needs mending"),
)


def add(_: argparse.ArgumentParser) -> None:
    """It takes no arguments."""


def run(settings: Settings, _: argparse.Namespace) -> int:
    """Print every finding as it is made."""
    from gpumon_core.doctor import examine, render

    problems = 0
    for finding in examine(settings):
        print(render(finding), flush=True)
        problems += finding.verdict == "problem"
    return terminal.FAILED if problems else terminal.FINE
