"""NvmlSource over the real pynvml and the fake driver: units, what is missing, texts, and how often it asks."""

from __future__ import annotations

import busy_driver
import fake_nvml
import pytest
from busy_driver import (
    BUSY_VALUES,
    FACT_CALLS,
    MIG_CALLS,
    READING_CALLS,
    SYSTEM_CALLS,
    hide_newer,
    source,
    uuids,
    values,
)
from fake_nvml import GIB, FakeGpu, FakeNvml, Unterminated

from gpumon_core.metrics import GPU_METRICS, TICK_COLUMNS
from gpumon_core.telemetry.gate import UNSUPPORTED
from gpumon_core.telemetry.records import GpuInfo

# The fixtures that these tests share.
driver, _log = busy_driver.driver, busy_driver._log


FINDING_CALLS = ("nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2")


def test_the_main_metrics_arrive_in_their_units(driver: FakeNvml) -> None:
    assert values(source().read()) == BUSY_VALUES


def test_a_number_has_the_type_of_its_column(driver: FakeNvml) -> None:
    driver.gpus[0].memory_used = 10 * GIB + 700 * 1024
    found = values(source().read())
    assert found["memory"] == 10241
    assert all(isinstance(found[m.key], int) for m in GPU_METRICS if m.key in found and m.column == "integer")


def test_every_fact_arrives_in_its_unit(driver: FakeNvml) -> None:
    snapshot = source().read()
    assert snapshot.timestamp == 1_700_000_000.5
    assert snapshot.host.name == "testhost"
    assert snapshot.host.driver_version == "580.159.03"
    assert snapshot.host.cuda_version == "13.0"
    assert snapshot.host.nvml_version == "13.580.159.03"
    assert snapshot.gpus[0] == GpuInfo(
        index=0,
        uuid="GPU-first",
        name="NVIDIA RTX A6000",
        memory_total_mib=48 * 1024,
        power_limit_w=280.0,
        pci_bus_id="00000000:01:00.0",
        architecture="Ampere",
        compute_capability="8.6",
        memory_from="device",
    )
    assert [gpu.index for gpu in snapshot.gpus] == [0, 1]
    assert snapshot.lost == frozenset()


@pytest.mark.parametrize(("number", "text"), [(13000, "13.0"), (12080, "12.8"), (11040, "11.4"), (10020, "10.2")])
def test_the_cuda_version_reads_as_nvidia_writes_it(driver: FakeNvml, number: int, text: str) -> None:
    driver.cuda_version = number
    assert source().host.cuda_version == text


@pytest.mark.parametrize(("code", "name"), [(2, "Kepler"), (7, "Ampere"), (9, "Hopper"), (10, "Blackwell")])
def test_an_architecture_has_its_name(driver: FakeNvml, code: int, name: str) -> None:
    driver.gpus[0].architecture = code
    assert source().read().gpus[0].architecture == name


@pytest.mark.parametrize("code", [0xFFFFFFFF, 4711, None])
def test_an_architecture_newer_than_pynvml_is_none(driver: FakeNvml, code: int | None) -> None:
    driver.gpus[0].architecture = code
    assert source().read().gpus[0].architecture is None


def test_a_board_without_enforced_power_limit_has_the_limit_that_was_set(driver: FakeNvml) -> None:
    driver.gpus[0].power_enforced_limit_mw = None
    driver.gpus[0].power_limit_mw = 250_000
    assert source().read().gpus[0].power_limit_w == 250.0


def test_memory_used_leaves_out_what_the_driver_reserves_as_nvidia_smi_does(driver: FakeNvml) -> None:
    assert values(source().read())["memory"] == 10 * 1024


def test_memory_used_on_an_old_driver_is_its_first_version(driver: FakeNvml) -> None:
    driver.hide("nvmlDeviceGetMemoryInfo_v2")
    assert values(source().read())["memory"] == 10 * 1024 + 600


