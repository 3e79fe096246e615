"""Finds the user of a user id: a login name, or the user who may use the id in containers.

A directory (LDAP, SSSD) may be unreachable for a moment, and slow. So a thread of its own asks it, and asks again
for ids that it did not know.
"""

from __future__ import annotations

import pwd
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpumon_core.attribution.files import read
from gpumon_core.safety.text import field

# Ranges of ids that users may use in containers: subuid(5).
SUBUID = "/etc/subuid"
LARGEST_SUBUID = 1 << 20
# A tick waits this long for a new id. A later tick uses an answer that comes later.
PATIENCE_S = 0.5
# An id without a name is looked up again, so many times: first after this pause, which then doubles up to the
# longest.
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 600.0
MOST_TRIES = 64
# The most ids in memory.
MOST_IDS = 4096


@dataclass(frozen=True, slots=True)
class Owner:
    """The user of an id: the id is a login, or a subordinate id that a login may use in containers."""

    name: str
    is_subordinate: bool = False


def owner_of(uid: int) -> Owner | None:
    """The user of an id; None while it is not known."""
    name = login_name(uid)
    if name is not None:
        return Owner(name)
    name = subordinate_owner(uid)
    return None if name is None else Owner(name, is_subordinate=True)


def login_name(uid: int) -> str | None:
    """The login name of a user id; None while it is not known."""
    try:
        return field("user", pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return None


def subordinate_owner(uid: int, path: str = SUBUID) -> str | None:
    """The user to whom the file of subordinate ids gives an id; the number of a user without a name."""
    for line in (read(path, LARGEST_SUBUID) or b"").decode("utf-8", "replace").splitlines():
        owner, _, rest = line.strip().partition(":")
        start, _, count = rest.partition(":")
        if not (owner and start.isdecimal() and count.isdecimal() and len(start) <= 10 and len(count) <= 10):
            continue
        if int(start) <= uid < int(start) + int(count):
            by_number = login_name(int(owner)) if owner.isdecimal() and len(owner) <= 10 else None
            return by_number or field("user", owner)
    return None


def id_inside(uid: int, uid_map: bytes | None) -> int | None:
    """What a user id is in a process's user namespace: user_namespaces(7); None where it has none of its own."""
    for line in (uid_map or b"").splitlines()[:512]:
        fields = line.split()
        if len(fields) == 3 and all(field.isdigit() for field in fields):
            inside, outside, count = map(int, fields)
            if outside <= uid < outside + count:
                return inside + uid - outside if inside != outside else None
    return None


class UserNames:
    """The users of ids. One thread only calls `find`, which waits a moment for a directory, once for each id."""

    def __init__(self, look_up: Callable[[int], Owner | None]) -> None:
        self._look_up = look_up
        self._known: dict[int, Owner] = {}
        # By id: when it is looked up again, the pause after that, and how many times it was.
        self._due: dict[int, tuple[float, float, int]] = {}
        self._thread: threading.Thread | None = None

    def find(self, uid: int) -> Owner | None:
        """The user of an id; None while it is not known."""
        known = self._known.get(uid)
        if known is not None:
            return known
        due, pause, tries = self._due.get(uid, (0.0, FIRST_PAUSE_S, 0))
        now = time.monotonic()
        if now < due or tries >= MOST_TRIES or (self._thread is not None and self._thread.is_alive()):
            return None
        if len(self._due) >= MOST_IDS:
            self._due.clear()
        self._due[uid] = now + pause, min(LONGEST_PAUSE_S, 2 * pause), tries + 1
        self._thread = threading.Thread(target=self._ask, args=(uid,), name="user name", daemon=True)
        self._thread.start()
        if not tries:
            self._thread.join(PATIENCE_S)
        return self._known.get(uid)

    def _ask(self, uid: int) -> None:
        owner = self._look_up(uid)
        if owner is not None:
            if len(self._known) >= MOST_IDS:
                self._known.clear()
            self._known[uid] = owner
            self._due.pop(uid, None)
