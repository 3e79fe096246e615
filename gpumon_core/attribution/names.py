"""What people call a process: of `python -u train.py` that is train.py, not python."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath, PureWindowsPath

# The kernel cuts a command's name off here (TASK_COMM_LEN - 1); the full one is in its arguments.
COMM_LENGTH = 15
# A name is for a column of a table.
LONGEST = 120

# Options of the interpreters that take the next argument: python(1), node(1), java(1), perl(1), julia(1).
PYTHON_TAKES = frozenset({"-W", "-X", "--check-hash-based-pycs"})
JAVA_TAKES = frozenset(
    {"-cp", "-classpath", "--class-path", "-p", "--module-path", "--add-modules", "--add-opens"}
)
NODE_TAKES = frozenset({"-r", "--require", "--import", "--loader", "-C", "--conditions"})
OTHER_TAKES = frozenset({"-o", "-O", "--project-dir", "-L", "--load", "-I"})
# Files that say nothing by themselves: it is their folder that has the name.
FACELESS = frozenset({"__main__.py", "__init__.py"})


def readable(comm: str, arguments: Sequence[str]) -> str:
    """The name of a process, from the kernel's name for it (os.fsdecode's text) and its arguments."""
    name = _of_interpreter(arguments) or _of_program(comm, arguments)
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")[:LONGEST]


def _of_program(comm: str, arguments: Sequence[str]) -> str:
    if not arguments:
        return comm
    if arguments[0].lower().endswith(".exe"):
        # A Windows program under Wine or Proton.
        return PureWindowsPath(arguments[0]).name or comm
    # As bytes: the cut may go through a letter.
    cut = comm.encode("utf-8", "surrogateescape")
    if len(cut) >= COMM_LENGTH:
        program = arguments[0].rsplit("/", 1)[-1]
        if program.encode("utf-8", "surrogateescape").startswith(cut):
            return program
    return comm


def _of_interpreter(arguments: Sequence[str]) -> str | None:
    """What an interpreter runs; None for any other program."""
    if not arguments:
        return None
    program = arguments[0].rsplit("/", 1)[-1]
    for pattern, what in _INTERPRETERS:
        if pattern.fullmatch(program):
            return what(program, arguments[1:])
    return None


def _python(program: str, arguments: Sequence[str]) -> str | None:
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "-" or not argument:
            return None
        if not argument.startswith("-"):
            return _script(argument)
        if argument in PYTHON_TAKES:
            position += 2
            continue
        # Short options may stand together ("-um module"), and -m and -c end them.
        if not argument.startswith("--") and argument[1] not in "WX":
            for place, letter in enumerate(argument[1:], 1):
                if letter in "mc":
                    rest = argument[place + 1 :] or next(iter(arguments[position + 1 :]), "")
                    return f"{program} -c" if letter == "c" else rest.removesuffix(".__main__") or None
        position += 1
    return None


def _java(program: str, arguments: Sequence[str]) -> str | None:
    del program
    for position, argument in enumerate(arguments):
        if argument == "-jar":
            return _script(next(iter(arguments[position + 1 :]), ""))
    found = _first(arguments, JAVA_TAKES)
    return found.rsplit(".", 1)[-1] if found else None


def _node(program: str, arguments: Sequence[str]) -> str | None:
    del program
    return _script(_first(arguments, NODE_TAKES))


def _other(program: str, arguments: Sequence[str]) -> str | None:
    if any(argument in ("-c", "-e", "-E") for argument in arguments[:1]):
        return program
    return _script(_first(arguments, OTHER_TAKES))


_INTERPRETERS: tuple[tuple[re.Pattern[str], Callable[[str, Sequence[str]], str | None]], ...] = (
    (re.compile(r"(?:python|pypy)[\d.]*(?:-[a-z]+)?t?"), _python),
    (re.compile(r"java"), _java),
    (re.compile(r"node(?:js)?|deno|bun"), _node),
    (re.compile(r"(?:ba|da|z|k|fi)?sh|perl[\d.]*|ruby[\d.]*|Rscript|julia|lua[\d.]*"), _other),
)


def _first(arguments: Sequence[str], takes: frozenset[str]) -> str | None:
    """The first argument that is neither an option nor an option's value."""
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in takes:
            skip = True
        elif argument and not argument.startswith("-"):
            return argument
    return None


def _script(path: str | None) -> str | None:
    if not path:
        return None
    file = PurePosixPath(path)
    if file.name in FACELESS and file.parent.name:
        return file.parent.name
    return file.name or None
