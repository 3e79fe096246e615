"""The process ledger, filtered and page by page."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from urllib.parse import parse_qsl, urlencode
from zoneinfo import ZoneInfo

import pandas as pd
import pytest
import sqlalchemy as sa
from ticks import GPUS, tick, who

from gpumon_core.attribution.records import ProcessIdentity, Program
from gpumon_core.safety.parameters import read
from gpumon_core.store import database
from gpumon_core.store.queries import processes
from gpumon_core.store.queries.process_filter import PARAMETERS, ProcessFilter, Wording, from_query
from gpumon_core.store.queries.processes import process_history
from gpumon_core.store.schema import gpu_processes, process_gpus
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, ProcessReading, Snapshot


@pytest.fixture
def writer(database_url: str) -> Writer:
    return Writer(database.open_for_writing(database_url), "here", "nvml", 4)


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    return database.open_for_reading(database_url)


VLLM = Program(
    command="python -m vllm serve Llama_3", workload="vLLM", model="llama3", pod="chat-0", container_id="a" * 64
)
TRAIN = Program(command="python train.py --lr 0.1", workload="PyTorch", container_id="0123456789abcdef" * 4)
OLLAMA = Program(workload="Ollama", model="qwen3", container_name="ollama", container_id="b" * 64)
PEOPLE = {
    7: ProcessIdentity(7, "b:1", 1.0, "train_100%.py", "ada", TRAIN),
    70: ProcessIdentity(70, "b:2", 1.0, "ollama", "grace", OLLAMA),
    8: ProcessIdentity(8, "b:3", 1.0, "Xorg", None),
    9: ProcessIdentity(9, "b:4", 1.0, "VLLM::Engine", "ada", VLLM),
}


@pytest.fixture
def ledger(writer: Writer, engine: sa.Engine) -> sa.Engine:
    writer.write(tick(100, {(0, 7): 10, (1, 7): 20}), PEOPLE)
    writer.write(tick(160, {(0, 7): 10, (1, 7): 20}), PEOPLE)
    writer.write(tick(200, {(1, 70): 10}), PEOPLE)
    writer.write(tick(300, {(2, 8): 10}, kind="C+G"), PEOPLE)
    writer.write(tick(400, {(2, 8): 10, (0, 9): 5000}, kind="C+G"), PEOPLE)
    return engine


def test_the_newest_come_first_with_gpus_and_state(ledger: sa.Engine) -> None:
    frame = process_history(ledger)
    assert frame["pid"].tolist() == [9, 8, 70, 7]
    assert frame["gpus"].tolist() == ["0", "2", "1", "0, 1"]
    assert frame["running"].tolist() == [True, True, False, False]
    assert frame["kind"].tolist() == ["C+G", "C+G", "C", "C"]
    assert frame["max_memory"].tolist() == [5000, 10, 10, 30]
    assert frame["lifetime_s"].tolist() == [0, 100, 0, 60]
    assert frame["workload"].tolist() == ["vLLM", None, "Ollama", "PyTorch"]


@pytest.mark.parametrize(
    ("filters", "pids"),
    [
        ({"gpu_ids": (2,)}, [70, 7]),
        ({"gpu_ids": (1, 3), "text": "o"}, [9, 8, 7]),
        ({"text": "7"}, [7]),
        ({"text": "99999999999999999999"}, []),
        ({"text": "7" * 5000}, []),
        ({"text": " TRAIN "}, [7]),
        ({"text": "100%"}, [7]),
        ({"text": "%"}, [7]),
        ({"text": "_"}, [9, 7]),
        ({"text": "vllm SERVE"}, [9]),
        ({"text": "' OR 1=1 --"}, []),
        ({"users": ("grace", "nobody")}, [70]),
        ({"containers": ("chat-0",)}, [9]),
        ({"containers": ("0123456789ab", "ollama")}, [70, 7]),
        ({"containers": ("a" * 12, "b" * 12)}, []),
        ({"programs_with": (("workload", ("vLLM", "Ollama")),)}, [9, 70]),
        ({"programs_with": (("workload", ("vLLM", "Ollama")), ("model", ("qwen3",)))}, [70]),
        ({"programs_with": (("model", ()),)}, [9, 8, 70, 7]),
        ({"kinds": ("G",)}, [9, 8]),
        ({"kinds": ("C", "M")}, [9, 8, 70, 7]),
        ({"kinds": ("M",)}, []),
        ({"states": ("running",)}, [9, 8]),
        ({"states": ("ended",)}, [70, 7]),
        ({"states": ("ended", "running")}, [9, 8, 70, 7]),
        ({"min_memory_mib": 30}, [9, 7]),
        ({"min_lifetime_s": 60}, [8, 7]),
        ({"min_lifetime_s": 61}, [8]),
        ({"min_lifetime_s": 101}, []),
        ({"start": 150, "end": 250}, [70, 7]),
        ({"start": 161}, [9, 8, 70]),
        ({"start": 401}, []),
        ({"end": 99}, []),
        ({"users": ("ada",), "states": ("ended",), "kinds": ("C",), "start": 100, "text": "train"}, [7]),
    ],
)
def test_filters_hold_for_rows_pages_and_count(
    ledger: sa.Engine, filters: dict[str, object], pids: list[int]
) -> None:
    wanted = ProcessFilter(**filters)  # type: ignore[arg-type]
    assert process_history(ledger, wanted)["pid"].tolist() == pids
    assert processes.count(ledger, wanted) == len(pids)
    assert [pid for page in processes.pages(ledger, wanted, size=1) for pid in page["pid"]] == pids


def test_a_process_that_goes_on_was_seen_just_now(ledger: sa.Engine, database_url: str) -> None:
    # As among hundreds of processes, of which few are brought up to date with each tick.
    with database.open_for_writing(database_url).begin() as connection:
        connection.execute(sa.update(gpu_processes).where(gpu_processes.c.pid == 8).values(last_seen=300))
    for filters in ({"start": 350}, {"min_lifetime_s": 100}):
        frame = process_history(ledger, ProcessFilter(**filters)).set_index("pid")
        assert frame.loc[8, ["last_seen", "lifetime_s"]].tolist() == [400, 100]


def test_those_that_were_seen_last_are_found_in_order(
    ledger: sa.Engine, writer: Writer, database_url: str
) -> None:
    def pids(most: int, **filters: object) -> list[int]:
        frame = processes.seen_last(ledger, ProcessFilter(**filters), most)  # type: ignore[arg-type]
        whole = process_history(ledger).set_index("process_id").loc[frame["process_id"]].reset_index()
        pd.testing.assert_frame_equal(frame, whole[frame.columns])
        return frame["pid"].tolist()

    # As among hundreds of processes, of which few are brought up to date with each tick.
    with database.open_for_writing(database_url).begin() as connection:
        connection.execute(sa.update(gpu_processes).where(gpu_processes.c.pid == 8).values(last_seen=100))
    assert pids(100) == [9, 8, 70, 7]
    assert pids(2) == [9, 8]
    assert pids(100, start=200, gpu_ids=(2, 3)) == [8, 70]
    assert pids(100, text="no such process") == []
    # One that is on two GPUs is still one.
    writer.write(tick(500, {(0, 7): 10, (1, 7): 20, (2, 8): 10}), PEOPLE)
    assert pids(3) == [8, 7, 9]


def test_what_a_process_did_is_added_up_over_its_gpus(writer: Writer, engine: sa.Engine) -> None:
    def at(now: int, *rows: ProcessReading) -> Snapshot:
        plain = tick(now, gpus=GPUS[:2])
        readings = tuple(GpuReading(gpu.uuid, {"utilization": 50.0, "power": 100.0}) for gpu in GPUS[:2])
        return Snapshot(now, plain.host, plain.gpus, readings, rows)

    both = (
        ProcessReading("GPU-0", 7, "C", 1000, sm_utilization=40),
        ProcessReading("GPU-1", 7, "C", 500, sm_utilization=20),
    )
    writer.write(at(100, *both), who(7, 8))
    writer.write(at(104, *both), who(7, 8))
    writer.write(at(108, ProcessReading("GPU-0", 8, "C", 100)), who(7, 8))
    frame = process_history(engine).set_index("pid")
    with engine.connect() as connection:
        sums = connection.execute(
            sa.select(sa.func.sum(process_gpus.c.busy_s), sa.func.sum(process_gpus.c.energy_j)).where(
                process_gpus.c.process_id == int(frame.loc[7, "process_id"])
            )
        ).one()
    assert frame.loc[7, ["busy_s", "energy_j"]].tolist() == list(sums)
    assert sums[0] == pytest.approx(8.0)
    assert frame.loc[7, ["sm_mean", "max_sm"]].tolist() == [30.0, 40.0]
    assert frame.loc[7, "memory_mib_s"] == pytest.approx(1500 * 8)
    assert not frame.loc[7, "estimated"]
    assert math.isnan(frame.loc[8, "sm_mean"])
    assert math.isnan(frame.loc[8, "max_sm"])
    assert frame.loc[8, "estimated"]


def test_pages_are_the_whole_in_order_while_the_recorder_writes(writer: Writer, engine: sa.Engine) -> None:
    def people(first: int) -> dict[int, ProcessIdentity]:
        return {pid: ProcessIdentity(pid, f"b:{pid}", 1.0, "w", "ada") for pid in range(first, first + 10)}

    for number in range(5):
        now, crowd = 100 + 4 * number, people(10 * number)
        writer.write(tick(now, {(pid % 3, pid): 10 for pid in crowd}), crowd)
    before = process_history(engine)
    found = []
    for number, page in enumerate(processes.pages(engine, size=7)):
        found.append(page)
        now, crowd = 200 + 4 * number, people(100 + 10 * number)
        writer.write(tick(now, {(pid % 3, pid): 10 for pid in crowd}), crowd)
    whole = pd.concat(found, ignore_index=True)
    assert whole["process_id"].tolist() == before["process_id"].tolist()
    assert [len(page) for page in found] == [7] * 7 + [1]
    order = list(zip(whole["first_seen"], whole["process_id"], strict=True))
    assert all(one > other for one, other in pairwise(order))


def test_a_page_ends_where_the_next_begins(ledger: sa.Engine) -> None:
    first = processes.page(ledger, size=3)
    rest = processes.page(ledger, size=3, after=processes.position(first))
    assert [*first["pid"], *rest["pid"]] == [9, 8, 70, 7]
    assert processes.page(ledger, size=3, after=processes.position(rest)).empty


def test_nothing_found_has_every_column_and_its_type(ledger: sa.Engine) -> None:
    whole, empty = (process_history(ledger, ProcessFilter(text=text)) for text in ("", "no such process"))
    assert len(empty) == 0
    assert list(empty) == list(whole)
    assert empty.dtypes.tolist() == whole.dtypes.tolist()
    assert list(processes.pages(ledger, ProcessFilter(text="no such process"))) == []


def test_a_filter_is_a_key() -> None:
    one, other = (ProcessFilter(users=("ada",), programs_with=(("model", ("llama3",)),)) for _ in range(2))
    assert {one: 1}[other] == 1


def test_a_column_that_programs_lacks_is_refused(ledger: sa.Engine) -> None:
    with pytest.raises(KeyError):
        process_history(ledger, ProcessFilter(programs_with=(("nonsense", ("x",)),)))


def test_filters_offer_what_the_ledger_has(ledger: sa.Engine) -> None:
    assert processes.usernames(ledger) == ["ada", "grace"]
    assert processes.containers(ledger) == ["0123456789ab", "chat-0", "ollama"]
    assert processes.program_values(ledger, "workload") == ["Ollama", "PyTorch", "vLLM"]
    assert processes.program_values(ledger, "model") == ["llama3", "qwen3"]


def test_a_new_workload_moves_no_other(writer: Writer, ledger: sa.Engine) -> None:
    before = processes.workloads(ledger)
    assert before == ["PyTorch", "Ollama", "vLLM"]
    blender = ProcessIdentity(5, "b:5", 1.0, "blender", "ada", Program(workload="Blender"))
    writer.write(tick(500, {(0, 5): 10}), {5: blender})
    assert processes.workloads(ledger) == [*before, "Blender"]


CHOSEN = ProcessFilter(
    start=100,
    end=500,
    gpu_ids=(1, 2),
    users=("ada", "grace"),
    containers=("chat-0",),
    programs_with=(("workload", ("vLLM",)), ("model", ("llama3", "qwen3"))),
    kinds=("C", "G"),
    states=("running",),
    min_memory_mib=2048,
    min_lifetime_s=60,
    text="a&b=c ü",
)


def test_a_filter_goes_through_a_query_string_and_back() -> None:
    for wanted in (ProcessFilter(), CHOSEN, ProcessFilter(text="x"), ProcessFilter(min_memory_mib=0)):
        values = read(PARAMETERS, parse_qsl(urlencode(wanted.query()), strict_parsing=bool(wanted.query())))
        # The routes look GPUs up by what a query calls them.
        assert from_query({**values, "gpu": tuple(map(int, values["gpu"]))}) == wanted
    assert ProcessFilter(process_ids=(1,)).query() == []
    names = {name for name, _ in CHOSEN.query()}
    assert names == {one.name for one in PARAMETERS}, "every condition was tried"


def test_a_query_without_some_of_the_parameters_leaves_their_conditions_out() -> None:
    assert from_query({"user": ("ada",), "q": ""}) == ProcessFilter(users=("ada",))
    assert from_query({}) == ProcessFilter()


def test_a_filter_quotes_long_values_in_bounds() -> None:
    wording = Wording(ZoneInfo("UTC"))
    for chosen in (ProcessFilter(text=5000 * "x"), ProcessFilter(users=(5000 * "x",))):
        words = chosen.describe(wording)
        assert "xxx" in words
        assert len(words) < 200
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in ProcessFilter(text="a\N{RIGHT-TO-LEFT OVERRIDE}b").describe(wording)


def test_a_filter_says_what_it_excludes() -> None:
    wording = Wording(ZoneInfo("Europe/Berlin"), {1: "rack1 GPU 0"})
    assert ProcessFilter().describe(wording) == ProcessFilter(text=" ").describe(wording) == ""
    said = replace(CHOSEN, process_ids=(7,)).describe(wording)
    assert said == (
        "seen since Thu 01 Jan 1970 01:01:40, seen before Thu 01 Jan 1970 01:08:20, on rack1 GPU 0 or GPU id:2, "
        "of user ada or grace, in container chat-0, with workload vLLM, with model llama3 or qwen3, "
        "of type C or G, running, that held at least 2.0 GiB, that lived at least 1m 0s, "
        "with “a&b=c ü” in the name or command line, or as PID, with gpumon's id 7"
    )
