"""Finds what lies beside the original's file: the gpu_config.json that names its GPUs, and files like it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpumon_core.legacy_import.reader import OriginalReader, is_index
from gpumon_core.legacy_import.sqlite_file import SqliteFileError
from gpumon_core.safety.text import LONGEST, clean


@dataclass(frozen=True, slots=True)
class NamedGpu:
    """A GPU as gpu_config.json names it."""

    index: int
    name: str | None
    uuid: str | None = None


def named_gpus(path: Path) -> list[NamedGpu]:
    """The GPUs of the gpu_config.json that lies beside the original's file or a folder above; [] without one."""
    for folder in (path.absolute().parent, path.absolute().parent.parent):
        with suppress(OSError, ValueError, RecursionError):
            file = folder / "gpu_config.json"
            if not file.is_file() or file.stat().st_size > 2**20:
                continue
            config = json.loads(file.read_bytes().decode("utf-8", "replace"), strict=False)
            if not isinstance(config, dict):
                continue
            listed = config.get("gpus")
            if isinstance(listed, list):
                return [
                    NamedGpu(gpu["index"], _text(gpu.get("name")), _text(gpu.get("uuid")))
                    for gpu in listed
                    if isinstance(gpu, dict) and is_index(gpu.get("index"))
                ]
            name = _text(config.get("gpu_name"))
            return [NamedGpu(0, name)] if name else []
    return []


def _text(value: object) -> str | None:
    text = value.strip() if isinstance(value, str) else ""
    # "GPU" and "Unknown" are what the original writes when nvidia-smi does not answer.
    return None if text in ("", "GPU", "Unknown") or clean(text, LONGEST) != text else text


def found_in(folder: Path, own: Iterable[Path] = ()) -> list[Path]:
    """The original's files in a folder, by name. Only the schema of each is read.

    `own` are gpumon's files. They are not opened: a program that closes a file releases the locks that its SQLite
    holds on it. Source: sqlite.org, "How To Corrupt An SQLite Database File", 2.2.
    """
    ours = set()
    for path in own:
        with suppress(OSError):
            ours.add(_inode(path))
    found = []
    with suppress(OSError):
        for path in sorted(folder.glob("*.db")):
            with suppress(OSError, SqliteFileError):
                if _inode(path) not in ours:
                    OriginalReader(path, copying=False).close()
                    found.append(path)
    return found


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
