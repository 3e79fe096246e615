"""Where a process stands: its container, pod, service and job, from its control groups (cgroups(7)).

The kernel knows no containers. But every engine gives the groups that it makes names of its own, and
those are in /proc/PID/cgroup.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# A path longer than this is nobody's, and not worth the search.
LONGEST = 4096
ID = r"(?P<id>[0-9a-f]{64})"

# What one part of a path says of a container, the more telling first. Groups: id, the container.
CONTAINERS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (engine, re.compile(pattern))
    for engine, pattern in (
        ("docker", rf"docker-{ID}\.scope"),
        ("podman", rf"libpod-{ID}(?:\.scope)?"),
        ("cri-o", rf"crio-{ID}(?:\.scope)?"),
        ("containerd", rf"(?:cri-containerd|nerdctl|containerd)-{ID}\.scope"),
        # runc's systemd driver, where the path it was given is not a path ("slice:prefix:name").
        ("containerd", rf".*:(?:cri-containerd|nerdctl):{ID}"),
        ("lxc", r"lxc\.payload\.(?P<id>.+)"),
        ("systemd-nspawn", r"machine-(?P<id>.+)\.scope"),
        ("systemd-nspawn", r"systemd-nspawn@(?P<id>.+)\.service"),
    )
)
# What only its parent tells: (the part before it, itself).
BELOW: tuple[tuple[str, re.Pattern[str], re.Pattern[str]], ...] = tuple(
    (engine, re.compile(above), re.compile(pattern))
    for engine, above, pattern in (
        ("docker", "docker", ID),
        ("podman", "libpod_parent", rf"libpod-{ID}"),
        # The path does not say which engine runs a pod; containerd is the one that most clusters have.
        ("containerd", r"pod[0-9a-f-]{32,36}", ID),
        ("containerd", "default|k8s\\.io|moby", ID),
        ("lxc", r"lxc|lxc\.payload", r"(?P<id>[^/]+)"),
    )
)
POD = re.compile(r"(?:.*-)?pod(?P<uid>[0-9a-f]{8}(?:[-_]?[0-9a-f]{4}){3}[-_]?[0-9a-f]{12})(?:\.slice)?")
JOB = re.compile(r"job_(?P<id>\d+)")
SLURM = re.compile(r"slurm(?:_.*)?|(?:.*_)?slurmstepd\.scope")
UNIT = re.compile(r".+\.(?:service|scope)")
# Scopes that an engine or Slurm made are not what people know a process by.
MADE = re.compile(
    r"(?:docker|libpod|libpod-conmon|crio|crio-conmon|cri-containerd|nerdctl|containerd|machine)-.*\.scope"
)
ESCAPED = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Placement:
    """What the control groups of a process tell; None where they tell nothing.

    `container_id` is 64 hexadecimal digits, or, of LXC and systemd-nspawn, the container's name. `unit` is
    the nearest systemd service or session around the process; `pod_uid` is Kubernetes'.
    """

    container_engine: str | None = None
    container_id: str | None = None
    pod_uid: str | None = None
    unit: str | None = None
    slurm_job: str | None = None


def placement(text: str) -> Placement:
    """Read the content of /proc/PID/cgroup, of version 1, 2 or both at once."""
    paths = []
    for line in text.splitlines()[:64]:
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator and path.startswith("/") and len(path) <= LONGEST:
            # The unified hierarchy and systemd's own tell most; the controllers of version 1 the rest.
            paths.append((0 if controllers == "" else 1 if controllers == "name=systemd" else 2, path))
    found: dict[str, str] = {}
    for _, path in sorted(paths, key=lambda item: item[0]):
        for name, value in _read(path).items():
            found.setdefault(name, value)
    return Placement(**found)


def _read(path: str) -> dict[str, str]:
    """What one path tells. The innermost of several containers is the process's own."""
    found: dict[str, str] = {}
    above = ""
    in_slurm = False
    for part in path.split("/"):
        container = _container(above, part)
        if container is not None:
            found["container_engine"], found["container_id"] = container
        if pod := POD.fullmatch(part):
            digits = re.sub("[-_]", "", pod["uid"])
            found["pod_uid"] = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
        if SLURM.fullmatch(part):
            in_slurm = True
        elif UNIT.fullmatch(part) and container is None and not MADE.fullmatch(part):
            found["unit"] = ESCAPED.sub(lambda code: chr(int(code[1], 16)), part)
        if in_slurm and (job := JOB.fullmatch(part)):
            found["slurm_job"] = job["id"]
        above = part
    return found


def _container(above: str, part: str) -> tuple[str, str] | None:
    for engine, pattern in CONTAINERS:
        if found := pattern.fullmatch(part):
            return engine, ESCAPED.sub(lambda code: chr(int(code[1], 16)), found["id"])
    for engine, parent, pattern in BELOW:
        if parent.fullmatch(above) and (found := pattern.fullmatch(part)):
            return engine, found["id"]
    return None
