"""Processes, MIG devices and GPUs, as a test sees them."""

from __future__ import annotations

import ctypes
import struct
import time
import uuid as uuids
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from . import layout
from .attributes import Number, Text, TextValue, View, free_slot, set_all
from .layout import UNSUPPORTED

if TYPE_CHECKING:
    from . import FakeNvml

Kind: TypeAlias = Literal["C", "G", "M"]
Presence: TypeAlias = Literal["always", "after sizing", "until sizing"]

NOT_AVAILABLE = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE: a process's memory under WDDM
NO_INSTANCE = 0xFFFFFFFF  # a process's GPU and compute instance outside MIG
GIB = 2**30

_KINDS: dict[str, int] = {"C": 1, "G": 2, "M": 4}
_PRESENCE: dict[str, int] = {"always": 1, "after sizing": 2, "until sizing": 3}


def _set_gpm(raw: Any, metric_id: int, value: float | None) -> None:
    entries = [entry for entry in raw.gpm if entry.used and entry.id == metric_id]
    entry = entries[0] if entries else raw.gpm[free_slot(raw.gpm, "GPM values")]
    entry.id, entry.value = metric_id, value or 0.0
    entry.used = value is not None


class FakeProcess(View):
    """A process on a GPU. Memory is in bytes, utilization in percent of the GPU."""

    pid = Number()
    memory = Number()
    protected_memory = Number()
    gpu_instance = Number()
    compute_instance = Number()
    sm = Number()
    memory_utilization = Number()
    encoder = Number()
    decoder = Number()
    jpeg = Number()
    ofa = Number()
    time_us = Number()  # of its utilization sample; 0: just now, whenever asked
    name = Text()

    def remove(self) -> None:
        """End the process: NVML no longer lists it."""
        self._raw.presence = 0


class FakeMig(View):
    """A MIG device of a GPU. Its numbers are what nvmlDeviceGetAttributes_v2 and the memory calls say."""

    name = Text()
    uuid = Text()
    gpu_instance_id = Number()
    compute_instance_id = Number()
    memory_total = Number()
    memory_reserved = Number()
    memory_used = Number()
    bar1_total = Number()
    bar1_used = Number()
    multiprocessors = Number()
    copy_engines = Number()
    decoders = Number()
    encoders = Number()
    jpegs = Number()
    ofas = Number()
    gpu_instance_slices = Number()
    compute_instance_slices = Number()

    def __init__(self, gpu: FakeGpu, slot: int) -> None:
        super().__init__(gpu._raw.migs[slot])
        self.gpu, self.slot = gpu, slot

    def set_gpm(self, metric_id: int, value: float | None) -> None:
        """What nvmlGpmMetricsGet says for this GPU instance; None: not supported."""
        _set_gpm(self._raw, metric_id, value)

    def remove(self) -> None:
        """Destroy the instance: its slot is empty, and its handle no longer valid."""
        self._raw.used = 0


