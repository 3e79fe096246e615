"""Writes the reference in docs/api.md from the routes themselves, each with an example that was asked for:

.venv/bin/python docs/api_reference.py
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# pages/ is a package, and benchmarks/pages.py is not it.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from filled import NOW, filled, serving

from gpumon_core import api
from gpumon_core.api import openapi
from gpumon_core.api.resource import Resource
from gpumon_core.recording import runtime
from gpumon_core.safety.parameters import LARGEST, UTC_ZONE, Parameter
from gpumon_core.store import database

PAGE = ROOT / "docs" / "api.md"
PLACE = re.compile(r"(?<=<!-- routes -->\n).*?(?=<!-- /routes -->)", re.DOTALL)
ANSWERS = re.compile(r"```json\n.*?\n```", re.DOTALL)
SERVER = "http://127.0.0.1:8081"
# The most keys of an object, and the most levels, in an example.
KEYS, DEEPEST = 16, 6
MORE = "…"


def reference(answers: Mapping[str, Any]) -> str:
    """Every route with its parameters, its formats and an example; `answers` has what was answered, by path."""
    return "\n".join(_route(one, answers[one.path]) for one in api.RESOURCES)


def _route(one: Resource, answer: Any) -> str:
    lines = [f"### {one.path}", "", one.summary]
    if one.replaces:
        lines += ["", f"Replaces the original's `{one.replaces}`."]
    lines += ["", f"Formats: {', '.join(one.formats)}.", ""]
    if one.parameters:
        lines += ["| parameter | default | meaning |", "| --- | --- | --- |"]
        lines += [
            f"| `{each.name}` | {_default(each)} | {openapi.says(each)}{_values(each)} |"
            for each in one.parameters
        ]
        lines.append("")
    lines += ["```sh", f"curl '{url(one)}'", "```", "", "```json"]
    lines += [json.dumps(shortened(answer), indent=1, ensure_ascii=False), "```", ""]
    return "\n".join(lines)


def url(one: Resource) -> str:
    """The address of a route's example."""
    return f"{SERVER}{one.path}" + (f"?{one.example}" if one.example else "")


def _default(one: Parameter) -> str:
    if one.default is UTC_ZONE:
        return "`UTC`"
    return "" if one.default in (None, "") else f"`{one.default}`"


def _values(one: Parameter) -> str:
    """What it takes, where that is a short list or a range."""
    schema = one.kind.schema
    if len(schema.get("enum", ())) in range(1, 10):
        return " One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + "."
    if schema.get("maximum", LARGEST) < LARGEST:
        return f" {schema['minimum']} to {schema['maximum']}."
    return ""


def shortened(answer: Any, depth: int = 0) -> Any:
    """An answer with the first items of its lists and the first keys of its objects."""
    if depth > DEEPEST and isinstance(answer, dict | list):
        return MORE
    if isinstance(answer, dict):
        first = {key: shortened(value, depth + 1) for key, value in list(answer.items())[:KEYS]}
        return first | ({MORE: MORE} if len(answer) > KEYS else {})
    if isinstance(answer, list):
        plain = all(not isinstance(item, dict | list) for item in answer)
        first_items = [shortened(item, depth + 1) for item in answer[: 3 if plain else 1]]
        return first_items + ([MORE] if len(answer) > len(first_items) else [])
    return answer


def answers() -> dict[str, Any]:
    """What simulated GPUs answer to the examples, by path."""
    with tempfile.TemporaryDirectory() as folder:
        engine = database.open_for_reading(filled(Path(folder)))
        runtime.engine = lambda url=None: engine
        # At that time its samples were fresh.
        api.gpus.time = SimpleNamespace(time=lambda: NOW)
        with serving() as port:
            return {
                one.path: _asked(url(one).replace(SERVER, f"http://127.0.0.1:{port}")) for one in api.RESOURCES
            }


def _asked(address: str) -> Any:
    with urllib.request.urlopen(address) as answer:
        return json.load(answer)


def main() -> None:
    """Put the reference between its two marks."""
    text = reference(answers())
    PAGE.write_text(PLACE.sub(lambda _: text, PAGE.read_text()))


if __name__ == "__main__":
    main()
