"""What stands inside a process's root: read as that process reads it, by a thread that ends afterwards."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TypeVar

from gpumon_core.attribution import rights
from gpumon_core.attribution.files import Tree, read
from gpumon_core.attribution.listeners import started

# Where a pod's namespace stands in its containers:
# https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/
NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
# A namespace is a label of the DNS: RFC 1123.
LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

Found = TypeVar("Found")


def look(proc: str, pid: int, start: int | None, action: Callable[[Tree], Found]) -> Found:
    """What `action` finds below the root of the process that began at `start` (clock ticks; None: whichever has
    the PID). Takes the rights of that process from the calling thread for good. Raises OSError where it has ended,
    or its root may not be looked at."""
    process = f"{proc}/{pid}"
    with Tree.of_process(process) as tree:
        its_own = rights.of(read(f"{process}/status"))
        # Behind both: a process that is there now was there before, and nobody else had its number.
        if its_own is None or (start is not None and started(pid, proc) != start):
            raise ProcessLookupError(errno.ESRCH, "has ended", process)
        rights.take(its_own)
        return action(tree)


def namespace(tree: Tree) -> str | None:
    """The Kubernetes namespace that the account of a pod belongs to; None where no such name stands there."""
    return as_label((tree.read(NAMESPACE_FILE, 256) or b"").decode("ascii", "replace"))


def as_label(text: str) -> str | None:
    """A text that is a name of Kubernetes, without the blanks around it."""
    text = text.strip()
    return text if LABEL.fullmatch(text) else None
