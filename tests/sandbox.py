"""The image without an engine: the Dockerfile's tree, read-only, run by a user who is nobody, as process 1.

It takes root, for mounting. Python and its packages are those that run the tests, where the image has its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from conftest import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent
# A number without a name, as whoever owns history/ is inside a container.
USER = 54321

# The new root is a file system of its own, so that what is not named here is not there.
MOUNTS = """
set -e
root=$1 writable=$2
shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755 image "$root"
# First of all, since what is shown may lie below /tmp.
mkdir "$root/proc" "$root/dev" "$root/tmp"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
shown() {
    mkdir -p "$root$2"
    mount --rbind "$1" "$root$2"
    mount -o remount,bind,ro "$root$2"
}
for folder in /bin /sbin /lib /lib64; do
    if [ -L "$folder" ]; then
        cp -P "$folder" "$root$folder"
    elif [ -d "$folder" ]; then
        shown "$folder" "$folder"
    fi
done
while [ "$1" != -- ]; do
    shown "${1%%:*}" "${1#*:}"
    shift
done
shift
mkdir "$root/state"
mount --bind "$writable/state" "$root/state"
for folder in history logs; do
    mount --bind "$writable/$folder" "$root/app/$folder"
done
mount -o remount,ro "$root"
exec chroot "$root" "$@"
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction of the Dockerfile, with its continued lines joined."""

    name: str
    value: str


@cache
def steps() -> tuple[tuple[Step, ...], ...]:
    """The Dockerfile's instructions, a tuple for each stage."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[list[Step]] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, value = line.split(maxsplit=1)
            if name == "FROM":
                found.append([])
            found[-1].append(Step(name, value))
    return tuple(map(tuple, found))


def image_environment() -> dict[str, str]:
    """The variables that the image sets."""
    pairs = (pair for step in steps()[-1] if step.name == "ENV" for pair in shlex.split(step.value))
    return dict(pair.split("=", 1) for pair in pairs)


def copies() -> list[tuple[list[str], str]]:
    """What the first stage copies from the tree: sources and destination under the folder it works in."""
    found, folder = [], Path("/")
    for step in steps()[0]:
        if step.name == "WORKDIR":
            folder = Path(step.value)
        elif step.name == "COPY":
            *sources, destination = step.value.split()
            one_file = len(sources) == 1 and not destination.endswith("/")
            found.append((sources, str(folder / destination) + ("" if one_file else "/")))
    return found


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the tree from the build: the last line that matches decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            # Docker's patterns: * stays within a name, **/ is any depth, and what is inside a match matches too.
            parts = re.split(r"(\*\*/|\*|\[.*?\])", line.removeprefix("!"))
            wild = {"**/": "(?:.*/)?", "*": "[^/]*"}
            pattern = "".join(wild.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)
            if re.fullmatch(f"{pattern}(?:/.*)?", path):
                verdict = not line.startswith("!")
    return verdict


def build(folder: Path) -> None:
    """Make /app as the Dockerfile does, under `folder`, from what .dockerignore lets through."""
    for sources, destination in copies():
        for source in sources:
            target = folder / destination.lstrip("/")
            if destination.endswith("/"):
                target /= Path(source).name
            for file in sorted(path for path in (ROOT / source, *(ROOT / source).rglob("*")) if path.is_file()):
                if not ignored(str(file.relative_to(ROOT))):
                    place = target / file.relative_to(ROOT / source) if (ROOT / source).is_dir() else target
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, place)
    for name in ("history", "logs"):
        (folder / "app" / name).mkdir()


def need() -> None:
    """Skip where no such file system can be made."""
    if os.geteuid() != 0:
        pytest.skip("a read-only file system and another user take root")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody make mounts of his own")


class Sandbox:
    """A container of the image, as far as one can be had without an engine."""

    def __init__(self, folder: Path) -> None:
        need()
        self.image, self.writable, self._root = folder / "image", folder / "volumes", folder / "root"
        self._root.mkdir(parents=True)
        build(self.image)
        for name in ("history", "logs", "state"):
            (self.writable / name).mkdir(parents=True)
            os.chown(self.writable / name, USER, USER)

    def command(self, command: list[str], shown: list[Path] | None = None, **environment: str) -> list[str]:
        """What runs `command` inside, with the image's variables and `environment`; `shown` is to be seen too."""
        variables = image_environment() | environment
        # The image's packages are those that run the tests.
        variables["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        seen = [f"{path}:{path}" for path in ("/usr", "/etc", *{sys.prefix, sys.base_prefix}, *(shown or []))]
        seen.append(f"{self.image / 'app'}:/app")
        drop = "setpriv --bounding-set=-all --inh-caps=-all --no-new-privs --clear-groups"
        inside = [*drop.split(), f"--reuid={USER}", f"--regid={USER}", "env", "-i"]
        inside += [f"{name}={value}" for name, value in variables.items()]
        inside += ["sh", "-c", 'cd /app && exec "$@"', "sh", *command]
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return [*apart, "bash", "-c", MOUNTS, "mounts", str(self._root), str(self.writable), *seen, "--", *inside]

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        full = self.command(command, **environment)
        return subprocess.run(full, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
