"""Columns of text for a terminal: made harmless, measured as a terminal does, cut and aligned."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Sequence
from itertools import zip_longest

from gpumon_core.format import printable

GAP = 2
CUT = "…"
# On a narrow terminal a column is at least this wide.
NARROWEST = 5


def width(text: str) -> int:
    """How many cells of a terminal a printable text takes."""
    if text.isascii():
        return len(text)
    return sum(_cells(character) for character in text)


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, cells: int) -> str:
    """The text, or its beginning and an ellipsis where it is wider than this number of cells."""
    if width(text) <= cells:
        return text
    taken, room = "", cells - 1
    for character in text:
        room -= _cells(character)
        if room < 0:
            break
        taken += character
    return taken + CUT if cells > 0 else ""


def padded(text: str, cells: int, right: bool = False) -> str:
    """The text, cut or filled up to exactly so many cells."""
    text = cut(text, cells)
    blank = " " * (cells - width(text))
    return blank + text if right else text + blank


def aligned(
    rows: Sequence[Sequence[str]],
    right: Collection[int] = (),
    most: int | None = None,
    fixed: Collection[int] = (),
) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell; those in `right` end at their right edge.

    Where all together are wider than `most`, the widest columns become narrower, but not those in
    `fixed`. A row may have
    fewer cells than others.
    """
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(width, column)) for column in zip_longest(*shown, fillvalue="")]
    if most is not None:
        _shrink(widths, most - GAP * (len(widths) - 1), fixed)
    lines = []
    for row in shown:
        cells = [padded(cell, widths[place], place in right) for place, cell in enumerate(row)]
        line = (" " * GAP).join(cells).rstrip()
        lines.append(line if most is None else cut(line, most))
    return lines


def _shrink(widths: list[int], room: int, fixed: Collection[int]) -> None:
    """Take from the widest columns, cell by cell, until all fit or none can give more."""
    giving = [place for place in range(len(widths)) if place not in fixed]
    while sum(widths) > room and giving:
        widest = max(giving, key=lambda place: widths[place])
        if widths[widest] <= NARROWEST:
            return
        widths[widest] -= 1
