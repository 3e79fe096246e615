"""What servers and container engines say of a process: real processes, small servers that answer as they do."""

from __future__ import annotations

import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE_S, eventually
from test_attribution import FakeProc

from gpumon_core.attribution import containers, endpoints, inquirer, ollama
from gpumon_core.attribution.describe import Describer
from gpumon_core.attribution.inquirer import Inquirer
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import Ask, Endpoint, ProcessIdentity, Program
from gpumon_core.attribution.rules import Rules, RulesError
from gpumon_core.attribution.secrets import Mask
from gpumon_core.telemetry.records import ProcessReading

DIGEST = "0123456789ab" + "c" * 52
ID = "a1" * 32
# A child that calls itself something else.
TITLED = "subprocess.run(['{}', '-c', 'import time; time.sleep(600)'], executable=sys.executable)"


class Server:
    """An HTTP server on this machine whose answers are set by path; what it was asked is in `asked`."""

    def __init__(self, socket_path: Path | None = None) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.delay_s = 0.0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                time.sleep(outer.delay_s)
                answer = outer.answers.get(self.path)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(404 if answer is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

            def address_string(self) -> str:
                return "somebody"

        if socket_path is None:
            self.server: socketserver.BaseServer = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            self.port = self.server.server_address[1]  # type: ignore[index]
        else:
            self.server = socketserver.ThreadingUnixStreamServer(str(socket_path), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def attribution() -> Iterator[LocalAttribution]:
    made = LocalAttribution(trusted=True, describer=Describer())
    yield made
    made.close()


@pytest.fixture
def ask() -> Iterator[Inquirer]:
    made = Inquirer(every_s=0.2)
    yield made
    made.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Starts a program of a given name with arguments, as a child of this test or of another's; its PID."""
    running = []

    def begin(name: str, *arguments: str, child: str | None = None, **environment: str) -> int:
        path = tmp_path / name
        inner = "time.sleep(600)" if child is None else TITLED.format(child)
        path.write_text(f"import subprocess, sys, time\nprint('here', flush=True)\n{inner}\n")
        process = subprocess.Popen(
            [sys.executable, str(path), *arguments], stdout=subprocess.PIPE, env=os.environ | environment
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        return process.pid

    yield begin
    for process in running:
        subprocess.run(["pkill", "-P", str(process.pid)], check=False)
        process.kill()
        process.wait()


def reading(pid: int, memory_mib: int = 1000) -> ProcessReading:
    return ProcessReading("GPU-0", pid, "C", memory_mib)


def learned(
    attribution: LocalAttribution,
    ask: Inquirer,
    *readings: ProcessReading,
    until: Callable[[dict[int, ProcessIdentity]], bool],
) -> dict[int, ProcessIdentity]:
    """What is known once `until` holds of it, tick after tick."""

    def tick() -> dict[int, ProcessIdentity] | None:
        found = ask.add(attribution.identify({one.pid for one in readings}, time.time()), readings)
        return found if until(found) else None

    found = eventually(tick, every_s=0.02)
    assert found is not None
    return found


def test_a_vllm_server_says_what_it_serves_and_its_worker_knows_it_by_its_launcher(
    server: Server, attribution: LocalAttribution, ask: Inquirer, start: Callable[..., int]
) -> None:
    launcher = start("vllm", "serve", "org/model-a", "--port", str(server.port), child="VLLM::EngineCore")
    worker = 0
    while not worker:
        listed = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=False).stdout
        worker = int(listed or 0)
    server.answers["/v1/models"] = {"data": [{"id": "org/model-a"}, {"id": "adapter"}]}
    first = learned(
        attribution, ask, reading(worker), until=lambda known: known[worker].program.workload is not None
    )[worker]
    assert first.ask is not None
    assert first.ask.address == ("127.0.0.1", server.port)
    assert first.program.model == "org/model-a", "known before anybody was asked"
    found = learned(attribution, ask, reading(worker), until=lambda known: not known[worker].pending)
    assert (found[worker].program.workload, found[worker].program.model) == ("vLLM", "org/model-a")
    # The next call gives the same object: nothing new is known.
    asked = len(server.asked)
    eventually(lambda: len(server.asked) > asked + 1)
    again = ask.add(attribution.identify({worker}, 0), [reading(worker)])
    assert again[worker] is found[worker]


def test_a_swap_is_noticed_at_once_by_the_memory(server: Server) -> None:
    ask = Inquirer(every_s=600)
    endpoint = Endpoint("/v1/model", "id", port=server.port)
    identity = ProcessIdentity(7, "boot:1", program=Program(workload="TabbyAPI"), pending=True)
    identity = ProcessIdentity(
        7, "boot:1", program=identity.program, pending=True, ask=Ask(endpoint, ("127.0.0.1", server.port))
    )

    def model(memory_mib: int) -> str | None:
        return ask.add({7: identity}, [reading(7, memory_mib)])[7].program.model

    server.answers["/v1/model"] = {"id": "one-7b"}
    model(8000)
    ask.wait(PATIENCE_S)
    assert model(8000) == "one-7b"
    server.answers["/v1/model"] = {"id": "two-70b"}
    assert model(8050) == "one-7b"
    eventually(lambda: model(40000) == "two-70b")
    assert server.asked == ["/v1/model"] * 2, "it is not asked again for nothing"
    server.answers["/v1/model"] = {"id": None}
    eventually(lambda: model(900) is None)
    ask.close()


def manifest(models: Path, name: str, digest: str) -> None:
    path = models / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "9" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
    ]
    path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))


