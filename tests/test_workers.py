"""Processes that were started to work for another: real multiprocessing, and families as /proc shows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_attribution import FakeProc

from gpumon_core.attribution import describe
from gpumon_core.attribution.files import read
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import ProcessIdentity

SCRIPT = """
import multiprocessing, os, time

def work():
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.set_start_method("{}")
    worker = multiprocessing.Process(target=work)
    worker.start()
    worker.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_worker_is_called_as_the_script_that_started_it(tmp_path: Path, method: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPT.format(method))
    command = [sys.executable, "train.py", "--model", "org/base"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, start_new_session=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        attribution = LocalAttribution(trusted=True)
        try:
            found = attribution.identify({pid}, 0)[pid]
        finally:
            attribution.close()
            subprocess.run(["pkill", "-9", "-g", str(process.pid)], check=False)
    assert found.name == "train.py"
    assert (found.program.category, found.program.model) == ("training", "org/base")
    assert found.program.command is not None
    assert ("multiprocessing" in found.program.command) == (method != "fork"), "its command line is its own"


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path / "proc")


def put(proc: FakeProc, pid: int, parent: int, command: str, cwd: str = "/", **environment: str) -> None:
    """A process in the folder, whose arguments are divided by blanks."""
    arguments = command.split(" ")
    proc.put(pid, pid * 10, arguments[0].rsplit("/", 1)[-1][:15].encode(), "\0".join([*arguments, ""]).encode())
    stat = proc.path / str(pid) / "stat"
    stat.write_bytes(stat.read_bytes().replace(b" S 1 ", f" S {parent} ".encode(), 1))
    (proc.path / str(pid) / "cwd").symlink_to(cwd)
    (proc.path / str(pid) / "exe").symlink_to(arguments[0] if arguments[0].startswith("/") else "/usr/bin/x")
    (proc.path / str(pid) / "environ").write_text("\0".join(f"{k}={v}" for k, v in environment.items()))


def who(proc: FakeProc, pid: int) -> ProcessIdentity:
    return proc.attribution().identify({pid}, 0)[pid]


SPAWN = "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5, pipe_handle=7)"


def put_spawned(proc: FakeProc, pid: int, parent: int, **environment: str) -> None:
    put(proc, pid, parent, "/usr/bin/python3", **environment)
    cmdline = f"/usr/bin/python3\0-c\0{SPAWN}\0--multiprocessing-fork\0".encode()
    (proc.path / str(pid) / "cmdline").write_bytes(cmdline)


