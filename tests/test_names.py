"""What people call a process, from the kernel's name for it and its arguments."""

from __future__ import annotations

import pytest

from gpumon_core.attribution.names import LONGEST, readable

PYTHON = "/usr/bin/python3"


@pytest.mark.parametrize(
    ("comm", "arguments", "name"),
    [
        ("python3", [PYTHON, "train.py"], "train.py"),
        ("python3", [PYTHON, "-u", "/home/ada/jobs/train.py", "--epochs", "3"], "train.py"),
        ("pt_main_thread", ["python", "-uB", "train.py"], "train.py"),
        ("python", ["/opt/conda/bin/python3.12", "-X", "importtime", "-Wignore", "run.py"], "run.py"),
        ("python3", [PYTHON, "-W", "ignore", "-c", "import torch"], "python3 -c"),
        (
            "python3",
            [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", "x"],
            "vllm.entrypoints.openai.api_server",
        ),
        ("python3", [PYTHON, "-um", "ipykernel_launcher", "-f", "x"], "ipykernel_launcher"),
        ("python3", [PYTHON, "-mhttp.server"], "http.server"),
        ("python3", [PYTHON, "-m", "comfy.__main__"], "comfy"),
        ("python3", [PYTHON, "/srv/tool/__main__.py"], "tool"),
        ("vllm", ["/usr/bin/python3", "/usr/local/bin/vllm", "serve", "x"], "vllm"),
        ("python3.13t", ["python3.13t", "free.py"], "free.py"),
        ("python3", [PYTHON], "python3"),
        ("python3", [PYTHON, "-"], "python3"),
        ("python3", [PYTHON, "-m"], "python3"),
        ("python3", [PYTHON, "-i"], "python3"),
        ("ray::RolloutWor", ["ray::RolloutWorker.sample"], "ray::RolloutWorker.sample"),
        ("VLLM::EngineCor", ["VLLM::EngineCore"], "VLLM::EngineCore"),
        ("java", ["/usr/bin/java", "-Xmx2g", "-jar", "/opt/minecraft/server.jar", "nogui"], "server.jar"),
        ("java", ["java", "-cp", "/opt/lib/*", "org.example.Trainer"], "Trainer"),
        ("node", ["node", "--require", "x.js", "/srv/app/index.js"], "index.js"),
        ("bash", ["/bin/bash", "/home/ada/run.sh"], "run.sh"),
        ("bash", ["bash", "-c", "sleep 5; echo"], "bash"),
        ("Game.exe", ["Z:\\home\\ada\\Games\\Doom\\DOOMEternalx64vk.exe"], "DOOMEternalx64vk.exe"),
        ("ollama", ["/usr/local/bin/ollama", "runner"], "ollama"),
        ("text-generation", ["/usr/local/bin/text-generation-server", "serve"], "text-generation-server"),
        ("pythonic", ["pythonic", "train.py"], "pythonic"),
        ("gone", [], "gone"),
        ("odd", [""], "odd"),
        ("python3", ["python3", "", "x"], "python3"),
    ],
)
def test_a_process_is_called_by_what_it_runs(comm: str, arguments: list[str], name: str) -> None:
    assert readable(comm, arguments) == name


def test_a_name_fits_a_column() -> None:
    assert len(readable("python3", ["python3", "x" * 5000 + ".py"])) == LONGEST