def test_ollamas_runners_have_the_models_of_their_files(
    server: Server, attribution: LocalAttribution, ask: Inquirer, start: Callable[..., int], tmp_path: Path
) -> None:
    models = tmp_path / "models"
    manifest(models, "registry.ollama.ai/library/qwen3/14b", DIGEST)
    manifest(models, "registry.ollama.ai/library/qwen3/latest", DIGEST)
    manifest(models, "hf.co/org/gemma/Q4", "f" * 64)
    server.answers["/api/ps"] = {"models": [{"name": "qwen3:latest", "size_vram": 9 << 30}, {"name": "other:1b"}]}
    host = f"127.0.0.1:{server.port}"
    one = start("ollama", "runner", "--model", f"{models}/blobs/sha256-{DIGEST}", OLLAMA_HOST=host)
    two = start("ollama", "runner", "--model", f"{models}/blobs/sha256-{'f' * 64}", OLLAMA_HOST=host)
    found = learned(
        attribution,
        ask,
        reading(one),
        reading(two),
        until=lambda known: not any(p.pending for p in known.values()),
    )
    assert found[one].program.model == "qwen3:latest", "the name that is loaded, of the two that the file has"
    assert found[two].program.model == "hf.co/org/gemma:Q4"
    assert server.asked.count("/api/ps") <= 2, "runners of one server are answered together"


def test_ollamas_runners_without_a_file_are_matched_by_memory() -> None:
    loaded = {"models": [{"name": "big", "size_vram": 40 << 30}, {"name": "small", "size_vram": 4 << 30}]}
    assert ollama.model_of(loaded, None, "", 4500) == "small"
    assert ollama.model_of(loaded, None, "", 39000) == "big"
    assert ollama.model_of({"models": [{"name": "one"}]}, None, "", None) == "one"
    assert ollama.model_of({"models": []}, None, "", 5) is None
    assert ollama.model_of(None, None, "", 5) is None
    for odd in ([], "x", {"models": {"a": 1}}, {"models": [None, {"name": 3}]}):
        assert ollama.model_of(odd, "/x/blobs/sha256-" + DIGEST, "", 5) is None


def test_a_server_that_does_not_answer_costs_a_tick_nothing(server: Server) -> None:
    server.delay_s = 2 * PATIENCE_S
    ask = Inquirer()
    endpoint = Endpoint("/v1/models", "data.0.id", port=server.port)
    identity = ProcessIdentity(
        7, "boot:1", program=Program(model="guess"), pending=True, ask=Ask(endpoint, ("127.0.0.1", server.port))
    )

    def known() -> ProcessIdentity:
        return ask.add({7: identity}, [reading(7)])[7]

    known()
    eventually(lambda: server.asked)
    assert known().pending, "the tick has gone on while the server is asked"
    eventually(lambda: not known().pending)
    assert known().program.model == "guess", "what the command line said stays"
    ask.close()


@pytest.mark.parametrize(
    "answer",
    [b"", b"not JSON", b"[" * 50_000, b'"text"', b"3", {"e": ""}, {"data": 7}, b" " * (2 << 20), {"data": [3]}],
)  # fmt: skip
def test_no_answer_makes_trouble(server: Server, answer: object) -> None:
    server.answers["/v1/models"] = answer
    ask = Inquirer()
    endpoint = Endpoint("/v1/models", "data.0.id", port=server.port)
    identity = ProcessIdentity(7, "boot:1", pending=True, ask=Ask(endpoint, ("127.0.0.1", server.port)))
    ask.add({7: identity}, [reading(7)])
    ask.wait(PATIENCE_S)
    found = ask.add({7: identity}, [reading(7)])[7]
    assert (found.pending, found.program.model) == (False, None)
    ask.close()


