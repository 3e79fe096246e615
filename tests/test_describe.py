"""What a process runs: on processes that really run, and on cgroup texts as kernels write them."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import PATIENCE_S, eventually
from test_attribution import FakeProc

from gpumon_core.attribution import masked_fields
from gpumon_core.attribution.describe import LONGEST_COMMAND, Commands, Describer
from gpumon_core.attribution.inquirer import Inquirer
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.attribution.rules import Rules

SECRET = "hf_abcdefghijklmnopqrstuvwxyz012345"
DOCKER = "0::/system.slice/docker-" + "a1" * 32 + ".scope\n"


@contextmanager
def script(path: Path, *arguments: str, **options: object) -> Iterator[int]:
    """A Python script that sleeps, under way; its PID."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("import time\nprint('here', flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, "-u", str(path), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == b"here\n"
            yield process.pid
        finally:
            process.kill()


def described(pid: int, commands: Commands = "masked", rules: Rules | None = None) -> tuple[str | None, Program]:
    attribution = LocalAttribution(trusted=True, describer=Describer(commands=commands, rules=rules))
    try:
        found = attribution.identify({pid}, time.time())[pid]
    finally:
        attribution.close()
    return found.name, found.program


def test_a_script_has_its_name_and_its_whole_command_line(tmp_path: Path) -> None:
    with script(tmp_path / "jobs" / "train.py", "--epochs", "3 4", cwd=tmp_path) as pid:
        name, program = described(pid)
    assert name == "train.py"
    assert program.command == f"{sys.executable} -u {tmp_path}/jobs/train.py --epochs '3 4'"
    assert program.executable == os.path.realpath(sys.executable)
    assert program.working_directory == str(tmp_path)
    assert program.parents is not None
    own = Path("/proc/self/comm").read_text().strip()
    assert program.parents.split(" > ")[-1] == own, "the chain ends with the parent, which is this test"


@pytest.mark.parametrize(
    ("script", "library", "workload", "category"),
    [
        ("train.py", "torch/lib/libtorch_cuda.so", "PyTorch training", "training"),
        ("train.py", "jaxlib/libjax_common.so", "JAX training", "training"),
        ("train.py", "tensorflow/libtensorflow_cc.so.2", "TensorFlow training", "training"),
        ("train.py", "libother.so", "Training", "training"),
        ("evaluate.py", "torch/lib/libtorch_cuda.so", "PyTorch", "other"),
        ("evaluate.py", "jaxlib/xla_extension.so", "JAX", "other"),
        ("evaluate.py", "libtorchvision.so", None, None),
    ],
)
def test_a_framework_is_known_by_the_libraries_of_a_script(
    tmp_path: Path, script: str, library: str, workload: str | None, category: str | None
) -> None:
    path = tmp_path / "site-packages" / library
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(4096))
    source = "import mmap, sys, time\nf = open(sys.argv[1])\nm = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
    (tmp_path / script).write_text(f"{source}print('here', flush=True)\ntime.sleep(600)\n")
    command = [sys.executable, str(tmp_path / script), library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path / "site-packages") as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"here\n"
            _, program = described(process.pid)
        finally:
            process.kill()
    assert (program.workload, program.category) == (workload, category)


def test_secrets_are_masked_first(tmp_path: Path) -> None:
    arguments = ("--model", "Qwen/Qwen3-8B", "--hf-token", SECRET, f"https://ada:{SECRET}@hub.example/x")
    with script(tmp_path / "train.py", *arguments) as pid:
        _, program = described(pid)
        _, whole = described(pid, "full")
    assert program.command is not None
    assert SECRET not in repr(program)
    assert "--model Qwen/Qwen3-8B" in program.command
    assert whole.command is not None
    assert whole.command.count(SECRET) == 2


