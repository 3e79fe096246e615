"""Hostile processes: real ones, which the fake driver lists on its GPUs."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fake_nvml import GIB, FakeNvml

from .programs import end_with_parent

NAMESPACE = "var/run/secrets/kubernetes.io/serviceaccount/namespace"
POD = {b"KUBERNETES_SERVICE_HOST": b"10.0.0.1"}
# Texts that no terminal, no database or no page takes as they are. 120 kB is what the kernel takes in one text.
TEXTS: tuple[bytes, ...] = (
    b"\x1b]0;title\x07\x1b[31mred\x1b[0m",
    "\u202egpj.elif\u202c\u2066isolated\u2069".encode(),
    b"\xff\xfe\x80 not UTF-8 \xc3(",
    b"\r\n2026-01-01 00:00:00 ERROR forged line of the log\n",
    b"<script>alert(1)</script><img src=x onerror=alert(1)>",
    b"=cmd|'/C calc'!A0",
    b"'; DROP TABLE gpus; --",
    "\ud800\udfff".encode("utf-8", "surrogatepass"),
    b"\xf4\x90\x80\x80",
    "e\u0301\u0300\u0302".encode() * 300,
    b"long " * 24_000,
    b"\x01\x02\x7f\xc2\x85\xe2\x80\xa8",
)
# Waits for its end, below another root where one is named; says so first.
WAIT = "import os,signal,sys; root=sys.argv[1]; root and (os.chroot(root), os.chdir('/')); "
WAIT += "os.write(1, b'.'); os.close(1); signal.pause()"
# Begins and ends others for as long as it lives, and changes its own name meanwhile.
FORKS = """
import os, time
os.write(1, b'.')
for turn in range(10**9):
    child = os.fork()
    if not child:
        os._exit(0)
    open('/proc/self/comm', 'wb').write(b'\\xff\\x1b[%d' % turn)
    os.waitpid(child, 0)
    time.sleep(0.05)