def test_a_models_name_is_hostile_text(server: Server) -> None:
    server.answers["/m"] = {"m": ["a\x00b\ud800\n<b>" + "x" * 5000]}
    ask = Inquirer()
    identity = ProcessIdentity(7, "boot:1", ask=Ask(Endpoint("/m", "m.*", port=1), ("127.0.0.1", server.port)))
    ask.add({7: identity}, [])
    ask.wait(PATIENCE_S)
    model = ask.add({7: identity}, [])[7].program.model
    assert model is not None
    assert len(model) <= inquirer.LONGEST_TEXT
    assert model.isprintable()
    assert model.encode()
    ask.close()


def test_what_others_say_of_a_process_passes_the_mask_too(server: Server) -> None:
    server.answers["/m"] = {"m": ["org/model-corp-1234", "x?token=s3cretvalue"]}
    ask = Inquirer(mask=Mask(["corp-[0-9]+"]))
    identity = ProcessIdentity(7, "boot:1", ask=Ask(Endpoint("/m", "m.*", port=1), ("127.0.0.1", server.port)))
    ask.add({7: identity}, [])
    ask.wait(PATIENCE_S)
    assert ask.add({7: identity}, [])[7].program.model == "org/model-***, x?token=***"
    ask.close()


def test_containers_are_called_as_their_engine_calls_them(tmp_path: Path) -> None:
    engine = Server(tmp_path / "engine.sock")
    engine.answers[f"/containers/{ID}/json"] = {
        "Name": "/vllm",
        "Config": {
            "Image": "vllm/vllm-openai:v0.11.0",
            "Labels": {"io.kubernetes.pod.name": "vllm-0", "io.kubernetes.pod.namespace": "serving"},
        },
    }
    ask = Inquirer(container_socket=str(tmp_path / "engine.sock"))
    program = Program(container_engine="docker", container_id=ID)
    identity = ProcessIdentity(7, "boot:1", program=program, pending=True, ask=Ask(container=("docker", ID)))
    ask.add({7: identity}, [reading(7)])
    ask.wait(PATIENCE_S)
    found = ask.add({7: identity}, [reading(7)])[7]
    assert not found.pending
    assert (found.program.container_name, found.program.container_image) == ("vllm", "vllm/vllm-openai:v0.11.0")
    assert (found.program.pod, found.program.namespace) == ("vllm-0", "serving")
    assert all(subject.due == float("inf") for subject in ask._subjects.values())
    assert engine.asked == [f"/containers/{ID}/json"], "once is enough"
    ask.close()
    engine.close()


def test_a_pods_container_is_known_by_the_file_that_its_runtime_runs_it_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "k8s.io" / ID
    folder.mkdir(parents=True)
    annotations = {
        "io.kubernetes.cri.container-name": "server",
        "io.kubernetes.cri.image-name": "nvcr.io/nvidia/tritonserver:25.09-py3",
        "io.kubernetes.cri.sandbox-name": "triton-0",
        "io.kubernetes.cri.sandbox-namespace": "serving",
    }
    (folder / "config.json").write_text(json.dumps({"ociVersion": "1.1.0", "annotations": annotations}))
    monkeypatch.setattr(containers, "CONFIGS", (str(tmp_path / "{namespace}/{id}/config.json"),))
    assert containers.facts_of("containerd", ID, 0) == {
        "container_name": "server",
        "container_image": "nvcr.io/nvidia/tritonserver:25.09-py3",
        "pod": "triton-0",
        "namespace": "serving",
    }
    (folder / "config.json").write_text("[]")
    assert containers.facts_of("containerd", ID, 0) == {}
    assert containers.facts_of("containerd", "../../etc", 0) == {}, "what is no id is no path"


