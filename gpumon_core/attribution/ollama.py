"""Which model an Ollama runner has: runners know files, people know names.

A model's file is called by its digest (models/blobs/sha256-...); its names are manifests beside it
(models/manifests/REGISTRY/NAMESPACE/MODEL/TAG), and the server tells which models are loaded (/api/ps).
Source: https://github.com/ollama/ollama/blob/main/docs/api.md and server/modelpath.go there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from gpumon_core.attribution.endpoints import is_loaded, values_at
from gpumon_core.attribution.files import read

BLOB = re.compile(r"(?P<models>.*)/blobs/sha256-(?P<digest>[0-9a-f]{64})")
MODEL_LAYER = "application/vnd.ollama.image.model"
DEFAULT_REGISTRY, DEFAULT_NAMESPACE = "registry.ollama.ai", "library"
MOST_MANIFESTS = 2000
MIB = 1 << 20


def model_of(
    answer: Any, blob: str | None, root: str, memory_mib: int | None, way: str = "models.*.name"
) -> str | None:
    """The model of one runner. `answer` is what /api/ps said, or None, and `way` leads to the names in it; `blob`
    is the runner's file, under `root` in this file system; `memory_mib` is what it holds of the GPU."""
    above, _, last = way.rpartition(".")
    sizes = {
        name: entry.get("size_vram")
        for entry in values_at(answer, above)
        if isinstance(entry, dict) and is_loaded(entry)
        if isinstance(name := entry.get(last) or entry.get("model"), str) and name
    }
    names = sorted(_names(blob, root)) if blob else []
    if names:
        return next((name for name in names if name in sizes), names[0])
    if len(sizes) == 1:
        return next(iter(sizes))
    if memory_mib is None:
        return None
    near = [(abs(size / MIB - memory_mib), name) for name, size in sizes.items() if isinstance(size, int | float)]
    return min(near)[1] if near else None


def _names(blob: str, root: str) -> Iterator[str]:
    found = BLOB.fullmatch(blob)
    if found is None:
        return
    folder = f"{root}{found['models']}/manifests"
    wanted, seen = f"sha256:{found['digest']}", 0
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            seen += 1
            if seen > MOST_MANIFESTS:
                return
            path = os.path.join(place, name)
            try:
                manifest = json.loads(read(path) or b"")
            except ValueError:
                continue
            layers = [layer for layer in values_at(manifest, "layers.*") if isinstance(layer, dict)]
            if any(layer.get("digest") == wanted and layer.get("mediaType") == MODEL_LAYER for layer in layers):
                called = _called(os.path.relpath(path, folder).split(os.sep))
                if called:
                    yield called


def _called(parts: list[str]) -> str | None:
    if len(parts) != 4:
        return None
    registry, namespace, model, tag = parts
    if registry != DEFAULT_REGISTRY:
        return f"{registry}/{namespace}/{model}:{tag}"
    return f"{model}:{tag}" if namespace == DEFAULT_NAMESPACE else f"{namespace}/{model}:{tag}"
