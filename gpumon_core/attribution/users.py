"""Whose a user id is: a login name, or the user that the id was given to for containers.

A directory (LDAP, SSSD) may be away for a moment, and may take long to say so: it is asked by a thread of its own,
and what it did not know is asked again.
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
# A new id is waited for so long; what comes later is taken at a later tick.
PATIENCE_S = 0.5
# An id without a name is looked up again after this pause, which doubles up to the longest, and so many times.
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 600.0
MOST_TRIES = 64
# So many ids are kept.
MOST_IDS = 4096


@dataclass(frozen=True, slots=True)
class Owner:
    """Who a user id belongs to: itself a login, or one of those that a login was given for its containers."""

    name: str
    is_subordinate: bool = False


def owner_of(uid: int) -> Owner | None:
    """Who an id belongs to, as far as it is known just now."""
    name = login_name(uid)
    if name is not None:
        return Owner(name)
    name = subordinate_owner(uid)
    return None if name is None else Owner(name, is_subordinate=True)


def login_name(uid: int) -> str | None:
    """The login name of a user id, as far as it is known just now."""
    try:
        return field("user", pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return None


def subordinate_owner(uid: int, path: str = SUBUID) -> str | None:
    """The user whom the file of subordinate ids gives an id to; by its number where it has no name."""
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
    """Owners of user ids; `find` belongs to one thread, and waits for a directory a moment, once for each id."""

    def __init__(self, look_up: Callable[[int], Owner | None]) -> None:
        self._look_up = look_up
        self._known: dict[int, Owner] = {}
        # By id: when it is looked up again, the pause after that, and how many times it was.
        self._due: dict[int, tuple[float, float, int]] = {}
        self._thread: threading.Thread | None = None

    def find(self, uid: int) -> Owner | None:
        """Who an id belongs to; None as long as that is not known."""
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
