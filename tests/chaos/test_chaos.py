"""A day of chaos in its short form: every trouble once, in the order that a seed gives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from postgres import Postgres

SEEDS = os.environ.get("CHAOS_SEEDS", "19").split()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end; its report is shown where a test fails."""
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1700, check=False)
    sys.stdout.write(f"python {' '.join(command[1:])}\n{done.stdout}{done.stderr}")
    return done


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_every_tick_is_recorded_or_named_as_lost(seed: str) -> None:
    assert run("--seed", seed).returncode == 0


@pytest.mark.timeout(600)
def test_a_tick_that_is_missing_is_noticed() -> None:
    done = run("--seed", "1", "--only", "theft")
    assert done.returncode == 1
    assert "are neither in its database nor named as lost" in done.stdout


@pytest.mark.timeout(900)
def test_a_database_server_that_fails_costs_no_tick(postgres: Postgres) -> None:
    del postgres
    assert (
        run("--postgresql", "--seed", "1", "--only", "pg_lock,pg_cut,pg_silent,pg_away,stop,term").returncode == 0
    )