@pytest.mark.parametrize(
    ("engine", "uid", "sockets"),
    [
        ("docker", 1000, ["/var/run/docker.sock", "/run/user/1000/docker.sock"]),
        ("podman", 1000, ["/run/podman/podman.sock", "/run/user/1000/podman/podman.sock"]),
        ("docker", 0, ["/var/run/docker.sock"]),
        ("containerd", 1000, ["/var/run/docker.sock"]),
        ("cri-o", 1000, []),
    ],
)
def test_an_engine_is_asked_where_it_listens(
    monkeypatch: pytest.MonkeyPatch, engine: str, uid: int, sockets: list[str]
) -> None:
    asked: list[str] = []

    def refuse(place: str, path: str) -> Any:
        asked.append(place)
        raise ConnectionRefusedError(path)

    monkeypatch.setattr(containers, "get_over_socket", refuse)
    monkeypatch.setattr(containers, "read", lambda path: None)
    assert containers.facts_of(engine, ID, uid) == {}
    assert asked == sockets


@pytest.mark.parametrize(
    "state",
    ["/run/containerd", "/run/k3s/containerd", "/var/snap/microk8s/common/run/containerd", "/run/k0s/containerd"],
)
def test_a_containerd_that_comes_with_a_cluster_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    place = f"{state}/io.containerd.runtime.v2.task/k8s.io/{ID}/config.json"
    config = json.dumps({"annotations": {"io.kubernetes.cri.sandbox-name": "llm-0"}}).encode()
    monkeypatch.setattr(containers, "read", lambda path: config if path == place else None)
    assert containers.facts_of("containerd", ID, 0) == {"pod": "llm-0"}


def test_a_rootless_engine_is_that_of_the_slices_user_and_is_asked_again_when_it_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is user 100998 outside of the container; the engine is user 1000's."""
    asked: list[int] = []

    def facts(engine: str, container: str, uid: int, extra: str | None = None) -> dict[str, str]:
        asked.append(uid)
        return {} if len(asked) < 3 else {"container_name": "ollama"}

    monkeypatch.setattr(containers, "facts_of", facts)
    monkeypatch.setattr(inquirer, "FIRST_RETRY_S", 0.01)
    proc = FakeProc(tmp_path / "proc")
    proc.put(7, 100, b"ollama", b"ollama\0serve\0", uid=100_998)
    path = f"/user.slice/user-1000.slice/user@1000.service/app.slice/docker.service/docker/{ID}"
    (proc.path / "7" / "cgroup").write_text(f"0::{path}\n")
    found = LocalAttribution(
        proc.path, trusted=True, describer=Describer(str(proc.path), commands="off")
    ).identify({7}, 0)[7]
    ask = Inquirer()
    eventually(lambda: ask.add({7: found}, [reading(7)])[7].program.container_name == "ollama")
    ask.close()
    assert asked == [1000, 1000, 1000]


def test_a_router_has_none_of_the_models_that_it_lists(server: Server) -> None:
    entries = [
        {"id": "org/Aaa-1B", "status": {"value": "unloaded"}},
        {"id": "org/Big-9B", "status": {"value": "loaded"}},
    ]
    server.answers["/v1/models"] = {"data": entries}
    ask = Inquirer()
    address = ("127.0.0.1", server.port)
    identity = ProcessIdentity(7, "boot:1", ask=Ask(Endpoint("/v1/models", "data.*.id", port=1), address))
    ask.add({7: identity}, [])
    ask.wait(PATIENCE_S)
    assert ask.add({7: identity}, [])[7].program.model is None
    ask.close()


@pytest.mark.parametrize(
    ("answer", "way", "model"),
    [
        ({"data": [{"id": "a", "state": "not-loaded"}, {"id": "b", "state": "loaded"}]}, "data.*.id", "b"),
        ({"data": [{"id": "a", "state": "loaded"}, {"id": "b", "state": "loaded"}]}, "data.*.id", None),
        ({"loaded_models": [{"id": "qwen3"}]}, "loaded_models.*.id", "qwen3"),
        ({"loaded_models": []}, "loaded_models.*.id", None),
        ({"loaded_models": [{"id": 3}, "x", None]}, "loaded_models.*.id", None),
    ],
)
def test_of_a_library_only_what_is_loaded_counts(answer: object, way: str, model: str | None) -> None:
    assert ollama.model_of(answer, None, "", 4000, way) == model


def test_a_server_that_answers_a_letter_at_a_time_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "WHOLE_S", 0.3)
    listening = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def drip() -> None:
        connection, _ = listening.accept()
        with connection:
            while not ended.is_set():
                try:
                    connection.sendall(b"H")
                except OSError:
                    return
                time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    try:
        with pytest.raises(OSError, match=r"."):
            endpoints.get("127.0.0.1", listening.getsockname()[1], "/")
    finally:
        ended.set()
        listening.close()


