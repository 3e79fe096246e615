"""Which texts of a process pass the mask on their way in: all that the process, or who started it, may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gpumon_core.attribution.records import Program
from gpumon_core.attribution.secrets import Mask
from gpumon_core.safety.text import clean

# `command` and ProcessIdentity.name are masked where they are made (describe.py), as GPUMON_COMMANDS says.
MASKED = (
    "executable",
    "working_directory",
    "parents",
    "container_name",
    "container_image",
    "pod",
    "namespace",
    "unit",
    "job_id",
    "job_name",
    "job_user",
    "notebook",
    "model",
)
# And those that are nobody's to choose.
NOT_MASKED = {
    "container_engine": "one of a table's",
    "container_id": "hexadecimal, or the name that container_name has masked",
    "workload": "a rule's word",
    "category": "a rule's word",
}
# So much of a text is looked through; less than that is kept.
LONGEST = 4096


def starred(program: Program, mask: Mask) -> Program:
    """The program with every text that may hold a secret masked. What was known by its name alone is then known
    by the masked one."""
    texts = {name: getattr(program, name) for name in MASKED}
    changed = {name: new for name, new in starred_facts(texts, mask).items() if new != texts[name]}
    if program.container_id is not None and program.container_id == program.container_name:
        # LXC and systemd-nspawn have no other id.
        changed |= {"container_id": changed.get("container_name", program.container_name)}
    return replace(program, **changed) if changed else program


def starred_facts(facts: Mapping[str, str | None], mask: Mask) -> dict[str, str | None]:
    """The same of fields that were learned later, by their names."""
    # Signs that cannot be seen would part a word that gives a secret away, and are gone afterwards.
    return {
        name: mask.text(clean(text, LONGEST)) if text and name in MASKED else text for name, text in facts.items()
    }
