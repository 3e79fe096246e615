"""Modules import what the table of docs/architecture.md allows, and no two of them share a name for a type."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "architecture.md"
VERSION = "__init__.py"
ROW = re.compile(r"\| `(?P<part>[\w/.]+)` \| [^|]+ \|(?P<allowed>[^|]*)\|")
# Parts that would need the server, the pages or the file formats to record.
ABOVE_RECORDING = ("doctor.py", "api/", "prometheus/", "export/", "figures/", "pages/", "web/", "cli/")


@dataclass(frozen=True, slots=True, order=True)
class Import:
    """One module of this repository that another one imports, both as paths."""

    source: str
    target: str


def name_of(path: Path) -> str:
    """A module as the table writes it: without `gpumon_core/`."""
    return path.relative_to(ROOT).as_posix().removeprefix("gpumon_core/")


def module_file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run, at the top of a module or later."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and is_for_type_checkers(child):
            for other in child.orelse:
                yield from statements(other)
        else:
            yield from statements(child)


def imported_modules(code: str, package: str = "") -> Iterator[str]:
    """The modules that code in a package imports, with the names that it takes from them."""
    for node in statements(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def files() -> list[Path]:
    found = [path for folder in ("gpumon_core", "pages") for path in (ROOT / folder).rglob("*.py")]
    return [*sorted(found), ROOT / "app.py"]


@cache
def imports() -> frozenset[Import]:
    found = set()
    for path in files():
        package = ".".join(path.parent.relative_to(ROOT).parts)
        for module in imported_modules(path.read_text(), package):
            target = module_file(module) or module_file(module.rpartition(".")[0])
            if target is not None:
                found.add(Import(name_of(path), name_of(target)))
    return frozenset(found)


@cache
def table() -> dict[str, tuple[str, ...]]:
    """What each part of the table may import."""
    section = TABLE.read_text().partition("## Who may import whom")[2].partition("\n## ")[0]
    rows = [row for row in map(ROW.fullmatch, section.splitlines()) if row is not None]
    return {row["part"]: tuple(re.findall(r"`([^`]+)`", row["allowed"])) for row in rows}


def part_of(module: str) -> str | None:
    """The row that a module belongs to: the longest that fits."""
    fitting = [part for part in table() if module == part or (part.endswith("/") and module.startswith(part))]
    return max(fitting, key=len, default=None)


def allows(allowed: str, module: str) -> bool:
    """Whether a name in a row allows a module: a part all of its own, any other name what lies below it."""
    if allowed in table():
        return part_of(module) == allowed
    return module == allowed or (allowed.endswith("/") and module.startswith(allowed))


def is_allowed(one: Import) -> bool:
    part = part_of(one.source)
    return (
        one.target == VERSION
        or part is None
        or part == part_of(one.target)
        or any(allows(allowed, one.target) for allowed in table()[part])
    )


def test_every_module_has_a_row() -> None:
    modules = {name_of(path) for path in files()} - {VERSION}
    lacking = sorted(module for module in modules if part_of(module) is None)
    assert not lacking, f"docs/architecture.md has no row for {', '.join(lacking)}: add one to its table"
    unused = [part for part in table() if not any(part_of(module) == part for module in modules)]
    assert not unused, f"docs/architecture.md has a row for {', '.join(unused)}, which does not exist"


def test_every_import_is_allowed() -> None:
    wrong = sorted(one for one in imports() if not is_allowed(one))
    assert not wrong, "\n".join(
        f"{one.source} imports {one.target}, which docs/architecture.md does not allow" for one in wrong
    )


@pytest.mark.parametrize("part", sorted(table()))
def test_a_row_allows_only_what_its_part_imports(part: str) -> None:
    targets = {one.target for one in imports() if part_of(one.source) == part}
    unused = [allowed for allowed in table()[part] if not any(allows(allowed, target) for target in targets)]
    assert not unused, (
        f"docs/architecture.md allows {part} to import {', '.join(unused)}, which it does not import"
    )


def test_nothing_in_gpumon_core_imports_streamlit() -> None:
    found = [
        name_of(path)
        for path in files()
        if (ROOT / "gpumon_core") in path.parents
        and any(module.split(".")[0] == "streamlit" for module in imported_modules(path.read_text()))
    ]
    assert not found


def test_telemetry_and_the_store_do_not_know_each_other() -> None:
    both = {(part_of(one.source), one.target) for one in imports()}
    assert not [target for part, target in both if part == "telemetry/" and target.startswith("store/")]
    from_telemetry = {target for part, target in both if part == "store/" and target.startswith("telemetry/")}
    # Plain records, and the arithmetic of an energy counter: neither asks the driver.
    assert from_telemetry <= {"telemetry/records.py", "telemetry/energy.py"}
    assert not [target for part, target in both if part == "store/queries/" and target.startswith("telemetry/")]


def test_recording_needs_nothing_that_shows() -> None:
    wrong = [
        one for one in imports() if one.source.startswith("recording/") and one.target.startswith(ABOVE_RECORDING)
    ]
    assert not wrong, f"what records must not need what shows: {wrong}"


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not() -> None:
    code = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import b\n"
        "def f():\n    if x:\n        from c.d import e\n    import g.h\nfrom . import i\nfrom ..j import k\n"
    )
    assert list(imported_modules(code, "p.q"))[1:] == ["c.d.e", "g.h", "p.q.i", "p.j.k"]


def public_types(code: str) -> Iterator[str]:
    """The public classes and aliases of types that code defines at its top."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if name[0].isupper() and not name.isupper())


def test_two_things_never_share_a_name() -> None:
    modules: dict[str, list[str]] = {}
    for path in files():
        for name in public_types(path.read_text()):
            modules.setdefault(name, []).append(name_of(path))
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}
