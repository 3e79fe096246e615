"""Identifies workloads: what kind of program a process is and which model it serves, by a table of rules.

The table is workloads.toml beside this file; the rules of a user's own file (GPUMON_RULES) come before it.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gpumon_core.attribution import names
from gpumon_core.attribution.records import Endpoint

BUILT_IN = Path(__file__).with_name("workloads.toml")
CATEGORIES = (
    *("inference", "training", "image generation", "notebook", "rendering"),
    *("media", "desktop", "game", "other"),
)
TEXTS = ("name", "verb", "folder", "parent", "executable", "argument", "command")
CONDITIONS = (*TEXTS, "library", "environment")
WAYS = ("option", "after", "environment")
# The most characters of a command line that rules look at.
LONGEST = 65536
# The most characters of a path; the kernel takes no longer one (PATH_MAX).
LONGEST_PATH = 4096
# A model in the cache of the Hugging Face hub: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
CACHED = re.compile(r"models--([^/]+?)--([^/]+)")
BLOB = re.compile(r"sha256-([0-9a-f]{12})[0-9a-f]{52}")
# Options that take no value, by their names. What follows any other option counts as its value, so that a value is
# never mistaken for a model.
FLAG = re.compile(
    r"--(no|enable|disable|use|skip|allow|trust|enforce|return|calculate|ignore|verbose|debug|quiet|help|version)(-.*)?"
    r"|--(async-scheduling|headless|fully-sharded-loras|kv-sharing-fast-prefill|language-model-only|share|listen)|-[hv]"
)


class RulesError(Exception):
    """A table of rules that cannot be used; `str()` is one sentence."""


@dataclass(frozen=True)
class RuleSubject:
    """What a rule can look at: the readable name, the path of the executable, arguments, environment, and the
    paths of mapped files, which are read only where a rule asks for them; the working directory, and the names of
    the processes that started it, the nearest first."""

    name: str
    executable: str | None
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    libraries: Callable[[], Sequence[str]] = tuple
    working_directory: str | None = None
    ancestors: tuple[str, ...] = ()

    @cached_property
    def line(self) -> names.CommandLine:
        """The command line, taken apart."""
        return names.taken_apart(self.arguments)

    @cached_property
    def folder(self) -> str | None:
        """The folder of the script, or the working directory of any other program."""
        # Only a shell sets PWD, and the program may have changed its folder since: a second choice.
        here = self.working_directory or self.environment.get("PWD")
        script = self.line.script
        if script is None:
            return here
        return os.path.dirname(os.path.normpath(os.path.join(here or "", script[:LONGEST_PATH])))

    def texts(self) -> dict[str, tuple[str, ...]]:
        """The texts in which the conditions are searched."""
        first = self.arguments[0][:LONGEST_PATH] if self.arguments else ""
        return {
            # A title that a process has given itself: "VLLM::EngineCore", "ray::IDLE".
            "name": (self.name, first) if "::" in first else (self.name,),
            "verb": self.line.arguments[:1],
            "folder": (self.folder or "",),
            "parent": self.ancestors,
            "executable": (self.executable or first,),
            "argument": self.arguments[:1024],
            "command": (" ".join(self.arguments)[:LONGEST],),
        }


@dataclass(frozen=True, slots=True)
class Workload:
    """The workload of a program: its name, its category, the model that its command line names, and the endpoint
    that knows more. A `worker` works for its parent, which knows the model; `ways` are the ways to the model's
    name."""

    name: str
    category: str
    model: str | None = None
    endpoint: Endpoint | None = None
    worker: bool = False
    ways: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    category: str
    texts: tuple[tuple[str, re.Pattern[str]], ...]
    environment: tuple[tuple[str, re.Pattern[str]], ...]
    library: re.Pattern[str] | None
    ways: tuple[tuple[str, str], ...]
    endpoint: Endpoint | None
    worker: bool


class Rules:
    """The rules in their order; `secrets` are further patterns to mask, from the user's file."""

    def __init__(self, rules: Sequence[_Rule], secrets: tuple[str, ...] = ()) -> None:
        self._rules = tuple(rules)
        self.secrets = secrets

    @classmethod
    def load(cls, extra: Path | None = None) -> Rules:
        """The built-in rules, after those of the user's file. Raises RulesError."""
        rules, secrets = _read(extra) if extra is not None else ([], ())
        return cls([*rules, *_read(BUILT_IN)[0]], secrets)

    def identify(self, program: RuleSubject) -> Workload | None:
        """The workload by the first rule that fits, or None."""
        texts = program.texts()
        mapped: Sequence[str] | None = None
        for rule in self._rules:
            if all(
                any(pattern.search(text[:LONGEST]) for text in texts[where]) for where, pattern in rule.texts
            ) and all(
                pattern.search(program.environment.get(variable, "")) for variable, pattern in rule.environment
            ):
                if rule.library is not None:
                    mapped = program.libraries() if mapped is None else mapped
                    if not any(map(rule.library.search, mapped)):
                        continue
                model = model_of(rule.ways, program)
                return Workload(rule.name, rule.category, model, rule.endpoint, rule.worker, rule.ways)
        return None


