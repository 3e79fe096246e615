"""What ships, proved as far as it can be without an engine: image, Compose file, unit, workflow, their page."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import sandbox
from conftest import PATIENCE_S
from fake_nvml import FakeNvml, environment
from rig import free_port
from sandbox import ROOT, Sandbox, steps

PAGE = (ROOT / "docs" / "deployment.md").read_text()
UNIT = ROOT / "deploy" / "gpumon.service"
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def tool(name: str) -> str:
    """A program of requirements-dev.txt or of the system."""
    found = shutil.which(name, path=TOOLS)
    if found is None:
        pytest.skip(f"{name} is not installed; ./setup.sh test installs it")
    return found


def passes(*command: str | Path, **options: Any) -> None:
    """The program has nothing to say against what it is given."""
    name, *arguments = command
    done = subprocess.run(
        [tool(str(name)), *arguments], cwd=ROOT, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compose() -> dict[str, Any]:
    """The Compose file's one service."""
    yaml = pytest.importorskip("ruamel.yaml", reason="ruamel.yaml is not installed; ./setup.sh test installs it")
    found: dict[str, Any] = yaml.YAML(typ="safe").load((ROOT / "docker-compose.yml").read_text())["services"][
        "gpumon"
    ]
    return found


def blocks(language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


# -- the image


def test_everything_the_image_copies_exists_is_committed_and_is_not_ignored() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for sources, _ in sandbox.copies():
        for source in sources:
            assert any(name == source or name.startswith(f"{source}/") for name in tracked), source
            assert not sandbox.ignored(source)


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".git/config",
        "history/gpumon.db",
        "logs/gpumon.log",
        "tests/conftest.py",
        ".venv/bin/python",
        "deploy/x",
    ],
)
def test_no_secret_no_history_and_no_test_gets_into_the_build(path: str) -> None:
    assert sandbox.ignored(path)


def test_no_bytecode_and_no_streamlit_secrets_get_into_the_build() -> None:
    assert sandbox.ignored("gpumon_core/store/__pycache__/schema.cpython-313.pyc")
    assert sandbox.ignored(".streamlit/secrets.toml")
    assert not sandbox.ignored("gpumon_core/store/schema.py")


