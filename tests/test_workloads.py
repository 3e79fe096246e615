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
from gpumon_core.attribution.rules import BUILT_IN, CATEGORIES, CONDITIONS, Rules, RulesError, RuleSubject

BLOB = "sha256-" + "0123456789ab" + "c" * 52


def program(command: str, **environment: str) -> RuleSubject:
    arguments = tuple(shlex.split(command))
    comm = arguments[0].rsplit("/", 1)[-1][:15]
    return RuleSubject(readable(comm, arguments), arguments[0], arguments, environment)


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
        # Ollama and llama.cpp
        (f"/usr/local/lib/ollama/llama-server --model /var/lib/ollama/blobs/{BLOB} --port 41835 --no-webui", "Ollama", "sha256-0123456789ab"),
        ("llama-server --models-preset /etc/models.ini --models-max 2 --port 8231", "llama.cpp", None),
        ("llama-server --host 127.0.0.1 --jinja --port 43091 --alias org/Big-9B:Q5_K_M --ctx-size 4096", "llama.cpp", "org/Big-9B:Q5_K_M"),
        ("llama serve -hf ggml-org/gemma-3-4b-it-GGUF", "llama.cpp", "ggml-org/gemma-3-4b-it-GGUF"),
        ("llama-bench -m /models/mine.gguf -ngl 100", "llama.cpp", "mine.gguf"),
        ("llama-mtmd-cli -m /models/a.gguf --mmproj /models/b.gguf", "llama.cpp", "a.gguf"),
        ("./Qwen3-8B.llamafile --server", "llamafile", None),
        # vLLM
        ("vllm serve --port 1 Qwen/Qwen3-8B", "vLLM", "Qwen/Qwen3-8B"),
        ("vllm serve --enable-prefix-caching --host 0.0.0.0 --port=1 --trust-remote-code Qwen/Qwen3-8B --dtype auto", "vLLM", "Qwen/Qwen3-8B"),
        ("python3 -m vllm.entrypoints.cli.main serve Qwen/Qwen3-8B", "vLLM", "Qwen/Qwen3-8B"),
        ("python3 -W ignore /usr/local/bin/vllm bench throughput --model Qwen/Qwen3-8B", "vLLM", "Qwen/Qwen3-8B"),
        ("VLLM::Worker_TP0", "vLLM", None),
        ("ray::RayWorkerWrapper.execute_method", "vLLM", None),
        # SGLang, Ray, and the servers around them
        ("sglang serve --model-path Qwen/Qwen3-8B --port 30001", "SGLang", "Qwen/Qwen3-8B"),
        ("sglang::scheduler_TP1", "SGLang", None),
        ("python3 -m sglang_router.launch_server --model-path Qwen/Qwen3-8B --dp-size 2", "SGLang", "Qwen/Qwen3-8B"),
        ("ray::ServeReplica:llm-app:LLMServer:qwen3-8b", "Ray Serve", None),
        ("ray::RayTrainWorker.execute", "Ray", None),
        ("ray::IDLE", "Ray", None),
        ("/usr/bin/local-ai run --address :8080", "LocalAI", None),
        ("/opt/lm-studio/lm-studio --run-as-service", "LM Studio", None),
        ("/home/ada/.lmstudio/.internal/utils/node /home/ada/.lmstudio/.internal/llmworker.js", "LM Studio", None),
        ("python3 koboldcpp.py --model /models/qwen3.gguf --usecublas --port 5001", "KoboldCpp", "qwen3.gguf"),
        ("./koboldcpp-linux-x64 /models/qwen3.gguf", "KoboldCpp", "qwen3.gguf"),
        ("python3 /usr/local/bin/trtllm-serve Qwen/Qwen3-8B --port 8001", "TensorRT-LLM", "Qwen/Qwen3-8B"),
        ("trtllm-serve serve --tp_size 2 Qwen/Qwen3-8B", "TensorRT-LLM", "Qwen/Qwen3-8B"),
        ("trtllm-bench --model Qwen/Qwen3-8B throughput --dataset /tmp/x", "TensorRT-LLM", "Qwen/Qwen3-8B"),
        ("python3 -m dynamo.vllm --model Qwen/Qwen3-8B", "Dynamo", "Qwen/Qwen3-8B"),
        ("python3 -m dynamo.trtllm --model-path Qwen/Qwen3-8B --served-model-name qwen", "Dynamo", "qwen"),
        ("lmdeploy serve api_server --tp 2 internlm/internlm3-8b", "LMDeploy", "internlm/internlm3-8b"),
        # pictures
        ("python3 ComfyUI/main.py --listen 0.0.0.0", "ComfyUI", None),
        ("/home/ada/comfy/ComfyUI/.venv/bin/python -s /home/ada/comfy/ComfyUI/main.py --port 8188", "ComfyUI", None),
        ("dotnet src/bin/live_release/SwarmUI.dll --launch_mode none", "SwarmUI", None),
        ("/opt/venv/bin/python3 /opt/venv/bin/invokeai-web --root /invokeai", "InvokeAI", None),
        # training
        ("python3 ./sdxl_train_network.py --pretrained_model_name_or_path /models/sdxl.safetensors --output_dir x", "kohya_ss", "sdxl.safetensors"),
        ("python3 /opt/kohya_ss/sd-scripts/train_network.py --network_dim 32", "kohya_ss", None),
        ("python3 kohya_gui.py --listen 0.0.0.0", "kohya_ss", None),
        ("python3 -m axolotl.cli.train config.yml", "Axolotl", None),
        ("/usr/bin/python3 /usr/local/bin/axolotl train config.yml", "Axolotl", None),
        ("python3 unsloth-cli.py --model_name unsloth/llama-3-8b --max_seq_length 8192", "Unsloth", "unsloth/llama-3-8b"),
        ("python3 -m verl.trainer.main_ppo data.train_batch_size=256", "verl", None),
        ("ray::WorkerDict.actor_rollout_generate_sequences", "verl", None),
        ("lerobot-train --policy.type=act --dataset.repo_id=ada/pick", "LeRobot", "act"),
        ("python3 -m lerobot.scripts.train --policy.path=lerobot/smolvla_base", "LeRobot", "lerobot/smolvla_base"),
        ("python3 -m open_clip_train.main --model ViT-B-32", "Training", "ViT-B-32"),
        ("python3 train2.py", "Training", None),
        ("julia --project -t 20 train.jl", "Training", None),
        # science
        ("julia --project=. -p 3 simulate.jl", "Julia", None),
        ("/usr/lib/R/bin/exec/R --no-echo --no-restore --file=fit.R --args 3", "R", None),
        ("Rscript -e library(torch)", "R", None),
        ("/usr/local/MATLAB/R2025b/bin/glnxa64/MATLAB -batch simulate -nodesktop", "MATLAB", None),
        ("gmx mdrun -deffnm md -nb gpu", "GROMACS", None),
        ("gmx_mpi mdrun -s topol.tpr", "GROMACS", None),
        ("lmp -k on g 1 -sf kk -in in.lj", "LAMMPS", None),
        ("/opt/lammps/bin/lmp_kokkos_cuda_mpi -in in.lj", "LAMMPS", None),
        ("simpleFoam -parallel", "OpenFOAM", None),
        ("foamRun -solver incompressibleFluid", "OpenFOAM", None),
        # pictures that move
        ("/usr/bin/blender --background shot.blend -a", "Blender", None),
        ("/opt/resolve/bin/resolve -nogui", "DaVinci Resolve", None),
        ("/usr/bin/obs --startstreaming", "OBS", None),
        ("'/usr/lib/plexmediaserver/Plex Transcoder' -codec:0 h264 -i x", "Plex", None),
        ("/usr/lib/jellyfin/bin/jellyfin --webdir=/usr/share/jellyfin/web", "Jellyfin", None),
        ("python3 -u -m frigate", "Frigate", None),
        ("frigate.detector:tensorrt", "Frigate", None),
        ("/opt/venv/bin/python /opt/venv/bin/gunicorn immich_ml.main:app -k immich_ml.config.CustomUvicornWorker", "Immich", None),
        ("Z:\\\\games\\\\Doom\\\\doom.exe -w", "Game", None),
        # what is only among the arguments is somebody's data
        ("python3 train.py --data /data/ComfyUI/output --model x", "Training", "x"),
        ("python3 main.py --data /srv/ComfyUI", None, None),
        ("python3 server.py --log /var/log/text-generation-webui/x", None, None),
        ("python3 app.py vllm serve", None, None),
        ("cp /opt/lm-studio/x /data/axolotl/y.exe", None, None),
        ("python3 -c 'import vllm.entrypoints; train(\"ComfyUI\")'", None, None),
        ("python3 pretrained_eval.py", None, None),
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
        ("python3 -u -m open_clip.main", {"WORLD_SIZE": "8", "LOCAL_RANK": "3"}, "PyTorch training"),
        ("blender -b x.blend", {"WORLD_SIZE": "8", "LOCAL_RANK": "3"}, "Blender"),
        ("python3 server.py", {"PWD": "/srv/text-generation-webui"}, "text-generation-webui"),
        ("python3 /srv/other/main.py", {"PWD": "/home/ada/ComfyUI"}, None),
    ],
)
def test_the_environment_says_what_arguments_do_not(
    command: str, environment: dict[str, str], workload: str | None
) -> None:
    found = Rules.load().identify(program(command, **environment))
    assert (found and found.name) == workload