def model_of(ways: Sequence[tuple[str, str]], program: RuleSubject) -> str | None:
    """The model that a program's command line or environment names, by the first way that leads to one."""
    for way, name in ways:
        found = (
            program.environment.get(name)
            if way == "environment"
            else option(program.line.arguments, name)
            if way == "option"
            else _after(program, name)
        )
        if found:
            return tidy(found)
    return None


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of an option. Where an option is repeated, the last one counts, as in most programs."""
    found = None
    for position, argument in enumerate(arguments):
        if argument == name:
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
            found = found if value.startswith("-") else value
        elif argument.startswith(name) and argument[len(name)] == "=":
            found = argument[len(name) + 1 :]
    return found


def _after(program: RuleSubject, word: str) -> str | None:
    """The first argument after a word, or after the program that is called so, that is neither an option nor an
    option's value."""
    arguments = program.line.arguments
    if word in arguments:
        position = arguments.index(word) + 1
    elif word == program.name:
        position = 0
    else:
        return None
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("-"):
            return argument
        has_value = "=" not in argument and argument != "--" and not FLAG.fullmatch(argument)
        position += 1
        if has_value and position < len(arguments) and not arguments[position].startswith("-"):
            position += 1
    return None


def tidy(model: str) -> str:
    """A model as people name it: without the folders around a file, and with the owner on the hub."""
    model = model[:LONGEST_PATH]
    if cached := CACHED.search(model):
        return f"{cached[1]}/{cached[2]}"
    if blob := BLOB.search(model):
        return f"sha256-{blob[1]}"
    if model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        return model.rstrip("/").rsplit("/", 1)[-1] or model
    return model


def _read(path: Path) -> tuple[list[_Rule], tuple[str, ...]]:
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RulesError(f"{path} cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RulesError(f"{path} is not TOML: {error}") from None
    _known(path.name, table, ("workload", "secrets"))
    secrets = table.get("secrets", [])
    if not (isinstance(secrets, list) and all(isinstance(pattern, str) for pattern in secrets)):
        raise RulesError(f"{path.name}: secrets must be a list of regular expressions")
    entries = table.get("workload", [])
    if not isinstance(entries, list):
        raise RulesError(f"{path.name}: each rule must begin with [[workload]]")
    rules = [_rule(f"{path.name}, rule {number}", entry) for number, entry in enumerate(entries, 1)]
    return rules, tuple(secrets)


def _rule(place: str, entry: Mapping[str, Any]) -> _Rule:
    _known(place, entry, ("name", "category", "match", "model", "endpoint", "worker"))
    name, category = entry.get("name"), entry.get("category", "other")
    if not isinstance(name, str) or not name:
        raise RulesError(f"{place}: name must be a text")
    place = f"{place} ({name})"
    if category not in CATEGORIES:
        raise RulesError(f"{place}: category {category!r} must be one of {', '.join(CATEGORIES)}")
    match = entry.get("match")
    if not isinstance(match, dict) or not match:
        raise RulesError(f"{place}: match must name at least one of {', '.join(CONDITIONS)}")
    _known(place, match, CONDITIONS)
    environment = match.get("environment", {})
    if not isinstance(environment, dict):
        raise RulesError(f"{place}: environment must be a table of variables and regular expressions")
    ways = entry.get("model", [])
    if not isinstance(ways, list):
        raise RulesError(f"{place}: model must be a list of tables with one of {', '.join(WAYS)}")
    worker = entry.get("worker", False)
    if not isinstance(worker, bool):
        raise RulesError(f"{place}: worker must be true or false")
    return _Rule(
        name,
        category,
        tuple((key, _pattern(place, match[key])) for key in TEXTS if key in match),
        tuple((variable, _pattern(place, text)) for variable, text in environment.items()),
        _pattern(place, match["library"]) if "library" in match else None,
        tuple(_way(place, way) for way in ways),
        _endpoint(place, entry["endpoint"]) if "endpoint" in entry else None,
        worker,
    )


def _endpoint(place: str, table: object) -> Endpoint:
    if not isinstance(table, dict):
        raise RulesError(f"{place}: endpoint must be a table with path, models, and port, option or environment")
    _known(f"{place}, endpoint", table, ("path", "models", "port", "option", "environment", "runners"))
    for key in ("path", "models", "option", "environment"):
        if key in table and not (isinstance(table[key], str) and table[key].isprintable()):
            raise RulesError(f"{place}: endpoint's {key} must be a text")
    if not re.fullmatch(r"/[!-~]*", table.get("path", "")):
        raise RulesError(f"{place}: endpoint's path must begin with / and have no blanks")
    if "models" not in table:
        raise RulesError(
            f'{place}: endpoint must say where the answer has the names of the models, as models = "data.0.id"'
        )
    port = table.get("port")
    if port is not None and not (type(port) is int and 0 < port < 65536):
        raise RulesError(f"{place}: endpoint's port must be a number from 1 to 65535")
    if type(table.get("runners", False)) is not bool:
        raise RulesError(f"{place}: endpoint's runners must be true or false")
    if not any(key in table for key in ("port", "option", "environment")):
        raise RulesError(f"{place}: endpoint must name its port, or an option or variable that has it")
    return Endpoint(**table)


def _way(place: str, way: object) -> tuple[str, str]:
    if isinstance(way, dict) and len(way) == 1:
        [(key, name)] = way.items()
        if key in WAYS and isinstance(name, str) and name:
            return key, name
    raise RulesError(f"{place}: model {way!r} must be a table with one of {', '.join(WAYS)}, and a text")


def _pattern(place: str, text: object) -> re.Pattern[str]:
    if not isinstance(text, str):
        raise RulesError(f"{place}: {text!r} must be a regular expression in quotes")
    try:
        return re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise RulesError(f"{place}: {text!r} is not a regular expression: {error}") from None


def _known(place: str, table: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in table:
        if key not in keys:
            raise RulesError(f"{place}: there is no {key!r} here; it may be {', '.join(keys)}")
