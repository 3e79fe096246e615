"""./gpumon runs the command line without a word about .venv, from any folder and through a link."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli import NOON, record, settings
from conftest import PATIENCE_S, ROOT, eventually
from sandbox import Sandbox, steps

LAUNCHER = ROOT / "gpumon"
# A name that is hard on shell scripts.
TREE = "-a tree's $HOME"
# In the place of .venv's Python: says where it runs, and what it is given.
STUB = """#!/bin/sh
printf '%s\\n' "$(pwd -P)" "$_GPUMON_CALLED_FROM" "$_GPUMON_CALLED_AS" "$@"
"""
EXPORT = ("export", "--table", "metrics", "--since", str(NOON - 3600), "--out")


def call(command: str | Path, *arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    # Settings of the test's own would hide those of the tree.
    environ = {name: value for name, value in settings(cwd).items() if not name.startswith("GPUMON_")}
    return subprocess.run(
        [command, *arguments],
        cwd=cwd,
        env=environ | {"GPUMON_SOURCE": "nvml", "GPUMON_HOST_NAME": "box"} | more,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


# ---- The script --------------------------------------------------------------------------------------


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """The launcher in a tree whose Python only says what it is given."""
    tree = tmp_path / TREE
    (tree / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(LAUNCHER, tree)
    (tree / ".venv" / "bin" / "python").write_text(STUB)
    (tree / ".venv" / "bin" / "python").chmod(0o755)
    return tree


def test_it_runs_the_core_in_its_own_tree_with_the_arguments_as_they_are(stub: Path, tmp_path: Path) -> None:
    done = call(stub / "gpumon", "a b", "", "$HOME", "-c", cwd=tmp_path)
    assert done.returncode == 0
    expected = [str(stub), str(tmp_path), str(stub / "gpumon"), "-m", "gpumon_core", "a b", "", "$HOME", "-c"]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize("command", ["{tmp}/elsewhere/gm", "./bin/gm", "bin/first", "gm", "{name}/gpumon"])
def test_it_finds_its_tree_through_links_to_links_and_from_the_path(
    stub: Path, tmp_path: Path, command: str
) -> None:
    places = tmp_path / "bin"
    places.mkdir()
    (places / "first").symlink_to(f"../{stub.name}/gpumon")
    (places / "gm").symlink_to("first")
    (tmp_path / "elsewhere").symlink_to(places)
    typed = command.format(tmp=tmp_path, name=f"./{stub.name}")
    path = f"{places}:{os.environ['PATH']}"
    # As a shell finds it.
    done = call("sh", "-c", '"$0" top', typed, cwd=tmp_path, PATH=path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [str(stub), str(tmp_path), typed, "-m", "gpumon_core", "top"]


def test_a_folder_that_is_gone_is_no_obstacle(stub: Path, tmp_path: Path) -> None:
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$0" top'
    done = call("sh", "-c", script, str(stub / "gpumon"), cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == str(stub)


@pytest.mark.parametrize("what", ["nothing", "a link to nowhere"])
def test_without_a_virtual_environment_it_says_what_makes_one(tmp_path: Path, what: str) -> None:
    tree = tmp_path / "new tree"
    tree.mkdir()
    shutil.copy(LAUNCHER, tree)
    if what != "nothing":
        # As after an upgrade of the system's Python.
        (tree / ".venv" / "bin").mkdir(parents=True)
        (tree / ".venv" / "bin" / "python").symlink_to("/usr/bin/python3.5")
    done = call(tree / "gpumon", "top", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("gpumon: ")
    assert f"{tree}/setup.sh run" in line


# ---- The whole of it ---------------------------------------------------------------------------------


def venv(place: Path, packages: bool = True) -> None:
    """A virtual environment, as setup.sh makes one, with the packages that run the tests or with none."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    [site] = place.glob("lib/python3*/site-packages")
    if packages:
        (site / "tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a history, on the packages that run the tests."""
    tree = tmp_path_factory.mktemp("trees") / TREE
    tree.mkdir()
    shutil.copy(LAUNCHER, tree)
    (tree / "gpumon_core").symlink_to(ROOT / "gpumon_core")
    venv(tree / ".venv")
    record(f"sqlite:///{tree / 'history' / 'gpumon.db'}", 30).dispose()
    return tree


def rows(path: Path) -> int:
    return len(path.read_text().splitlines()) - 1


def test_history_and_settings_are_those_of_its_tree_and_files_are_where_it_was_called(
    tree: Path, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("GPUMON_INTERVAL=never\n")
    for name in ("gpumon_core", "argparse", "sqlite3"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the wrong folder')\n")
    done = call(tree / "gpumon", *EXPORT, "out.csv", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(tmp_path / "out.csv") == 60
    assert not (tmp_path / "history").exists()
    (tree / ".env").write_text("GPUMON_INTERVAL=often\n")
    try:
        done = call(tree / "gpumon", *EXPORT, "more.csv", cwd=tmp_path)
    finally:
        (tree / ".env").unlink()
    assert done.returncode == 1
    assert "GPUMON_INTERVAL=often" in done.stderr


def test_every_file_that_a_verb_takes_is_where_it_was_called(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    assert call(tree / "gpumon", "backup", "--out", "copy.db", cwd=tmp_path / "below").returncode == 0
    assert (tmp_path / "below" / "copy.db").is_file()
    (tmp_path / "gpu_metrics.db").write_bytes(b"not a database")
    done = call(tree / "gpumon", "import", "../gpu_metrics.db", "--dry-run", cwd=tmp_path / "below")
    assert done.returncode == 1
    assert "gpu_metrics.db" in done.stderr
    assert "No such file" not in done.stderr


def test_in_its_own_folder_a_file_stays_as_it_was_typed_and_an_absolute_one_is_itself(
    tree: Path, tmp_path: Path
) -> None:
    assert call("./gpumon", *EXPORT, "own.csv", cwd=tree).stdout.endswith(" in own.csv\n")
    assert rows(tree / "own.csv") == 60
    assert call("./gpumon", *EXPORT, str(tmp_path / "absolute.csv"), cwd=tree).returncode == 0
    assert rows(tmp_path / "absolute.csv") == 60


def test_usage_shows_how_it_was_called(tree: Path) -> None:
    done = call("./gpumon", "export", "--help", cwd=tree)
    assert done.stdout.startswith("usage: ./gpumon export ")
    assert "\n  ./gpumon export --table history" in done.stdout
    assert call("./gpumon", "dance", cwd=tree).stderr.endswith("(see ./gpumon --help)\n")
    wrong = call("./gpumon", "usage", "--since", "whenever", cwd=tree).stderr
    assert wrong.endswith("(see ./gpumon usage --help)\n")


def test_how_it_was_called_is_not_reported_as_a_mistyped_setting(tree: Path, tmp_path: Path) -> None:
    assert "is not a setting" not in call(tree / "gpumon", "doctor", cwd=tmp_path).stdout


@pytest.mark.parametrize("verb", ["export", "record"])
def test_with_packages_missing_it_says_what_installs_them(tmp_path: Path, verb: str) -> None:
    shutil.copy(LAUNCHER, tmp_path)
    (tmp_path / "gpumon_core").symlink_to(ROOT / "gpumon_core")
    venv(tmp_path / ".venv", packages=False)
    done = call(tmp_path / "gpumon", verb, cwd=tmp_path)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "is not installed" in line
    assert "./setup.sh run" in line


def test_a_signal_reaches_the_verb_and_its_status_the_caller(tree: Path, tmp_path: Path) -> None:
    environ = settings(tmp_path) | {"GPUMON_SOURCE": "demo", "GPUMON_DATA_DIR": str(tmp_path / "own")}
    with subprocess.Popen([tree / "gpumon", "record"], cwd=tmp_path, env=environ) as running:
        eventually((tmp_path / "own" / "demo.db").exists)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=PATIENCE_S) == 0


def test_the_image_has_it_on_its_path(tmp_path: Path) -> None:
    made = " ".join(step.value for step in steps()[-1] if step.name == "RUN")
    assert "ln -s /opt/gpumon /app/.venv" in made
    assert "ln -s /app/gpumon /usr/local/bin/gpumon" in made
    box = Sandbox(tmp_path / "box")
    # The image's packages are those that run the tests.
    (box.image / "app" / ".venv").symlink_to(sys.prefix)
    done = box.run(["sh", "-c", "cd /tmp && exec /app/gpumon snapshot --json"], GPUMON_SOURCE="demo")
    assert done.returncode == 0, done.stderr
    assert '"source": "demo"' in done.stdout
