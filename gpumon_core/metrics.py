"""The catalogue: one row per metric. Sampling, storage, charts and exports all follow from it.

Adding a metric is adding a row here and, where every tick stores it, an Alembic revision for its column
(a test compares the two). This module imports nothing but the standard library,
so that every layer may read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Aggregate(StrEnum):
    """How several samples become one: over a bucket of time or over several GPUs."""

    MEAN = "mean"
    MAX = "max"
    LAST = "last"
    COUNTER = "counter"


class Level(StrEnum):
    """How serious a value is. Colours, words and symbols follow from it."""

    UNKNOWN = "unknown"
    CALM = "calm"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class NvmlCall:
    """One way of asking NVML for a metric: a function of a device.

    `function` is the pynvml function, called with the device handle and `arguments`;
    an argument that is text names a pynvml constant. `field` picks one attribute (or, as a number,
    one item) of what is returned; `count` takes the length of a returned list instead. The number is
    multiplied by `scale` into the metric's unit.
    """

    function: str
    arguments: tuple[str | int, ...] = ()
    field: str | int | None = None
    scale: float = 1.0
    count: bool = False


@dataclass(frozen=True, slots=True)
class NvmlField:
    """Another way: a field value (nvmlDeviceGetFieldValues). One call returns many of them.

    `name` is the pynvml constant of the field's id. Where `rate` is set the field is a counter, and
    the metric its growth per second.
    """

    name: str
    scope: int = 0
    scale: float = 1.0
    rate: bool = False


@dataclass(frozen=True, slots=True)
class NvmlGpm:
    """A third way: a GPU performance-monitoring metric (Hopper and newer), measured between two ticks.

    `by_nvlink` marks a metric that is 0 on a GPU without NVLink.
    """

    name: str
    scale: float = 1.0
    by_nvlink: bool = False


NvmlQuery = NvmlCall | NvmlField | NvmlGpm


class Group(StrEnum):
    """The groups of metrics, in the order of the pages."""

    COMPUTE = "Compute"
    MEMORY = "Memory"
    CLOCKS = "Clocks"
    THERMALS = "Thermals and power"
    INTERCONNECT = "Interconnect"
    RELIABILITY = "Reliability"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a GPU or of a process on a GPU.

    `nvml` lists the ways to ask, best first: the next is used where a driver lacks one. `samples` names the kind
    of samples that the driver buffers between ticks: the tick is then their mean, and `<key>_max` their maximum.
    `every_s` is how often it is asked (0: at every tick). `stored` says whether every tick or only a change is
    stored, `decimals` with how many decimals. `share_of` names the field of GpuInfo that is 100 % of this metric;
    `warning` and `critical` are then percentages of it, otherwise they are in the metric's unit. A value below
    `lowest` or above `highest` (by default that of its unit) is impossible. `since` is the first generation of
    GPUs with the metric, according to the documentation of NVML.

    `prometheus` is its name in Prometheus, and `prometheus_too` are its names in older versions of DCGM; the value
    is multiplied by `prometheus_scale`. Metrics of DCGM have the names and units of DCGM. The others have names of
    gpumon, in the base units of Prometheus.
    """

    key: str
    label: str
    unit: str
    group: Group
    nvml: tuple[NvmlQuery, ...]
    prometheus: str
    aggregate: Aggregate = Aggregate.MEAN
    column: Literal["integer", "float"] = "float"
    prometheus_type: Literal["gauge", "counter"] = "gauge"
    prometheus_scale: float = 1.0
    prometheus_too: tuple[str, ...] = ()
    device_class: str | None = None
    digits: int = 0
    decimals: int = 0
    stored: Literal["tick", "change"] = "tick"
    every_s: float = 0.0
    samples: str | None = None
    maximum: float | None = None
    lowest: float = 0.0
    highest: float | None = None
    share_of: Literal["memory_total_mib", "power_limit_w"] | None = None
    warning: float | None = None
    critical: float | None = None
    since: str | None = None

    @property
    def peak(self) -> str | None:
        """The column of the highest value within a tick, where the driver buffers samples."""
        return f"{self.key}_max" if self.samples else None

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest possible value, in its unit."""
        return self.lowest, HIGHEST[self.unit] if self.highest is None else self.highest

    def level(self, value: float | None, total: float | None = None) -> Level:
        """Classify a value given in this metric's unit; `total` is its 100 % where `share_of` is set."""
        if value is None:
            return Level.UNKNOWN
        if self.share_of is not None:
            if not total:
                return Level.CALM
            value = 100.0 * value / total
        if self.critical is not None and value >= self.critical:
            return Level.CRITICAL
        if self.warning is not None and value >= self.warning:
            return Level.WARNING
        return Level.CALM


