"""What the documentation says is true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from gpumon_core.__main__ import VERBS
from gpumon_core.settings import markdown_table
from gpumon_core.store.schema import metadata

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_settings_table_is_that_of_the_code() -> None:
    shown = README.split("<!-- settings -->\n")[1].split("<!-- /settings -->")[0].strip()
    assert shown == markdown_table(), "run docs/settings_table.py"


def test_every_table_of_the_database_is_explained() -> None:
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", README, re.MULTILINE))))
    assert set(metadata.tables) <= explained


def test_every_picture_and_file_it_names_exists() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    for script in re.findall(r"`(\w+\.py)` \|$", README, re.MULTILINE):
        assert (ROOT / "benchmarks" / script).is_file(), script


def test_every_command_it_names_exists() -> None:
    for verb in re.findall(r"-m gpumon_core (\w+)", README):
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
