"""Read every GPU once and print it: a table for people, or everything as JSON.

This asks the driver, whether a recorder runs or not; where a GPU measures between two readings (Hopper and newer),
it asks twice, a second apart.
"""

from __future__ import annotations

import argparse
import json

from gpumon_core.cli import terminal
from gpumon_core.settings import Settings

# The longest wait for model servers and container engines.
PATIENCE_S = 2.0
SUMMARY = "Read every GPU once and print it."
EXAMPLES = (
    ("", "the GPUs and their processes, as a table"),
    ("--json | jq '.gpus[].temperature'", "one value of each GPU"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Add the argument for JSON."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """Read the GPUs, and print them."""
    from gpumon_core.export import snapshot as export
    from gpumon_core.recording import collector

    chosen = collector.chosen(settings, terminal.say)
    try:
        taken, identities = chosen.observe_once(PATIENCE_S)
    finally:
        chosen.close()
    if arguments.json:
        tick = export.as_json(taken, identities, chosen.source.name)
        print(json.dumps(tick, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print(export.as_text(taken, identities, chosen.source.name))
    return terminal.FINE
