"""Files that a process controls: none makes gpumon publish what only gpumon may read, and none holds it up.

The processes are real. Each has a root of its own, prepared to deceive, and is looked at by the real attribution
and inquirer, tick after tick.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PATIENCE_S, ROOT, Server, eventually
from fake_nvml import FakeNvml
from test_attribution import FakeProc
from test_inquirer import DIGEST, manifest
from test_inquirer import Server as ModelServer

from gpumon_core.attribution import containers, endpoints, files, inside, local, ollama, readers, rights
from gpumon_core.attribution.describe import Describer
from gpumon_core.attribution.inquirer import Inquirer
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.readers import Late, Readers
from gpumon_core.attribution.records import Ask, ProcessIdentity, Program
from gpumon_core.recording.collector import Observer, SimulatedObserver
from gpumon_core.settings import load
from gpumon_core.telemetry.records import HostInfo, ProcessReading, Snapshot

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process a root of its own")

Begin = Callable[..., subprocess.Popen[bytes]]
Look = Callable[..., ProcessIdentity]
Names = Callable[..., list[str]]

NOBODY = 65534
NAMESPACE = inside.NAMESPACE_FILE.lstrip("/")
# What only root may read, and yet looks like the name of a namespace.
SECRET = "hunter2"

# argv: the new root, the user, and code that runs before.
CHILD = r"""
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def apart():
    check(libc.unshare(0x00020000))  # CLONE_NEWNS
    check(libc.mount(b"none", b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
def mount(source, target, kind=None, flags=0, data=None):
    check(libc.mount(os.fsencode(source), os.fsencode(target), kind, flags, data))
BIND = 0x1000
root, user, code = sys.argv[1], int(sys.argv[2]), sys.argv[3]
exec(code)
if root:
    os.chroot(root)
    os.chdir("/")
if user:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
print("here", flush=True)
time.sleep(600)
"""

# A file system whose server never answers, not even its first question.
FUSE = """
apart()
fuse = os.open("/dev/fuse", os.O_RDWR)
mount("fuse", os.path.join(root, sys.argv[4]), b"fuse", 0,
      b"fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other" % fuse)
"""


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Starts a process with a root of its own; `begin(root, user, code)`."""
    running: list[subprocess.Popen[bytes]] = []

    def start(
        root: Path | str = "", user: int = 0, code: str = "", *more: str, **environment: str
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(root), str(user), code, *more],
            stdout=subprocess.PIPE,
            env=os.environ | environment,
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def seen() -> Iterator[Look]:
    """What is known of a process once nothing more is asked, tick after tick."""
    attribution, ask = LocalAttribution(trusted=True), Inquirer()

    def look(pid: int) -> ProcessIdentity:
        def tick() -> ProcessIdentity | None:
            found = ask.add(attribution.identify({pid}, time.time()), [])[pid]
            return None if found.pending else found

        found = eventually(tick, every_s=0.02)
        assert found is not None
        return found

    yield look
    ask.close()
    attribution.close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that only root may read."""
    path = tmp_path / "secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def root_with(tmp_path: Path) -> tuple[Path, Path]:
    """A root that anybody may look at, and the place of the namespace's file in it."""
    root = tmp_path / "root"
    place = root / NAMESPACE
    place.parent.mkdir(parents=True)
    for folder in (tmp_path, root, *place.parents):
        if folder.is_relative_to(tmp_path):
            folder.chmod(0o755)
    return root, place


def up(target: Path) -> str:
    return "../" * 40 + str(target).lstrip("/")


def a_socket(place: Path) -> None:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A socket's path has room for 107 characters.
    before = Path.cwd()
    os.chdir(place.parent)
    try:
        listening.bind(place.name)
    finally:
        os.chdir(before)
    listening.close()


def a_sparse_file(place: Path) -> None:
    place.touch()
    os.truncate(place, 8 << 40)


def a_circle(place: Path) -> None:
    place.symlink_to(place.name)


def links_through_the_root(place: Path) -> None:
    (place.parent / "up").symlink_to("/")
    place.symlink_to("up/" * 5 + "proc/self/comm")


PLANTED: dict[str, Callable[[Path, Path], object]] = {
    "absolute link to gpumon's environment": lambda place, _: place.symlink_to("/proc/self/environ"),
    "absolute link to gpumon's name": lambda place, _: place.symlink_to("/proc/self/comm"),
    "link upwards to gpumon's name": lambda place, _: place.symlink_to(up(Path("/proc/self/comm"))),
    "absolute link to a secret": lambda place, secret: place.symlink_to(secret),
    "link upwards to a secret": lambda place, secret: place.symlink_to(up(secret)),
    "hard link to a secret": lambda place, secret: os.link(secret, place),
    "magic link": lambda place, _: place.symlink_to("/proc/self/fd/0"),
    "links through the root": lambda place, _: links_through_the_root(place),
    "link to itself": lambda place, _: a_circle(place),
    "pipe": lambda place, _: os.mkfifo(place, 0o666),
    "folder": lambda place, _: place.mkdir(),
    "socket": lambda place, _: a_socket(place),
    "device without end": lambda place, _: os.mknod(place, 0o666 | stat.S_IFCHR, os.makedev(1, 5)),
    "terminal": lambda place, _: os.mknod(place, 0o666 | stat.S_IFCHR, os.makedev(5, 0)),
    "eight terabytes": lambda place, _: a_sparse_file(place),
    "nothing in it": lambda place, _: place.touch(),
    "no label": lambda place, _: place.write_text("Not_A_Label"),
    "two lines": lambda place, _: place.write_text("one\ntwo"),
    "too long": lambda place, _: place.write_text("a" * 64),
    "NUL": lambda place, _: place.write_bytes(b"a\0b"),
    "no UTF-8": lambda place, _: place.write_bytes(b"\xff\xfe"),
    "turned": lambda place, _: place.write_text("a\u202eb"),
    "not there": lambda place, _: None,
}


@needs_root
@pytest.mark.parametrize("kind", PLANTED)
def test_a_pod_says_no_namespace_with_a_file_that_is_none(
    tmp_path: Path, secret: Path, begin: Begin, seen: Look, kind: str
) -> None:
    root, place = root_with(tmp_path)
    PLANTED[kind](place, secret)
    process = begin(root, NOBODY, KUBERNETES_SERVICE_HOST="10.0.0.1")
    found = seen(process.pid)
    assert found.program.namespace is None
    assert SECRET not in repr(found)


@needs_root
@pytest.mark.parametrize("user", [0, NOBODY])
def test_the_namespace_of_a_pod_is_found_behind_the_links_that_kubernetes_makes(
    tmp_path: Path, begin: Begin, seen: Look, user: int
) -> None:
    root, place = root_with(tmp_path)
    (place.parent / "..2026_11_28").mkdir()
    (place.parent / "..2026_11_28" / "namespace").write_text("serving\n")
    (place.parent / "..data").symlink_to("..2026_11_28")
    place.symlink_to("..data/namespace")
    process = begin(root, user, KUBERNETES_SERVICE_HOST="10.0.0.1", POD_NAME="llm-0")
    found = seen(process.pid).program
    assert (found.pod, found.namespace) == ("llm-0", "serving")


@needs_root
@pytest.mark.parametrize(
    ("user", "mode", "folder_mode", "found"),
    [
        (NOBODY, 0o644, 0o755, "serving"),
        (NOBODY, 0o600, 0o755, None),
        (NOBODY, 0o640, 0o755, None),
        (NOBODY, 0o644, 0o700, None),
        (0, 0o600, 0o700, "serving"),
    ],
)
def test_a_file_is_read_as_its_process_could_read_it(
    tmp_path: Path, begin: Begin, seen: Look, user: int, mode: int, folder_mode: int, found: str | None
) -> None:
    root, place = root_with(tmp_path)
    elsewhere = root / "private"
    elsewhere.mkdir()
    (elsewhere / "namespace").write_text("serving")
    (elsewhere / "namespace").chmod(mode)
    elsewhere.chmod(folder_mode)
    place.symlink_to("/private/namespace")
    process = begin(root, user, KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert seen(process.pid).program.namespace == found


@needs_root
@pytest.mark.parametrize(
    "target",
    [
        "/proc/self/comm",
        "/proc/{gpumon}/comm",
        "/proc/sys/kernel/hostname",
        "/sys/class/net/lo/operstate",
    ],
)
@pytest.mark.parametrize("how", ["link", "mount"])
def test_a_file_of_the_kernel_is_no_file_of_the_process(
    tmp_path: Path, begin: Begin, seen: Look, target: str, how: str
) -> None:
    """The process sees the same /proc as gpumon, and has it in its own root: /proc/self is whoever looks."""
    target = target.format(gpumon=os.getpid())
    root, place = root_with(tmp_path)
    (root / "proc").mkdir()
    (root / "sys").mkdir()
    code = "apart()\nfor name in ('proc', 'sys'): mount('/' + name, f'{root}/{name}', None, BIND | 0x4000)\n"
    if how == "link":
        place.symlink_to(target)
    else:
        place.touch()
        code += f"mount({target!r}, {str(place)!r}, None, BIND)\n"
    process = begin(root, 0, code, KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert seen(process.pid).program.namespace is None


@needs_root
def test_a_file_with_a_lease_is_not_waited_for(tmp_path: Path, begin: Begin, seen: Look) -> None:
    """Whoever opens it has to wait until the lease is given back: fcntl(2), 45 seconds."""
    root, place = root_with(tmp_path)
    place.write_text("serving")
    with place.open("r+") as held:
        fcntl.fcntl(held, fcntl.F_SETSIG, 0)
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            process = begin(root, NOBODY, KUBERNETES_SERVICE_HOST="10.0.0.1")
            assert seen(process.pid).program.namespace is None
        finally:
            fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            signal.signal(signal.SIGIO, before)


# A filter that answers openat2(2) with an error, as of a container engine: seccomp(2).
FILTER = """
import ctypes, struct, sys
from gpumon_core.attribution.files import Tree
libc = ctypes.CDLL(None, use_errno=True)
def content():
    with Tree.of_process(sys.argv[1]) as tree:
        return tree.read("file"), tree.names()
print(content())
steps = ((0x20, 0, 0, 0), (0x15, 0, 1, 437), (0x06, 0, 0, 0x00050000 | int(sys.argv[2])), (0x06, 0, 0, 0x7fff0000))
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))
program = Program(len(steps), ctypes.addressof(code))
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, ctypes.byref(program), 0, 0)
print(content())
"""


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_where_links_cannot_be_held_back_nothing_of_a_process_is_opened(tmp_path: Path, code: int) -> None:
    """An older kernel does not have openat2, and an older container engine's filter does not let it through."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").write_text("serving")
    done = subprocess.run(
        [sys.executable, "-c", FILTER, str(tmp_path), str(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.stdout == "(b'serving', ['file'])\n(None, [])\n", done.stderr


def test_a_file_that_changes_while_it_is_read_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    path = tmp_path / "root" / "file"
    path.write_text("a" * 100)
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            os.truncate(path, 1 << 30)
            os.truncate(path, 100)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with files.Tree.of_process(str(tmp_path)) as tree:
            for _ in range(500):
                content = tree.read("file", 256)
                assert content is None or len(content) <= 256
    finally:
        ended.set()
        changing.join()


@needs_root
def test_a_thread_that_has_taken_the_rights_of_a_process_has_no_others(secret: Path) -> None:
    found: list[object] = []

    def look() -> None:
        rights.take(rights.Rights(NOBODY, NOBODY))
        for path in (secret, Path("/proc/version"), Path("/etc/shadow")):
            try:
                found.append(path.read_text()[:1])
            except OSError as error:
                found.append(type(error))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [PermissionError, "L", PermissionError]
    assert secret.read_text() == SECRET, "the others keep theirs"


def test_rights_follow_from_what_the_kernel_writes() -> None:
    status = b"Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n"
    assert rights.of(status) == rights.Rights(4, 8, (9, 10))
    assert rights.of(b"Uid:\t1\t2\t3\t4\nGroups:\t \n") == rights.Rights(4, NOBODY)
    for odd in (None, b"", b"Uid:\t1\n", b"Uid:\tx\t2\t3\t4\n", b"Uid:\t-1\t-1\t-1\t-1\n"):
        assert rights.of(odd) is None


# ---- Ollama's folders ----------------------------------------------------------------------------


@pytest.fixture
def names(begin: Begin) -> Names:
    """The names that a runner's file has, as a process of somebody else's sees its root."""

    def look(root: Path, user: int = NOBODY, models: str = "/models") -> list[str]:
        process = begin(root, user)
        return ollama.names_of(f"{models}/blobs/sha256-{DIGEST}", f"/proc/{process.pid}/root")

    return look


def library(tmp_path: Path) -> Path:
    """A root with one good model in it."""
    tmp_path.chmod(0o755)
    manifest(tmp_path / "root" / "models", "registry.ollama.ai/library/qwen3/14b", DIGEST)
    return tmp_path / "root"


def place_of(root: Path, tag: str = "bad") -> Path:
    return root / "models/manifests/registry.ollama.ai/library/qwen3" / tag


@needs_root
def test_the_names_of_a_file_are_found_in_the_root_of_its_process(tmp_path: Path, names: Names) -> None:
    root = library(tmp_path)
    (root / "linked").symlink_to("/models")
    assert names(root) == ["qwen3:14b"]
    assert names(root, models="/linked") == ["qwen3:14b"], "the folder may be a link within the root"


def changed(place: Path, **values: object) -> None:
    """The good manifest, with other values."""
    place.write_text(json.dumps(json.loads((place.parent / "14b").read_text()) | values))


PLANTED_MANIFESTS: dict[str, Callable[[Path], object]] = {
    "pipe": lambda place: os.mkfifo(place, 0o666),
    "link to the good one": lambda place: place.symlink_to("14b"),
    "link to a file outside": lambda place: place.symlink_to(place.parents[5] / "outside"),
    "link upwards": lambda place: place.symlink_to("../" * 40 + str(place.parents[5] / "outside").lstrip("/")),
    "link to a folder": lambda place: place.symlink_to("/"),
    "folders without end": lambda place: (place / ("/".join("a" * 200))).mkdir(parents=True),
    "another kind": lambda place: changed(place, mediaType="text/html"),
    "another version": lambda place: changed(place, schemaVersion=1),
    "no JSON": lambda place: place.write_text("{"),
    "nested": lambda place: place.write_text("[" * 60_000),
    "a list": lambda place: place.write_text("[1]"),
    "eight terabytes": a_sparse_file,
    "private": lambda place: (shutil.copy(place.parent / "14b", place), place.chmod(0o600)),
    "no name": lambda place: shutil.copy(place.parent / "14b", place.with_name("a\u202eb")),
    "a name without end": lambda place: shutil.copy(place.parent / "14b", place.with_name(" " * 200)),
}  # fmt: skip


@needs_root
@pytest.mark.parametrize("kind", PLANTED_MANIFESTS)
def test_a_manifest_that_is_none_costs_itself_only(tmp_path: Path, names: Names, kind: str) -> None:
    root = library(tmp_path)
    shutil.copy(place_of(root, "14b"), tmp_path / "outside")
    PLANTED_MANIFESTS[kind](place_of(root))
    assert names(root) == ["qwen3:14b"]


@needs_root
def test_of_a_folder_with_any_number_of_files_only_some_are_looked_at(
    tmp_path: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = library(tmp_path)
    for number in range(300):
        place_of(root, f"0{number:03}").touch()
    monkeypatch.setattr(ollama, "MOST_MANIFESTS", 50)
    looked: list[str] = []
    read = files.Tree.read
    monkeypatch.setattr(files.Tree, "read", lambda *arguments: (looked.append(arguments[1]), read(*arguments))[1])
    names(root)
    assert 0 < len(looked) <= 50


@needs_root
def test_what_only_gpumon_may_read_is_no_model_of_a_process(tmp_path: Path, names: Names) -> None:
    root = library(tmp_path)
    manifest(root / "hidden" / "models", "registry.ollama.ai/library/private-name/1", DIGEST)
    (root / "hidden").chmod(0o700)
    (root / "open").symlink_to("/hidden/models")
    assert names(root, models="/open") == []
    assert names(root, models="/hidden/models") == []


@needs_root
def test_a_runner_with_a_pipe_among_its_manifests_is_named_all_the_same(
    tmp_path: Path, begin: Begin, seen: Look
) -> None:
    root = library(tmp_path)
    os.mkfifo(place_of(root, "0-pipe"))
    # Its command line is that of a runner, and its root its own.
    program = tmp_path / "ollama"
    program.write_text(CHILD.replace("sys.argv[1], int(sys.argv[2]), sys.argv[3]", f"{str(root)!r}, {NOBODY}, ''"))
    server = ModelServer()
    server.answers["/api/ps"] = {"models": []}
    process = subprocess.Popen(
        [sys.executable, str(program), "runner", "--model", f"/models/blobs/sha256-{DIGEST}"],
        stdout=subprocess.PIPE,
        env=os.environ | {"OLLAMA_HOST": f"127.0.0.1:{server.port}"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        assert seen(process.pid).program.model == "qwen3:14b"
    finally:
        process.kill()
        process.wait()
        server.close()


@pytest.mark.parametrize("size", [10**400, -1, float("inf"), float("nan"), True, "9", None, 1 << 70])
def test_no_size_of_a_model_makes_trouble(size: object) -> None:
    loaded = {"models": [{"name": "odd", "size_vram": size}, {"name": "good", "size_vram": 4 << 30}]}
    assert ollama.model_of(loaded, None, "", 4096) == "good"


# ---- Sockets -------------------------------------------------------------------------------------


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of /run/user/65534."""
    folder = tmp_path / str(NOBODY)
    folder.mkdir()
    monkeypatch.setattr(files, "_OF_USER", re.compile(re.escape(str(tmp_path)) + r"/([0-9]+)/.+"))
    return folder


@needs_root
def test_a_users_engine_is_no_link_to_the_systems(tmp_path: Path, user_folder: Path) -> None:
    engine = ModelServer(tmp_path / "docker.sock")
    engine.answers["/x"] = {"Name": "/of-root"}
    (user_folder / "docker.sock").symlink_to(tmp_path / "docker.sock")
    os.link(tmp_path / "docker.sock", user_folder / "hard.sock")
    for name in ("docker.sock", "hard.sock", "missing.sock"):
        with pytest.raises(OSError, match=r"."):
            endpoints.get_over_socket(str(user_folder / name), "/x")
    os.mkfifo(user_folder / "pipe.sock")
    os.chown(user_folder / "pipe.sock", NOBODY, NOBODY)
    with pytest.raises(OSError, match=r"."):
        endpoints.get_over_socket(str(user_folder / "pipe.sock"), "/x")
    # Whoever puts it there has to be the one that answers.
    os.chown(user_folder / "hard.sock", NOBODY, NOBODY)
    with pytest.raises(PermissionError, match="another user listens"):
        endpoints.get_over_socket(str(user_folder / "hard.sock"), "/x")
    assert engine.asked == []
    assert endpoints.get_over_socket(str(tmp_path / "docker.sock"), "/x") == {"Name": "/of-root"}
    engine.close()


@needs_root
def test_a_users_own_engine_answers(tmp_path: Path, user_folder: Path, begin: Begin) -> None:
    tmp_path.chmod(0o755)
    os.chown(user_folder, NOBODY, NOBODY)
    code = f"""
import socket, threading
os.chdir({str(user_folder)!r}); os.setgid({NOBODY}); os.setuid({NOBODY})
listening = socket.socket(socket.AF_UNIX); listening.bind("docker.sock"); listening.listen()
def answer():
    connection, _ = listening.accept()
    connection.recv(65536)
    connection.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{{}}')
threading.Thread(target=answer, daemon=True).start()
user = 0
"""
    begin("", 0, code)
    assert endpoints.get_over_socket(str(user_folder / "docker.sock"), "/x") == {}


@needs_root
def test_a_group_that_a_user_has_named_like_roots_container_is_not_asked_about_with_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns a control group can make others in it, of any name."""
    container = "a1" * 32
    engine = ModelServer(tmp_path / "docker.sock")
    engine.answers[f"/containers/{container}/json"] = {"Name": "/of-root", "Config": {"Image": "private"}}
    monkeypatch.setitem(containers.SOCKETS, "docker", (str(tmp_path / "docker.sock"),))
    (tmp_path / "config").write_text(json.dumps({"annotations": {"nerdctl/name": "of-root"}}))
    monkeypatch.setattr(containers, "CONFIGS", (str(tmp_path / "config"),))
    monkeypatch.setattr(containers, "GROUPS", {"": (str(tmp_path / "groups"),)})
    own = tmp_path / "groups/user.slice/user-65534.slice/user@65534.service"
    own.mkdir(parents=True)
    os.chown(own, NOBODY, NOBODY)
    (tmp_path / "groups/system.slice").mkdir()
    proc = FakeProc(tmp_path / "proc")
    for pid, above in ((7, own.relative_to(tmp_path / "groups")), (8, Path("system.slice"))):
        proc.put(pid, 100, uid=NOBODY)
        (proc.path / str(pid) / "cgroup").write_text(f"0::/{above}/docker-{container}.scope\n")
    attribution, ask = LocalAttribution(proc.path, trusted=True, describer=Describer(str(proc.path))), Inquirer()
    readings = [ProcessReading("GPU-0", pid, "C", 1) for pid in (7, 8)]

    def tick() -> dict[int, ProcessIdentity] | None:
        found = ask.add(attribution.identify({7, 8}, 0), readings)
        return None if any(one.pending for one in found.values()) else found

    found = eventually(tick)
    ask.close()
    engine.close()
    assert found is not None
    assert (found[7].program.container_name, found[7].program.container_image) == (None, None)
    assert found[8].program.container_name == "of-root"


# ---- What never answers --------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with less patience: what hangs here hangs for ever."""
    monkeypatch.setattr(readers, "HANGS_S", 0.05)
    monkeypatch.setattr("gpumon_core.attribution.inquirer.FILE_S", 0.1)
    monkeypatch.setattr("gpumon_core.attribution.inquirer.FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(ollama, "PATIENCE_S", 0.1)
    monkeypatch.setattr(local, "PATIENCE_S", 0.2)


class Source:
    """A source that sees some processes."""

    name, compares = "test", False

    def __init__(self, *pids: int) -> None:
        self.pids = pids
        self.is_closed = False

    def read(self) -> Snapshot:
        processes = tuple(ProcessReading("GPU-0", pid, "C", 100) for pid in self.pids)
        return Snapshot(time.time(), HostInfo("here"), processes=processes)

    def process_name(self, pid: int) -> str | None:
        return None

    def close(self) -> None:
        self.is_closed = True


def no_fuse() -> bool:
    return os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK)


@pytest.mark.skipif(no_fuse(), reason="only root can mount a file system that hangs")
def test_a_file_system_that_hangs_is_named_and_everything_else_goes_on(
    tmp_path: Path, begin: Begin, impatient: None
) -> None:
    root, place = root_with(tmp_path)
    hanging = begin(root, 0, FUSE, str(place.parent.relative_to(root)), KUBERNETES_SERVICE_HOST="10.0.0.1")
    good, place = root_with(tmp_path / "good")
    place.write_text("serving")
    other = begin(good, 0, KUBERNETES_SERVICE_HOST="10.0.0.1")
    source = Source(hanging.pid, other.pid)
    observer = Observer(source, LocalAttribution(trusted=True), Inquirer())

    def tick() -> dict[int, ProcessIdentity]:
        return observer.observe()[1]

    eventually(lambda: tick()[other.pid].program.namespace == "serving")
    eventually(lambda: (tick(), observer.hung_readers == 1)[1])
    assert tick()[hanging.pid].program.namespace is None
    problem = observer.reader_problem
    assert problem is not None
    assert problem.startswith(f"PID {hanging.pid}'s file {inside.NAMESPACE_FILE} has not answered since ")
    # It is tried again, and the same thread still waits.
    for _ in range(5):
        tick()
        time.sleep(0.05)
    assert observer.hung_readers == 1
    hanging.kill()
    hanging.wait()
    eventually(lambda: observer.hung_readers == 0)
    assert observer.reader_problem is None
    observer.close()
    assert source.is_closed


@pytest.mark.skipif(no_fuse(), reason="only root can mount a file system that hangs")
def test_a_program_ends_while_a_read_hangs(tmp_path: Path, begin: Begin) -> None:
    (tmp_path / "hangs").mkdir()
    holder = begin("", 0, FUSE.replace("os.path.join(root, sys.argv[4])", f"{str(tmp_path / 'hangs')!r}"))
    code = f"""
import os
from gpumon_core.attribution.inquirer import Inquirer
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.readers import Late
from gpumon_core.recording.collector import Observer
inquirer = Inquirer()
inquirer._start()
observer = Observer(type("Source", (), {{"close": lambda self: None}})(), LocalAttribution(), inquirer)
try:
    inquirer.readers.read(1, "it", lambda: os.stat("/proc/{holder.pid}/root{tmp_path}/hangs/x"), 0.1)
except Late:
    observer.close()
    print("late")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (0, "late\n"), done.stderr


def test_a_process_that_hangs_in_the_kernel_does_not_hold_up_the_tick(begin: Begin, impatient: None) -> None:
    """It may hang in the kernel, and hold what a read of its command line waits for."""
    hanging, other = begin().pid, begin().pid
    goes_on = threading.Event()

    class Hangs(Describer):
        def describe(self, pid: int, comm: str, parent: int) -> tuple[str, Program, Ask | None]:
            if pid == hanging:
                goes_on.wait()
            return super().describe(pid, comm, parent)

    attribution = LocalAttribution(trusted=True, describer=Hangs())
    observer = Observer(Source(hanging, other), attribution)
    try:
        found = eventually(
            lambda: (seen := observer.observe()[1])[other].program.command is not None and seen, every_s=0.01
        )
        assert (found[hanging].pending, found[hanging].program) == (True, Program())
        assert found[hanging].start_key is not None
        assert observer.observe()[1][hanging] is found[hanging], "nothing new is known of it"
        assert found[hanging].name == Path(f"/proc/{hanging}/comm").read_text().strip()
        eventually(lambda: (observer.observe(), observer.hung_readers == 1)[1], every_s=0.01)
        assert f"PID {hanging}'s command line" in (observer.reader_problem or "")
        goes_on.set()
        found = eventually(lambda: not (seen := observer.observe()[1])[hanging].pending and seen, every_s=0.01)
        assert found[hanging].program.command is not None
        assert observer.hung_readers == 0
        assert observer.observe()[1][hanging] is found[hanging], "nothing new is known, and nobody need look"
    finally:
        goes_on.set()
        observer.close()


def test_no_more_threads_hang_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "HANGS_S", 0.0)
    reading, goes_on, began = Readers(), threading.Event(), []

    def hang() -> int:
        began.append(1)
        goes_on.wait()
        return 7

    for key in range(3 * readers.MOST_HANGING):
        with pytest.raises(Late):
            reading.read(key, f"file {key}", hang, 0.0, uid=key // 3)
    eventually(lambda: len(began) == readers.MOST_HANGING)
    assert reading.hung == readers.MOST_HANGING
    assert re.fullmatch(rf"file 0 has not .* UTC \(and {readers.MOST_HANGING - 1} more\)", reading.problem or "")
    goes_on.set()
    eventually(lambda: reading.hung == 0)
    assert reading.read(0, "file 0", lambda: 8, 0.0) == 7, "what was late is taken when it is there"
    assert reading.read(0, "file 0", lambda: 8, PATIENCE_S) == 8
    with pytest.raises(ZeroDivisionError):
        reading.read("other", "a file", lambda: 1 / 0, PATIENCE_S)


def test_what_hangs_of_one_user_does_not_keep_anything_of_another_from_being_read() -> None:
    reading, goes_on = Readers(), threading.Event()
    for key in range(2 * readers.MOST_OF_ONE):
        with pytest.raises(Late):
            reading.read(key, "a file", goes_on.wait, 0.0, uid=1000)
    with pytest.raises(Late, match=f"while {readers.MOST_OF_ONE} others hang"):
        reading.read("new", "a file", int, PATIENCE_S, uid=1000)
    assert reading.read("new", "a file", int, PATIENCE_S, uid=1001) == 0
    goes_on.set()


def test_what_is_simulated_hangs_nowhere() -> None:
    observer = SimulatedObserver(load(source="demo"))
    assert (observer.hung_readers, observer.reader_problem) == (0, None)
    observer.close()


@needs_root
@pytest.mark.parametrize("kind", ["absolute", "upwards", "through a folder", "mounted over"])
def test_no_link_leaves_the_root_of_a_process_that_may_read_everything(
    tmp_path: Path, begin: Begin, seen: Look, kind: str
) -> None:
    """Its user is root, as in many containers: only its root keeps it from the files outside."""
    root, place = root_with(tmp_path)
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / "namespace"
    outside.write_text("private")
    code = ""
    if kind == "absolute":
        place.symlink_to(outside)
    elif kind == "upwards":
        place.symlink_to(up(outside))
    elif kind == "through a folder":
        place.parent.rmdir()
        place.parent.symlink_to(up(outside.parent))
    else:
        code = f"apart()\nmount('none', {str(place.parent)!r}, b'tmpfs')\n"
        code += f"os.symlink({str(outside)!r}, {str(place)!r})\n"
    process = begin(root, 0, code, KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert seen(process.pid).program.namespace is None


def test_a_pods_file_is_read_where_no_server_may_be_asked(tmp_path: Path, begin: Begin) -> None:
    quiet = LocalAttribution(trusted=True, describer=Describer(ask=False))
    process = begin(KUBERNETES_SERVICE_HOST="10.0.0.1")
    ask = quiet.identify({process.pid}, 0)[process.pid].ask
    quiet.close()
    assert ask is not None
    assert (ask.namespace, ask.endpoint, ask.container) == (True, None, None)


def test_a_containers_file_that_is_a_pipe_or_a_folder_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "CONFIGS", (str(tmp_path / "{id}"),))
    os.mkfifo(tmp_path / ("a" * 64))
    (tmp_path / ("b" * 64)).mkdir()
    for container in ("a" * 64, "b" * 64):
        assert containers.facts_of("cri-o", container, 0) == {}


# ---- A whole server ------------------------------------------------------------------------------


@pytest.mark.skipif(no_fuse(), reason="only root can mount a file system that hangs")
@pytest.mark.skipif(not local.sees_host_processes(), reason="the PIDs here are not the host's")
def test_a_server_beside_hostile_processes_records_publishes_nothing_of_its_own_and_ends(
    tmp_path: Path, begin: Begin, serve: Callable[..., Server], fake: FakeNvml
) -> None:
    hostile = {}
    for kind, plant in {
        "link": lambda place: place.symlink_to("/proc/self/environ"),
        "pipe": lambda place: os.mkfifo(place, 0o666),
        "hanging": lambda place: None,
    }.items():
        root, place = root_with(tmp_path / kind)
        plant(place)
        code = FUSE if kind == "hanging" else ""
        more = [str(place.parent.relative_to(root))] if kind == "hanging" else []
        hostile[kind] = begin(root, 0, code, *more, KUBERNETES_SERVICE_HOST="10.0.0.1", POD_NAME=f"{kind}-0").pid
    gpu = fake.add_gpu()
    for pid in hostile.values():
        gpu.add_process(pid, 1 << 30)
    server = serve(fake, GPUMON_PRICE_PER_KWH="0.31", MARKER="namespace-of-gpumon")
    server.ready()

    def published() -> str:
        with urllib.request.urlopen(f"{server.url}/api/v1/processes", timeout=PATIENCE_S) as answer:
            return str(answer.read().decode())

    found = eventually(lambda: all(f"{kind}-0" in (text := published()) for kind in hostile) and text)
    assert "namespace-of-gpumon" not in found
    before = gpu_ticks(server)
    eventually(lambda: gpu_ticks(server) >= before + 3)
    assert "namespace-of-gpumon" not in published()
    assert server.stop() == -signal.SIGTERM
    assert "Traceback" not in server.log.read_text()


def gpu_ticks(server: Server) -> int:
    """How many ticks a server has written."""
    database = sqlite3.connect(f"file:{server.data_dir / 'gpumon.db'}?mode=ro", uri=True, timeout=PATIENCE_S)
    try:
        return int(database.execute("SELECT count(DISTINCT timestamp_epoch) FROM gpu_metrics").fetchone()[0])
    finally:
        database.close()