def test_the_next_reading_is_new(driver: FakeNvml) -> None:
    reader = source()
    reader.read()
    driver.gpus[0].temperature = 75
    assert values(reader.read())["temperature"] == 75


BEHIND = {
    "temperature": "temperature",
    "utilization": "gpu_utilization",
    "memory": "memory_used",
    "power": "power_mw",
    "memory_utilization": "memory_utilization",
    "fan_speed": "fan",
    "sm_clock": "sm_clock",
    "memory_clock": "memory_clock",
}


@pytest.mark.parametrize("key", list(BUSY_VALUES))
def test_a_metric_that_the_board_lacks_is_none_and_the_others_stay(driver: FakeNvml, key: str) -> None:
    setattr(driver.gpus[0], BEHIND[key], None)
    with_it = {"utilization", "memory_utilization"} if "utilization" in key else {key}
    assert values(source().read()) == {**BUSY_VALUES, **dict.fromkeys(with_it)}


@pytest.mark.parametrize("key", list(BUSY_VALUES))
def test_zero_is_a_value(driver: FakeNvml, key: str) -> None:
    setattr(driver.gpus[0], BEHIND[key], 0)
    assert values(source().read()) == {**BUSY_VALUES, key: 0}


@pytest.mark.parametrize("key", sorted(set(BEHIND) - {"temperature"}))
@pytest.mark.parametrize("sentinel", [0xFFFFFFFF, 2**64 - 1])
def test_all_bits_set_is_no_value(driver: FakeNvml, key: str, sentinel: int) -> None:
    # A number of the fake is signed: the largest unsigned one is -1 there.
    setattr(driver.gpus[0], BEHIND[key], -1 if sentinel == 2**64 - 1 else sentinel)
    assert values(source().read()) == {**BUSY_VALUES, key: None}


@pytest.mark.parametrize("fact", ["memory_total", "power_enforced_limit_mw"])
def test_a_fact_with_all_bits_set_is_none(driver: FakeNvml, fact: str) -> None:
    setattr(driver.gpus[0], fact, -1)
    driver.gpus[0].power_limit_mw = None
    found = source().read().gpus[0]
    assert (found.memory_total_mib if fact == "memory_total" else found.power_limit_w) is None


def test_a_board_that_offers_nothing_still_is_a_gpu(fake: FakeNvml) -> None:
    bare = fake.add_gpu(name=None, memory_total=None)
    for name, attribute in vars(FakeGpu).items():
        if type(attribute).__name__ in ("Number", "Text"):
            setattr(bare, name, None)
    with fake_nvml.loaded(fake):
        snapshot = source().read()
    assert snapshot.gpus == (GpuInfo(index=0, uuid="PCI-0"),)
    assert dict(snapshot.readings[0].values) == dict.fromkeys(TICK_COLUMNS)


def test_two_boards_without_uuid_are_distinguished_by_their_place_on_the_bus(fake: FakeNvml) -> None:
    fake.add_gpu().uuid = None
    fake.add_gpu().uuid = None
    with fake_nvml.loaded(fake):
        assert uuids(source().read()) == ["PCI-00000000:01:00.0", "PCI-00000000:02:00.0"]


def test_a_machine_without_gpus_has_an_empty_snapshot(fake: FakeNvml) -> None:
    with fake_nvml.loaded(fake):
        snapshot = source().read()
    assert (snapshot.gpus, snapshot.readings, snapshot.processes) == ((), (), ())


def test_a_container_without_libcuda_has_gpus_and_no_cuda_version(driver: FakeNvml) -> None:
    # nvmlSystemGetCudaDriverVersion_v2 then says LIBRARY_NOT_FOUND, which is about libcuda and not NVML.
    driver.cuda_version = None
    snapshot = source().read()
    assert snapshot.host.cuda_version is None
    assert values(snapshot) == BUSY_VALUES


def test_static_facts_are_asked_once(driver: FakeNvml) -> None:
    reader = source()
    reader.read()
    driver.reset_calls()
    for _ in range(5):
        reader.read()
    once = [*FACT_CALLS, *MIG_CALLS, *SYSTEM_CALLS, *FINDING_CALLS]
    assert {name: driver.calls(name) for name in once} == dict.fromkeys(once, 0)