def test_a_users_own_patterns_are_masked_too(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text("secrets = ['corp-[0-9]{4}']\n")
    with script(tmp_path / "train.py", "--ticket", "corp-1234") as pid:
        _, program = described(pid, rules=Rules.load(tmp_path / "rules.toml"))
    assert program.command is not None
    assert "1234" not in program.command


def test_every_text_that_a_process_may_choose_passes_the_mask(tmp_path: Path) -> None:
    folder = tmp_path / f"password={SECRET}"
    folder.mkdir()
    program = folder / f"token={SECRET}"
    program.symlink_to(sys.executable)
    environ = os.environ | {
        "JPY_SESSION_NAME": f"/x/key-{SECRET}.ipynb",
        "SLURM_JOB_ID": f"api_key={SECRET}",
        "SLURM_JOB_NAME": f"run --password {SECRET[3:]}",
        "SLURM_JOB_USER": f"ada:{SECRET}",
        "KUBERNETES_SERVICE_HOST": "h",
        "POD_NAME": f"pod-{SECRET}",
        "POD_NAMESPACE": f"space-{SECRET}",
    }
    for commands in ("full", "masked", "name"):
        with script(tmp_path / "train.py", "--model", f"/m/{SECRET}", cwd=folder, env=environ) as pid:
            name, found = described(pid, commands)  # type: ignore[arg-type]
        shown = replace(found, command=None)
        assert found.pod == "pod-***"
        assert name == "train.py"
        assert SECRET[3:] not in repr(shown)


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        (f"worker --api-key {SECRET[3:]} of 8", "worker --api-key *** of 8"),
        ("reads postgres://ada:s3cretpassword@db", "ada:***@db"),
        ("x" * 110 + " --password s3cretpassword", "x" * 110 + " --passwor"),
        ("train: PASSWORD=s3cret", "train: PASSWORD=***"),
    ],
)
def test_a_title_is_masked_before_it_is_cut(tmp_path: Path, title: str, shown: str) -> None:
    # Python names its first thread so, and a title is all that its command line is.
    code = "import ctypes,time;ctypes.CDLL(None).prctl(15,b'MainThread');print('here',flush=True);time.sleep(600)"
    environ = {"PATH": os.environ["PATH"]}
    command = [title, "-c", code]
    with subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE, env=environ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"here\n"
            name, program = described(process.pid)
        finally:
            process.kill()
    assert name is not None
    assert name.startswith(shown[:119])
    assert "s3cret" not in repr((name, program))
    assert SECRET[3:] not in repr((name, program))


def test_for_every_field_it_is_decided_whether_it_is_masked() -> None:
    decided = {*masked_fields.MASKED, *masked_fields.NOT_MASKED, "command"}
    assert decided == {field.name for field in fields(Program)}
    assert not set(masked_fields.MASKED) & set(masked_fields.NOT_MASKED)


def test_a_process_is_masked_once_and_not_at_every_tick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[str] = []
    whole = masked_fields.starred
    monkeypatch.setattr(masked_fields, "starred", lambda program, mask: masked.append("x") or whole(program, mask))
    attribution = LocalAttribution(trusted=True, describer=Describer())
    with script(tmp_path / "train.py") as pid:
        for tick in range(5):
            attribution.identify({pid}, float(tick))
        attribution.close()
    assert masked == ["x"]


