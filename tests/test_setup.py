"""setup.sh: its verbs, and what it says where something is missing."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE_S, ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """setup.sh in a folder of its own, with nothing installed."""
    shutil.copy(ROOT / "setup.sh", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    shutil.copytree(ROOT / ".streamlit", tmp_path / ".streamlit")
    (tmp_path / "bin").mkdir()
    for program in ("bash", "dirname", "cat", "cksum", "tr", "rm", "touch", "env", "id"):
        found = shutil.which(program)
        assert found
        (tmp_path / "bin" / program).symlink_to(found)
    return tmp_path


def setup(tree: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / "setup.sh", *arguments],
        env={"PATH": str(tree / "bin"), "HOME": str(tree), **more},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def program(tree: Path, name: str, script: str) -> None:
    path = tree / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def test_setup_explains_each_verb(tree: Path) -> None:
    for arguments in ((), ("--help",)):
        done = setup(tree, *arguments)
        assert done.returncode == 0
        for verb in ("run", "demo", "test", "clean"):
            assert f"  {verb} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "python", "sentence"),
    [
        (("dance",), None, "there is no verb 'dance'"),
        (("run",), None, "python3 is not installed"),
        (("run",), 'if [ "$1" = -c ]; then exit 1; else echo "Python 3.9.2"; fi', "needs Python 3.11 or newer"),
        (("run",), 'case "$2" in *ensurepip*) exit 1 ;; esac', "venv module is missing"),
    ],
)
def test_setup_fails_in_one_clear_sentence(
    tree: Path, arguments: tuple[str, ...], python: str | None, sentence: str
) -> None:
    if python is not None:
        program(tree, "python3", python)
    done = setup(tree, *arguments)
    assert done.returncode != 0
    [line] = done.stderr.splitlines()
    assert line.startswith("setup.sh: ")
    assert sentence in line


def test_setup_names_a_taken_port(tree: Path) -> None:
    (tree / ".venv").symlink_to(Path(sys.executable).parent.parent)
    installed = subprocess.run(
        ["bash", "-c", "cat requirements*.txt | cksum | tr -d ' '"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    (tree / ".venv").unlink()
    (tree / ".venv" / "bin").mkdir(parents=True)
    (tree / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tree / ".venv" / f".installed-requirements.txt-{installed.stdout.strip()}").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, more in ((("--server.port", port), {}), ((), {"STREAMLIT_SERVER_PORT": port})):
            done = setup(tree, "run", *arguments, **more)
            assert done.returncode == 1
            [line] = done.stderr.splitlines()
            assert f"127.0.0.1:{port} cannot be served" in line
    assert "is not a port" in setup(tree, "run", "--server.port", "http").stderr
