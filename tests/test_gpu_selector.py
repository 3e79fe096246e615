"""A GPU is found by each of its names, and an ambiguous name is never guessed."""

from __future__ import annotations

from typing import Literal

import pytest
import sqlalchemy as sa
from ticks import GPUS, tick

from gpumon_core.store import database, schema
from gpumon_core.store.queries import gpu_selector
from gpumon_core.store.queries.gpu_selector import Named
from gpumon_core.store.writer import Writer

OLD = Named(1, "Box", 0, None, "GPU-aa11", here=False)
NEW = Named(2, "Box", 0, None, "GPU-aa22", "A100")
PART = Named(3, "Box", 0, 1, "MIG-GPU-aa22/1/0")
MOVED = Named(4, "rack", 3, None, "GPU-aa11")
ALONE = Named(5, "rack", 7, None, "GPU-ab")
THERE = [OLD, NEW, PART, MOVED, ALONE]


@pytest.mark.parametrize(
    ("text", "number", "due"),
    [
        ("0", "index", NEW),
        (" index:0 ", "id", NEW),
        ("box/0", "index", NEW),
        ("0:1", "index", PART),
        ("BOX/0:1", "id", PART),
        ("7", "index", ALONE),
        ("3", "index", MOVED),
        ("3", "id", PART),
        ("id:3", "index", PART),
        ("id:1", "index", OLD),
        ("GPU-aa22", "index", NEW),
        ("gpu-AA2", "id", NEW),
        ("MIG-GPU-aa22/1/0", "index", PART),
        ("mig", "index", PART),
        ("Box/GPU-aa11", "index", OLD),
        ("rack/gpu-aa", "index", MOVED),
    ],
)
def test_a_gpu_is_found_by_each_of_its_names(text: str, number: Literal["index", "id"], due: Named) -> None:
    assert gpu_selector.find(text, THERE, number) is due


@pytest.mark.parametrize(
    "text", ["", " ", "9", "id:9", "box", "box/", "rack/0", "index:", "0:2", "٠", "aa11", "x" * 5000]
)
def test_an_unknown_name_is_answered_with_the_gpus_that_there_are(text: str) -> None:
    with pytest.raises(gpu_selector.UnknownGpu) as caught:
        gpu_selector.find(text, THERE, "index")
    said = str(caught.value)
    assert said.startswith(f"there is no GPU {text[:100]}")
    assert "there are Box/0 (A100, GPU-aa22), " in said
    assert OLD.uuid + "), Box" not in said
    assert len(said) < 500


def test_an_ambiguous_name_is_answered_with_its_gpus() -> None:
    other = Named(6, "rack", 0, None, "GPU-ac")
    for text, both in (("0", "Box/0 (A100, GPU-aa22), rack/0 ("), ("GPU-aa11", "Box/0 ("), ("gpu-a", "Box/0 (")):
        with pytest.raises(gpu_selector.AmbiguousGpu, match="means several: name one of ") as caught:
            gpu_selector.find(text, [*THERE, other], "index")
        assert both in str(caught.value)


def test_where_there_are_many_gpus_some_are_listed() -> None:
    many = [Named(number, "rack", number, None, f"GPU-{number}") for number in range(1, 500)]
    with pytest.raises(gpu_selector.UnknownGpu, match=r"rack/8 .* and 491 more"):
        gpu_selector.find("rack/500", many, "index")
    with pytest.raises(gpu_selector.UnknownGpu, match="there are none yet"):
        gpu_selector.find("0", [], "index")


def test_what_is_recorded_is_known_by_its_host_and_whether_it_is_there(database_url: str) -> None:
    engine = database.open_for_writing(database_url)
    for host in ("one", "two"):
        Writer(engine, host, "nvml", 4).write(tick(100), {})
    with engine.begin() as connection:
        connection.execute(sa.update(schema.gpus).where(schema.gpus.c.id == 1).values(state="gone"))
    found = gpu_selector.known(database.open_for_reading(database_url))
    assert [(gpu.id, gpu.host, gpu.index, gpu.uuid, gpu.here) for gpu in found] == [
        (number, host, GPUS[place].index, GPUS[place].uuid, number != 1)
        for host, first in (("one", 1), ("two", 4))
        for place in range(3)
        for number in [first + place]
    ]
