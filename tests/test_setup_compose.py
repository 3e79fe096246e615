"""setup.sh drives Docker Compose, and says what is missing in one sentence; the engine here is a script."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from sandbox import ROOT

DOCKER = """#!/bin/sh
echo "$PUID:$PGID $*" >>"$ASKED"
case "$*" in
    "compose version --short") [ -n "$COMPOSE" ] || exit 1; echo "$COMPOSE" ;;
    "info --format {{.ServerVersion}}") [ -z "$ENGINE" ] || { echo "$ENGINE" >&2; exit 1; }; echo 28.2 ;;
    "info --format {{.OperatingSystem}} {{json .Runtimes}}") echo "$RUNTIMES" ;;
    "info --format {{.SecurityOptions}}") echo "$SECURITY" ;;
esac
"""
READY = {
    "COMPOSE": "2.40.3",
    "ENGINE": "",
    "RUNTIMES": 'Debian {"io.containerd.runc.v2":{},"nvidia":{}}',
    "SECURITY": "[]",
}


class Machine:
    """A tree of its own, and a PATH on which Docker is what a test wants it to be."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.bin, self.asked = folder / "tree", folder / "bin", folder / "asked"
        self.tree.mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "setup.sh", self.tree)
        for name in ("bash", "dirname", "sort", "head", "stat", "mkdir", "chown", "id", "cat"):
            program = shutil.which(name)
            assert program
            (self.bin / name).symlink_to(program)

    def docker(self) -> None:
        (self.bin / "docker").write_text(DOCKER)
        (self.bin / "docker").chmod(0o755)

    def setup(self, *arguments: str, **answers: str) -> subprocess.CompletedProcess[str]:
        variables = READY | answers | {"PATH": str(self.bin), "ASKED": str(self.asked)}
        return subprocess.run(
            ["bash", self.tree / "setup.sh", *arguments],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )

    def composed(self) -> list[str]:
        """What Compose was asked to do, with the user that it was given."""
        lines = self.asked.read_text().splitlines() if self.asked.exists() else []
        return [line for line in lines if " compose " in line and "compose version" not in line]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    found = Machine(tmp_path)
    found.docker()
    return found


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("setup.sh: ")
    return line


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "status", "logs", "build"])
def test_without_docker_every_verb_says_how_to_get_it_or_do_without(tmp_path: Path, verb: str) -> None:
    line = one_sentence(Machine(tmp_path).setup(verb))
    assert "Docker is not installed" in line
    assert "./setup.sh run" in line


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"COMPOSE": ""}, "Docker Compose is missing"),
        ({"COMPOSE": "2.9.1"}, "2.24 or newer is needed, and this is 2.9.1"),
        ({"COMPOSE": "v1.29.2"}, "2.24 or newer is needed, and this is 1.29.2"),
        ({"ENGINE": "Cannot connect to the Docker daemon. Is it running?"}, "sudo systemctl start docker"),
        ({"ENGINE": "permission denied while trying to connect to the API"}, "sudo ./setup.sh start"),
        ({"RUNTIMES": 'Debian {"runc":{}}'}, "NVIDIA Container Toolkit is missing"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(machine: Machine, answers: dict[str, str], said: str) -> None:
    assert said in one_sentence(machine.setup("start", **answers))
    assert machine.composed() == []
    assert not (machine.tree / "history").exists()


@pytest.mark.parametrize("version", ["2.24.0", "v2.24.6-desktop.1", "2.40.3+ds1-0ubuntu1", "5.0.0"])
def test_newer_versions_of_compose_will_do(machine: Machine, version: str) -> None:
    assert machine.setup("start", COMPOSE=version).returncode == 0


def test_the_runtime_of_docker_desktop_is_out_of_sight_and_may_be_there(machine: Machine) -> None:
    assert machine.setup("start", RUNTIMES='Docker Desktop {"runc":{}}').returncode == 0


def test_start_makes_the_folders_and_runs_as_their_owner(machine: Machine) -> None:
    (machine.tree / "history").mkdir()
    if os.geteuid() == 0:
        os.chown(machine.tree / "history", 1234, 2345)
    owner = (machine.tree / "history").stat()
    assert machine.setup("start").returncode == 0
    assert (machine.tree / "logs").is_dir()
    assert machine.composed() == [f"{owner.st_uid}:{owner.st_gid} compose up --detach"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_started_with_sudo_the_folders_belong_to_who_asked(machine: Machine) -> None:
    machine.setup("start", SUDO_UID="1234", SUDO_GID="2345")
    for name in ("history", "logs"):
        found = (machine.tree / name).stat()
        assert (found.st_uid, found.st_gid) == (1234, 2345)
    assert machine.composed() == ["1234:2345 compose up --detach"]


def test_a_rootless_engine_calls_its_user_root(machine: Machine) -> None:
    (machine.tree / "history").mkdir()
    if os.geteuid() == 0:
        os.chown(machine.tree / "history", 1234, 2345)
    machine.setup("start", SECURITY="[name=seccomp,profile=builtin name=rootless]")
    assert machine.composed() == ["0:0 compose up --detach"]


@pytest.mark.parametrize(
    ("verb", "asked"),
    [
        ("stop", "compose stop"),
        ("status", "compose ps --all"),
        ("logs", "compose logs --follow --tail 200"),
        ("build", "compose build --pull"),
    ],
)
def test_the_other_verbs_are_those_of_compose_and_need_no_gpu(machine: Machine, verb: str, asked: str) -> None:
    assert machine.setup(verb, RUNTIMES="").returncode == 0
    assert machine.composed() == [f": {asked}"]


def test_a_restart_takes_over_the_new_image_and_the_new_settings(machine: Machine) -> None:
    machine.setup("restart")
    (line,) = machine.composed()
    assert line.endswith("compose up --detach --force-recreate")


def test_options_go_to_compose(machine: Machine) -> None:
    machine.setup("logs", "--since", "1h")
    assert machine.composed()[0].endswith("--tail 200 --since 1h")


def test_the_help_lists_every_verb(machine: Machine) -> None:
    help_text = machine.setup("--help").stdout
    for verb in ("run", "demo", "test", "clean", "start", "stop", "restart", "status", "logs", "build"):
        assert f"\n  {verb} " in help_text
