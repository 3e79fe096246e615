"""Splits a text into words as a shell does, and accepts quotes that never end."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

# After these a quote opens in the middle of a word; after a letter it is an apostrophe.
OPENS = frozenset("=:,([{<>@$%+*/\"'")
PLAIN = re.compile(r"[^\s\"'\\;|&`]+")
# What ends a command.
BETWEEN = re.compile(r"\n|#(?=\s)|;+|&&|\|\|?|&|[(){}](?=\s|$)|[({](?=\w)|\$\(|`")
BARE = re.compile(r"[\w@%+=:,./*?&#~^!-]+")


@dataclass(frozen=True, slots=True)
class Token:
    """A word of a command: its begin and end in the text, and its value without quotes. `quote` is the quote
    around all of it."""

    begin: int
    end: int
    value: str
    quote: str = ""


def commands(text: str) -> Iterator[list[Token]]:
    """The commands of a line, each as its words."""
    words: list[Token] = []
    at = 0
    unclosed: set[str] = set()
    while at < len(text):
        if text[at] in " \t\r\f\v":
            at += 1
            continue
        between = BETWEEN.match(text, at)
        if between is not None:
            at = between.end()
            if words:
                yield words
                words = []
            continue
        word = _word(text, at, unclosed)
        words.append(word)
        at = word.end
    if words:
        yield words


def _word(text: str, begin: int, unclosed: set[str]) -> Token:  # noqa: PLR0912 - a letter a branch
    parts: list[str] = []
    at, quotes, whole = begin, 0, ""
    while at < len(text):
        c = text[at]
        if c.isspace():
            break
        if c in ";`" or (c in "|&" and text[at + 1 : at + 2] in ("", " ", "&", "|", "\n", "\t")):
            if at > begin:
                break
            parts.append(c)
            at += 1
        elif c == "\\" and at + 1 < len(text):
            parts.append(text[at + 1])
            at += 2
        elif c in "\"'":
            closing = _closing(text, c, at + 1) if c not in unclosed and _opens(text, begin, at) else None
            if closing is None:
                if _opens(text, begin, at):
                    unclosed.add(c)
                parts.append(c)
                at += 1
                continue
            inside = text[at + 1 : closing]
            if c == '"' and "\\" in inside:
                inside = re.sub(r'\\([\\"$`])', r"\1", inside)
            if at == begin:
                whole = c
            parts.append(inside)
            quotes += 1
            at = closing + 1
        elif c in "|&":
            parts.append(c)
            at += 1
        elif (plain := PLAIN.match(text, at)) is not None:
            parts.append(plain[0])
            at = plain.end()
        else:
            parts.append(c)
            at += 1
    is_whole = whole and quotes == 1 and len(parts) == 1
    return Token(begin, at, "".join(parts), whole if is_whole else "")


def _opens(text: str, begin: int, at: int) -> bool:
    return at == begin or text[at - 1] in OPENS or text[begin] in "-/"


def _closing(text: str, quote: str, begin: int) -> int | None:
    if quote == "'":
        found = text.find("'", begin)
        return found if found >= 0 else None
    at = begin
    while (at := text.find(quote, at)) >= 0:
        slashes = 0
        while at - slashes - 1 >= begin and text[at - slashes - 1] == "\\":
            slashes += 1
        if slashes % 2 == 0:
            return at
        at += 1
    return None


def quoted(value: str, quote: str) -> str:
    """A value as a word, in the quotes that it had."""
    if quote == '"':
        return '"' + re.sub(r'([\\"])', r"\\\1", value) + '"'
    if quote == "'" and "'" not in value:
        return f"'{value}'"
    return value if BARE.fullmatch(value) else shlex.quote(value)
