"""Lists the texts of a process that are masked: all that the process, or the user who started it, can choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gpumon_core.attribution.records import Program
from gpumon_core.attribution.secrets import Mask
from gpumon_core.safety.text import clean

# describe.py masks `command` and ProcessIdentity.name, as GPUMON_COMMANDS says.
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
# Fields that a process cannot choose, and why.
NOT_MASKED = {
    "container_engine": "from a table",
    "container_id": "hexadecimal, or the name that container_name has masked",
    "workload": "a rule's word",
    "category": "a rule's word",
}
# The most characters of a text to search for secrets; fewer are stored.
LONGEST = 4096


def starred(program: Program, mask: Mask) -> Program:
    """The program with every text that may hold a secret masked. A container with its name as its id gets the
    masked name as its id."""
    texts = {name: getattr(program, name) for name in MASKED}
    changed = {name: new for name, new in starred_facts(texts, mask).items() if new != texts[name]}
    if program.container_id is not None and program.container_id == program.container_name:
        # Containers of LXC and systemd-nspawn have no other id.
        changed |= {"container_id": changed.get("container_name", program.container_name)}
    return replace(program, **changed) if changed else program


def starred_facts(facts: Mapping[str, str | None], mask: Mask) -> dict[str, str | None]:
    """The same for fields that the inquirer learned, by their names."""
    # Remove invisible characters before masking: they could split a word that marks a secret.
    return {
        name: mask.text(clean(text, LONGEST)) if text and name in MASKED else text for name, text in facts.items()
    }
