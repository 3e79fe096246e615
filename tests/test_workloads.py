"""What a program is, by the table of rules."""

# ruff: noqa: E501 - a case a line
from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest

from gpumon_core.attribution.names import readable
from gpumon_core.attribution.records import Endpoint
from gpumon_core.attribution.rules import BUILT_IN, CATEGORIES, CONDITIONS, Program, Rules, RulesError

BLOB = "sha256-" + "0123456789ab" + "c" * 52


def program(command: str, **environment: str) -> Program:
    arguments = tuple(shlex.split(command))
    comm = arguments[0].rsplit("/", 1)[-1][:15]
    return Program(readable(comm, arguments), arguments[0], arguments, environment)


@pytest.mark.parametrize(
    ("command", "workload", "model"),
    [
        ("/usr/local/bin/ollama serve", "Ollama", None),
        (f"/usr/local/bin/ollama runner --model /usr/share/ollama/.ollama/models/blobs/{BLOB} --port 4", "Ollama", "sha256-0123456789ab"),
        ("/usr/bin/python3 /usr/local/bin/vllm serve Qwen/Qwen3-8B --port 8000", "vLLM", "Qwen/Qwen3-8B"),
        ("vllm serve Qwen/Qwen3-8B --served-model-name qwen", "vLLM", "qwen"),
        ("python3 -m vllm.entrypoints.openai.api_server --model=meta-llama/Llama-3.1-8B", "vLLM", "meta-llama/Llama-3.1-8B"),
        ("VLLM::EngineCore", "vLLM", None),
        ("python -m sglang.launch_server --model-path Qwen/Qwen3-8B", "SGLang", "Qwen/Qwen3-8B"),
        ("sglang::scheduler", "SGLang", None),
        ("/opt/llama.cpp/build/bin/llama-server -m /models/qwen3-8b-q4.gguf -ngl 99", "llama.cpp", "qwen3-8b-q4.gguf"),
        ("llama-server -hf ggml-org/gemma-3-4b-it-GGUF", "llama.cpp", "ggml-org/gemma-3-4b-it-GGUF"),
        ("python3 -m llama_cpp.server --model ./x.gguf", "llama.cpp", "x.gguf"),
        ("text-generation-launcher --model-id mistralai/Mistral-7B", "text-generation-inference", "mistralai/Mistral-7B"),
        ("python3 /opt/conda/bin/text-generation-server serve bigscience/bloom --sharded", "text-generation-inference", "bigscience/bloom"),
        ("python3 /srv/tabbyAPI/main.py --model-name Qwen3-exl2", "TabbyAPI", "Qwen3-exl2"),
        ("tritonserver --model-repository=/models", "Triton", None),
        ("python3 /opt/ComfyUI/main.py --listen", "ComfyUI", None),
        ("python3 /srv/stable-diffusion-webui/launch.py", "Stable Diffusion WebUI", None),
        ("python3 /usr/local/bin/whisper talk.mp3 --model large-v3", "Whisper", "large-v3"),
        ("whisper-server -m models/ggml-base.en.bin", "Whisper", "models/ggml-base.en.bin"),
        ("python3 -m ipykernel_launcher -f /run/kernel.json", "Jupyter", None),
        ("ray::RolloutWorker.sample()", "Ray", None),
        ("python -u train.py --epochs 3", "Training", None),
        ("python pretrain_gpt.py --model gpt2", "Training", "gpt2"),
        ("/snap/blender/current/blender -b scene.blend", "Blender", None),
        ("/usr/lib/jellyfin-ffmpeg/ffmpeg -hwaccel cuda -i x", "ffmpeg", None),
        ("/home/ada/.steam/steamapps/common/Doom/doom", "Game", None),
        ("/usr/lib/xorg/Xorg :0", "Desktop", None),
        ("/usr/bin/gnome-shell", "Desktop", None),
        ("kwin_wayland", "Desktop", None),
        ("/usr/lib/firefox/firefox", "Browser", None),
        ("python3 -m some.server --model-path /home/ada/.cache/hub/models--org--name/snapshots/abc", None, None),
        ("python3 restrain.py", None, None),
        ("python3 constraint.py", None, None),
        ("sleep 600", None, None),
    ],
)  # fmt: skip
def test_a_command_line_is_known_for_what_it_is(command: str, workload: str | None, model: str | None) -> None:
    found = Rules.load().identify(program(command))
    assert (found and found.name, found and found.model) == (workload, model)