@pytest.mark.parametrize(
    ("arguments", "environment", "port"),
    [
        ([], {}, 8000),
        (["--port", "9001"], {}, 9001),
        (["--port=9002"], {"PORT": "1"}, 9002),
        (["--port", "nine"], {"PORT": "0.0.0.0:9003"}, 9003),
        ([], {"PORT": "http://127.0.0.1:9004/"}, 9004),
        ([], {"PORT": ":9005"}, 9005),
        ([], {"PORT": "[::]:99999"}, 8000),
        (["--port"], {"PORT": "somewhere"}, 8000),
        (["--port", "0.0.0.0:9006"], {}, 9006),
        (["--port=:9007"], {}, 9007),
        (["--port", "1", "--port", "9008"], {}, 9008),
        ([], {"PORT": "0.0.0.0"}, 8000),
        ([], {"PORT": "http://0.0.0.0"}, 80),
        ([], {"PORT": "https://house.example/ollama"}, 443),
        ([], {"PORT": "127.0.0.1:9009/ollama"}, 9009),
        ([], {"PORT": "[::1]:9010"}, 9010),
        ([], {"PORT": "::1"}, 8000),
        ([], {"PORT": "[::1]"}, 8000),
    ],
)
def test_a_servers_port_is_in_its_arguments_or_environment(
    arguments: list[str], environment: dict[str, str], port: int
) -> None:
    endpoint = Endpoint("/", "x", port=8000, option="--port", environment="PORT")
    found = endpoints.address_of(endpoint, os.getpid(), arguments, environment)
    assert found == ("127.0.0.1", port)


def test_a_server_with_a_network_of_its_own_is_asked_at_its_address(tmp_path: Path) -> None:
    for name, target in (("self", "net:[1]"), ("7", "net:[2]")):
        (tmp_path / name / "ns").mkdir(parents=True)
        (tmp_path / name / "ns" / "net").symlink_to(target)
    (tmp_path / "7" / "net").mkdir()
    (tmp_path / "7" / "net" / "fib_trie").write_text(
        "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 127.0.0.1\n        /32 host LOCAL\n"
        "     |-- 172.17.0.0\n        /16 link UNICAST\n     |-- 172.17.0.3\n        /32 host LOCAL\n"
    )
    endpoint = Endpoint("/", "x", port=80)
    assert endpoints.address_of(endpoint, 7, [], {}, str(tmp_path)) == ("172.17.0.3", 80)
    assert endpoints.address_of(endpoint, 8, [], {}, str(tmp_path)) == ("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("way", "found"),
    [
        ("data.0.id", ["a"]),
        ("data.*.id", ["a", "b"]),
        ("data.7.id", []),
        ("*.0.id", ["a"]),
        ("data.id", []),
        ("", []),
    ],
)
def test_paths_lead_to_the_values_of_an_answer(way: str, found: list[str]) -> None:
    assert endpoints.names_at({"data": [{"id": "a"}, {"id": "b"}, {"id": ""}]}, way) == found


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("'x'", "must be a table"),
        ("{ models = 'a', port = 1 }", "path must begin with /"),
        ("{ path = 'http://elsewhere/', models = 'a', port = 1 }", "path must begin with /"),
        ("{ path = '/a b', models = 'a', port = 1 }", "no blanks"),
        ("{ path = '/a', port = 1 }", "where the answer has the names"),
        ("{ path = '/a', models = 'a' }", "must name its port"),
        ("{ path = '/a', models = 'a', port = 70000 }", "1 to 65535"),
        ("{ path = '/a', models = 'a', port = true }", "1 to 65535"),
        ("{ path = '/a', models = 'a', port = 1, host = 'b' }", "no 'host' here"),
        ("{ path = '/a', models = 3, port = 1 }", "models must be a text"),
        ("{ path = '/a', models = 'a', port = 1, runners = 1 }", "true or false"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(f"[[workload]]\nname = 'Mine'\nmatch = {{ name = 'x' }}\nendpoint = {text}\n")
    with pytest.raises(RulesError, match=complaint):
        Rules.load(path)


def test_no_server_is_asked_where_the_user_does_not_want_it(start: Callable[..., int]) -> None:
    pid = start("ollama", "runner")
    quiet = LocalAttribution(trusted=True, describer=Describer(ask=False))
    found = quiet.identify({pid}, 0)[pid]
    quiet.close()
    assert (found.ask, found.pending, found.program.workload) == (None, False, "Ollama")