MIB = 1 / 2**20
# The highest number of a unit: far above the values of present GPUs, and small enough for the columns (32 bits,
# and a rollup stores it times 10^decimals). For counters it is the largest exact integer in a floating-point
# number.
HIGHEST: dict[str, float] = {
    "°C": 250.0,
    "%": 100.0,
    "MiB": 2.0**26,
    "W": 10_000.0,
    "J": 1e13,
    "MHz": 50_000.0,
    "MiB/s": 2.0**24,
    "P": 15.0,
    "bits": 2.0**53,
    "errors": 2.0**53,
    "pages": 2.0**31 - 1,
    "rows": 2.0**31 - 1,
    "lanes": 64.0,
    "": 15.0,
}
# How often NVML is asked for values that rarely change.
RARELY_S = 60.0
ALL_LINKS = 0xFFFFFFFF
# In MiB/s: four times the rate of 16 lanes of PCIe 7.
PCIE_HIGHEST = 2.0**20
# The factors from the catalogue's units to the base units at the end of gpumon's own names.
BASE_UNITS = {"_hertz": 1e6, "_ratio": 0.01, "_bytes": float(2**20)}


def scale_of(prometheus: str) -> float:
    """The factor for a name of gpumon's own; 1 for a name of DCGM."""
    return next((scale for unit, scale in BASE_UNITS.items() if prometheus.endswith(unit)), 1.0)


def _clock(name: str, label: str, constant: str, prometheus: str) -> Metric:
    return Metric(
        key=name,
        label=label,
        unit="MHz",
        group=Group.CLOCKS,
        nvml=(NvmlCall("nvmlDeviceGetClockInfo", (constant,)),),
        prometheus=prometheus,
        prometheus_scale=scale_of(prometheus),
        column="integer",
        device_class="frequency",
    )


def _engine(name: str, label: str, function: str, prometheus: str, since: str) -> Metric:
    """A video engine. The driver answers with the utilization and the period of its mean."""
    return Metric(
        key=name,
        label=label,
        unit="%",
        group=Group.COMPUTE,
        nvml=(NvmlCall(function, field=0),),
        prometheus=prometheus,
        prometheus_scale=scale_of(prometheus),
        maximum=100,
        highest=100,
        since=since,
    )


def _activity(name: str, label: str, gpm: str, prometheus: str, group: Group = Group.COMPUTE) -> Metric:
    # DCGM gives these as a share of 1.
    return Metric(
        key=name,
        label=label,
        unit="%",
        group=group,
        nvml=(NvmlGpm(gpm),),
        prometheus=prometheus,
        prometheus_scale=0.01,
        digits=1,
        decimals=1,
        maximum=100,
        highest=100,
        since="Hopper",
    )


def _rate(
    name: str, label: str, ways: tuple[NvmlQuery, ...], prometheus: str, since: str, highest: float | None = None
) -> Metric:
    return Metric(
        key=name,
        label=label,
        unit="MiB/s",
        group=Group.INTERCONNECT,
        nvml=ways,
        prometheus=prometheus,
        prometheus_scale=2**20,
        device_class="data_rate",
        decimals=1,
        highest=highest,
        since=since,
    )


def _rare(
    name: str,
    label: str,
    group: Group,
    ways: tuple[NvmlQuery, ...],
    prometheus: str,
    unit: str = "",
    aggregate: Aggregate = Aggregate.LAST,
    since: str | None = None,
    counts: bool = False,
) -> Metric:
    """A metric that is asked rarely and stored when it changes; `counts` marks one that is shown as it is and
    never falls."""
    counts = counts or aggregate is Aggregate.COUNTER
    return Metric(
        key=name,
        label=label,
        unit=unit,
        group=group,
        nvml=ways,
        prometheus=prometheus,
        aggregate=aggregate,
        column="integer",
        prometheus_type="counter" if counts else "gauge",
        prometheus_scale=scale_of(prometheus),
        stored="change",
        every_s=RARELY_S,
        since=since,
    )