@pytest.mark.parametrize(
    ("command", "working_directory", "workload"),
    [
        ("python3 main.py", "/opt/ComfyUI", "ComfyUI"),
        ("python3 main.py", "/home/comfyui/other", None),
        ("python3 ../ComfyUI/main.py", "/opt/tools", "ComfyUI"),
        ("python3 launch.py --xformers", "/srv/stable-diffusion-webui-forge", "Stable Diffusion WebUI"),
        ("python3 main.py", "/srv/tabbyAPI", "TabbyAPI"),
        ("python3 /srv/own/main.py", "/opt/ComfyUI", None),
    ],
)
def test_a_program_is_known_by_its_own_folder(command: str, working_directory: str, workload: str | None) -> None:
    # A shell that has moved on since: the kernel knows better.
    found = Rules.load().identify(
        replace(program(command, PWD="/home/ada/elsewhere"), working_directory=working_directory)
    )
    assert (found and found.name) == workload


@pytest.mark.parametrize(
    ("command", "parents", "workload"),
    [
        ("/usr/lib/jellyfin-ffmpeg/ffmpeg -i x", ("jellyfin",), "Jellyfin"),
        ("ffmpeg -hwaccel cuda -i x", ("frigate.capture:door",), "Frigate"),
        ("/opt/homebrew/bin/llama-server --model x.gguf --port 4", ("ollama",), "Ollama"),
        ("/backends/cuda12-llama-cpp/llama-cpp-avx2 --addr 127.0.0.1:41223", ("run.sh", "local-ai"), "LocalAI"),
        ("python3 backend.py --addr 127.0.0.1:41223", ("bash", "local-ai"), "LocalAI"),
        ("python3 backend.py --addr 127.0.0.1:41223", ("bash",), None),
    ],
)
def test_a_program_is_known_by_who_started_it(
    command: str, parents: tuple[str, ...], workload: str | None
) -> None:
    found = Rules.load().identify(replace(program(command), ancestors=parents))
    assert (found and found.name) == workload


