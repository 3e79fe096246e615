"""How large the container image is, compressed: an estimate, made without an engine.

    .venv/bin/python benchmarks/image.py

Does what the Dockerfile does to its layers: installs requirements.txt from wheels alone, copies what the image has
of the tree, compiles it, and compresses both as registries do (tar and gzip). The base image is not here to be
measured; an allowance stands for it.
"""

from __future__ import annotations

import compileall
import gzip
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 350.0
# python:3.13-slim has somewhat less than this on amd64 and arm64.
BASE_MB = 50.0


class Counted:
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: bytes) -> int:
        """Count it."""
        self.size += len(data)
        return len(data)


def compressed_mb(folder: Path) -> float:
    """A layer of this content, in MB of 10^6 bytes."""
    counted = Counted()
    with (
        gzip.GzipFile(fileobj=cast(Any, counted), mode="wb", compresslevel=6) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        archive.add(folder, arcname=".")
    return counted.size / 1e6


def plain_mb(folder: Path) -> float:
    """The same as it lies on the disk."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def packages(folder: Path) -> None:
    """What the first stage installs."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    wheels = [
        "--only-binary=:all:",
        "--require-hashes",
        "--target",
        str(folder),
        "-r",
        str(ROOT / "requirements.txt"),
    ]
    subprocess.run([*command, *wheels], check=True)


def tree(folder: Path) -> None:
    """What the Dockerfile copies, compiled."""
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        copied = re.fullmatch(r"COPY (?!--from)(.+) (\S+)", line)
        for name in copied[1].split() if copied else ():
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder / name)
    compileall.compile_dir(folder, quiet=1)


def main() -> None:
    """Measure and print."""
    whole = BASE_MB
    for name, make in (("packages", packages), ("gpumon", tree)):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            began = time.monotonic()
            make(folder)
            size = compressed_mb(folder)
            whole += size
            took = time.monotonic() - began
            print(f"{name:<12} {plain_mb(folder):7.1f} MB, compressed {size:7.1f} MB ({took:.0f} s)")
    print(f"base image   about {BASE_MB:.0f} MB compressed (an allowance)")
    verdict = "within" if whole <= LIMIT_MB else "ABOVE"
    print(f"image        about {whole:.0f} MB compressed   {verdict} {LIMIT_MB:.0f} MB")


if __name__ == "__main__":
    main()
