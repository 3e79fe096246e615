"""The catalogue: one row per metric. Sampling, storage, charts and exports are all derived from it.

Adding a metric is adding a row here and, for the stored column, an Alembic revision
(a test holds the two to each other). This module imports nothing but the standard library,
so that every layer may read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Aggregate(StrEnum):
    """How many samples become one: over a bucket of time or over several GPUs."""

    MEAN = "mean"
    MAX = "max"
    LAST = "last"
    COUNTER = "counter"


class Level(StrEnum):
    """How worrying a value is. Colours, words and symbols are derived from it."""

    UNKNOWN = "unknown"
    CALM = "calm"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class NvmlCall:
    """One way of asking NVML for a metric.

    `function` is the pynvml function, called with the device handle and `arguments`;
    an argument that is text names a pynvml constant. `field` picks one attribute of a
    returned structure. The number is multiplied by `scale` into the metric's unit.
    """

    function: str
    arguments: tuple[str | int, ...] = ()
    field: str | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a GPU or of a process on a GPU.

    `nvml` lists the ways to ask, newest first: the next is used where a driver lacks one.
    `share_of` names the fact of GpuInfo that is this metric's 100 %; `warning` and `critical`
    then are percentages of it, otherwise they are in the metric's own unit.
    """

    key: str
    label: str
    unit: str
    nvml: tuple[NvmlCall, ...]
    prometheus: str
    aggregate: Aggregate = Aggregate.MEAN
    column: Literal["integer", "float"] = "float"
    prometheus_type: Literal["gauge", "counter"] = "gauge"
    device_class: str | None = None
    digits: int = 0
    maximum: float | None = None
    share_of: Literal["memory_total_mib", "power_limit_w"] | None = None
    warning: float | None = None
    critical: float | None = None

    def level(self, value: float | None, whole: float | None = None) -> Level:
        """Classify a value given in this metric's unit; `whole` is its 100 % where `share_of` is set."""
        if value is None:
            return Level.UNKNOWN
        if self.share_of is not None:
            if not whole:
                return Level.CALM
            value = 100.0 * value / whole
        if self.critical is not None and value >= self.critical:
            return Level.CRITICAL
        if self.warning is not None and value >= self.warning:
            return Level.WARNING
        return Level.CALM


MIB = 1 / 2**20

# Units and meanings: NVML API reference, "Device Queries". Prometheus names: the default
# counters of NVIDIA's DCGM exporter, whose units (MiB, W, MHz, %) are ours as well.
# Utilization has no critical level on purpose: a busy GPU is what one pays for.
GPU_METRICS: tuple[Metric, ...] = (
    Metric(
        key="temperature",
        label="Temperature",
        unit="°C",
        nvml=(
            NvmlCall("nvmlDeviceGetTemperatureV", ("NVML_TEMPERATURE_GPU",)),
            NvmlCall("nvmlDeviceGetTemperature", ("NVML_TEMPERATURE_GPU",)),
        ),
        prometheus="DCGM_FI_DEV_GPU_TEMP",
        device_class="temperature",
        warning=80,
        critical=90,
    ),
    Metric(
        key="utilization",
        label="Utilization",
        unit="%",
        nvml=(NvmlCall("nvmlDeviceGetUtilizationRates", field="gpu"),),
        prometheus="DCGM_FI_DEV_GPU_UTIL",
        maximum=100,
    ),
    Metric(
        key="memory",
        label="Memory used",
        unit="MiB",
        # The second version leaves the driver's reserved memory out of "used", as nvidia-smi does.
        nvml=(
            NvmlCall("nvmlDeviceGetMemoryInfo", ("nvmlMemory_v2",), field="used", scale=MIB),
            NvmlCall("nvmlDeviceGetMemoryInfo", field="used", scale=MIB),
        ),
        prometheus="DCGM_FI_DEV_FB_USED",
        column="integer",
        device_class="data_size",
        share_of="memory_total_mib",
        warning=90,
        critical=97,
    ),
    Metric(
        key="power",
        label="Power",
        unit="W",
        nvml=(NvmlCall("nvmlDeviceGetPowerUsage", scale=1e-3),),
        prometheus="DCGM_FI_DEV_POWER_USAGE",
        device_class="power",
        # Boards under load run at their limit by design; only clearly above it is worth a look.
        share_of="power_limit_w",
        warning=102,
        critical=110,
    ),
    Metric(
        key="memory_utilization",
        label="Memory controller",
        unit="%",
        nvml=(NvmlCall("nvmlDeviceGetUtilizationRates", field="memory"),),
        prometheus="DCGM_FI_DEV_MEM_COPY_UTIL",
        maximum=100,
    ),
    Metric(
        key="fan_speed",
        label="Fan",
        unit="%",
        nvml=(NvmlCall("nvmlDeviceGetFanSpeed"),),
        prometheus="DCGM_FI_DEV_FAN_SPEED",
        # Intended speed; NVML documents that it may exceed 100.
        maximum=100,
        warning=90,
        critical=100.5,
    ),
    Metric(
        key="sm_clock",
        label="SM clock",
        unit="MHz",
        nvml=(NvmlCall("nvmlDeviceGetClockInfo", ("NVML_CLOCK_SM",)),),
        prometheus="DCGM_FI_DEV_SM_CLOCK",
        column="integer",
        device_class="frequency",
    ),
    Metric(
        key="memory_clock",
        label="Memory clock",
        unit="MHz",
        nvml=(NvmlCall("nvmlDeviceGetClockInfo", ("NVML_CLOCK_MEM",)),),
        prometheus="DCGM_FI_DEV_MEM_CLOCK",
        column="integer",
        device_class="frequency",
    ),
)

# A process's metrics come from the running-process calls themselves, so `nvml` is empty.
PROCESS_METRICS: tuple[Metric, ...] = (
    Metric(
        key="memory",
        label="Memory",
        unit="MiB",
        nvml=(),
        prometheus="gpumon_process_memory_mib",
        column="integer",
        device_class="data_size",
        share_of="memory_total_mib",
    ),
)

GPU_METRICS_BY_KEY: dict[str, Metric] = {metric.key: metric for metric in GPU_METRICS}
