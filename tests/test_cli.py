"""The command line's manners: help that is true, pipes, signals, exit statuses; and `usage`."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli import HOSTILE, NOON, PROGRAM, gpumon, record, settings
from conftest import PATIENCE_S, ROOT

from gpumon_core.__main__ import VERBS, module, parser
from gpumon_core.store import database
from gpumon_core.store.queries import usage

SINCE = ("--since", str(NOON - 3600))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    record(f"sqlite:///{folder / 'gpumon.db'}", 1500).dispose()
    return folder


def test_the_page_about_it_is_what_it_says_itself() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "docs" / "cli_reference.py")
    assert spec
    assert spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text() == reference.page(), "run docs/cli_reference.py"


@pytest.mark.parametrize("arguments", [["--help"], ["record", "--help"], ["snapshot", "--help"]], ids=" ".join)
def test_it_explains_itself(folder: Path, arguments: list[str]) -> None:
    done = gpumon(settings(folder), *arguments)
    assert done.returncode == 0
    assert "usage:" in done.stdout


@pytest.mark.parametrize("name", VERBS)
def test_every_example_is_one_that_works(name: str) -> None:
    assert module(name).EXAMPLES
    for command, _ in module(name).EXAMPLES:
        words = shlex.split(command.split(" > ")[0].split("|")[0])
        assert parser([name]).parse_args([name, *words]).verb == name


def test_help_shows_examples_and_the_exit_statuses(folder: Path) -> None:
    whole = gpumon(settings(folder), "--help")
    assert whole.returncode == 0
    for text in (*VERBS, "exit status:", "130"):
        assert text in whole.stdout
    one = gpumon(settings(folder), "export", "--help")
    assert one.stdout.startswith("usage: python -m gpumon_core export ")
    assert "python -m gpumon_core export --table history --since 24h" in one.stdout


@pytest.mark.parametrize("words", [(), ("dance",), ("top", "--interval", "0"), ("snapshot", "--xml")])
def test_wrong_usage_is_one_line_and_2(folder: Path, words: tuple[str, ...]) -> None:
    done = gpumon(settings(folder), *words)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("gpumon: ")
    assert "--help" in line


def test_record_needs_none_of_what_the_other_verbs_do() -> None:
    code = (
        "import sys; from gpumon_core.__main__ import parser; parser(['record']); "
        "import gpumon_core.recording.recorder; "
        "print(*{'pandas', 'plotly', 'pyarrow', 'numpy', 'tty', 'gpumon_core.cli.top'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_a_reader_that_goes_away_ends_it_without_a_word(folder: Path) -> None:
    command = shlex.join([*PROGRAM, "export", "--table", "metrics"])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env=settings(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (141, "", 1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_without_a_traceback_also_without_a_reader(
    folder: Path, number: signal.Signals, status: int
) -> None:
    with subprocess.Popen(
        [*PROGRAM, "export", "--table", "metrics"],
        cwd=ROOT,
        env=settings(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        # It has begun, and soon waits for somebody to read on.
        process.stdout.read(1)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE_S) == status
        assert process.stderr.read() == b""


def test_a_full_disk_is_one_line(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*PROGRAM, "usage", *SINCE],
            cwd=ROOT,
            env=settings(folder),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in done.stderr


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(folder: Path, tmp_path: Path) -> None:
    words = ["export", "--table", "metrics", "--force", "--out", str(tmp_path / "out.csv")]
    assert gpumon(settings(folder), *words).stderr == ""
    master, slave = os.openpty()
    subprocess.run([*PROGRAM, *words], cwd=ROOT, env=settings(folder), stderr=slave, stdout=slave, check=True)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "100%  3,000 of 3,000 rows" in shown


# ---- usage -------------------------------------------------------------------------------------------


def test_the_parts_of_usage_add_up_in_every_format(folder: Path) -> None:
    environ = settings(folder, GPUMON_PRICE_PER_KWH="0.5", GPUMON_CURRENCY="CHF")
    scope = usage.Scope(NOON - 3600, NOON + 7200)
    whole = usage.gpu_totals(database.open_for_reading(f"sqlite:///{folder / 'gpumon.db'}"), scope)
    energy = whole["energy_j"].sum() / 3.6e6
    answer_body = json.loads(gpumon(environ, "usage", *SINCE, "--by", "model", "--format", "json").stdout)
    assert answer_body["together"]["energy_kwh"] == pytest.approx(energy, rel=0.001)
    assert sum(row["energy_kwh"] for row in answer_body["usage"]) == pytest.approx(energy, rel=0.001)
    assert answer_body["together"]["cost"] == pytest.approx(energy / 2, rel=0.001)
    assert answer_body["together"]["energy_share_percent"] == pytest.approx(100)
    assert answer_body["together"]["gpu_hours"] == pytest.approx(whole["busy_s"].sum() / 3600, rel=0.001)
    assert (answer_body["currency"], answer_body["usage"][0]["name"]) == ("CHF", "a:7b")
    rows = list(csv.DictReader(io.StringIO(gpumon(environ, "usage", *SINCE, "--format", "csv").stdout)))
    assert {"ada", "grace"} <= {row["Name"] for row in rows}
    assert sum(float(row["Energy (kWh)"]) for row in rows) == pytest.approx(energy, rel=0.001)
    table = gpumon(environ, "usage", *SINCE, "--by", "process").stdout
    assert f"{energy:.3f}" in table.splitlines()[-1]
    assert table.splitlines()[-1].startswith("Together")
    assert "Cost (CHF)" in table
    assert HOSTILE.encode("unicode_escape").decode()[:8] in table
    assert "\x1b" not in table


def test_an_empty_range_says_so(folder: Path) -> None:
    done = gpumon(settings(folder), "usage", "--since", str(NOON + 864000))
    assert done.returncode == 0
    assert "Nothing was recorded" in done.stdout