@pytest.mark.parametrize(("commands", "name", "has_workload"), [("name", "train.py", True), ("off", None, False)])
def test_a_setting_stores_less(tmp_path: Path, commands: Commands, name: str | None, has_workload: bool) -> None:
    environ = os.environ | {"JPY_SESSION_NAME": "/home/ada/x.ipynb", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with script(tmp_path / "train.py", "--lr", "0.1", env=environ) as pid:
        found, program = described(pid, commands)
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
    assert found == (name or comm)
    assert (program.command, program.working_directory, program.notebook) == (None, None, None)
    assert (program.workload is not None) is has_workload
    assert str(tmp_path) not in repr(program)


def test_jobs_and_notebooks_are_known_by_the_environment(tmp_path: Path) -> None:
    environ = os.environ | {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "ablation",
        "SLURM_JOB_USER": "ada",
        "JPY_SESSION_NAME": "/home/ada/ablation.ipynb",
    }
    with script(tmp_path / "run.py", env=environ) as pid:
        _, program = described(pid)
    assert (program.job_id, program.job_name, program.job_user) == ("4711", "ablation", "ada")
    assert program.notebook == "/home/ada/ablation.ipynb"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_may_not_read_is_left_out(tmp_path: Path) -> None:
    describer = Describer()
    nobody = pwd.getpwnam("nobody").pw_uid
    reading, writing = os.pipe()
    with script(tmp_path / "train.py", "--lr", "0.1") as pid:
        child = os.fork()
        if child == 0:
            try:
                os.setuid(nobody)
                os.write(writing, repr(describer.describe(pid, "python", 1)).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    assert "'train.py'" in found, "arguments are everybody's to read"
    assert "working_directory=None" in found
    assert "executable=None" in found


def test_a_container_is_known_by_its_cgroup(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc")
    proc.put(7, 100, b"python", b"python\0train.py\0")
    (proc.path / "7" / "cgroup").write_text(DOCKER)
    found = LocalAttribution(proc.path, trusted=True).identify({7}, 0)[7]
    assert (found.program.container_engine, found.program.container_id) == ("docker", "a1" * 32)


def test_a_pod_is_known_by_cgroup_environment_and_account(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc")
    proc.put(7, 100, b"python", b"python\0serve.py\0")
    folder = proc.path / "7"
    uid = "3f5b1a52_9f6e_4d0a_8f0e_1f2e3d4c5b6a"
    (folder / "cgroup").write_text(
        f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid}.slice/"
        f"cri-containerd-{'b2' * 32}.scope\n"
    )
    (folder / "environ").write_bytes(b"KUBERNETES_SERVICE_HOST=10.0.0.1\0HOSTNAME=llm-0\0")
    account = folder / "root/var/run/secrets/kubernetes.io/serviceaccount"
    account.mkdir(parents=True)
    (account / "namespace").write_text("serving")
    attribution, ask = LocalAttribution(proc.path, trusted=True), Inquirer()
    found = attribution.identify({7}, 0)[7]
    assert (found.program.container_engine, found.program.container_id) == ("containerd", "b2" * 32)
    assert (found.program.pod, found.program.namespace, found.pending) == ("llm-0", None, True)
    # The process may put anything where its file is: the tick does not look.
    found = eventually(lambda: not (one := ask.add(attribution.identify({7}, 0), [])[7]).pending and one)
    ask.close()
    assert isinstance(found, ProcessIdentity)
    assert found.program.namespace == "serving"


def test_hostile_texts_are_cut_and_printable(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc")
    proc.put(7, 100, b"x", b"prog\0\xff\xfe\x1b[31m\n\0" + b"a" * (1 << 20) + b"\0")
    (proc.path / "7" / "environ").write_bytes(b"\xff\xfe\0=\0SLURM_JOB_ID=\x1b[31m\0")
    found = LocalAttribution(proc.path, trusted=True).identify({7}, 0)[7]
    assert found.program.command is not None
    assert len(found.program.command) == LONGEST_COMMAND
    for text in (found.name, found.program.command, found.program.job_id):
        assert text is not None
        assert text.isprintable()


@pytest.mark.parametrize(
    "cmdline",
    [
        b"ollama\0runner\0" + b"/" * (1 << 20) + b"\0",
        b"ollama\0runner\0" + b"--model\0" * 200_000,
        b"python\0" + b"forge" * 200_000 + b"/launch.py\0",
        b"python\0" + b"/forge" * 200_000 + b"/launch.py\0",
        b"python\0" + b"-W\0x\0" * 200_000,
        b"ray::" + b"train" * 200_000 + b"\0",
        b"vllm\0serve\0" + b"models--" * 100_000 + b"\0",
    ],
    ids=["slashes", "options", "words", "folders", "values", "title", "cache"],
)
def test_a_command_line_without_end_is_looked_at_only_so_far(tmp_path: Path, cmdline: bytes) -> None:
    """A pattern that goes back and forth in a megabyte would hold up the tick for hours."""
    proc = FakeProc(tmp_path / "proc")
    proc.put(7, 100, cmdline.split(b"\0", 1)[0][:15], cmdline)
    found: list[object] = []
    looks = threading.Thread(
        target=lambda: found.append(LocalAttribution(proc.path, trusted=True).identify({7}, 0)[7]), daemon=True
    )
    looks.start()
    looks.join(PATIENCE_S)
    assert found


def test_a_chain_of_parents_ends_even_where_it_goes_in_circles(tmp_path: Path) -> None:
    proc = FakeProc(tmp_path / "proc")
    proc.put(7, 100)
    stat = (proc.path / "7" / "stat").read_bytes().replace(b" S 1 ", b" S 7 ", 1)
    (proc.path / "7" / "stat").write_bytes(stat)
    program = LocalAttribution(proc.path, trusted=True).identify({7}, 0)[7].program
    assert program.parents is not None
    assert program.parents.startswith("python > python")
