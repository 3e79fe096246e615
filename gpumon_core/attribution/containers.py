"""Finds the name and image of a container: from the socket of its engine, or from the file of its runtime.

What cannot be read stays unknown. Sources: Docker's Engine API (Podman's is compatible), /containers/{id}/json;
the OCI runtime specification, config.json; the annotations of containerd's and CRI-O's Kubernetes parts
(pkg/annotations).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from gpumon_core.attribution.endpoints import get_over_socket, values_at
from gpumon_core.attribution.files import read

ID = re.compile(r"[0-9a-f]{64}")
# The prefix of an engine that belongs to a user. Only that engine is asked about its containers.
ROOTLESS = "rootless "
SOCKETS = {
    # A rootless engine listens in the folder of the user that it belongs to.
    "docker": ("/var/run/docker.sock", "/run/user/{uid}/docker.sock"),
    "podman": ("/run/podman/podman.sock", "/run/user/{uid}/podman/podman.sock"),
    f"{ROOTLESS}docker": ("/run/user/{uid}/docker.sock",),
    f"{ROOTLESS}podman": ("/run/user/{uid}/podman/podman.sock",),
}
# Where control groups are, by the name of their hierarchy in /proc/PID/cgroup.
GROUPS = {"": ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"), "name=systemd": ("/sys/fs/cgroup/systemd",)}
# Where containerd stores its state: by itself, and as part of k3s and RKE2, MicroK8s, k0s and Docker.
STATES = (
    "/run/containerd",
    "/run/k3s/containerd",
    "/var/snap/microk8s/common/run/containerd",
    "/run/k0s/containerd",
    "/run/docker/containerd/daemon",
)
CONFIGS = (
    *(f"{state}/io.containerd.runtime.v2.task/{{namespace}}/{{id}}/config.json" for state in STATES),
    "/run/containers/storage/overlay-containers/{id}/userdata/config.json",
    "/var/lib/containers/storage/overlay-containers/{id}/userdata/config.json",
)
NAMESPACES = ("k8s.io", "default", "moby")
# The annotations in a container's file for each field; the first that exists counts.
ANNOTATIONS = {
    "container_name": ("io.kubernetes.cri.container-name", "io.kubernetes.container.name", "nerdctl/name"),
    "container_image": ("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"),
    "pod": ("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"),
    "namespace": ("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"),
}
# The labels of Docker for each field.
LABELS = {"pod": "io.kubernetes.pod.name", "namespace": "io.kubernetes.pod.namespace"}


def facts_of(engine: str, container: str, uid: int, extra_socket: str | None = None) -> dict[str, str]:
    """What is known of a container, by the fields of attribution.records.Program; {} where nothing is."""
    if ID.fullmatch(container) is None:
        return {}
    # The engine of root is the engine of the system.
    sockets = [place.format(uid=uid) for place in SOCKETS.get(engine, ()) if uid or "{uid}" not in place]
    if engine.startswith(ROOTLESS):
        if extra_socket is not None and _owner(extra_socket) == uid:
            sockets.insert(0, extra_socket)
        return _from_sockets(sockets, container)
    if extra_socket is not None:
        sockets.insert(0, extra_socket)
    return (
        _from_sockets(sockets, container)
        or _from_config(container)
        # The path of a pod's container does not say whether containerd or Docker runs it.
        or (_from_sockets(SOCKETS["docker"][:1], container) if engine == "containerd" else {})
    )


def _from_sockets(sockets: Sequence[str], container: str) -> dict[str, str]:
    for place in sockets:
        try:
            return _from_engine(get_over_socket(place, f"/containers/{container}/json"))
        except (OSError, ValueError, RecursionError):
            continue
    return {}


def _from_engine(answer: Any) -> dict[str, str]:
    found = {
        "container_name": _text(values_at(answer, "Name")).removeprefix("/"),
        "container_image": _text(values_at(answer, "Config.Image")),
    }
    # The names of labels have dots, which a path of values_at would split.
    labels = next((labels for labels in values_at(answer, "Config.Labels") if isinstance(labels, dict)), {})
    found |= {field: _text([labels.get(label)]) for field, label in LABELS.items()}
    return {field: text for field, text in found.items() if text}


def _from_config(container: str) -> dict[str, str]:
    for pattern in CONFIGS:
        for namespace in NAMESPACES if "{namespace}" in pattern else ("",):
            content = read(pattern.format(namespace=namespace, id=container))
            if content is None:
                continue
            try:
                annotations = json.loads(content).get("annotations") or {}
            except (ValueError, AttributeError, RecursionError):
                continue
            if isinstance(annotations, dict):
                found = {
                    field: _text([annotations[key] for key in keys if key in annotations])
                    for field, keys in ANNOTATIONS.items()
                }
                return {field: text for field, text in found.items() if text}
    return {}


def _text(values: list[Any]) -> str:
    return next((value for value in values if isinstance(value, str)), "")


def owner(pid: int, proc: str = "/proc") -> int:
    """The user id of a process, by the owner of its folder in /proc."""
    return _owner(f"{proc}/{pid}") or 0


def maker(pid: int, container: str, proc: str = "/proc") -> int | None:
    """The user who could choose the name of a container's control group, which is the owner of the group above it;
    None where that cannot be read. A user's own group (cgroups(7), delegation) may have the name of any container,
    also of one of root's."""
    for line in (read(f"{proc}/{pid}/cgroup") or b"").decode("utf-8", "surrogateescape").split("\n")[:64]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        above = path.partition(container)[0].rpartition("/")[0]
        if container not in path or ".." in above.split("/"):
            continue
        for place in GROUPS.get(controllers, ()):
            if (uid := _owner(f"{place}{above}")) is not None:
                return uid
    return None


def _owner(path: str) -> int | None:
    try:
        return os.stat(path).st_uid
    except (OSError, ValueError):
        return None
