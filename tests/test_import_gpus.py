"""Which GPU of this host a file of the original is about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpumon_core.legacy_import import gpu_choice
from gpumon_core.legacy_import.discovery import NamedGpu, named_gpus
from gpumon_core.legacy_import.import_records import ImportRefused, TargetGpu

TARGETS = [
    TargetGpu(3, 0, "GPU-aa1", "A6000", 49140, 0, 0),
    TargetGpu(5, 1, "GPU-aa2", "A100", 40960, 0, 0),
]


@pytest.mark.parametrize(
    ("indices", "several", "named", "given", "chosen"),
    [
        ([0], False, [], ["1"], {0: 5}),
        ([0], False, [], ["GPU-aa1"], {0: 3}),
        ([0], False, [], ["id:5"], {0: 5}),
        ([0], False, [], ["gpu-AA2"], {0: 5}),
        ([0], False, [], ["here/1"], {0: 5}),
        ([0], False, [NamedGpu(0, "A100")], [], {0: 5}),
        ([0, 1], True, [], [], {0: 3, 1: 5}),
        ([0, 1], True, [], ["0=1", "1=GPU-aa1"], {0: 5, 1: 3}),
        (
            [0, 1],
            True,
            [NamedGpu(0, "A100", "GPU-aa2"), NamedGpu(1, "x", "GPU-aa1")],
            [],
            {0: 5, 1: 3},
        ),
        ([0, 1], True, [NamedGpu(0, "H100", "GPU-bb")], [], {1: 5}),
    ],
)
def test_the_right_gpu_is_chosen(
    indices: list[int],
    several: bool,
    named: list[NamedGpu],
    given: list[str],
    chosen: dict[int, int],
) -> None:
    found = gpu_choice.choose(indices, several, named, TARGETS, given, "here")
    assert {index: target.id for index, target in found.targets.items()} == chosen
    assert set(found.unmatched) == set(indices) - set(chosen)


@pytest.mark.parametrize(
    ("indices", "several", "named", "given", "says"),
    [
        ([0], False, [], [], "several that fit"),
        ([0], False, [NamedGpu(0, "RTX 3090")], [], "'RTX 3090', which here does not have"),
        ([0], False, [], ["GPU-aa"], "means several"),
        ([0], False, [], ["7"], "there is no GPU 7; there are here/0 (A6000, GPU-aa1), here/1 ("),
        ([0], False, [], [""], "there is no GPU"),
        ([0, 1], True, [], ["1"], "say for each"),
        ([0, 1], True, [], ["4=1"], "has GPU 0, 1, and no GPU 4"),
        ([0, 1], True, [], ["0=1"], "two GPUs of the file would become one"),
        ([4], True, [], [], "has no GPU 4"),
    ],
)
def test_gpumon_asks_for_a_gpu_that_it_cannot_know(
    indices: list[int], several: bool, named: list[NamedGpu], given: list[str], says: str
) -> None:
    with pytest.raises(ImportRefused) as caught:
        gpu_choice.choose(indices, several, named, TARGETS, given, "here")
    assert says in str(caught.value)
    assert caught.value.status == 2


def test_what_lies_beside_the_file_names_the_gpu(tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    config = tmp_path / "gpu_config.json"
    config.write_text('{"gpu_name": "NVIDIA GeForce RTX 3090"}')
    for target in (tmp_path / "gpu_metrics.db", tmp_path / "history" / "gpu_metrics.db"):
        assert named_gpus(target) == [NamedGpu(0, "NVIDIA GeForce RTX 3090")]
    config.write_text(json.dumps({"gpus": [{"index": 1, "uuid": "GPU-x", "name": "GPU"}, {"index": "a"}, 3]}))
    assert named_gpus(tmp_path / "gpu_metrics.db") == [NamedGpu(1, None, "GPU-x")]
    for nonsense in (b"", b"[1]", b"\xff\xfe{", b'{"gpu_name": 3}', b"[" * 100_000):
        config.write_bytes(nonsense)
        assert named_gpus(tmp_path / "gpu_metrics.db") == []