@pytest.mark.parametrize(
    ("environment", "model"),
    [
        ({"LLAMA_ARG_MODEL": "/models/qwen3.gguf"}, "qwen3.gguf"),
        ({"LLAMA_ARG_HF_REPO": "ggml-org/gemma-3-4b-it-GGUF:Q8_0"}, "ggml-org/gemma-3-4b-it-GGUF:Q8_0"),
        ({"LLAMA_ARG_ALIAS": "house", "LLAMA_ARG_MODEL": "/models/qwen3.gguf"}, "house"),
    ],
)
def test_llama_cpp_takes_its_options_from_the_environment_too(environment: dict[str, str], model: str) -> None:
    found = Rules.load().identify(program("llama-server -ngl 99", **environment))
    assert found is not None
    assert found.model == model
    assert found.endpoint is not None
    assert found.endpoint.environment == "LLAMA_ARG_PORT"


@pytest.mark.parametrize(
    "command",
    [
        "llama-bench -m x.gguf",
        "llama-cli -m x.gguf",
        "vllm bench throughput --model x",
        "VLLM::EngineCore",
        "python3 -m sglang.bench_one_batch --model-path x",
        "trtllm-bench --model x throughput",
    ],
)
def test_a_program_without_a_server_has_no_port_to_ask_at(command: str) -> None:
    found = Rules.load().identify(program(command))
    assert found is not None
    assert found.endpoint is None


def test_an_option_that_is_given_twice_counts_as_it_does_for_the_program() -> None:
    found = Rules.load().identify(program("vllm serve x --served-model-name a --served-model-name=b"))
    assert found is not None
    assert found.model == "b"


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
        ("[[workload]]\nname = 'A'\nworker = 1\n" + MATCH, "worker must be true or false"),
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
    assert Rules.load().identify(RuleSubject("x", None, arguments, {})) is None