def test_one_call_yields_all_its_metrics(driver: FakeNvml) -> None:
    reader = source()
    reader.read()
    driver.reset_calls()
    reader.read()
    assert driver.calls("nvmlDeviceGetUtilizationRates", 0) == 1
    assert driver.calls("nvmlDeviceGetMemoryInfo_v2", 0) == 1
    assert driver.calls("nvmlDeviceGetClockInfo", 0) == 4


@pytest.mark.parametrize("code", sorted(UNSUPPORTED))
@pytest.mark.parametrize("function", READING_CALLS)
def test_what_a_device_does_not_support_is_asked_once_and_others_still_are(
    driver: FakeNvml, function: str, code: int
) -> None:
    hide_newer(driver, function)
    driver.fail(function, code, gpu=0)
    reader = source()
    driver.reset_calls()
    for _ in range(3):
        reader.read()
    arguments = 4 if function == "nvmlDeviceGetClockInfo" else 1
    # One is for what is read with every tick, and for what is read rarely.
    rarely = int(function == "nvmlDeviceGetMemoryInfo_v2")
    assert driver.calls(function, 0) == arguments + rarely
    assert driver.calls(function, 1) == 3 * arguments + rarely


def test_what_is_not_supported_is_nothing_to_log(driver: FakeNvml, caplog: pytest.LogCaptureFixture) -> None:
    driver.gpus[0].fan = driver.gpus[0].power_mw = None
    reader = source()
    for _ in range(3):
        reader.read()
    assert caplog.messages == []


GARBAGE = [b"\xff\xfe\x80 board", b"\xc3", bytes(range(128, 160))]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("attribute", ["name", "uuid", "pci_bus_id"])
def test_a_text_of_a_gpu_that_is_not_utf_8_costs_that_text(
    driver: FakeNvml, attribute: str, garbage: bytes
) -> None:
    setattr(driver.gpus[0], attribute, garbage)
    snapshot = source().read()
    first = snapshot.gpus[0]
    assert getattr(first, attribute) == ("PCI-00000000:01:00.0" if attribute == "uuid" else None)
    assert values(snapshot, first.uuid) == BUSY_VALUES
    assert snapshot.gpus[1].name == "NVIDIA RTX A6000"


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("attribute", ["driver_version", "nvml_version"])
def test_a_text_of_the_driver_that_is_not_utf_8_costs_that_text(
    driver: FakeNvml, attribute: str, garbage: bytes
) -> None:
    setattr(driver, attribute, garbage)
    snapshot = source().read()
    assert getattr(snapshot.host, attribute) is None
    assert values(snapshot) == BUSY_VALUES


@pytest.mark.parametrize("attribute", ["name", "uuid", "pci_bus_id"])
def test_a_text_without_end_does_no_harm(driver: FakeNvml, attribute: str) -> None:
    setattr(driver.gpus[0], attribute, Unterminated(b"NVIDIA"))
    driver.driver_version = Unterminated(b"580.")
    snapshot = source().read()
    first = snapshot.gpus[0]
    assert str(getattr(first, attribute)).startswith("NVIDIA")
    assert values(snapshot, first.uuid) == BUSY_VALUES
    assert str(snapshot.host.driver_version).startswith("580.580.")


@pytest.mark.parametrize("name", [b"\xff\xfe", Unterminated(b"\xe4bc"), None, b""])
def test_a_process_whose_name_is_not_text_has_none(driver: FakeNvml, name: bytes | None) -> None:
    driver.gpus[0].add_process(77, GIB, name=name)
    assert source().process_name(77) is None


def test_the_name_of_a_process_is_its_programs(driver: FakeNvml) -> None:
    driver.gpus[0].add_process(77, GIB, name="/opt/My Tools/träiner")
    assert source().process_name(77) == "träiner"
