"""The place of a process, from /proc/PID/cgroup as kernels, engines and Slurm write it."""

# ruff: noqa: E501 - a case a line
from __future__ import annotations

import random
from dataclasses import astuple

import pytest

from gpumon_core.attribution.cgroups import Placement, placement

ID, INNER = "4f" * 32, "7c" * 32
UID = "3f5b1a52-9f6e-4d0a-8f0e-1f2e3d4c5b6a"
UNDER = UID.replace("-", "_")
POD = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDER}.slice"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"0::/system.slice/docker-{ID}.scope\n", Placement("docker", ID)),
        (f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope", Placement("docker", ID, unit="user@1000.service")),
        (f"0::/docker/{ID}", Placement("docker", ID)),
        (f"0::/docker/{ID}/init", Placement("docker", ID)),
        (f"12:memory:/docker/{ID}\n11:devices:/docker/{ID}\n1:name=systemd:/docker/{ID}\n0::/\n", Placement("docker", ID)),
        (f"0::/machine.slice/libpod-{ID}.scope/container", Placement("podman", ID)),
        (f"0::/libpod_parent/libpod-{ID}", Placement("podman", ID)),
        (f"0::/machine.slice/libpod-conmon-{ID}.scope", Placement()),
        (f"0::/system.slice/nerdctl-{ID}.scope", Placement("containerd", ID)),
        (f"0::/default/{ID}", Placement("containerd", ID)),
        (f"0::/system.slice/containerd.service/kubepods-besteffort-pod{UNDER}.slice:cri-containerd:{ID}", Placement("containerd", ID, UID, "containerd.service")),
        (f"0::{POD}/cri-containerd-{ID}.scope", Placement("containerd", ID, UID)),
        (f"0::{POD}/crio-{ID}.scope", Placement("cri-o", ID, UID)),
        (f"0::{POD}/crio-conmon-{ID}.scope", Placement(pod_uid=UID)),
        (f"0::{POD}/docker-{ID}.scope", Placement("docker", ID, UID)),
        (f"4:devices:/kubepods/besteffort/pod{UID}/{ID}", Placement("containerd", ID, UID)),
        (f"0::/docker/{ID}/kubelet{POD}/cri-containerd-{INNER}.scope", Placement("containerd", INNER, UID)),
        ("0::/lxc.payload.web/system.slice/ollama.service", Placement("lxc", "web", unit="ollama.service")),
        ("0::/lxc/101/ns/system.slice/cron.service", Placement("lxc", "101", unit="cron.service")),
        ("0::/lxc.payload/web", Placement("lxc", "web")),
        ("0::/lxc.monitor.web", Placement()),
        ("0::/machine.slice/machine-lab\\x2d1.scope/payload", Placement("systemd-nspawn", "lab-1")),
        ("0::/machine.slice/systemd-nspawn@lab.service/payload", Placement("systemd-nspawn", "lab")),
        ("9:memory:/slurm/uid_1000/job_123/step_0/task_0\n0::/", Placement(slurm_job="123")),
        ("9:memory:/slurm_node7/uid_1000/job_123/step_batch", Placement(slurm_job="123")),
        ("0::/system.slice/slurmstepd.scope/job_123/step_0/user/task_0", Placement(slurm_job="123")),
        ("0::/system.slice/node7_slurmstepd.scope/job_9/step_0", Placement(slurm_job="9")),
        ("0::/home/job_123", Placement()),
        ("0::/system.slice/ollama.service", Placement(unit="ollama.service")),
        ("0::/system.slice/system-my\\x2dapp.slice/my\\x2dapp@1.service", Placement(unit="my-app@1.service")),
        ("0::/user.slice/user-1000.slice/session-3.scope", Placement(unit="session-3.scope")),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-blender-4711.scope", Placement(unit="app-gnome-blender-4711.scope")),
        ("0::/user.slice/user-1000.slice/user@1000.service/init.scope", Placement(unit="init.scope")),
        ("0::/", Placement()),
        ("", Placement()),
        ("0::/../../other", Placement()),
        ("garbage\n::::\n\x00\ufffd:/:", Placement()),
        ("0::/" + "a" * 100_000, Placement()),
        (f"0::/system.slice/docker-{ID[:-1]}.scope", Placement()),
        (f"0::/system.slice/web.service/libpod-payload-{ID}", Placement("podman", ID, unit="web.service")),
        (f"0::/system.slice/docker-{ID}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDER}.slice/cri-containerd-{INNER}.scope", Placement("containerd", INNER, UID)),
        (f"0::/system.slice/myapp.service/docker-{ID}.scope", Placement("docker", ID, unit="myapp.service")),
        (f"0::/system.slice:docker:{ID}", Placement("docker", ID)),
        (f"0::{POD}/{ID}", Placement("containerd", ID, UID)),
        (f"0::/../docker-{ID}.scope", Placement("docker", ID)),
        (f"0::/system.slice/docker-{ID}.scope (deleted)", Placement("docker", ID)),
        ("0::/system.slice/ollama.service (deleted)", Placement(unit="ollama.service")),
        ("0::/lxc/lxc.monitor.web", Placement()),
        ("0::/user.slice/user-1000.slice/user@1000.service", Placement(unit="user@1000.service")),
        ("0::/machine.slice/machine-qemu\\x2d1\\x2dwin.scope/libvirt/emulator", Placement(unit="machine-qemu-1-win.scope")),
        ("0::/system.slice/machine-learning.scope", Placement(unit="machine-learning.scope")),
        ("9:memory:/slurm/uid_1000/job_5/step_0\n1:name=systemd:/system.slice/slurmd.service", Placement(unit="slurmd.service", slurm_job="5")),
        (f"4:memory:/docker/{ID}\n1:name=systemd:/docker/{INNER}\n", Placement("docker", INNER)),
        (f"1:name=systemd:/docker/{ID}\n0::/docker/{INNER}\n", Placement("docker", INNER)),
        ("0::/slurm/uid_1000/job_\u0661", Placement()),
        # wherever the engine's configuration puts them
        (f"9:perf_event:/ecs/{UID}/{ID}\n1:name=systemd:/ecs/{UID}/{ID}\n", Placement("docker", ID)),
        (f"0::/ecstasks.slice/ecstasks-{'a5' * 16}.slice/docker-{ID}.scope", Placement("docker", ID)),
        (f"0::/ecs/{'a5' * 16}/{'a5' * 16}-3264187598", Placement("containerd", f"{'a5' * 16}-3264187598")),
        (f"0::/my/own/parent/{ID}", Placement("docker", ID)),
        (f"0::/batch.slice/docker-{ID}.scope", Placement("docker", ID)),
        (f"0::/../{ID}", Placement("docker", ID)),
        (f"0::/../../{POD.rsplit('/', 1)[1]}/cri-containerd-{ID}.scope", Placement("containerd", ID, UID)),
        (f"0::/../crio-{ID}.scope", Placement("cri-o", ID)),
        (f"0::/{ID}", Placement("docker", ID)),
        (f"0::/actions_job/{ID}", Placement("docker", ID)),
        (f"0::/system.slice/balena-{ID}.scope", Placement("docker", ID)),
        (f"0::/libpod_parent/{INNER}", Placement()),
        (f"0::/libpod_parent/{INNER}/libpod-{ID}", Placement("podman", ID)),
        (f"0::/machine.slice/machine-libpod_pod_{INNER}.slice/libpod-{ID}.scope", Placement("podman", ID)),
        (f"0::/user.slice/my-{ID[:-1]}.scope", Placement(unit=f"my-{ID[:-1]}.scope")),
        ("0::/system.slice/caf\\xc3\\xa9.service", Placement(unit="café.service")),
        ("0::/system.slice/a\\x00\\xffb.service", Placement(unit="a\ufffd\ufffdb.service")),
        ("0::/system.slice/a\udcff\u2028b.service", Placement(unit="a\ufffd\ufffdb.service")),
    ],
)  # fmt: skip
def test_a_process_is_found_by_its_control_groups(text: str, found: Placement) -> None:
    assert placement(text) == found