"""


@dataclass(frozen=True, slots=True)
class Secrets:
    """What must not be seen anywhere: by where it was planted."""

    file: str
    environment: str
    command: str
    # In the environment of the programs themselves.
    own: str

    def seen_in(self, content: bytes) -> list[str]:
        """Where those come from that are in this text."""
        places = {"a file": self.file, "an environment": self.environment, "a command line": self.command}
        places["gpumon's own environment"] = self.own
        return [place for place, secret in places.items() if secret.encode() in content]


class Zoo:
    """Begins them, and ends them again."""

    def __init__(self, folder: Path, fake: FakeNvml, secrets: Secrets, rng: random.Random) -> None:
        self._folder, self._fake, self.secrets, self._rng = folder, fake, secrets, rng
        self._count = 0
        self.secret_file = self.folder("secret") / "namespace"
        self.secret_file.write_text(secrets.file)
        self.secret_file.chmod(0o600)

    def folder(self, name: str) -> Path:
        """A new folder."""
        self._count += 1
        found = self._folder / f"{name}-{self._count}"
        found.mkdir(parents=True)
        return found

    @contextmanager
    def process(
        self,
        arguments: list[bytes],
        environment: dict[bytes, bytes] | None = None,
        root: Path | None = None,
        name: bytes = b"python",
        code: str = WAIT,
        script: str = "",
    ) -> Iterator[int]:
        """A process on a GPU. It is called `name` (comm), and has these arguments behind its own; with a `script`,
        which is a name, it has that and these alone."""
        # The kernel names a process after the file that was run.
        folder = self.folder("bin")
        file = os.fsencode(folder) + b"/" + name.replace(b"/", b"_").replace(b"\0", b"_")[:200]
        os.symlink(os.path.realpath(sys.executable), file)
        given = [file, b"-I", b"-S", b"-c", code.encode(), os.fsencode(str(root)) if root else b"", *arguments]
        if script:
            (folder / script).write_text(code.replace("sys.argv[1]", "''"))
            given = [file, script.encode(), *arguments]
        child = subprocess.Popen(
            given,
            cwd=folder,
            env={b"PATH": b"/usr/bin:/bin", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - it only asks the kernel
        )
        assert child.stdout is not None
        child.stdout.read(1)
        gpu = self._rng.choice(self._fake.gpus)
        gpu.add_process(child.pid, self._rng.randrange(1, 4) * GIB, sm=self._rng.randrange(0, 100), name=name[:90])
        try:
            yield child.pid
        finally:
            self._fake.remove_process(child.pid)
            child.kill()
            child.wait()
            child.stdout.close()

    def texts(self) -> Iterator[None]:
        """Texts of every kind in every place where a process can put one."""
        chosen = self._rng.sample(TEXTS, len(TEXTS))

        def text() -> bytes:
            return chosen[self._rng.randrange(len(chosen))]

        secret, command = self.secrets.environment.encode(), self.secrets.command.encode()
        environment = {
            b"SLURM_JOB_ID": text(),
            b"SLURM_JOB_NAME": text(),
            b"SLURM_JOB_USER": text(),
            b"POD_NAME": text(),
            b"POD_NAMESPACE": text(),
            b"JPY_SESSION_NAME": text(),
            b"HF_TOKEN": b"hf_" + secret,
            b"DATABASE_URL": b"postgresql://user:" + secret + b"@host/db",
            text().replace(b"=", b"").replace(b"\0", b"") + b"K": text(),
            **POD,
        }
        arguments = [b"--api-key", command, b"--password=" + command, b"", b"", text(), b"--token", command]
        arguments += [b"postgresql://user:" + command + b"@host/db", text()]
        with self.process(arguments, environment, name=chosen[0][:15]):
            yield

    def forks(self) -> Iterator[None]:
        """One that begins and ends others, and is called otherwise at every tick."""
        with self.process([], name=b"forks", code=FORKS):
            yield

    def _pod(self, plant: Callable[[Path], None]) -> Iterator[None]:
        """A process in a pod, as it says, with its namespace where and what `plant` makes it."""
        root = self.folder("root")
        place = root / NAMESPACE
        place.parent.mkdir(parents=True)
        plant(place)
        # Who may not change the root of a process shows nothing here, and no harm either.
        with self.process([], dict(POD), root=root, name=b"pod"):
            yield

    def fifo(self) -> Iterator[None]:
        """A namespace that is a FIFO which nobody writes."""
        yield from self._pod(os.mkfifo)

    def link(self) -> Iterator[None]:
        """A namespace that leads out of the process's own root, in one of several ways."""

        def plant(place: Path) -> None:
            way = self._rng.randrange(4)
            if way == 0:
                place.symlink_to("/proc/self/environ")
            elif way == 1:
                place.symlink_to(self.secret_file)
            elif way == 2:
                place.symlink_to("../" * 40 + str(self.secret_file).lstrip("/"))
            else:
                place.parent.rmdir()
                place.parent.symlink_to(self.secret_file.parent)

        yield from self._pod(plant)

    def strange(self) -> Iterator[None]:
        """A namespace that is a device without an end, a socket, a folder, or a file of nonsense."""
        opened: list[socket.socket] = []

        def plant(place: Path) -> None:
            way = self._rng.randrange(4)
            if way == 0:
                with suppress(OSError):
                    os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))
            elif way == 1:
                opened.append(socket.socket(socket.AF_UNIX))
                with suppress(OSError):
                    opened[0].bind(str(place))
            elif way == 2:
                place.mkdir()
            else:
                place.write_bytes(b"name\0space" + b"".join(TEXTS))

        yield from self._pod(plant)
        for one in opened:
            one.close()

    def manifest(self) -> Iterator[None]:
        """An Ollama runner whose model's manifests are a FIFO, a device, a link, and a file without an end."""
        models, blob = self._models()
        folder = models / "manifests/registry.ollama.ai/library/hostile"
        folder.mkdir(parents=True)
        os.mkfifo(folder / "1-fifo")
        (folder / "2-link").symlink_to(self.secret_file)
        with suppress(OSError):
            os.mknod(folder / "3-device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        with (folder / "4-endless").open("wb") as file:
            file.truncate(2**40)
        with self.process([b"--model", blob, b"--port", b"1"], name=b"ollama", script="runner"):
            yield

    @contextmanager
    def honest(self) -> Iterator[str]:
        """An Ollama runner as it should be; the name of its model."""
        models, blob = self._models()
        name = f"honest-{self._count}"
        manifest = models / f"manifests/registry.ollama.ai/library/{name}/latest"
        manifest.parent.mkdir(parents=True)
        digest = blob.decode().rpartition("sha256-")[2]
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": 1}
        manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
        with self.process([b"--model", blob, b"--port", b"1"], name=b"ollama", script="runner"):
            yield name

    def _models(self) -> tuple[Path, bytes]:
        """A folder of Ollama's, and the file of a model in it."""
        models = self.folder("models")
        (models / "blobs").mkdir()
        return models, os.fsencode(f"{models}/blobs/sha256-{'0123456789abcdef' * 4}")