@pytest.mark.parametrize(
    ("command", "environment", "workload"),
    [
        ("python3 main.py --listen", {"PWD": "/home/ada/ComfyUI"}, "ComfyUI"),
        ("python3 main.py --listen", {"PWD": "/home/ada/other"}, None),
        ("python3 -u run.py", {"WORLD_SIZE": "8", "LOCAL_RANK": "3"}, "PyTorch training"),
        ("python3 train.py", {"JAX_PLATFORMS": "cuda"}, "JAX training"),
    ],
)
def test_the_environment_tells_what_arguments_do_not(
    command: str, environment: dict[str, str], workload: str | None
) -> None:
    found = Rules.load().identify(program(command, **environment))
    assert (found and found.name) == workload


def test_a_model_from_the_hubs_cache_has_its_name() -> None:
    path = "/home/ada/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/abc"
    found = Rules.load().identify(program(f"vllm serve {path}"))
    assert found is not None
    assert found.model == "Qwen/Qwen3-8B"


def test_a_users_rules_go_first(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(
        """secrets = ["corp-[0-9]+"]
[[workload]]
name = "Our service"
category = "inference"
match = { command = "vllm serve", environment = { TEAM = "^ml$" } }
model = [{ option = "--none" }, { environment = "MODEL" }]
"""
    )
    rules = Rules.load(path)
    assert rules.secrets == ("corp-[0-9]+",)
    found = rules.identify(program("vllm serve x", TEAM="ml", MODEL="org/ours"))
    assert found is not None
    assert (found.name, found.category, found.model) == ("Our service", "inference", "org/ours")
    assert rules.identify(program("vllm serve x", TEAM="other")).name == "vLLM"  # type: ignore[union-attr]


def test_what_the_documentation_shows_can_be_used(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "workloads.md").read_text()
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.toml"
        path.write_text(example)
        Rules.load(path)
    text = " ".join(text.split())
    for place in (*CONDITIONS, *CATEGORIES, *(field.name for field in fields(Endpoint))):
        assert re.search(rf"\b{place}\b", text), place
    asked = {rule["name"] for rule in tomllib.loads(BUILT_IN.read_text())["workload"] if "endpoint" in rule}
    for name in asked:
        assert name in text.split("Built-in rules ask")[1], name


def test_mapped_files_are_read_only_where_a_rule_asks_for_them() -> None:
    looked: list[int] = []

    def libraries() -> list[str]:
        looked.append(1)
        return ["/x/torch/lib/libtorch_cuda.so"]

    rules = Rules.load()
    assert rules.identify(replace(program("vllm serve x"), libraries=libraries)).name == "vLLM"  # type: ignore[union-attr]
    assert not looked
    assert rules.identify(replace(program("train.py"), libraries=libraries)).name == "PyTorch training"  # type: ignore[union-attr]
    assert len(looked) == 1, "once for all rules"


MATCH = "match = { name = 'x' }\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("not toml", "is not TOML"),
        ("extra = 1", "there is no 'extra' here"),
        ("secrets = 'x'", "secrets must be a list"),
        ("workload = 1", r"must begin with \[\[workload\]\]"),
        ("[[workload]]\n" + MATCH, "rule 1: name must be a text"),
        ("[[workload]]\nname = 'A'\n", r"rule 1 \(A\): match must name at least one"),
        ("[[workload]]\nname = 'A'\nmatch = { name = '(' }", "not a regular expression"),
        ("[[workload]]\nname = 'A'\nmatch = { name = 3 }", "must be a regular expression in quotes"),
        ("[[workload]]\nname = 'A'\nmatch = { title = 'x' }", "there is no 'title' here"),
        ("[[workload]]\nname = 'A'\ncategory = 'B'\n" + MATCH, "category 'B' must be one of inference"),
        ("[[workload]]\nname = 'A'\nmodel = [{ flag = '-m' }]\n" + MATCH, "must be a table with one of option"),
        ("[[workload]]\nname = 'A'\nmatch = { environment = 'x' }", "environment must be a table"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_sentence(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(RulesError, match=why) as raised:
        Rules.load(path)
    assert "rules.toml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RulesError, match="cannot be read"):
        Rules.load(tmp_path / "none.toml")


@pytest.mark.parametrize("arguments", [(), ("",), ("\udcff\x00",), ("a" * 1_000_000,), ("-m",) * 50_000])
def test_hostile_arguments_are_no_trouble(arguments: tuple[str, ...]) -> None:
    assert Rules.load().identify(Program("x", None, arguments, {})) is None
