"""Masks the secrets in the texts of a process, before anything is stored."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from gpumon_core.attribution.secrets import texts
from gpumon_core.attribution.secrets.lines import DEEPEST, LONGEST_LINE, arguments_starred, line_starred
from gpumon_core.attribution.secrets.texts import STARS


class Mask:
    """Replaces secrets by stars.

    `patterns` are further regular expressions. They mask what matches their group "secret", or their first group,
    or without a group the whole expression. Raises ValueError for one that cannot be used.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._patterns = [_compiled(pattern) for pattern in patterns]

    def arguments(self, arguments: Sequence[str], longest: int | None = None) -> list[str]:
        """The arguments of a program with every secret masked; with `longest`, about that many characters of
        them."""
        if longest is not None:
            arguments = [argument[: 2 * longest] for argument in arguments[: 2 * longest]]
        return arguments_starred(arguments, self._inside, 0, longest)

    def text(self, text: str) -> str:
        """A text with every secret in it masked: a title, a path, a command line in one piece."""
        return self._inside(text, 0)

    def _inside(self, text: str, depth: int) -> str:
        if len(text) < 3:
            return text
        text = texts.starred(text)
        if depth < DEEPEST and len(text) < LONGEST_LINE and (" " in text or "\t" in text or "\n" in text):
            text = line_starred(text, self._inside, depth + 1)
        for substitute in self._patterns:
            text = substitute(text)
        return text


def _compiled(pattern: str) -> Callable[[str], str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    if expression.search(""):
        raise ValueError(f"the pattern {pattern!r} matches the empty text, and would mask everything")
    group = "secret" if "secret" in expression.groupindex else 1 if expression.groups else 0

    def hide(found: re.Match[str]) -> str:
        begin, end = found.start(group) - found.start(), found.end(group) - found.start()
        return found[0] if begin < 0 else found[0][:begin] + STARS + found[0][end:]

    return lambda text: expression.sub(hide, text)