class FakeGpu(View):
    """A GPU. Every attribute is live: set it, and the next NVML call says so."""

    name = Text()
    uuid = Text()
    serial = Text()
    vbios = Text()
    pci_bus_id = Text()
    minor_number = Number()
    architecture = Number()
    brand = Number()
    compute_major = Number()
    compute_minor = Number()
    core_count = Number()
    memory_bus_width = Number()
    pci_device_id = Number()
    pci_subsystem_id = Number()
    memory_total = Number()
    memory_reserved = Number()
    memory_used = Number()  # without the reserved part, as in nvmlMemory_v2_t
    bar1_total = Number()
    bar1_used = Number()
    gpu_utilization = Number()
    memory_utilization = Number()
    encoder_utilization = Number()
    decoder_utilization = Number()
    jpeg_utilization = Number()
    ofa_utilization = Number()
    utilization_period_us = Number()
    temperature = Number()
    hotspot_temperature = Number()
    memory_temperature = Number()
    power_mw = Number()
    power_average_mw = Number()
    power_limit_mw = Number()
    power_enforced_limit_mw = Number()
    power_min_limit_mw = Number()
    power_max_limit_mw = Number()
    power_default_limit_mw = Number()
    energy_mj = Number()
    performance_state = Number()
    pcie_generation = Number()
    pcie_width = Number()
    pcie_max_generation = Number()
    pcie_max_width = Number()
    pcie_tx_kib_s = Number()
    pcie_rx_kib_s = Number()
    pcie_replays = Number()
    clocks_event_reasons = Number()
    supported_event_reasons = Number()
    ecc_enabled = Number()
    ecc_pending = Number()
    remapped_correctable = Number()
    remapped_uncorrectable = Number()
    remapped_pending = Number()
    remapped_failure = Number()
    retired_pending = Number()  # None: the board does not retire pages
    persistence_mode = Number()
    compute_mode = Number()
    display_mode = Number()
    display_active = Number()
    mig_enabled = Number()  # None: no MIG on this board
    mig_pending = Number()
    mig_slots = Number()
    nvlink_count = Number()
    nvlink_version = Number()
    gpm_supported = Number()
    fan = Number("fan_speed", 0)
    graphics_clock = Number("clock", 0)
    sm_clock = Number("clock", 1)
    memory_clock = Number("clock", 2)
    video_clock = Number("clock", 3)
    max_graphics_clock = Number("max_clock", 0)
    max_sm_clock = Number("max_clock", 1)
    max_memory_clock = Number("max_clock", 2)
    max_video_clock = Number("max_clock", 3)
    temperature_shutdown = Number("threshold", 0)
    temperature_slowdown = Number("threshold", 1)
    temperature_memory_max = Number("threshold", 2)
    temperature_gpu_max = Number("threshold", 3)

    def __init__(self, fake: FakeNvml, slot: int) -> None:
        super().__init__(fake.state.gpus[slot])
        self.fake, self.slot = fake, slot

    @property
    def lost(self) -> bool:
        """Whether every call about this GPU returns NVML_ERROR_GPU_IS_LOST."""
        return bool(self._raw.lost)

    @lost.setter
    def lost(self, value: bool) -> None:
        self._raw.lost = value

    @property
    def compute_capability(self) -> tuple[int, int]:
        """CUDA compute capability as (major, minor)."""
        return self.compute_major, self.compute_minor

    @compute_capability.setter
    def compute_capability(self, value: tuple[int, int]) -> None:
        self.compute_major, self.compute_minor = value

    @property
    def fans(self) -> tuple[int, ...]:
        """The speed of each fan in percent; `fan` is the first."""
        return tuple(speed for speed in self._raw.fan_speed if speed != UNSUPPORTED)

    @fans.setter
    def fans(self, speeds: Sequence[int]) -> None:
        padding = [UNSUPPORTED] * (layout.FANS - len(speeds))
        self._raw.fan_speed[:] = [*speeds, *padding]

    def add_mig(
        self,
        *,
        slot: int | None = None,
        name: TextValue = None,
        uuid: TextValue = None,
        memory_total: int = 10 * GIB,
        **values: Any,
    ) -> FakeMig:
        """Create a MIG device, and switch MIG mode on. `values` are attributes of FakeMig."""
        slot = free_slot(self._raw.migs, "MIG devices on a GPU") if slot is None else slot
        mig = FakeMig(self, slot)
        for number in layout.MIG_NUMBERS:
            setattr(mig._raw, number, 0)
        for entry in mig._raw.gpm:
            entry.used = 0
        mig.name = name or f"{self.name} MIG 1g.{memory_total // GIB}gb"
        mig.uuid = uuid or f"MIG-{uuids.uuid5(uuids.NAMESPACE_OID, f'{self.slot}.{slot}')}"
        # On an A100 the seven smallest GPU instances are 7 to 13.
        defaults = {"gpu_instance_id": 7 + slot, "multiprocessors": 14, "copy_engines": 1}
        slices = {"gpu_instance_slices": 1, "compute_instance_slices": 1}
        set_all(mig, {"memory_total": memory_total, **defaults, **slices, **values})
        mig._raw.used = 1
        self.mig_enabled = self.mig_pending = 1
        self.mig_slots = max(self.mig_slots or 0, 7, slot + 1)
        return mig

    def add_process(
        self,
        pid: int,
        memory: int | None,
        kind: Kind = "C",
        mig: FakeMig | None = None,
        *,
        presence: Presence = "always",
        **values: Any,
    ) -> FakeProcess:
        """Let a process run here; memory None is NVML_VALUE_NOT_AVAILABLE.

        With presence "after sizing" it appears once a client has asked how many there are, with
        "until sizing" it ends then. `values` are attributes of FakeProcess (sm, encoder, name, ...).
        A process of two kinds is added once per kind, as NVML lists it twice.
        """
        raw = self.fake.next_process()
        process = FakeProcess(raw)
        ctypes.memset(ctypes.addressof(raw), 0, ctypes.sizeof(raw))
        raw.gpu, raw.mig, raw.kind = self.slot, mig.slot if mig else -1, _KINDS[kind]
        gpu_instance = mig.gpu_instance_id if mig else NO_INSTANCE
        compute_instance = mig.compute_instance_id if mig else NO_INSTANCE
        instances = {"gpu_instance": gpu_instance, "compute_instance": compute_instance}
        memory = NOT_AVAILABLE if memory is None else memory
        set_all(process, {"pid": pid, "memory": memory, "name": f"/usr/bin/process-{pid}", **instances, **values})
        raw.presence = _PRESENCE[presence]  # last: from now on the library sees it
        return process

    def add_sample(self, kind: int, value: int, timestamp_us: int | None = None) -> None:
        """Append to the samples of one NVML sampling type (0 power in mW, 1 GPU, 2 memory, ...)."""
        ring = self._raw.rings[kind]
        sample = ring.samples[ring.written % layout.SAMPLES]
        sample.time_us = time.time_ns() // 1000 if timestamp_us is None else timestamp_us
        sample.value = value
        ring.written += 1

    def set_field(
        self,
        field_id: int,
        value: float,
        *,
        scope: int | None = None,
        value_type: int | None = None,
        error: int = 0,
    ) -> None:
        """What nvmlDeviceGetFieldValues says for a field, before anything built in.

        `value_type` is an NVML_VALUE_TYPE_*; left out, it is double for a float, (un)signed long long
        for an int. `error` is the field's own nvmlReturn. Scope None answers for all scopes.
        """
        self.clear_field(field_id, scope=scope)
        field = self._raw.fields[free_slot(self._raw.fields, "fields on a GPU")]
        if value_type is None:
            value_type = 0 if isinstance(value, float) else 4 if value < 0 else 3
        code = {0: "<d", 1: "<Ixxxx", 2: "<Q", 3: "<Q", 4: "<q", 5: "<ixxxx", 6: "<Hxxxxxx"}[value_type]
        (field.value,) = struct.unpack("<Q", struct.pack(code, value))
        field.id, field.type, field.result = field_id, value_type, error
        field.any_scope, field.scope = scope is None, scope or 0
        field.used = 1

    def clear_field(self, field_id: int, *, scope: int | None = None) -> None:
        """Undo set_field."""
        for field in self._raw.fields:
            if field.used and field.id == field_id and field.any_scope == (scope is None):
                field.used = field.scope != (scope or 0)

    def set_gpm(self, metric_id: int, value: float | None) -> None:
        """What nvmlGpmMetricsGet says for a metric; None: not supported."""
        _set_gpm(self._raw, metric_id, value)

    def set_ecc_errors(
        self, count: int | None, *, uncorrected: bool = False, aggregate: bool = False, location: int = 2
    ) -> None:
        """An error counter; `location` is an NVML_MEMORY_LOCATION_* (2: DRAM)."""
        self._raw.ecc[uncorrected][aggregate][location] = UNSUPPORTED if count is None else count

    def set_nvlink(self, link: int, *, active: bool = True, errors: Sequence[int] = (0, 0, 0, 0, 0)) -> None:
        """State and error counters (in the order of NVML_NVLINK_ERROR_DL_*) of a link."""
        self.nvlink_count = max(self.nvlink_count or 0, link + 1)
        self._raw.nvlink_active[link] = active
        self._raw.nvlink_errors[link][:] = list(errors)

    def retire_page(self, address: int, *, cause: int = 1, timestamp_us: int = 0) -> None:
        """Retire a page; `cause` is an NVML_PAGE_RETIREMENT_CAUSE_* (1: double bit error)."""
        page = self._raw.retired[free_slot(self._raw.retired, "retired pages on a GPU")]
        page.cause, page.address, page.time_us = cause, address, timestamp_us
        page.used = 1
        self.retired_pending = self.retired_pending or 0

    def remove(self) -> None:
        """Take the board out: the GPUs after it move up one index."""
        self._raw.used = 0


