"""To come."""

from __future__ import annotations

import argparse

from gpumon_core.settings import Settings

SUMMARY = "To come."
EXAMPLES: tuple[tuple[str, str], ...] = ()


def add(_: argparse.ArgumentParser) -> None:
    """To come."""


def run(_: Settings, __: argparse.Namespace) -> int:
    """To come."""
    return 1
