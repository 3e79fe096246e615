"""What the documentation says is true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from gpumon_core.__main__ import VERBS
from gpumon_core.settings import markdown_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_settings_table_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    shown = page.split("<!-- settings -->\n")[1].split("<!-- /settings -->")[0].strip()
    assert shown == markdown_table(), "run docs/settings_table.py"


def test_it_says_what_gpumon_is_in_five_lines_and_shows_it() -> None:
    lines = README.splitlines()
    assert lines[0] == "# gpumon"
    assert all(lines[2:7])
    assert lines[7] == ""
    assert lines[8].startswith("![")


def test_it_is_short_enough_for_a_newcomer() -> None:
    assert len((ROOT / "README.md").read_bytes()) < 9000


def test_the_two_commands_come_first() -> None:
    assert README.split("```sh\n")[1].split("```")[0].count("./setup.sh") == 2


def test_the_comparison_says_when_it_was_made_and_what_others_are_better_at() -> None:
    section = README.split("## How it compares\n")[1].split("\n## ")[0]
    assert re.search(r"As of \d+ \w+ \d{4}", section)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    names = " ".join(row[0] for row in rows)
    for tool in ("nvidia-smi", "nvitop", "nvtop", "dcgm-exporter", "Beszel", "GPU Hot", "gpu-monitor"):
        assert tool in names
    assert all(row[-1].strip() for row in rows)
    assert "What gpumon does not do:" in section


def test_every_script_that_measures_a_figure_exists() -> None:
    scripts = re.findall(r"`(\w+\.py)` \|$", (ROOT / "docs" / "figures.md").read_text(), re.MULTILINE)
    assert scripts
    for script in scripts:
        assert (ROOT / "benchmarks" / script).is_file(), script


def test_every_command_it_names_exists() -> None:
    for verb in re.findall(r"\./gpumon (\w+)", README):
        assert verb in VERBS
    help_text = subprocess.run([ROOT / "setup.sh", "--help"], capture_output=True, text=True, check=True).stdout
    for verb in re.findall(r"\./setup\.sh (\w+)", README):
        assert re.search(rf"^  {verb} ", help_text, re.MULTILINE), verb


def test_every_page_it_names_is_served_there() -> None:
    main = (ROOT / "pages" / "main.py").read_text()
    for address in re.findall(r"\(`/(\w+)`\)", README):
        assert f'url_path="{address}"' in main


def test_no_text_names_a_place_that_only_one_machine_has() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".sh", ".toml", ".txt", ".css", ".c", ".h"} and path.is_file():
            assert "/" + "root/" not in path.read_text(), name
