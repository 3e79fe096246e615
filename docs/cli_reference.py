"""Writes docs/cli.md from the parser of the command line itself:

.venv/bin/python docs/cli_reference.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpumon_core.__main__ import module, parser
from gpumon_core.cli import terminal

PROGRAM = "./gpumon"
PAGE = Path(__file__).with_name("cli.md")
HEAD = f"""# The command line

`{PROGRAM} VERB` needs no server. This page is made from what `--help` after a verb prints
(`docs/cli_reference.py`).

You can call the launcher `gpumon` from any folder, also through a link such as one in `~/.local/bin`. It uses the
settings, the `.env` and the history of its own folder; a FILE is relative to the folder that you call it from.
In the image it is on the PATH: `docker exec gpumon gpumon doctor`. `.venv/bin/python -m gpumon_core VERB`
does the same.

In a pipe there are no colours, bars or escape sequences, and output is UTF-8 whatever the locale is; `NO_COLOR`
removes the colours on a terminal, too. Messages go to stderr. Control characters in
names of processes and users are written as escapes such as `\\x1b`.

| exit status | meaning |
| --- | --- |
"""


def page() -> str:
    """The text of the page."""
    lines = [HEAD + "\n".join(f"| {status} | {meaning} |" for status, meaning in terminal.STATUSES.items())]
    for name, one in _verbs().items():
        verb = module(name)
        lines.append(f"## {name}")
        lines += _prose(verb.__doc__)
        options = [action for action in one._actions if not isinstance(action, argparse._HelpAction)]
        if options:
            lines.append("| option | meaning |\n| --- | --- |\n" + "\n".join(map(_option, options)))
        examples = [f"# {why}\n{PROGRAM} {name} {command}".rstrip() for command, why in verb.EXAMPLES]
        lines.append("```sh\n" + "\n\n".join(examples) + "\n```")
    return "\n\n".join(lines) + "\n"


def _verbs() -> dict[str, argparse.ArgumentParser]:
    [subparsers] = [one for one in parser()._actions if isinstance(one, argparse._SubParsersAction)]
    return dict(subparsers.choices)


def _prose(text: str) -> list[str]:
    """The paragraphs of a docstring; indented parts stay as they are."""
    found = []
    for paragraph in text.strip().split("\n\n"):
        if "\n  " in paragraph:
            found.append(f"```text\n{paragraph}\n```")
        else:
            found.append(paragraph)
    return found


def _option(action: argparse.Action) -> str:
    value = action.metavar or ("\\|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    names = ", ".join(action.option_strings) or str(value)
    shown = names if action.nargs == 0 or not action.option_strings else f"{names} {value}"
    return f"| `{shown}` | {action.help} |"


def main() -> None:
    """Write it."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