def _errors(name: str, label: str, ways: tuple[NvmlQuery, ...], prometheus: str, since: str) -> Metric:
    return _rare(name, label, Group.RELIABILITY, ways, prometheus, "errors", Aggregate.COUNTER, since)


def _ecc(kind: str, lifetime: str, field: str, prometheus: str) -> Metric:
    corrected = "CORRECTED" if kind == "corrected" else "UNCORRECTED"
    return _errors(
        f"ecc_{kind}_{lifetime}",
        f"ECC errors, {kind}, {'since the driver loaded' if lifetime == 'volatile' else 'of its life'}",
        (
            NvmlField(field),
            NvmlCall(
                "nvmlDeviceGetTotalEccErrors",
                (f"NVML_MEMORY_ERROR_TYPE_{corrected}", f"NVML_{lifetime.upper()}_ECC"),
            ),
        ),
        prometheus,
        "Fermi",
    )


def _remapped(name: str, label: str, field: str, item: int, prometheus: str, unit: str = "") -> Metric:
    ways = (NvmlField(field), NvmlCall("nvmlDeviceGetRemappedRows", field=item))
    # The numbers of rows are counters; "pending" and "failure" are 0 or 1.
    counts = unit == "rows"
    return _rare(
        f"remapped_rows_{name}", label, Group.RELIABILITY, ways, prometheus, unit, since="Ampere", counts=counts
    )


