"""The one gate for texts from outside: what passes it can be stored, sent, printed and believed to be what it
looks like.

Names, command lines, titles and answers are chosen by programs that gpumon does not trust. What a text must not
have is replaced, sign by sign; nothing is raised, and a text that has passed once passes again unchanged.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any, TypeVar

# What stands for a sign that has no place in a text.
REPLACED = "\N{REPLACEMENT CHARACTER}"
CUT = "…"
# So many characters of a text are kept; of some kinds, by the names of their fields, fewer or more.
LONGEST = 256
LONGEST_OF = {
    "command": 4096,
    # Paths, and rows of names.
    "executable": 1024,
    "working_directory": 1024,
    "notebook": 1024,
    "parents": 1024,
    "container_image": 512,
    # A name is for a column of a table.
    "name": 120,
    "container_id": 128,
    "job_id": 64,
    # DNS names of Kubernetes: a subdomain, and a label.
    "pod": 253,
    "namespace": 63,
}

# Signs of which nothing is seen though they count as letters, symbols or marks: fillers, the blank of Braille, and
# what Unicode's property Default_Ignorable_Code_Point lists beside the format characters.
_UNSEEN = (
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\uffa0\U00016fe4\U0001d159\U000e0000-\U000e0fff"
)
# Invisible signs that are a part of how a sign before them is written: the joiners of Arabic, Persian, the scripts
# of India and of emoji, and the selectors of a sign's form. They stay where they can do that; between the letters
# of Latin, Greek and Cyrillic, or several in a row, they only make two texts look the same.
_JOINERS = "\u200c\u200d"
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_HOLDS = "\u0590-\u115e\u1161-\u17b3\u17b6-\u180a\u1810-\u1fff\u2100-\u27ff\u2801-\u2fdf\u3001-\u3163\u3165-\ud7ff"
_HOLDS += "\uf900-\ufdff\ufe10-\ufefe\uff00-\uff9f\uffa1-\uffef\U00010000-\U00016fe3\U00016fe5-\U0001d158"
_HOLDS += "\U0001d15a-\U0003ffff"
_IS_PART = re.compile(rf"(?<=[{_HOLDS}])[{_SELECTORS}]|(?<=[{_HOLDS}\ufe00-\ufe0f])[{_JOINERS}](?=[{_HOLDS}])")
_HIDDEN = re.compile(rf"[{_UNSEEN}{_JOINERS}{_SELECTORS}]")
# More marks on one letter than any language has: they climb over the lines around it.
_MARKS = "\u0300-\u034e\u0350-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
_TOWER = re.compile(rf"([{_MARKS}]{{4}})[{_MARKS}]+")

Record = TypeVar("Record")


def clean(text: str, longest: int | None = None) -> str:
    """The text without control characters, halves of surrogate pairs, signs that turn its direction, and signs
    that cannot be seen; line ends, tabs and odd blanks are blanks. Of one that is longer than `longest` the
    beginning, with an ellipsis as its last sign."""
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + CUT
    if text.isprintable() and (text.isascii() or not _is_suspect(text)):
        return text
    # By the different signs, not one by one: a text may have millions.
    table = {ord(sign): _instead(sign) for sign in set(text) if not sign.isprintable() or _HIDDEN.match(sign)}
    parts, done = [], 0
    for found in _IS_PART.finditer(text):
        parts += [text[done : found.start()].translate(table), found[0]]
        done = found.end()
    return _TOWER.sub(r"\1", "".join([*parts, text[done:].translate(table)]))


def decoded(content: bytes | None, longest: int | None = None) -> str:
    """The same of bytes that should be UTF-8."""
    # No sign takes more than four: what is far behind the end need not be looked at.
    content = (content or b"")[: None if longest is None else 4 * longest + 4]
    return clean(content.decode("utf-8", "replace"), longest)


def field(name: str, text: str | None) -> str | None:
    """The text of a field of that name; None where there is none, or nothing in it."""
    return clean(text, LONGEST_OF.get(name, LONGEST)) if text else None


def record(one: Record) -> Record:
    """The same dataclass, with every text in it cleaned and cut as its field says."""
    changed: dict[str, Any] = {}
    for about in fields(one):  # type: ignore[arg-type]
        value = getattr(one, about.name)
        if isinstance(value, str):
            cleaned = clean(value, LONGEST_OF.get(about.name, LONGEST))
            if cleaned != value:
                changed[about.name] = cleaned
    return replace(one, **changed) if changed else one  # type: ignore[type-var]


def _is_suspect(text: str) -> bool:
    return _HIDDEN.search(text) is not None or _TOWER.search(text) is not None


def _instead(sign: str) -> str:
    return " " if sign.isspace() and sign not in "\x1c\x1d\x1e\x1f\x85\u2028\u2029" else REPLACED