# A workstation board with fan and ECC, and no MIG, NVLink or GPM.
BOARD: dict[str, Any] = {
    "vbios": "94.02.5C.00.02",
    "architecture": 7,
    "brand": 13,
    "compute_capability": (8, 6),
    "core_count": 10752,
    "memory_bus_width": 384,
    "pci_device_id": 0x223010DE,
    "pci_subsystem_id": 0x145910DE,
    "memory_reserved": 600 * 2**20,
    "memory_used": 0,
    "bar1_total": 256 * 2**20,
    "bar1_used": 5 * 2**20,
    "gpu_utilization": 0,
    "memory_utilization": 0,
    "encoder_utilization": 0,
    "decoder_utilization": 0,
    "jpeg_utilization": 0,
    "ofa_utilization": 0,
    "utilization_period_us": 167_000,
    "temperature": 40,
    "temperature_shutdown": 98,
    "temperature_slowdown": 95,
    "temperature_gpu_max": 93,
    "fan": 30,
    "power_mw": 25_000,
    "power_average_mw": 25_000,
    "power_limit_mw": 300_000,
    "power_enforced_limit_mw": 300_000,
    "power_min_limit_mw": 100_000,
    "power_max_limit_mw": 300_000,
    "power_default_limit_mw": 300_000,
    "energy_mj": 1_000_000,
    "graphics_clock": 210,
    "sm_clock": 210,
    "memory_clock": 405,
    "video_clock": 555,
    "max_graphics_clock": 2100,
    "max_sm_clock": 2100,
    "max_memory_clock": 8001,
    "max_video_clock": 1950,
    "performance_state": 8,
    "pcie_generation": 1,
    "pcie_width": 16,
    "pcie_max_generation": 4,
    "pcie_max_width": 16,
    "pcie_tx_kib_s": 0,
    "pcie_rx_kib_s": 0,
    "pcie_replays": 0,
    "clocks_event_reasons": 1,
    "supported_event_reasons": 0x1FF,
    "ecc_enabled": 1,
    "ecc_pending": 1,
    "remapped_correctable": 0,
    "remapped_uncorrectable": 0,
    "remapped_pending": 0,
    "remapped_failure": 0,
    "persistence_mode": 1,
    "compute_mode": 0,
    "display_mode": 0,
    "display_active": 0,
}
