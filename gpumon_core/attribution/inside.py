"""Reads files inside the root of a process with the rights of that process, on a thread that ends afterwards."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import TypeVar

from gpumon_core.attribution import rights
from gpumon_core.attribution.files import Tree, read
from gpumon_core.attribution.listeners import started

# The file with the namespace of a pod in its containers:
# https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/
NAMESPACE_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
# A namespace is a label of the DNS: RFC 1123.
LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")

_Result = TypeVar("_Result")


def look(proc: str, pid: int, start: int | None, action: Callable[[Tree], _Result]) -> _Result:
    """The result of `action` below the root of the process that began at `start` (clock ticks; None: any process
    with the PID). The calling thread gets the rights of that process, until it ends. Raises OSError where the
    process has ended, or its root cannot be read."""
    process = f"{proc}/{pid}"
    with Tree.of_process(process) as tree:
        its_own = rights.of(read(f"{process}/status"))
        # After both reads: a process that exists now existed before, and no other process had its PID.
        if its_own is None or (start is not None and started(pid, proc) != start):
            raise ProcessLookupError(errno.ESRCH, "has ended", process)
        rights.take(its_own)
        return action(tree)


def namespace(tree: Tree) -> str | None:
    """The Kubernetes namespace that the account of a pod belongs to; None where the file has no such name."""
    return as_label((tree.read(NAMESPACE_FILE, 256) or b"").decode("ascii", "replace"))


def as_label(text: str) -> str | None:
    """A text without the blanks around it, if it is a name of Kubernetes."""
    text = text.strip()
    return text if LABEL.fullmatch(text) else None