@pytest.mark.parametrize(
    ("text", "uid"),
    [
        (f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope", "1000"),
        (f"0::/user.slice/user-1000.slice/user@1000.service/app.slice/docker.service/docker/{ID}", "1000"),
        ("0::/../user@1001.service/app.slice/x.scope", "1001"),
        (f"0::/system.slice/docker-{ID}.scope", None),
        (f"0::/system.slice/docker-{ID}.scope/user.slice/user-1000.slice/session-1.scope", None),
    ],
)
def test_a_rootless_container_belongs_to_the_user_in_whose_slice_it_is(text: str, uid: str | None) -> None:
    assert placement(text).slice_uid == uid


def test_no_text_makes_it_raise_and_what_it_says_can_be_stored() -> None:
    choose = random.Random(1)
    pieces = [
        ":",
        "/",
        "\n",
        "0::",
        "..",
        ID,
        f"pod{UID}",
        "docker-",
        ".scope",
        ".service",
        "job_1",
        "slurm",
        "\\x",
        "\\xff",
        "\\x00",
        "\udcff",
        "\x00",
        "é",
    ]
    for _ in range(5_000):
        found = placement("0::/" + "".join(choose.choices(pieces, k=12)))
        for value in astuple(found):
            assert value is None or (value.isprintable() and value.encode())
