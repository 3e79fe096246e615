"""What a GPU and its driver say of themselves, and what rarely changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pynvml

from gpumon_core.metrics import MIB
from gpumon_core.telemetry import unified
from gpumon_core.telemetry.gate import Gate, Unsupported
from gpumon_core.telemetry.limits import MOST_MEMORY_MIB, MOST_POWER_W, within
from gpumon_core.telemetry.records import GpuInfo, HostInfo

ARCHITECTURES = {
    value: name.removeprefix("NVML_DEVICE_ARCH_").title()
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_DEVICE_ARCH_") and name != "NVML_DEVICE_ARCH_UNKNOWN"
}
# Of the facts of a GPU: a limit follows nvidia-smi -pl or Dynamic Boost, and one that could not be read may come.
MAY_CHANGE = (
    *("name", "memory_total_mib", "power_limit_w", "pci_bus_id"),
    *("architecture", "compute_capability", "memory_from"),
)


def read_host(gate: Gate, before: HostInfo) -> HostInfo:
    """What the driver says of itself; what it fails to say stays as it was. Raises DeviceLost and SessionOver."""
    return HostInfo(
        name=before.name,
        driver_version=gate.text("driver", pynvml.nvmlSystemGetDriverVersion) or before.driver_version,
        cuda_version=_cuda_version(gate) or before.cuda_version,
        nvml_version=gate.text("driver", pynvml.nvmlSystemGetNVMLVersion) or before.nvml_version,
    )


def read(
    gate: Gate,
    system: unified.System,
    handle: object,
    index: int,
    parent: GpuInfo | None = None,
    mig_index: int | None = None,
) -> GpuInfo:
    """What a GPU says of itself; a MIG instance says less, and has the rest from its parent. Raises DeviceLost and
    SessionOver."""
    subject = f"GPU {index}"

    def ask(call: Callable[..., Any]) -> Any:
        return gate.fact(subject, call, handle)

    def text(call: Callable[..., Any]) -> str | None:
        return gate.text(subject, call, handle)

    name = text(pynvml.nvmlDeviceGetName)
    memory, supported = None, True
    try:
        memory = gate.ask(subject, pynvml.nvmlDeviceGetMemoryInfo, handle)
    except Unsupported:
        supported = False
    # Zeros that are answered with success are a word of their own.
    whole = None if memory is None else round(memory.total * MIB)
    total, memory_from = unified.memory_facts(
        name, supported, whole if whole == 0 else within(whole, MOST_MEMORY_MIB), system
    )
    bus_id = parent.pci_bus_id if parent else text(_pci_bus_id)
    capability = ask(pynvml.nvmlDeviceGetCudaComputeCapability)
    capability = f"{capability[0]}.{capability[1]}" if _is_version(capability) else None
    architecture = ARCHITECTURES.get(ask(pynvml.nvmlDeviceGetArchitecture))
    return GpuInfo(
        index=index,
        # A board without a readable UUID still has an address on the bus that no other has.
        uuid=text(pynvml.nvmlDeviceGetUUID) or place_of(bus_id or str(index), mig_index),
        name=name,
        memory_total_mib=total,
        power_limit_w=_watts(ask(pynvml.nvmlDeviceGetEnforcedPowerLimit))
        or _watts(ask(pynvml.nvmlDeviceGetPowerManagementLimit)),
        pci_bus_id=bus_id,
        architecture=architecture or (parent.architecture if parent else None),
        compute_capability=capability or (parent.compute_capability if parent else None),
        parent_uuid=parent.uuid if parent else None,
        mig_index=mig_index,
        memory_from=memory_from,
    )


def update(info: GpuInfo, now: GpuInfo) -> GpuInfo:
    """The facts of a GPU after it was asked again: what may change, and was answered, is new."""
    if now.memory_from == "unified" and info.memory_from == "device":
        # A driver that has said once how much memory the board has is not believed when it says nothing.
        now = replace(now, memory_total_mib=None, memory_from=None)
    return replace(info, **{name: getattr(now, name) for name in MAY_CHANGE if getattr(now, name) is not None})


def place_of(where: str, mig_index: int | None) -> str:
    """What replaces the UUID of a device that has none of its own."""
    return f"PCI-{where}" + ("" if mig_index is None else f"-MIG-{mig_index}")


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else within(milliwatts / 1000, MOST_POWER_W)


def _is_version(pair: Any) -> bool:
    """Whether a major and a minor number can be those of a compute capability."""
    return bool(pair) and 0 < pair[0] < 1000 and 0 <= pair[1] < 1000


def _pci_bus_id(handle: object) -> Any:
    # pynvml decodes the text when the attribute is read: here, so that the gate sees it fail.
    return pynvml.nvmlDeviceGetPciInfo(handle).busId


def _cuda_version(gate: Gate) -> str | None:
    """The newest CUDA version that the driver supports, such as "13.0"."""
    version = gate.fact("driver", pynvml.nvmlSystemGetCudaDriverVersion_v2) or gate.fact(
        "driver", pynvml.nvmlSystemGetCudaDriverVersion
    )
    # 1000 times the major version and 10 times the minor one.
    return f"{version // 1000}.{version % 1000 // 10}" if version and 1000 <= version < 1_000_000 else None
