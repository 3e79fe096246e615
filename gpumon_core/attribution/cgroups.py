"""Finds the container, pod, service and job of a process, from its control groups (cgroups(7)).

The kernel knows no containers. But each engine gives its groups names of its own, which are in /proc/PID/cgroup.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from gpumon_core.safety.text import clean

# No engine makes a longer path: it is not searched.
LONGEST = 4096
# Every engine names a container by 64 hexadecimal digits, wherever it puts the group: below a folder of its own
# (/docker), of an orchestrator (/ecs/TASK), of the user (--cgroup-parent), or, seen from another control group
# namespace, below no folder (/../ID). The 64 digits mark a container, and a prefix marks the engine:
# "docker-ID.scope", "libpod-ID", or "slice:cri-containerd:ID", which is meant for systemd but is a folder where an
# engine has none.
ID = r"(?P<id>[0-9a-f]{64})"
SHAPE = re.compile(rf"(?:(?P<maker>.+)[-:])?{ID}(?:\.scope)?")
# On AWS Fargate a container is its task's id with a number behind it.
FARGATE = re.compile(r"(?P<id>[0-9a-f]{32}-[0-9]{6,20})")
MAKERS = {
    "docker": "docker",
    "libpod": "podman",
    # In the group of a service (--cgroups=split, as Quadlet does) Podman adds "payload".
    "libpod-payload": "podman",
    "crio": "cri-o",
    "cri-containerd": "containerd",
    "containerd": "containerd",
    "nerdctl": "containerd",
}
# The monitor of a container, in a group of almost the same name.
MONITOR = re.compile(r".*conmon")
# The engine of a container without a prefix: the group above it names the engine. Otherwise it is Docker, which
# takes any parent. dockerd has its containers in containerd's namespace "moby".
ABOVE: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("docker", re.compile("docker|moby")),
    # The path does not say which engine runs a pod; containerd is the one that most clusters have.
    ("containerd", re.compile(r"(?:.*-)?pod[0-9a-f_-]{32,36}(?:\.slice)?|default|k8s\.io")),
)
# The group of Podman's pods, which have ids of the same form.
POD_PARENT = "libpod_parent"

# Engines that identify a container by a name. The group `id` is the container's name.
ANY = ".*"
NAMED: tuple[tuple[str, re.Pattern[str], re.Pattern[str]], ...] = tuple(
    (engine, re.compile(above), re.compile(pattern))
    for engine, above, pattern in (
        ("lxc", ANY, r"lxc\.payload\.(?P<id>.+)"),
        # The virtual machines of libvirt are there too (machine-qemu\x2d1\x2dname.scope); they are not containers.
        ("systemd-nspawn", r"machine\.slice", r"machine-(?!qemu\\x2d)(?P<id>.+)\.scope"),
        ("systemd-nspawn", ANY, r"systemd-nspawn@(?P<id>.+)\.service"),
        ("lxc", r"lxc|lxc\.payload", r"(?!lxc\.monitor)(?P<id>.+)"),
    )
)
USER_SLICE = re.compile(r"user-(?P<uid>[0-9]{1,10})\.slice|user@(?P<manager>[0-9]{1,10})\.service")
POD = re.compile(r"(?:.*-)?pod(?P<uid>[0-9a-f]{8}(?:[-_]?[0-9a-f]{4}){3}[-_]?[0-9a-f]{12})(?:\.slice(?::.*)?)?")
JOB = re.compile(r"job_(?P<id>[0-9]+)")
SLURM = re.compile(r"slurm(?:_.*)?|(?:.*_)?slurmstepd\.scope")
UNIT = re.compile(r".+\.(?:service|scope)")
# Scopes that an engine or Slurm made are not units that people know.
MADE = re.compile(r"(?:docker|libpod|crio|cri-containerd|nerdctl|containerd)-.*\.scope")
# systemd escapes bytes, and a letter may be several: systemd.unit(5).
ESCAPED = re.compile(r"(?:\\x[0-9a-f]{2})+")
# The kernel's mark on a group that was removed while the process ended: admin-guide/cgroup-v2.rst.
REMOVED = " (deleted)"
# The order to read the hierarchies in: the unified one and systemd's say most.
FIRST = {"": 0, "name=systemd": 1}
LAST = 2


@dataclass(frozen=True, slots=True)
class Placement:
    """What the control groups of a process say; None where they say nothing.

    `container_id` is 64 hexadecimal digits, or, of LXC and systemd-nspawn, the container's name. `unit` is the
    nearest systemd service or session around the process; `pod_uid` is Kubernetes'. `slice_uid` is the user of the
    slice. That user owns the container of a rootless engine, whatever user the process has inside it.
    """

    container_engine: str | None = None
    container_id: str | None = None
    pod_uid: str | None = None
    unit: str | None = None
    slurm_job: str | None = None
    slice_uid: str | None = field(default=None, compare=False)


def placement(text: str) -> Placement:
    """Read the content of /proc/PID/cgroup, of version 1, 2 or both at once."""
    paths = []
    # Not splitlines(): a group's name may have any character but "/" and the line feed.
    for line in text.split("\n")[:64]:
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator and path.startswith("/") and len(path) <= LONGEST:
            paths.append((FIRST.get(controllers, LAST), path.removesuffix(REMOVED)))
    found: dict[str, str] = {}
    for _, path in sorted(paths, key=lambda item: item[0]):
        for name, value in _read(path).items():
            found.setdefault(name, value)
    return Placement(**found)


def _read(path: str) -> dict[str, str]:
    """What one path says. Of several containers the innermost counts."""
    found: dict[str, str] = {}
    above = ""
    in_slurm = False
    for part in path.split("/"):
        # Slices inside a container belong to its own users.
        if "container_id" not in found and (owner := USER_SLICE.fullmatch(part)):
            found["slice_uid"] = owner["uid"] or owner["manager"]
        container = _container(above, part)
        if container is not None:
            found["container_engine"], found["container_id"] = container
        if pod := POD.fullmatch(part):
            digits = re.sub("[-_]", "", pod["uid"])
            found["pod_uid"] = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
        if SLURM.fullmatch(part):
            in_slurm = True
        elif UNIT.fullmatch(part) and container is None and not MADE.fullmatch(part):
            found["unit"] = _unescaped(part)
        if in_slurm and (job := JOB.fullmatch(part)):
            found["slurm_job"] = job["id"]
        above = part
    return found


def _container(above: str, part: str) -> tuple[str, str] | None:
    """The engine and the container of one part of a path."""
    if found := SHAPE.fullmatch(part):
        maker = found["maker"]
        if maker is None:
            return None if above == POD_PARENT else (_engine(above), found["id"])
        if MONITOR.fullmatch(maker):
            return None
        # The slice is before the colons.
        return MAKERS.get(maker.rpartition(":")[2]) or _engine(above), found["id"]
    if found := FARGATE.fullmatch(part):
        return "containerd", found["id"]
    for engine, parent, pattern in NAMED:
        if (found := pattern.fullmatch(part)) and parent.fullmatch(above):
            return engine, _unescaped(found["id"])
    return None


def _engine(above: str) -> str:
    return next((engine for engine, parent in ABOVE if parent.fullmatch(above)), "docker")


def _unescaped(name: str) -> str:
    """A unit's name as people wrote it."""
    return clean(
        ESCAPED.sub(lambda run: bytes.fromhex(run[0].replace("\\x", "")).decode("utf-8", "replace"), name)
    )
