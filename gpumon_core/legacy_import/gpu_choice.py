"""Decides which GPU of this host each GPU of the original's file is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpumon_core.legacy_import.discovery import NamedGpu
from gpumon_core.legacy_import.import_records import ImportRefused, TargetGpu
from gpumon_core.store.queries import gpu_selector

# The exit status where the user has to give another --gpu.
WRONG_ARGUMENT = 2


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """The GPU of this host for each GPU of the file, by the file's index; for the others, why there is none."""

    targets: Mapping[int, TargetGpu]
    unmatched: Mapping[int, str]


def choose(
    indices: Sequence[int],
    has_several: bool,
    named: Sequence[NamedGpu],
    targets: Sequence[TargetGpu],
    given: Sequence[str],
    host: str,
) -> GpuChoice:
    """Find each GPU of a file among the GPUs of this host. `given` are the values of --gpu: GPU or INDEX=GPU.

    Raises ImportRefused.
    """
    found = _given_targets(indices, targets, given, host)
    unmatched: dict[int, str] = {}
    names = {gpu.index: gpu for gpu in named}
    for index in indices:
        if index not in found:
            guess = _guess(index, has_several, names.get(index), targets, host)
            if isinstance(guess, TargetGpu):
                found[index] = guess
            else:
                unmatched[index] = guess
    if len({target.id for target in found.values()}) < len(found):
        raise ImportRefused(
            "two GPUs of the file would become one GPU of this host: choose with --gpu INDEX=GPU", WRONG_ARGUMENT
        )
    if not found:
        why = next(iter(unmatched.values()))
        which = f"{min(unmatched)}=" if has_several else ""
        raise ImportRefused(
            f"gpumon does not know which GPU the file is about: {why}. {host} has {_described(targets)}. Choose "
            f"with --gpu {which}{targets[0].uuid}",
            WRONG_ARGUMENT,
        )
    return GpuChoice(found, unmatched)


def _given_targets(
    indices: Sequence[int], targets: Sequence[TargetGpu], given: Sequence[str], host: str
) -> dict[int, TargetGpu]:
    """What the values of --gpu say, by the file's index."""
    found: dict[int, TargetGpu] = {}
    listed = ", ".join(map(str, indices))
    for text in given:
        left, separator, right = (part.strip() for part in text.partition("="))
        if separator:
            if not left.isdecimal() or int(left) not in indices:
                raise ImportRefused(
                    f"--gpu {text}: the file has GPU {listed}, and no GPU {left or 'without an index'}: name one "
                    "that it has",
                    WRONG_ARGUMENT,
                )
            found[int(left)] = _find(right, targets, host)
        elif len(indices) == 1 and not found:
            found[indices[0]] = _find(left, targets, host)
        else:
            raise ImportRefused(
                f"--gpu {text}: the file has GPU {listed}: say for each which it is, as in "
                f"--gpu {indices[0]}={targets[0].uuid}",
                WRONG_ARGUMENT,
            )
    return found


def _guess(
    index: int, has_several: bool, named: NamedGpu | None, targets: Sequence[TargetGpu], host: str
) -> TargetGpu | str:
    """The only GPU that fits, or why there is none."""
    if named is not None and named.uuid is not None:
        same = [target for target in targets if target.uuid == named.uuid]
        return same[0] if same else f"gpu_config.json calls GPU {index} {named.uuid}, which {host} does not have"
    fitting = [target for target in targets if target.index == index or not has_several]
    if named is not None and named.name is not None:
        words = named.name.split()
        fitting = [target for target in fitting if target.name is None or target.name.split() == words]
        if not fitting:
            return f"gpu_config.json calls GPU {index} {named.name!r}, which {host} does not have"
    if not fitting:
        return f"{host} has no GPU {index}"
    return fitting[0] if len(fitting) == 1 else f"{host} has several that fit"


def _find(text: str, targets: Sequence[TargetGpu], host: str) -> TargetGpu:
    """The GPU of this host that a user means: see gpu_selector.find."""
    named = [
        gpu_selector.Named(target.id, host, target.index, None, target.uuid, target.name) for target in targets
    ]
    try:
        found = gpu_selector.find(text, named, "index")
    except (gpu_selector.UnknownGpu, gpu_selector.AmbiguousGpu) as error:
        raise ImportRefused(str(error), WRONG_ARGUMENT) from error
    return next(target for target in targets if target.id == found.id)


def _described(targets: Sequence[TargetGpu]) -> str:
    return "; ".join(
        f"GPU {target.index}, {target.name or 'of unknown model'}, {target.uuid}" for target in targets
    )