def test_the_image_holds_every_file_that_the_pages_and_the_core_have(tmp_path: Path) -> None:
    sandbox.build(tmp_path)
    tracked = subprocess.run(
        ["git", "ls-files", "app.py", "pages", "gpumon_core", ".streamlit"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert [name for name in tracked if not (tmp_path / "app" / name).is_file()] == []


def test_the_image_is_made_in_two_stages_and_its_bases_are_slim() -> None:
    assert [stage[0].value for stage in steps()] == ["python:3.13-slim AS build", "python:3.13-slim"]
    last = " ".join(step.value for step in steps()[-1] if step.name == "RUN")
    assert "apt-get" not in last
    assert "pip install" not in last
    assert "uninstall --yes --quiet --root-user-action=ignore pip" in last


@pytest.mark.parametrize(("python", "machine"), [("3.11", "x86_64"), ("3.13", "x86_64"), ("3.13", "aarch64")])
def test_every_package_has_a_wheel(python: str, machine: str, tmp_path: Path) -> None:
    platforms = [f"--platform={kind}_{machine}" for kind in ("manylinux2014", "manylinux_2_27", "manylinux_2_28")]
    target = ["--python-version", python, *platforms, "--target", str(tmp_path), "--ignore-installed"]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--only-binary=:all:", *target]
    # Without the hashes, for which pip would have to download every file; names and versions say which there are.
    lock = re.sub(r" *\\\n +--hash=\S+", "", (ROOT / "requirements.txt").read_text())
    (tmp_path / "lock.txt").write_text(lock)
    done = subprocess.run(
        [*command, "-r", str(tmp_path / "lock.txt")], capture_output=True, text=True, timeout=300, check=False
    )
    if re.search(r"NewConnectionError|Connection(Error| refused)|Temporary failure|Timeout", done.stderr):
        pytest.skip("the package registry cannot be reached")
    assert done.returncode == 0, done.stderr


def test_hadolint_finds_nothing() -> None:
    passes("hadolint", "Dockerfile")


# -- the image's entry point, as a user without a name on a read-only tree


@pytest.fixture
def box(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path / "box")


def test_nothing_but_the_volumes_and_tmp_can_be_written(box: Sandbox) -> None:
    tried = "/app/x /app/gpumon_core/x /x /usr/x /etc/x history/x logs/x /tmp/x"
    done = box.run(["sh", "-c", f"id -u; for file in {tried}; do touch $file && echo $file; done"])
    assert done.stdout.split() == [str(sandbox.USER), "history/x", "logs/x", "/tmp/x"]
    # Not for want of permission alone: root could not either.
    assert done.stderr.count("Read-only file system") == 5


class Container:
    """The image's command, running."""

    def __init__(self, box: Sandbox, driver: FakeNvml) -> None:
        self.port = free_port()
        self.settings = {"STREAMLIT_SERVER_PORT": str(self.port), "GPUMON_INTERVAL": "1"}
        seen = environment(driver)
        library = Path(seen["LD_LIBRARY_PATH"].partition(os.pathsep)[0])
        fake = {"LD_LIBRARY_PATH": str(library), "FAKE_NVML_STATE": f"/state/{driver.path.name}"}
        command = next(step.value for step in steps()[-1] if step.name == "CMD")
        self.log = box.writable / "stderr"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                box.command(
                    shlex.split(command.strip("[]").replace(",", " ")), [library], **fake, **self.settings
                ),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def health(self) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=PATIENCE_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def wait(self, status: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.health() != status:
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"/healthz: {self.health()}\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """As an engine does: a signal to process 1 of the container."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), how)
        self.process.wait(timeout=PATIENCE_S)


@pytest.fixture
def container(box: Sandbox) -> Any:
    driver = FakeNvml(box.writable / "state" / "nvml")
    driver.add_gpu()
    os.chmod(driver.path, 0o666)
    running = Container(box, driver)
    running.driver = driver  # type: ignore[attr-defined]
    yield running
    if running.process.poll() is None:
        # What has changed its user outlives the `unshare` that began it.
        running.stop(signal.SIGKILL)


def healthcheck(box: Sandbox, **settings: str) -> int:
    """The exit status of the image's health check."""
    line = next(step.value for step in steps()[-1] if step.name == "HEALTHCHECK").partition("CMD ")[2]
    return box.run(shlex.split(line.strip("[]").replace(",", " ")), **settings).returncode


def test_the_server_records_and_answers_as_a_user_without_a_name(box: Sandbox, container: Any) -> None:
    container.wait(200)
    database = box.writable / "history" / "gpumon.db"
    assert database.stat().st_uid == sandbox.USER
    log = (box.writable / "logs" / "gpumon.log").read_text()
    assert f"serving on http://0.0.0.0:{container.port}" in log
    assert healthcheck(box, **container.settings) == 0
    container.stop()
    assert "recorder stopped" in (box.writable / "logs" / "gpumon.log").read_text()
    said = container.log.read_text()
    assert "Traceback" not in said
    assert "Read-only file system" not in said
    assert "ermission denied" not in said


DRAW = """
import time
from streamlit.testing.v1 import AppTest
from gpumon_core.recording import runtime

runtime.start()
while runtime.counters().ticks < 2:
    time.sleep(0.1)
for name in ("overview", "gpu", "history", "processes", "usage", "system"):
    page = AppTest.from_file("pages/main.py", default_timeout=600)
    page.switch_page(name + ".py").run()
    print(name, len(page.exception) + len(page.error))
runtime.stop()
"""


def test_every_page_is_drawn_from_the_read_only_tree(box: Sandbox) -> None:
    done = box.run(["python", "-c", DRAW], GPUMON_SOURCE="demo", GPUMON_INTERVAL="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1::2] == ["0"] * 6


def test_the_bytecode_that_the_image_is_given_is_used_as_it_is(box: Sandbox) -> None:
    line = next(step.value for step in steps()[0] if step.name == "RUN" and "compileall" in step.value)
    _, *arguments = shlex.split(line)
    subprocess.run([sys.executable, *arguments], cwd=box.image / "app", check=True)
    code = "import gpumon_core.recording.recorder as module; print(module.__cached__)"
    done = box.run(["python", "-v", "-c", code])
    assert f"code object from '{done.stdout.strip()}'" in done.stderr


def test_the_container_is_unhealthy_without_a_fresh_sample_and_without_a_server(
    box: Sandbox, container: Any
) -> None:
    assert healthcheck(box, STREAMLIT_SERVER_PORT=str(free_port())) == 1
    container.wait(200)
    container.driver.driver_loaded = False
    container.wait(503)
    assert healthcheck(box, **container.settings) == 1


def test_the_health_check_asks_the_server_past_any_proxy(box: Sandbox, container: Any) -> None:
    container.wait(200)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert healthcheck(box, http_proxy=proxy, HTTP_PROXY=proxy, **container.settings) == 0


# -- Compose


def test_the_compose_file_is_valid() -> None:
    passes("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    client = shutil.which("docker")
    if client and not subprocess.run([client, "compose", "version"], capture_output=True, check=False).returncode:
        passes("docker", "compose", "config", "--quiet")


def test_the_container_may_do_little() -> None:
    service = compose()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    written = [volume["target"] for volume in service["volumes"] if not volume.get("read_only")]
    volumes = next(step.value for step in steps()[-1] if step.name == "VOLUME")
    assert written == shlex.split(volumes.strip("[]").replace(",", " "))


def test_compose_asks_for_health_as_the_image_does() -> None:
    line = next(step.value for step in steps()[-1] if step.name == "HEALTHCHECK")
    options, _, command = line.partition("CMD ")
    asked = dict(option.removeprefix("--").replace("-", "_").split("=") for option in options.split())
    check = {name: str(value) for name, value in compose()["healthcheck"].items() if name != "test"}
    assert check == asked
    assert compose()["healthcheck"]["test"] == ["CMD", *shlex.split(command.strip("[]").replace(",", " "))]


def test_the_override_of_the_page_is_valid_too(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    override = tmp_path / "override.yml"
    override.write_text(block)
    passes("check-jsonschema", "--builtin-schema", "vendor.compose-spec", override)


def run_lines() -> list[list[str]]:
    """Every `docker run` that a document shows, in words."""
    documents = (path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    joined = "\n".join(documents).replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^docker run .*$", joined, re.MULTILINE)]


def plain(text: str) -> str:
    """A Compose value with its variables' defaults put in."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_docker_run_gives_what_compose_gives() -> None:
    service = compose()
    (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
    (port,), (tmpfs,), (drop,), (security,) = (
        service[name] for name in ("ports", "tmpfs", "cap_drop", "security_opt")
    )
    expected = {
        ("--detach", ""),
        ("--name", "gpumon"),
        ("--restart", service["restart"]),
        ("--publish", plain(port)),
        ("--gpus", devices["count"]),
        ("--pid", service["pid"]),
        ("--uts", service["uts"]),
        ("--user", "$(id -u):$(id -g)"),
        ("--read-only", ""),
        ("--tmpfs", tmpfs),
        ("--cap-drop", drop),
        ("--security-opt", security),
        ("--env", plain(f"TZ={service['environment']['TZ']}")),
    }
    for volume in service["volumes"]:
        source = re.sub(r"^\./", "$PWD/", volume["source"])
        end = ":ro" if volume.get("read_only") else ""
        expected.add(("--volume", f"{source}:{volume['target']}{end}"))
    lines = run_lines()
    assert lines
    for words in lines:
        assert words[:2] == ["docker", "run"]
        assert words[-1] == plain(service["image"])
        options, rest = set(), words[2:-1]
        while rest:
            name = rest.pop(0)
            options.add((name, rest.pop(0) if rest and not rest[0].startswith("--") else ""))
        assert options == expected


def test_the_readme_shows_the_lines_of_the_page() -> None:
    section = (ROOT / "README.md").read_text().split("## Docker\n")[1].split("\n## ")[0]
    shown = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(shown) == 2
    by_compose, by_docker = shown
    assert "docker compose up --detach\n" in by_compose
    assert "docker run --detach " in by_docker
    assert by_compose in blocks("sh")
    assert by_docker in blocks("sh")


def test_the_settings_of_the_page_are_those_of_the_compose_file() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in re.findall(r"\$\{(\w+):-", text):
        assert re.search(rf"`{name}\b|^{name}=|\s{name}=", PAGE, re.MULTILINE), f"{name} is not explained"


# -- systemd


def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists on this machine."""
    python = "/opt/gpumon/.venv/bin/python"
    text = UNIT.read_text()
    assert f"ExecStart={python} " in text
    copy = tmp_path / "gpumon.service"
    copy.write_text(text.replace(python, sys.executable).replace("/opt/gpumon", str(ROOT)))
    return copy


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    done = subprocess.run(
        [tool("systemd-analyze"), "verify", unit(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_is_closed_but_for_processes_devices_and_the_network(tmp_path: Path) -> None:
    # systemd-analyze takes the level times ten.
    passes("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", unit(tmp_path))


@pytest.mark.parametrize("shut", ["PrivateDevices", "DeviceAllow", "DevicePolicy", "ProtectClock"])
def test_the_unit_does_not_shut_out_a_driver_that_loads_later(shut: str) -> None:
    assert not re.search(rf"^{shut}=", UNIT.read_text(), re.MULTILINE)


@pytest.mark.parametrize("shut", ["ProtectProc", "ProcSubset", "PrivateUsers"])
def test_the_unit_does_not_hide_whose_processes_use_the_gpus(shut: str) -> None:
    assert not re.search(rf"^{shut}=", UNIT.read_text(), re.MULTILINE)


def test_the_page_installs_what_the_unit_runs() -> None:
    lines = next(block for block in blocks("sh") if "systemctl" in block)
    python = re.search(r"^ExecStart=(\S+)/bin/python", UNIT.read_text(), re.MULTILINE)
    assert python
    assert f"venv --clear {python[1]}\n" in lines
    install = "-m pip install --only-binary=:all: --require-hashes -r /opt/gpumon/requirements.txt"
    assert f"{python[1]}/bin/python {install}" in lines
    assert f"sudo cp /opt/gpumon/{UNIT.relative_to(ROOT)} /etc/systemd/system/" in lines


# -- the workflow and the scripts


def test_the_workflow_is_sound() -> None:
    # Actions and images of their makers are named by version, as the Dockerfile names its base.
    ignored = ("unpinned-uses", "unpinned-images", "duplicate-triggers")
    passes("jactionlint", "--no-online", *(f"--ignore={rule}" for rule in ignored))
    passes("check-jsonschema", "--builtin-schema", "vendor.github-workflows", ".github/workflows/ci.yml")


def test_the_workflow_runs_the_image_as_shut_as_compose_does() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    for option in ("--read-only", "--tmpfs /tmp", "--cap-drop ALL", "--security-opt no-new-privileges:true"):
        assert option in text
    assert "platforms: linux/amd64,linux/arm64" in text
    assert "provenance: mode=max" in text
    assert "sbom: true" in text


@pytest.mark.parametrize("script", ["setup.sh", "gpumon", ".ci/run"])
def test_shellcheck_finds_nothing(script: str) -> None:
    passes("shellcheck", script)
