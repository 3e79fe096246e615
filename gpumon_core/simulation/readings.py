"""The readings of a simulated GPU, from its load."""

from __future__ import annotations

from math import pi, sin

from gpumon_core.metrics import TICK_COLUMNS
from gpumon_core.simulation.gpus import CLOCK_STEP_MHZ, SimulatedGpu
from gpumon_core.simulation.load import QUICK_PART, LoadCurve, fraction, hash64
from gpumon_core.simulation.people import DAY, HOUR, GpuModel

THROTTLE_C = 87
# A GPU with a lower level counts as idle.
STILL = 0.005

NO_VALUES: dict[str, float | None] = dict.fromkeys(TICK_COLUMNS)
# Only some models measure these: GPM came with Hopper, and only models with HBM report the temperature of their
# memory.
WITH_GPM = frozenset({"Hopper", "Blackwell"})
WITH_HBM = frozenset({"Hopper"}) | {"NVIDIA A100-SXM4-80GB"}
# Bits of the clocks-event reasons (nvmlClocksEventReason* in the API reference).
REASON_IDLE, REASON_POWER_CAP, REASON_THERMAL = 0x1, 0x4, 0x20
# The index of a GPU whose memory corrects an error from time to time, and how often.
ECC_INDEX, ECC_EVERY_S = 5, 11 * HOUR
MIB_S_PCIE, MIB_S_NVLINK = 9000, 120_000


def gpu_values(gpu: SimulatedGpu, load: LoadCurve, timestamp: float, weather_c: float) -> dict[str, float | None]:
    """All values but the memory, in the catalogue's units and with the precision of NVML."""
    model, limits = gpu.model, gpu.model.power
    step = load.at(timestamp)
    noise = hash64(gpu.key, int(timestamp))
    wobble = fraction(noise, 0) - 0.5
    used, watts = load.used[step], load.watts[step] * (1 + 0.03 * wobble)
    # From time to time the power is above the limit for a moment.
    if fraction(noise, 1) > 0.998 and watts > 0.85 * limits.limit_w:
        watts = limits.limit_w * (1.02 + 0.1 * fraction(noise, 2))
    quick, slow = load.warmth(step, timestamp)
    rise = limits.load_c + gpu.hotter_c - limits.idle_c
    base = limits.idle_c + weather_c
    temperature = round(base + rise * (QUICK_PART * quick + (1 - QUICK_PART) * slow))
    awake = used > STILL or (load.has_context[step] and not model.sleeps)
    utilization = _percent(used, 0.03 * wobble)
    bandwidth = _percent(load.bandwidth[step], 0.04 * (fraction(noise, 3) - 0.5))
    clock = _sm_clock(model, watts, temperature, wobble) if awake else model.sm_mhz[0]
    # The maximum of a tick is above its mean, and further above with an uneven load.
    above = 1 + 0.25 * fraction(noise, 2) * (1 - used) + 0.02 * fraction(noise, 1)
    values = {**NO_VALUES, **gpu.constant}
    values["temperature"] = float(temperature)
    values["power"] = round(watts, 3)
    values["power_max"] = round(watts * (1 + 0.04 * fraction(noise, 1)), 3)
    values["utilization"] = utilization
    values["utilization_max"] = float(min(100, round(utilization * above)))
    values["memory_utilization"] = bandwidth
    values["memory_utilization_max"] = float(min(100, round(bandwidth * above)))
    values["fan_speed"] = _fan(model, base + rise * slow)
    values["sm_clock"] = values["graphics_clock"] = clock
    values["video_clock"] = round(0.9 * clock / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ
    values["memory_clock"] = model.memory_mhz[awake]
    if model.name in WITH_HBM or model.architecture in WITH_HBM:
        values["memory_temperature"] = float(temperature + 5 + round(6 * load.bandwidth[step]))
    values["pcie_tx"] = round(MIB_S_PCIE * 0.2 * bandwidth * (0.5 + fraction(noise, 2)) / 100, 1)
    values["pcie_rx"] = round(MIB_S_PCIE * 0.5 * bandwidth * (0.5 + fraction(noise, 3)) / 100, 1)
    if model.architecture in WITH_GPM:
        values["graphics_activity"] = utilization
        values["sm_activity"] = round(0.93 * utilization, 1)
        values["sm_occupancy"] = round(0.41 * utilization, 1)
        values["tensor_activity"] = round(0.52 * utilization * (0.9 + 0.2 * fraction(noise, 3)), 1)
        values["dram_activity"] = round(0.8 * bandwidth, 1)
    if gpu.has_nvlink:
        traffic = MIB_S_NVLINK * 0.3 * bandwidth * (0.8 + 0.4 * fraction(noise, 1)) / 100
        values["nvlink_tx"] = values["nvlink_rx"] = round(traffic, 1)
    values["performance_state"] = 0 if awake else 8
    values["clocks_event_reasons"] = _reasons(awake, watts, limits.limit_w, temperature)
    values["pcie_generation"] = gpu.constant["max_pcie_generation"] if awake else 1
    if gpu.info.index == ECC_INDEX:
        values["ecc_corrected_aggregate"] = int((timestamp + gpu.key % ECC_EVERY_S) // ECC_EVERY_S) % 100_000
    return values


def _reasons(awake: bool, watts: float, limit_w: float, temperature: float) -> int:
    """Why the clocks are not at their maximum, as the bits of the driver."""
    if not awake:
        return REASON_IDLE
    return REASON_POWER_CAP * (watts > 0.97 * limit_w) | REASON_THERMAL * (temperature > THROTTLE_C)


def _percent(level: float, wobble: float) -> float:
    """A share as whole percent, with noise unless it is idle."""
    if level <= STILL:
        return 0.0
    return float(min(100, max(0, round(100 * level * (1 + wobble)))))


def _fan(model: GpuModel, temperature: float) -> float | None:
    """The fan speed in percent; it follows the heat sink. Gaming models stop their fans when cool."""
    if model.fan_min is None:
        return None
    if model.fan_min == 0 and temperature < 43:
        return 0.0
    wanted = 30 + 70 * (temperature - 42) / (model.power.load_c + 6 - 42)
    return float(round(min(100.0, max(30.0, wanted))))


def _sm_clock(model: GpuModel, watts: float, temperature: float, wobble: float) -> int:
    """The SM clock in MHz: lower near the power limit, and lower still when the GPU is too hot."""
    low, high = model.sm_mhz
    strain = max(0.0, watts / model.power.limit_w - 0.5)
    mhz = high * (1 - 0.22 * strain - 0.02 * max(0, temperature - THROTTLE_C) + 0.015 * strain * wobble)
    return max(low, min(high, round(mhz / CLOCK_STEP_MHZ) * CLOCK_STEP_MHZ))


def weather_c(seed: int, timestamp: float) -> float:
    """How much warmer than usual the air is, in °C: by the time of day, and from one day to the next."""
    day, second = divmod(timestamp, DAY)
    today, tomorrow = (6 * fraction(hash64(seed, int(day) + n, 3), 0) - 3 for n in (0, 1))
    return today + (tomorrow - today) * second / DAY + 2.5 * sin(2 * pi * (second / HOUR - 9) / 24)