# Units and meanings: NVML API reference, "Device Queries". Prometheus names: the default counters of NVIDIA's DCGM
# exporter, with the same units (MiB, W, MHz, %). Utilization has no critical level on purpose: a GPU is meant to
# be busy.
GPU_METRICS: tuple[Metric, ...] = (
    Metric(
        key="temperature",
        label="Temperature",
        unit="°C",
        group=Group.THERMALS,
        nvml=(
            NvmlCall("nvmlDeviceGetTemperatureV", ("NVML_TEMPERATURE_GPU",)),
            NvmlCall("nvmlDeviceGetTemperature", ("NVML_TEMPERATURE_GPU",)),
        ),
        prometheus="DCGM_FI_DEV_GPU_TEMP",
        device_class="temperature",
        lowest=-60,
        warning=80,
        critical=90,
    ),
    Metric(
        key="utilization",
        label="Utilization",
        unit="%",
        group=Group.COMPUTE,
        nvml=(NvmlCall("nvmlDeviceGetUtilizationRates", field="gpu"),),
        samples="NVML_GPU_UTILIZATION_SAMPLES",
        prometheus="DCGM_FI_DEV_GPU_UTIL",
        decimals=1,
        maximum=100,
        highest=100,
    ),
    Metric(
        key="memory",
        label="Memory used",
        unit="MiB",
        group=Group.MEMORY,
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
        group=Group.THERMALS,
        # Where there is an energy counter, the mean over a tick comes from it.
        nvml=(NvmlCall("nvmlDeviceGetPowerUsage", scale=1e-3),),
        samples="NVML_TOTAL_POWER_SAMPLES",
        decimals=1,
        prometheus="DCGM_FI_DEV_POWER_USAGE",
        device_class="power",
        # GPUs under load run at their power limit by design; only a clearly higher value is unusual.
        share_of="power_limit_w",
        warning=102,
        critical=110,
    ),
    Metric(
        key="memory_utilization",
        label="Memory controller",
        unit="%",
        group=Group.MEMORY,
        nvml=(NvmlCall("nvmlDeviceGetUtilizationRates", field="memory"),),
        samples="NVML_MEMORY_UTILIZATION_SAMPLES",
        prometheus="DCGM_FI_DEV_MEM_COPY_UTIL",
        decimals=1,
        maximum=100,
        highest=100,
    ),
    Metric(
        key="fan_speed",
        label="Fan",
        unit="%",
        group=Group.THERMALS,
        nvml=(NvmlCall("nvmlDeviceGetFanSpeed"),),
        prometheus="DCGM_FI_DEV_FAN_SPEED",
        # Intended speed; NVML documents that it may exceed 100.
        maximum=100,
        highest=255,
        warning=90,
        critical=100.5,
    ),
    _clock("sm_clock", "SM clock", "NVML_CLOCK_SM", "DCGM_FI_DEV_SM_CLOCK"),
    _clock("memory_clock", "Memory clock", "NVML_CLOCK_MEM", "DCGM_FI_DEV_MEM_CLOCK"),
    _clock("graphics_clock", "Graphics clock", "NVML_CLOCK_GRAPHICS", "gpumon_gpu_graphics_clock_hertz"),
    _clock("video_clock", "Video clock", "NVML_CLOCK_VIDEO", "DCGM_FI_DEV_VIDEO_CLOCK"),
    Metric(
        key="memory_temperature",
        label="Memory temperature",
        unit="°C",
        group=Group.THERMALS,
        nvml=(NvmlField("NVML_FI_DEV_MEMORY_TEMP"),),
        prometheus="DCGM_FI_DEV_MEMORY_TEMP",
        device_class="temperature",
        lowest=-60,
        warning=95,
        critical=105,
    ),
    _engine(
        "encoder_utilization", "Encoder", "nvmlDeviceGetEncoderUtilization", "DCGM_FI_DEV_ENC_UTIL", "Maxwell"
    ),
    _engine(
        "decoder_utilization", "Decoder", "nvmlDeviceGetDecoderUtilization", "DCGM_FI_DEV_DEC_UTIL", "Maxwell"
    ),
    _engine(
        "jpeg_utilization",
        "JPEG engine",
        "nvmlDeviceGetJpgUtilization",
        "gpumon_gpu_jpeg_utilization_ratio",
        "Turing",
    ),
    _engine(
        "ofa_utilization",
        "Optical flow",
        "nvmlDeviceGetOfaUtilization",
        "gpumon_gpu_ofa_utilization_ratio",
        "Turing",
    ),
    _activity(
        "graphics_activity",
        "Graphics engine active",
        "NVML_GPM_METRIC_GRAPHICS_UTIL",
        "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
    ),
    _activity("sm_activity", "SM active", "NVML_GPM_METRIC_SM_UTIL", "DCGM_FI_PROF_SM_ACTIVE"),
    _activity("sm_occupancy", "SM occupancy", "NVML_GPM_METRIC_SM_OCCUPANCY", "DCGM_FI_PROF_SM_OCCUPANCY"),
    _activity(
        "tensor_activity",
        "Tensor pipe active",
        "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
    ),
    _activity(
        "dram_activity", "DRAM active", "NVML_GPM_METRIC_DRAM_BW_UTIL", "DCGM_FI_PROF_DRAM_ACTIVE", Group.MEMORY
    ),
    # The functions below measure for 20 ms while the caller waits: they come last.
    _rate(
        "pcie_tx",
        "PCIe sent",
        (
            NvmlGpm("NVML_GPM_METRIC_PCIE_TX_PER_SEC"),
            NvmlCall("nvmlDeviceGetPcieThroughput", ("NVML_PCIE_UTIL_TX_BYTES",), scale=1 / 1024),
        ),
        "DCGM_FI_PROF_PCIE_TX_BYTES",
        "Maxwell",
        highest=PCIE_HIGHEST,
    ),
    _rate(
        "pcie_rx",
        "PCIe received",
        (
            NvmlGpm("NVML_GPM_METRIC_PCIE_RX_PER_SEC"),
            NvmlCall("nvmlDeviceGetPcieThroughput", ("NVML_PCIE_UTIL_RX_BYTES",), scale=1 / 1024),
        ),
        "DCGM_FI_PROF_PCIE_RX_BYTES",
        "Maxwell",
        highest=PCIE_HIGHEST,
    ),
    _rate(
        "nvlink_tx",
        "NVLink sent",
        (
            NvmlGpm("NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC", by_nvlink=True),
            NvmlField("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", ALL_LINKS, scale=1 / 1024, rate=True),
        ),
        "DCGM_FI_PROF_NVLINK_TX_BYTES",
        "Pascal",
    ),
    _rate(
        "nvlink_rx",
        "NVLink received",
        (
            NvmlGpm("NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC", by_nvlink=True),
            NvmlField("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", ALL_LINKS, scale=1 / 1024, rate=True),
        ),
        "DCGM_FI_PROF_NVLINK_RX_BYTES",
        "Pascal",
    ),
    # The driver's counter begins at 0 with the driver; the stored one goes on. Joules.
    Metric(
        key="energy",
        label="Energy",
        unit="J",
        group=Group.THERMALS,
        nvml=(
            NvmlField("NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION", scale=1e-3),
            NvmlCall("nvmlDeviceGetTotalEnergyConsumption", scale=1e-3),
        ),
        # DCGM counts millijoules.
        prometheus="DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
        prometheus_type="counter",
        prometheus_scale=1e3,
        aggregate=Aggregate.COUNTER,
        device_class="energy",
        since="Volta",
    ),
    Metric(
        key="performance_state",
        label="Performance state",
        unit="P",
        group=Group.CLOCKS,
        nvml=(NvmlCall("nvmlDeviceGetPerformanceState"),),
        prometheus="DCGM_FI_DEV_PSTATE",
        aggregate=Aggregate.LAST,
        column="integer",
        stored="change",
        highest=15,
    ),
    # A set of bits: nvmlClocksEventReason* in the API reference.
    Metric(
        key="clocks_event_reasons",
        label="Throttle reasons",
        unit="bits",
        group=Group.CLOCKS,
        nvml=(
            NvmlCall("nvmlDeviceGetCurrentClocksEventReasons"),
            NvmlCall("nvmlDeviceGetCurrentClocksThrottleReasons"),
        ),
        prometheus="DCGM_FI_DEV_CLOCKS_EVENT_REASONS",
        # Its name before DCGM 3.3, for older alert rules.
        prometheus_too=("DCGM_FI_DEV_CLOCK_THROTTLE_REASONS",),
        aggregate=Aggregate.LAST,
        column="integer",
        stored="change",
    ),
    _rare(
        "pcie_generation",
        "PCIe generation",
        Group.INTERCONNECT,
        (NvmlCall("nvmlDeviceGetCurrPcieLinkGeneration"),),
        "DCGM_FI_DEV_PCIE_LINK_GEN",
    ),
    _rare(
        "pcie_width",
        "PCIe width",
        Group.INTERCONNECT,
        (NvmlCall("nvmlDeviceGetCurrPcieLinkWidth"),),
        "DCGM_FI_DEV_PCIE_LINK_WIDTH",
        "lanes",
    ),
    _rare(
        "max_pcie_generation",
        "PCIe generation, highest",
        Group.INTERCONNECT,
        (NvmlCall("nvmlDeviceGetMaxPcieLinkGeneration"),),
        "DCGM_FI_DEV_PCIE_MAX_LINK_GEN",
    ),
    _rare(
        "max_pcie_width",
        "PCIe width, highest",
        Group.INTERCONNECT,
        (NvmlCall("nvmlDeviceGetMaxPcieLinkWidth"),),
        "DCGM_FI_DEV_PCIE_MAX_LINK_WIDTH",
        "lanes",
    ),
    _errors(
        "pcie_replays",
        "PCIe replays",
        (NvmlCall("nvmlDeviceGetPcieReplayCounter"), NvmlField("NVML_FI_DEV_PCIE_REPLAY_COUNTER")),
        "DCGM_FI_DEV_PCIE_REPLAY_COUNTER",
        "Kepler",
    ),
    _errors(
        "nvlink_crc_flit_errors",
        "NVLink CRC flit errors",
        (NvmlField("NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL"),),
        "DCGM_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL",
        "Pascal",
    ),
    _errors(
        "nvlink_crc_data_errors",
        "NVLink CRC data errors",
        (NvmlField("NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL"),),
        "DCGM_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL",
        "Pascal",
    ),
    _errors(
        "nvlink_replay_errors",
        "NVLink replays",
        (
            NvmlField("NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL"),
            NvmlField("NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY", ALL_LINKS),
        ),
        "DCGM_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL",
        "Pascal",
    ),
    _errors(
        "nvlink_recovery_errors",
        "NVLink recoveries",
        (
            NvmlField("NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL"),
            NvmlField("NVML_FI_DEV_NVLINK_ERROR_DL_RECOVERY", ALL_LINKS),
        ),
        "DCGM_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
        "Pascal",
    ),
    # Newer drivers count CRC errors of flits and data together. NVML's change log: not on Blackwell.
    _errors(
        "nvlink_crc_errors",
        "NVLink CRC errors",
        (NvmlField("NVML_FI_DEV_NVLINK_ERROR_DL_CRC", ALL_LINKS),),
        "gpumon_gpu_nvlink_crc_errors_total",
        "Pascal",
    ),
    _rare(
        "bar1_used",
        "BAR1 used",
        Group.MEMORY,
        (NvmlCall("nvmlDeviceGetBAR1MemoryInfo", field="bar1Used", scale=MIB),),
        "DCGM_FI_DEV_BAR1_USED",
        "MiB",
        since="Kepler",
    ),
    _rare(
        "memory_reserved",
        "Memory reserved",
        Group.MEMORY,
        (NvmlCall("nvmlDeviceGetMemoryInfo", ("nvmlMemory_v2",), field="reserved", scale=MIB),),
        "DCGM_FI_DEV_FB_RESERVED",
        "MiB",
    ),
    _rare(
        "power_limit",
        "Power limit",
        Group.THERMALS,
        (
            NvmlCall("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),
            NvmlCall("nvmlDeviceGetPowerManagementLimit", scale=1e-3),
        ),
        "DCGM_FI_DEV_ENFORCED_POWER_LIMIT",
        "W",
        since="Kepler",
    ),
    *(
        _rare(
            f"max_{name}_clock",
            f"{label} clock, highest",
            Group.CLOCKS,
            (NvmlCall("nvmlDeviceGetMaxClockInfo", (constant,)),),
            prometheus,
            "MHz",
        )
        for name, label, constant, prometheus in (
            ("sm", "SM", "NVML_CLOCK_SM", "DCGM_FI_DEV_MAX_SM_CLOCK"),
            ("memory", "Memory", "NVML_CLOCK_MEM", "DCGM_FI_DEV_MAX_MEM_CLOCK"),
            ("graphics", "Graphics", "NVML_CLOCK_GRAPHICS", "gpumon_gpu_graphics_clock_max_hertz"),
            ("video", "Video", "NVML_CLOCK_VIDEO", "DCGM_FI_DEV_MAX_VIDEO_CLOCK"),
        )
    ),
    _ecc("corrected", "volatile", "NVML_FI_DEV_ECC_SBE_VOL_TOTAL", "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL"),
    _ecc("uncorrected", "volatile", "NVML_FI_DEV_ECC_DBE_VOL_TOTAL", "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL"),
    _ecc("corrected", "aggregate", "NVML_FI_DEV_ECC_SBE_AGG_TOTAL", "DCGM_FI_DEV_ECC_SBE_AGG_TOTAL"),
    _ecc("uncorrected", "aggregate", "NVML_FI_DEV_ECC_DBE_AGG_TOTAL", "DCGM_FI_DEV_ECC_DBE_AGG_TOTAL"),
    _remapped(
        "corrected",
        "Rows remapped after corrected errors",
        "NVML_FI_DEV_REMAPPED_COR",
        0,
        "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS",
        "rows",
    ),
    _remapped(
        "uncorrected",
        "Rows remapped after uncorrected errors",
        "NVML_FI_DEV_REMAPPED_UNC",
        1,
        "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS",
        "rows",
    ),
    _remapped(
        "pending", "Row remapping pending", "NVML_FI_DEV_REMAPPED_PENDING", 2, "DCGM_FI_DEV_ROW_REMAP_PENDING"
    ),
    _remapped(
        "failure", "Row remapping failed", "NVML_FI_DEV_REMAPPED_FAILURE", 3, "DCGM_FI_DEV_ROW_REMAP_FAILURE"
    ),
    _rare(
        "retired_pages_corrected",
        "Pages retired after corrected errors",
        Group.RELIABILITY,
        (
            NvmlField("NVML_FI_DEV_RETIRED_SBE"),
            NvmlCall(
                "nvmlDeviceGetRetiredPages",
                ("NVML_PAGE_RETIREMENT_CAUSE_MULTIPLE_SINGLE_BIT_ECC_ERRORS",),
                count=True,
            ),
        ),
        "DCGM_FI_DEV_RETIRED_SBE",
        "pages",
        since="Kepler",
        counts=True,
    ),
    _rare(
        "retired_pages_uncorrected",
        "Pages retired after uncorrected errors",
        Group.RELIABILITY,
        (
            NvmlField("NVML_FI_DEV_RETIRED_DBE"),
            NvmlCall(
                "nvmlDeviceGetRetiredPages", ("NVML_PAGE_RETIREMENT_CAUSE_DOUBLE_BIT_ECC_ERROR",), count=True
            ),
        ),
        "DCGM_FI_DEV_RETIRED_DBE",
        "pages",
        since="Kepler",
        counts=True,
    ),
    _rare(
        "retired_pages_pending",
        "Page retirement pending",
        Group.RELIABILITY,
        (NvmlField("NVML_FI_DEV_RETIRED_PENDING"), NvmlCall("nvmlDeviceGetRetiredPagesPendingStatus")),
        "DCGM_FI_DEV_RETIRED_PENDING",
        since="Kepler",
    ),
)


@dataclass(frozen=True, slots=True)
class ClocksEventReason:
    """One bit of clocks_event_reasons: a reason why clocks are not higher. `throttles` marks reasons that slow
    down work; an idle GPU, or one at its power limit, works as intended."""

    bit: int
    label: str
    throttles: bool


# nvmlClocksEventReason* in the API reference.
CLOCKS_EVENT_REASONS = (
    ClocksEventReason(0x1, "Idle", False),
    ClocksEventReason(0x2, "Application clocks", False),
    ClocksEventReason(0x4, "Power cap", False),
    ClocksEventReason(0x8, "Hardware slowdown", True),
    ClocksEventReason(0x10, "Sync boost", False),
    ClocksEventReason(0x20, "Software thermal", True),
    ClocksEventReason(0x40, "Hardware thermal", True),
    ClocksEventReason(0x80, "Power brake", True),
    ClocksEventReason(0x100, "Display clocks", False),
)


def throttled_by(bits: float | None) -> list[str]:
    """The reasons in clocks_event_reasons that slow down work."""
    if bits is None or bits != bits:  # noqa: PLR0124 - pandas' NaN
        return []
    return [reason.label for reason in CLOCKS_EVENT_REASONS if reason.throttles and int(bits) & reason.bit]


# The metrics that every tick stores, and those that only a change stores.
TICK_METRICS = tuple(metric for metric in GPU_METRICS if metric.stored == "tick")
CHANGE_METRICS = tuple(metric for metric in GPU_METRICS if metric.stored == "change")
# The columns of a tick: the metrics, and the maximum of those that are means over the tick.
TICK_COLUMNS = tuple(
    key for metric in TICK_METRICS for key in (metric.key, *((metric.peak,) if metric.peak else ()))
)

# A process's metrics come from the running-process and process-utilization calls: `nvml` is empty.
PROCESS_METRICS: tuple[Metric, ...] = (
    Metric(
        key="memory",
        label="Memory",
        unit="MiB",
        group=Group.MEMORY,
        nvml=(),
        prometheus="gpumon_process_memory_bytes",
        prometheus_scale=scale_of("gpumon_process_memory_bytes"),
        column="integer",
        device_class="data_size",
        share_of="memory_total_mib",
    ),
    *(
        Metric(
            key=key,
            label=label,
            unit="%",
            group=Group.COMPUTE,
            nvml=(),
            prometheus=f"gpumon_process_{key}_ratio",
            prometheus_scale=scale_of(f"gpumon_process_{key}_ratio"),
            column="integer",
            maximum=100,
            highest=100,
            since="Maxwell",
        )
        for key, label in (
            ("sm_utilization", "SM"),
            ("memory_utilization", "Memory controller"),
            ("encoder_utilization", "Encoder"),
            ("decoder_utilization", "Decoder"),
        )
    ),
)

GPU_METRICS_BY_KEY: dict[str, Metric] = {metric.key: metric for metric in GPU_METRICS}
