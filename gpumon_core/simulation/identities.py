"""The identities of simulated processes, which the simulation knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from gpumon_core.attribution.records import NOTHING, ProcessIdentity, Program
from gpumon_core.simulation.load import ProgramRun, hash64
from gpumon_core.simulation.source import SimulatedSource

LOGIN = "sshd > bash > tmux"
DESKTOP = Program(parents="systemd > gnome-session-b", unit="session-2.scope")

# The identity of each program of the simulation, with {model} and {user} to fill in, and the models that it may
# use.
PROGRAMS: dict[str, tuple[Program, tuple[str, ...]]] = {
    "vllm": (
        Program(
            executable="/usr/bin/python3.12",
            command="vllm serve {model} --gpu-memory-utilization 0.9 --api-key '***'",
            container_engine="docker",
            container_name="vllm",
            container_image="vllm/vllm-openai:v0.11.0",
            parents="containerd-shim",
            workload="vLLM",
            category="inference",
        ),
        ("Qwen/Qwen3-32B", "meta-llama/Llama-3.3-70B-Instruct", "mistralai/Mistral-Small-3.2-24B-Instruct-2506"),
    ),
    "tritonserver": (
        Program(
            executable="/opt/tritonserver/bin/tritonserver",
            command="tritonserver --model-repository=/models",
            container_engine="containerd",
            pod="triton-0",
            namespace="serving",
            parents="containerd-shim",
            workload="Triton",
            category="inference",
        ),
        (),
    ),
    "ollama": (
        Program(
            executable="/usr/local/bin/ollama",
            command="/usr/local/bin/ollama runner --ollama-engine --port 41835",
            parents="ollama",
            unit="ollama.service",
            workload="Ollama",
            category="inference",
        ),
        ("qwen3:14b", "gemma3:12b", "llama3.1:8b", "gpt-oss:20b"),
    ),
    "ComfyUI": (
        Program(
            command="python main.py --listen",
            working_directory="/home/{user}/ComfyUI",
            parents="systemd",
            unit="comfyui.service",
            workload="ComfyUI",
            category="image generation",
        ),
        (),
    ),
    "ipykernel_launcher": (
        Program(
            command="python3 -m ipykernel_launcher -f /home/{user}/.local/share/jupyter/runtime/kernel.json",
            working_directory="/home/{user}/notebooks",
            parents="jupyter-lab",
            notebook="notebooks/{model}",
            workload="Jupyter",
            category="notebook",
        ),
        ("embeddings.ipynb", "explore.ipynb", "ablation.ipynb"),
    ),
    "train_ddp.py": (
        Program(
            command="python -u train_ddp.py --config configs/{model}.yaml",
            working_directory="/home/{user}/runs",
            parents="slurmstepd > slurm_script > torchrun",
            job_name="{model}",
            workload="PyTorch training",
            category="training",
        ),
        ("vit-l-16", "llama-1b", "dit-xl"),
    ),
    "ffmpeg": (
        Program(
            command="ffmpeg -hwaccel cuda -i input.mkv -c:v hevc_nvenc output.mkv",
            parents="jellyfin",
            unit="jellyfin.service",
            workload="ffmpeg",
            category="media",
        ),
        (),
    ),
    "blender": (replace(DESKTOP, command="blender scene.blend", workload="Blender", category="rendering"), ()),
    "whisper": (
        Program(
            command="whisper talk.mp3 --model {model}", parents=LOGIN, workload="Whisper", category="inference"
        ),
        ("large-v3", "turbo"),
    ),
    "Xorg": (replace(DESKTOP, command="/usr/lib/xorg/Xorg :0", workload="Desktop", category="desktop"), ()),
    "gnome-shell": (replace(DESKTOP, command="gnome-shell", workload="Desktop", category="desktop"), ()),
    "firefox": (replace(DESKTOP, command="firefox", workload="Browser", category="desktop"), ()),
    "ray::RolloutWorker": (Program(command="ray::RolloutWorker", workload="Ray", category="training"), ()),
}
for _script in ("train.py", "finetune.py", "pretrain.py"):
    PROGRAMS[_script] = (
        Program(
            command=f"python -u {_script} --model {{model}} --wandb-key '***'",
            working_directory="/home/{user}/work",
            parents=LOGIN,
            workload="PyTorch training",
            category="training",
        ),
        ("Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "google/vit-huge-patch14-224-in21k"),
    )
# For these {model} is a file or a configuration, not a model.
MODELLESS = frozenset({"ipykernel_launcher", "train_ddp.py"})
EVALUATION = Program(
    command="python evaluate.py --split test", working_directory="/home/{user}/work", parents=LOGIN
)
PROGRAMS["evaluate.py"] = (EVALUATION, ())
PROGRAMS["python3"] = (replace(EVALUATION, command="python3"), ())

# The most identities in memory.
MAX_KNOWN = 8192


class SimulatedAttribution:
    """Identifies the processes of a SimulatedSource, at any time."""

    def __init__(self, source: SimulatedSource) -> None:
        self._source = source
        # By PID: from when to when it has which identity.
        self._known: dict[int, tuple[float, float, ProcessIdentity]] = {}

    def identify(self, pids: Iterable[int], timestamp: float) -> dict[int, ProcessIdentity]:
        """An identity for every PID at that time (UTC seconds); one with only the PID where no process has it."""
        return {pid: self.identify_one(pid, timestamp) for pid in pids}

    def close(self) -> None:
        """Nothing to close."""

    def identify_one(self, pid: int, timestamp: float) -> ProcessIdentity:
        """The process that has this PID at that time."""
        known = self._known.get(pid)
        if known is not None and known[0] <= timestamp < known[1]:
            return known[2]
        run = self._source.identity(pid, timestamp)
        if run is None:
            return ProcessIdentity(pid)
        identity = ProcessIdentity(pid, run.start_key, float(run.start), run.name, run.user, program_of(run))
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[pid] = (run.start, run.end, identity)
        return identity


def program_of(run: ProgramRun) -> Program:
    """The program of a run."""
    models = PROGRAMS.get(run.name, (NOTHING, ()))[1]
    return _program(run.name, run.user, models[hash64(run.key) % len(models)] if models else "")


@lru_cache(maxsize=512)
def _program(name: str, user: str, model: str) -> Program:
    plain, _ = PROGRAMS.get(name, (NOTHING, ()))
    texts = {
        field: getattr(plain, field).format(model=model, user=user)
        for field in ("command", "working_directory", "notebook", "job_name")
        if getattr(plain, field)
    }
    job_id = str(hash64(len(model), len(user)) % 90_000 + 10_000) if plain.job_name else None
    return replace(
        plain,
        **texts,
        job_id=job_id,
        job_user=user if job_id else None,
        model=model if model and name not in MODELLESS else None,
    )
