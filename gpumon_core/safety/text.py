"""The one gate for texts from outside: what passes it is safe to store, to send and to print, and is what it looks
like.

Programs that gpumon does not trust choose names, command lines, titles and answers. The gate replaces characters
that a text must not have. It raises nothing, and does not change a text that has passed it before.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any, TypeVar

# The replacement for a character that a text must not have.
REPLACED = "\N{REPLACEMENT CHARACTER}"
CUT = "…"
# The most characters of a text, and of some fields, by their names.
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

# Invisible characters that count as letters, symbols or marks: fillers, the blank of Braille, and those of
# Unicode's property Default_Ignorable_Code_Point that are not format characters.
_UNSEEN = (
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\uffa0\U00016fe4\U0001d159\U000e0000-\U000e0fff"
)
# Invisible characters that change the form of a character before them: the joiners of Arabic, Persian, the scripts
# of India and of emoji, and the variation selectors. They stay after characters that they can change. Between
# Latin, Greek and Cyrillic letters, or several in a row, they only make different texts look the same.
_JOINERS = "\u200c\u200d"
_SELECTORS = "\ufe00-\ufe0f\U000e0100-\U000e01ef"
_HOLDS = "\u0590-\u115e\u1161-\u17b3\u17b6-\u180a\u1810-\u1fff\u2100-\u27ff\u2801-\u2fdf\u3001-\u3163\u3165-\ud7ff"
_HOLDS += "\uf900-\ufdff\ufe10-\ufefe\uff00-\uff9f\uffa1-\uffef\U00010000-\U00016fe3\U00016fe5-\U0001d158"
_HOLDS += "\U0001d15a-\U0003ffff"
_IS_PART = re.compile(rf"(?<=[{_HOLDS}])[{_SELECTORS}]|(?<=[{_HOLDS}\ufe00-\ufe0f])[{_JOINERS}](?=[{_HOLDS}])")
_HIDDEN = re.compile(rf"[{_UNSEEN}{_JOINERS}{_SELECTORS}]")
# More marks on one letter than any language has: they cover the lines above and below.
_MARKS = "\u0300-\u034e\u0350-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
_TOWER = re.compile(rf"([{_MARKS}]{{4}})[{_MARKS}]+")

Record = TypeVar("Record")


def clean(text: str, longest: int | None = None) -> str:
    """The text without control characters, halves of surrogate pairs, characters that turn its direction, and
    invisible characters. Line ends, tabs and unusual blanks become blanks. A text that is longer than `longest` is
    cut, with an ellipsis as its last character."""
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + CUT
    if text.isprintable() and (text.isascii() or not _is_suspect(text)):
        return text
    # Look at each different character once: a text may have millions of characters.
    table = {ord(sign): _replacement(sign) for sign in set(text) if not sign.isprintable() or _HIDDEN.match(sign)}
    parts, done = [], 0
    for found in _IS_PART.finditer(text):
        parts += [text[done : found.start()].translate(table), found[0]]
        done = found.end()
    return _TOWER.sub(r"\1", "".join([*parts, text[done:].translate(table)]))


def escaped(text: str, allowed: str = "") -> str:
    """The text with every character that a terminal or a log must not get as an escape, such as \\x1b: what would
    move a cursor, colour the text or turn its direction. `allowed` are characters that stay."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in allowed else one.encode("unicode_escape").decode() for one in text
    )


def decoded(content: bytes | None, longest: int | None = None) -> str:
    """The same for bytes that should be UTF-8."""
    # A character takes at most four bytes: the rest of a long text is not needed.
    content = (content or b"")[: None if longest is None else 4 * longest + 4]
    return clean(content.decode("utf-8", "replace"), longest)


def field(name: str, text: str | None) -> str | None:
    """The text for a field of that name; None for None or an empty text."""
    return clean(text, LONGEST_OF.get(name, LONGEST)) if text else None


def record(one: Record) -> Record:
    """The same dataclass with every text cleaned, and cut to the length for its field."""
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


def _replacement(sign: str) -> str:
    return " " if sign.isspace() and sign not in "\x1c\x1d\x1e\x1f\x85\u2028\u2029" else REPLACED
