"""Finds the name of the model of an Ollama runner, which knows only the file.

The name of a model's file is its digest (models/blobs/sha256-...). The names of the model are manifests
(models/manifests/REGISTRY/NAMESPACE/MODEL/TAG), and the server reports the loaded models (/api/ps). Source:
https://github.com/ollama/ollama/blob/main/docs/api.md and server/modelpath.go there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from gpumon_core.attribution import inside, rights
from gpumon_core.attribution.endpoints import is_loaded, values_at
from gpumon_core.attribution.files import Tree
from gpumon_core.attribution.readers import Late, Readers

BLOB = re.compile(r"(?P<models>.*)/blobs/sha256-(?P<digest>[0-9a-f]{64})")
MODEL_LAYER = "application/vnd.ollama.image.model"
MANIFESTS = frozenset(
    {"application/vnd.docker.distribution.manifest.v2+json", "application/vnd.oci.image.manifest.v1+json"}
)
DEFAULT_REGISTRY, DEFAULT_NAMESPACE = "registry.ollama.ai", "library"
# A registry, a namespace, a model or a tag: types/model/name.go there.
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")
# The most entries of folders and bytes of manifests to look at, and the longest time for it.
MOST_MANIFESTS = 2000
MOST_BYTES = 8 << 20
LONGEST_S = 10.0
# The longest wait of the inquirer for them.
PATIENCE_S = 2.0
MIB = 1 << 20
# No GPU has as many bytes.
MOST_MEMORY = 1 << 60


def model_of(
    answer: Any,
    blob: str | None,
    root: str,
    memory_mib: int | None,
    way: str = "models.*.name",
    names: Sequence[str] | None = None,
) -> str | None:
    """The model of one runner. `answer` is the answer of /api/ps, or None, and `way` is the path to the names in
    it. `blob` is the runner's file below `root` (/proc/PID/root). `names` are the names of its model; where they
    are not given, they are looked up. `memory_mib` is its GPU memory."""
    above, _, last = way.rpartition(".")
    sizes = {
        name: entry.get("size_vram")
        for entry in values_at(answer, above)
        if isinstance(entry, dict) and is_loaded(entry)
        if isinstance(name := entry.get(last) or entry.get("model"), str) and name
    }
    if names is None:
        try:
            names = names_of(blob, root) if blob else ()
        except Late:
            names = ()
    if names:
        return next((name for name in names if name in sizes), names[0])
    if len(sizes) == 1:
        return next(iter(sizes))
    if memory_mib is None:
        return None
    near = [
        (abs(size / MIB - memory_mib), name)
        for name, size in sizes.items()
        if isinstance(size, int | float) and 0 <= size <= MOST_MEMORY
    ]
    return min(near)[1] if near else None


def names_of(blob: str, root: str, readers: Readers | None = None, start: int | None = None) -> list[str]:
    """The names of a model's file in Ollama's folders, sorted; [] where these cannot be read. `root` is
    /proc/PID/root of the runner, which began at `start` (clock ticks). Raises readers.Late."""
    proc, _, pid = root.removesuffix("/root").rpartition("/")
    found = BLOB.fullmatch(blob)
    if found is None or not pid.isdecimal():
        return []
    look = partial(_names, models=found["models"], digest=found["digest"])
    try:
        return (readers or Readers()).read(
            (root, start, blob),
            f"PID {pid}'s folder of Ollama's manifests",
            lambda: inside.look(proc, int(pid), start, look),
            PATIENCE_S,
            rights.user_of(f"{proc}/{pid}"),
            is_last=True,
        )
    except OSError:
        return []


def _names(tree: Tree, models: str, digest: str) -> list[str]:
    wanted, found = f"sha256:{digest}", []
    try:
        with tree.below(f"{models}/manifests") as manifests:
            size = 0
            for path in _manifests(manifests):
                content = manifests.read("/".join(path))
                size += len(content or b"")
                if size > MOST_BYTES:
                    break
                if content is not None and _is_of(content, wanted):
                    found.append(_called(*path))
    except OSError:
        # There are no folders, or they cannot be read.
        return []
    return sorted(found)


def _manifests(manifests: Tree) -> Iterator[tuple[str, str, str, str]]:
    """The paths of the manifests that can be read: REGISTRY, NAMESPACE, MODEL, TAG."""
    ends, left = time.monotonic() + LONGEST_S, MOST_MANIFESTS
    waiting: list[tuple[str, ...]] = [()]
    while waiting and left > 0 and time.monotonic() < ends:
        path = waiting.pop()
        if len(path) == 4:
            left -= 1
            yield path
            continue
        names = manifests.names("/".join(path) or ".", left)
        # A file in place of a folder has no names, and counts as one entry.
        left -= 1
        waiting += [(*path, name) for name in reversed(names) if PART.fullmatch(name)]


def _is_of(content: bytes, digest: str) -> bool:
    """Whether the content is a manifest of a model with this digest."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):
        return False
    if not isinstance(manifest, dict) or manifest.get("schemaVersion") != 2:
        return False
    kind = manifest.get("mediaType")
    if kind is not None and not (isinstance(kind, str) and kind in MANIFESTS):
        return False
    layers = [layer for layer in values_at(manifest, "layers.*") if isinstance(layer, dict)]
    return any(layer.get("digest") == digest and layer.get("mediaType") == MODEL_LAYER for layer in layers)


def _called(registry: str, namespace: str, model: str, tag: str) -> str:
    if registry != DEFAULT_REGISTRY:
        return f"{registry}/{namespace}/{model}:{tag}"
    return f"{model}:{tag}" if namespace == DEFAULT_NAMESPACE else f"{namespace}/{model}:{tag}"