def test_an_engine_has_the_model_of_the_server_above_it(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/python3 /usr/local/bin/vllm serve --port 9001 Qwen/Qwen3-8B")
    put(proc, 8, 7, "VLLM::EngineCore")
    put(proc, 9, 8, "VLLM::Worker_TP0")
    for pid in (8, 9):
        found = who(proc, pid)
        assert (found.program.workload, found.program.model) == ("vLLM", "Qwen/Qwen3-8B")
        assert found.ask is not None
        assert found.ask.address == ("127.0.0.1", 9001)
        assert [member for member, _ in found.ask.family][-1] == 7


def test_an_engine_that_has_no_title_yet_is_known_by_the_server_above_it(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/python3 /usr/local/bin/vllm serve Qwen/Qwen3-8B")
    put_spawned(proc, 8, 7)
    found = who(proc, 8)
    assert (found.name, found.program.workload, found.program.model) == ("vllm", "vLLM", "Qwen/Qwen3-8B")


def test_an_engine_in_a_script_is_no_server(proc: FakeProc) -> None:
    """vLLM's usual port is somebody else's."""
    put(proc, 7, 1, "/usr/bin/python3 offline.py --model org/mine")
    put(proc, 8, 7, "VLLM::EngineCore")
    found = who(proc, 8)
    assert (found.program.workload, found.program.model, found.ask) == ("vLLM", "org/mine", None)


def test_an_engine_of_another_server_has_that_ones_model(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/python3 -m dynamo.vllm --model Qwen/Qwen3-8B")
    put(proc, 8, 7, "VLLM::EngineCore")
    assert who(proc, 8).program.model == "Qwen/Qwen3-8B"


def test_a_child_knows_more_of_itself_than_its_router(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/llama-server --models-preset x.ini --alias all --port 8231", LLAMA_ARG_PORT="8231")
    put(proc, 8, 7, "/usr/bin/llama-server --port 43091 --alias org/Big-9B", LLAMA_ARG_PORT="8231")
    found = who(proc, 8)
    assert found.program.model == "org/Big-9B"
    assert found.ask is not None
    assert found.ask.address == ("127.0.0.1", 43091)


def test_ollamas_own_llama_server_is_ollamas(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/ollama serve", OLLAMA_HOST="0.0.0.0:11500")
    put(proc, 8, 7, "/opt/llama/llama-server --model /models/x.gguf --port 43091", OLLAMA_HOST="0.0.0.0:11500")
    found = who(proc, 8)
    assert found.program.workload == "Ollama"
    assert found.ask is not None
    assert found.ask.address == ("127.0.0.1", 11500)


def test_a_backend_of_localai_is_known_through_the_shell_that_starts_it(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/local-ai run --address :8081")
    put(proc, 8, 7, "/bin/bash /backends/vllm/run.sh --addr 127.0.0.1:4000")
    put(proc, 9, 8, "/usr/bin/python3 /backends/vllm/backend.py --addr 127.0.0.1:4000")
    found = who(proc, 9)
    assert (found.program.workload, found.program.category) == ("LocalAI", "inference")
    assert found.ask is not None
    assert found.ask.address == ("127.0.0.1", 8081)


def test_a_shell_between_a_server_and_its_worker_does_not_divide_them(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/text-generation-launcher --model-id org/x --port 8085")
    put(proc, 8, 7, "/bin/sh -c exec\ttext-generation-server")
    put(proc, 9, 8, "/usr/bin/python3 /usr/bin/text-generation-server serve org/x")
    found = who(proc, 9)
    assert found.ask is not None
    assert found.ask.address == ("127.0.0.1", 8085)


def test_a_worker_that_mpi_started_belongs_to_who_asked_for_it(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/python3 /usr/local/bin/trtllm-serve Qwen/Qwen3-8B --tp_size 2 --port 8002")
    put(proc, 8, 7, "/usr/bin/orted --hnp")
    put(proc, 9, 8, "/usr/bin/python3 -m mpi4py.futures.server")
    found = who(proc, 9)
    assert (found.name, found.program.workload) == ("trtllm-serve", "TensorRT-LLM")
    assert found.program.model == "Qwen/Qwen3-8B"
    assert found.ask is not None
    assert found.ask.address == ("127.0.0.1", 8002)
    assert found.ask.launcher is None


def test_only_its_own_parent_may_have_opened_the_socket_for_a_server(proc: FakeProc) -> None:
    """What is above a shell has started other things as well."""
    put(proc, 7, 1, "/usr/bin/code-server --port 8000")
    put(proc, 8, 7, "/bin/bash")
    put(proc, 9, 8, "/usr/bin/python3 /usr/local/bin/vllm serve org/x")
    found = who(proc, 9)
    assert found.ask is not None
    assert (found.ask.family, found.ask.launcher) == (((9, None),), (8, 80))


def test_which_of_the_workers_it_is_a_worker_says_itself(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/python3 run.py", cwd="/srv/x")
    put_spawned(proc, 8, 7, LOCAL_RANK="1", WORLD_SIZE="2")
    found = who(proc, 8)
    assert (found.name, found.program.workload) == ("run.py", "PyTorch training")


def test_code_that_is_no_worker_does_not_get_the_name_of_its_parents(proc: FakeProc) -> None:
    put(proc, 7, 1, "/usr/bin/python3 train.py")
    put(proc, 8, 7, "/usr/bin/python3 -c import\ttorch")
    found = who(proc, 8)
    assert (found.name, found.program.workload) == ("python3 -c", None)


def test_workers_of_a_parent_that_has_gone_are_what_they_are(proc: FakeProc) -> None:
    put_spawned(proc, 8, 7)
    assert who(proc, 8).name == "python3 -c"


def test_workers_all_the_way_up_come_to_an_end(proc: FakeProc, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in range(2, 40):
        put_spawned(proc, pid, pid - 1)
    looked: list[str] = []

    def watched(path: str) -> bytes | None:
        looked.append(path)
        return read(path)

    monkeypatch.setattr(describe, "read", watched)
    assert who(proc, 39).name == "python3 -c"
    assert sum(path.endswith("/cmdline") for path in looked) <= 1 + describe.LONGEST_FAMILY
