"""What people call a process, from the kernel's name for it and its arguments."""

from __future__ import annotations

import random

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
        ("julia", ["julia", "-t", "20", "train.jl"], "train.jl"),
        ("julia", ["julia", "--threads", "auto", "--project", "-L", "load.jl", "train.jl"], "train.jl"),
        ("julia", ["julia", "--project=.", "-p3", "-O3", "train.jl"], "train.jl"),
        ("R", ["/usr/lib/R/bin/exec/R", "--no-echo", "--file=fit.R", "--args", "-e", "3"], "fit.R"),
        ("R", ["R", "CMD", "BATCH", "--no-save", "fit.R", "fit.out"], "fit.R"),
        ("Rscript", ["Rscript", "--vanilla", "fit.R"], "fit.R"),
        ("node", ["node", "--import", "./x.mjs", "--env-file", ".env", "app.js"], "app.js"),
        ("deno", ["deno", "run", "--allow-net", "--config", "d.json", "main.ts"], "main.ts"),
        ("java", ["java", "--add-opens", "java.base/java.nio=ALL-UNNAMED", "-cp", "x", "a.b.Main"], "Main"),
        ("java", ["java", "-p", "mods", "-m", "org.example/org.example.Main"], "Main"),
        ("perl", ["perl", "-I", "lib", "-MTest::More", "x.pl"], "x.pl"),
        ("ruby", ["ruby", "-r", "json", "-I", "lib", "x.rb"], "x.rb"),
        ("bash", ["bash", "-xo", "pipefail", "--rcfile", "x", "run.sh"], "run.sh"),
        ("dotnet", ["dotnet", "exec", "--runtimeconfig", "x.json", "SwarmUI.dll"], "SwarmUI.dll"),
        ("python3", [PYTHON, "-uW", "ignore", "--", "run.py"], "run.py"),
        (
            "ld-linux-x86-64",
            ["/lib64/ld-linux-x86-64.so.2", "--library-path", "/x", PYTHON, "train.py"],
            "train.py",
        ),
        ("pt_main_thread", ["VLLM::EngineCore"], "VLLM::EngineCore"),
        ("gone", [], "gone"),
        ("odd", [""], "odd"),
        ("python3", ["python3", "", "x"], "python3"),
    ],
)
def test_a_process_is_called_by_what_it_runs(comm: str, arguments: list[str], name: str) -> None:
    assert readable(comm, arguments) == name


SECRET = "hunter2"


@pytest.mark.parametrize(
    "arguments",
    [
        ["python3", "-c", SECRET],
        ["python3", "-uBc", SECRET],
        ["python3", "-W", "ignore", f"-c{SECRET}"],
        ["julia", "-e", SECRET],
        ["julia", "--project", "-t", "4", "-E", SECRET],
        ["julia", "-qe", SECRET],
        ["julia", f"--eval={SECRET}"],
        ["julia", "--eval", SECRET, "x.jl"],
        ["R", "--no-echo", "-e", SECRET],
        ["Rscript", "--vanilla", "-e", SECRET],
        ["node", "-e", SECRET],
        ["node", "-r", "x", "--eval", SECRET],
        ["node", f"--print={SECRET}"],
        ["bun", "-e", SECRET],
        ["deno", "eval", SECRET],
        ["perl", "-lane", SECRET],
        ["perl", "-0777", "-I", "lib", "-ne", SECRET],
        ["perl", f"-E{SECRET}"],
        ["ruby", "-rjson", "-e", SECRET],
        ["lua", "-l", "x", "-e", SECRET],
        ["php", "-d", "x=1", "-r", SECRET],
        ["octave", "--eval", SECRET],
        ["bash", "-lc", SECRET],
        ["bash", "-o", "pipefail", "-ec", SECRET],
        ["bash", "-ce", SECRET],
        ["fish", "--command", SECRET],
        ["ld-linux-x86-64.so.2", "/usr/bin/perl", "-e", SECRET],
    ],
)
def test_code_is_never_a_name(arguments: list[str]) -> None:
    name = readable(arguments[0][:15], arguments)
    assert name
    assert SECRET not in name


def test_no_arguments_make_it_raise() -> None:
    choose = random.Random(1)
    programs = ["python3", "julia", "R", "java", "node", "perl", "bash", "php", "dotnet", "ld.so", "ruby", "x"]
    pieces = [
        "",
        "-",
        "--",
        "+",
        "=",
        "-c",
        "-e",
        "-m",
        "-jar",
        "--eval=",
        "-W",
        "-0",
        "x/",
        "/",
        "run",
        "\udcff",
        "\x00",
    ]
    for _ in range(5_000):
        arguments = [choose.choice(programs), *choose.choices([*pieces, *programs], k=choose.randrange(6))]
        assert isinstance(readable("comm", arguments), str)


def test_a_name_fits_a_column() -> None:
    assert len(readable("python3", ["python3", "x" * 5000 + ".py"])) == LONGEST
