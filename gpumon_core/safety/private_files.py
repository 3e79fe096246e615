"""Makes files and folders private: they hold names of people and jobs, and others may share the machine."""

from __future__ import annotations

import os
import pwd
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FOLDER, FILE = 0o700, 0o600
FOLDER_ABOVE = 0o755
GROUP_AND_OTHERS, OTHERS = 0o077, 0o007
# An access list names further users, and then the bits of the group are only its mask. Source: acl(5).
ACCESS_LIST = "system.posix_acl_access"


# ---- New files and folders ---------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make a folder that only its owner can open, and the folders above it so that only their owner can change
    them, whatever the umask is. Existing folders stay as they are. Raises OSError."""
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=FOLDER_ABOVE, exist_ok=True)
    path.mkdir(mode=FOLDER, exist_ok=True)


def make_file(path: Path) -> None:
    """Make an empty file that only its owner can read, unless the file exists. SQLite uses it as a new database,
    and gives its mode to the files beside it. If it cannot be made, nothing is raised here: the program that opens
    it next reports why."""
    with suppress(OSError):
        os.close(os.open(os.path.realpath(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, FILE))


def opener(path: str, flags: int) -> int:
    """An opener for `open` that makes files which only their owner can read."""
    return os.open(path, flags, FILE)


# ---- Existing files and folders ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exposed:
    """A file or folder that other users of this machine can read. `mode` is its mode, `wanted` the private one;
    `obstacle` says why gpumon must not change it, and is empty where gpumon may."""

    path: Path
    mode: int
    wanted: int
    is_folder: bool
    obstacle: str = ""

    def __str__(self) -> str:
        return f"{self.path} ({stat.filemode(self.mode)})"


def exposed(databases: Iterable[Path], log_file: Path | None) -> list[Exposed]:
    """The parts of the history, its copies and the log that other users can read: files, then folders."""
    databases = list(dict.fromkeys(path.absolute() for path in databases))
    log = None if log_file is None else log_file.absolute()
    found: list[Exposed | None] = []
    folders: list[Exposed | None] = []
    for folder in dict.fromkeys(path.parent for path in databases):
        named = [path.name for path in databases if path.parent == folder]
        names = sorted(_names(folder))
        ours = [name for name in names if any(_belongs(name, one) for one in named)]
        if log is not None and log.parent == folder:
            ours += [name for name in names if _is_log(name, log.name)]
        found += [_look(folder / name) for name in ours]
        if ours:
            folders.append(_look(folder, [name for name in names if name not in ours]))
    if log is not None:
        # The folder of the log may be for all, as /var/log.
        found += [_look(log.parent / name) for name in sorted(_names(log.parent)) if _is_log(name, log.name)]
    return [one for one in dict.fromkeys([*found, *folders]) if one is not None]


def mend(one: Exposed) -> str:
    """Make a file or folder private. Returns why that failed, or an empty text. If something else has taken its
    place since, nothing of another user is changed, nor the target of a link."""
    if one.obstacle:
        return one.obstacle
    try:
        # Open only its place, not its content: closing it must not release the locks of a database in use.
        descriptor = os.open(one.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if obstacle := _obstacle(one.path, facts):
                return obstacle
            os.chmod(f"/proc/self/fd/{descriptor}", stat.S_IMODE(facts.st_mode) & one.wanted)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        # It does not exist, or this user cannot read it.
        return []


def _belongs(name: str, database: str) -> bool:
    """Whether a file is a database, a file that SQLite or gpumon put beside it, ticks that wait for it, or a copy
    of `backup`."""
    beside = name.startswith((f"{database}-", f"{database}."))
    stem, suffix = os.path.splitext(database)
    copy = rf"\.?{re.escape(stem)}-\d{{8}}-\d{{6}}{re.escape(suffix)}(\.\d+\.part)?(-wal|-shm|-journal)?"
    waiting = r"waiting-[0-9a-f]{12}-\w+\.(ticks|tmp|unreadable)"
    return name == database or beside or re.fullmatch(f"{copy}|{waiting}", name) is not None


def _is_log(name: str, log: str) -> bool:
    return re.fullmatch(rf"{re.escape(log)}(\.\d+)?", name) is not None


def _look(path: Path, others: list[str] | None = None) -> Exposed | None:
    """How a file is exposed, or a folder with these `others` in it; None where it is not."""
    is_linked = path.is_symlink() or (others is None and path.parent.is_symlink())
    try:
        facts = path.stat()
    except OSError:
        return None
    is_folder = stat.S_ISDIR(facts.st_mode)
    if is_folder != (others is not None) or not (is_folder or stat.S_ISREG(facts.st_mode)):
        return None
    taken = OTHERS if _has_access_list(path) else GROUP_AND_OTHERS
    if not stat.S_IMODE(facts.st_mode) & taken:
        return None
    obstacle = "a link leads there" if is_linked else _obstacle(path, facts)
    if is_folder and not obstacle:
        obstacle = _not_ours(path, facts, others or [])
    return Exposed(path, facts.st_mode, 0o7777 & ~taken, is_folder, obstacle)


def _has_access_list(path: Path) -> bool:
    try:
        return bool(os.getxattr(path, ACCESS_LIST))
    except OSError:
        # There is none, or the file system has none.
        return False


def _obstacle(path: Path, facts: os.stat_result) -> str:
    """Why gpumon must not change a file or folder, whatever is in it."""
    if stat.S_ISLNK(facts.st_mode):
        return "it is a link"
    if facts.st_uid != os.geteuid():
        return "it belongs to another user"
    if not stat.S_ISDIR(facts.st_mode) and facts.st_nlink > 1:
        return "it has another name elsewhere"
    return ""


def _not_ours(path: Path, facts: os.stat_result, others: list[str]) -> str:
    """Why gpumon must not change a folder."""
    real = path.resolve()
    homes = [Path(os.environ.get("HOME") or "/").resolve()]
    with suppress(KeyError):
        homes.append(Path(pwd.getpwuid(os.geteuid()).pw_dir).resolve())
    if (
        real.parent == Path("/")
        or facts.st_mode & stat.S_ISVTX
        or any(home.is_relative_to(real) for home in homes)
    ):
        return "it is a folder of the system or of a user"
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f"other files are in it, too: {others[0]!a}{more}"
    return ""


def sentences(found: list[Exposed]) -> Iterator[tuple[str, str]]:
    """Pairs of a problem and its remedy: one for all that gpumon may change, and one for each of the others."""
    ours, rest = [one for one in found if not one.obstacle], [one for one in found if one.obstacle]
    if ours:
        yield (
            f"{_listed(ours)} can be read by other users of this machine",
            "Run ./gpumon doctor --fix to make them private; docs/deployment.md says how to give "
            "other users access on purpose.",
        )
    for one in rest:
        kind = "700" if one.is_folder else "600"
        yield (
            f"{one} can be read by other users of this machine, and gpumon does not change it: {one.obstacle}",
            f"If no other user needs it: chmod {kind}, or give gpumon a folder of its own (GPUMON_DATA_DIR).",
        )


def _listed(found: list[Exposed]) -> str:
    # Name the folder, which is the last one: it says most.
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{found[-1]}{more}"
