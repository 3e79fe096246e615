"""What is imported is declared, and what is declared is locked, by version and hash, with all that it needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gpumon_core

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RENEW = 'see "Packages" in CONTRIBUTING.md'
RUNTIME = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
DEV = [Requirement(text) for text in PROJECT["dependency-groups"]["dev"]]
# Each lock with the declarations that it is made of.
LOCKS = {"requirements.txt": RUNTIME, "requirements-dev.txt": RUNTIME + DEV}
EACH_LOCK = pytest.mark.parametrize("lock", LOCKS)


# ---- What is declared --------------------------------------------------------------------------------


def undeclared(root: Path, files: Iterable[str], declared: Iterable[Requirement]) -> list[str]:
    """The imports of these files, as `file: module`, that no declared package provides."""
    known = {canonicalize_name(requirement.name) for requirement in declared}
    providers = metadata.packages_distributions()
    ours = {part for name in files for part in (Path(name).stem, *Path(name).parent.parts)}
    found = []
    for name in files:
        for module in imported((root / name).read_text()):
            top = module.partition(".")[0]
            if top in sys.stdlib_module_names or top in ours:
                continue
            # Several distributions may share a namespace, such as `ruamel`; one of them is enough.
            if not known & {canonicalize_name(one) for one in providers.get(top, [top])}:
                found.append(f"{name}: {module}")
    return sorted(set(found))


def imported(source: str) -> list[str]:
    """The modules that a file imports anywhere in it, by statement or by a call with their name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "importorskip", "__import__"):
                found.append(str(node.args[0].value))
    return found


def tracked(*folders: str) -> list[str]:
    """The Python files of these folders, by their paths."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if name.endswith(".py") and (ROOT / name).is_file()]


def test_every_package_that_gpumon_imports_is_declared() -> None:
    files = tracked("gpumon_core", "pages", "app.py", "deploy")
    assert len(files) > 100
    assert undeclared(ROOT, files, RUNTIME) == []


def test_gpumon_imports_every_package_that_it_declares() -> None:
    providers = metadata.packages_distributions()
    files = tracked("gpumon_core", "pages", "app.py", "deploy")
    modules = {module.partition(".")[0] for name in files for module in imported((ROOT / name).read_text())}
    # Streamlit imports Plotly when a page draws a chart, and does not bring it.
    used = {"plotly", *(canonicalize_name(one) for module in modules for one in providers.get(module, ()))}
    assert {canonicalize_name(requirement.name) for requirement in RUNTIME} <= used


def test_every_package_that_the_checks_import_is_declared() -> None:
    files = tracked()
    assert len(files) > 200
    assert undeclared(ROOT, files, RUNTIME + DEV) == []


@pytest.mark.parametrize(
    "line",
    [
        "import requests",
        "from ruamel.yaml import YAML",
        "def late():\n    import anyio.abc",
        "if TYPE_CHECKING:\n    from altair import Chart",
        "import_module('websockets.sync.client')",
        "pytest.importorskip('werkzeug')",
    ],
)
def test_an_import_that_nobody_declared_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "new.py").write_text(f"import sys\nimport sqlalchemy as sa\n{line}\n")
    [found] = undeclared(tmp_path, ["new.py"], [Requirement("sqlalchemy==1")])
    assert found.startswith("new.py: ")


@pytest.mark.parametrize("requirement", RUNTIME + DEV, ids=lambda one: one.name)
def test_a_declaration_names_one_version(requirement: Requirement) -> None:
    [only] = requirement.specifier
    assert only.operator == "=="
    assert "*" not in only.version
    assert requirement.url is None


def test_nothing_is_declared_twice() -> None:
    names = [canonicalize_name(requirement.name) for requirement in RUNTIME + DEV]
    assert len(names) == len(set(names))


def test_the_project_has_the_version_that_the_program_says() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gpumon_core.__version__"}
    # setuptools reads it without running anything, so it has to be a plain text there.
    assert f'__version__ = "{gpumon_core.__version__}"\n' in Path(gpumon_core.__file__).read_text()


# ---- What is locked ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Locked:
    """One package of a lock."""

    version: str
    marker: Marker | None
    hashes: frozenset[str]


def locked(text: str) -> dict[str, Locked]:
    """The packages of a lock by name. AssertionError where a line is anything but a version with its hashes."""
    found = {}
    plain = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    for entry in plain.replace("\\\n", " ").splitlines():
        whole = re.fullmatch(
            r"(?P<name>[\w.-]+)==(?P<version>[\w.+!-]+)(?: ; (?P<marker>[^#]+?))?"
            r"(?P<hashes>(?: +--hash=sha256:[0-9a-f]{64})+)",
            entry,
        )
        assert whole, f"{entry[:100]} is not a version with its hashes; {RENEW}"
        name = canonicalize_name(whole["name"])
        assert name not in found, f"{name} is locked twice"
        marker = Marker(whole["marker"]) if whole["marker"] else None
        found[name] = Locked(whole["version"], marker, frozenset(whole["hashes"].split()))
    return found


def needed(declared: Iterable[Requirement]) -> set[str]:
    """What these packages and all that they need are called, on this machine and in the installed versions."""
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, "") for requirement in declared]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), wanted)
            if key not in seen:
                seen.add(key)
                todo += [(Requirement(text), wanted) for text in metadata.requires(requirement.name) or ()]
    return {name for name, _ in seen}


def apart(declared: list[Requirement], lock: dict[str, Locked]) -> list[str]:
    """Where a lock and its declarations part, one sentence each."""
    found = []
    for requirement in declared:
        one = lock.get(canonicalize_name(requirement.name))
        if one is None or not requirement.specifier.contains(one.version, prereleases=True):
            found.append(f"{requirement} is declared, and {one.version if one else 'nothing'} is locked")
    here = {name for name, one in lock.items() if one.marker is None or one.marker.evaluate()}
    wanted = needed(declared)
    found += [f"{name} is needed and not locked" for name in sorted(wanted - here)]
    found += [f"{name} is locked and nothing needs it" for name in sorted(here - wanted)]
    return found


@EACH_LOCK
def test_the_lock_is_what_the_declarations_take(lock: str) -> None:
    assert apart(LOCKS[lock], locked((ROOT / lock).read_text())) == [], RENEW


@EACH_LOCK
def test_what_is_installed_is_what_is_locked(lock: str) -> None:
    for name, one in locked((ROOT / lock).read_text()).items():
        if one.marker is None or one.marker.evaluate():
            assert metadata.version(name) == one.version, f"{name}: run ./setup.sh test"


def test_the_checks_run_on_the_packages_that_gpumon_runs_on() -> None:
    dev = locked((ROOT / "requirements-dev.txt").read_text())
    for name, one in locked((ROOT / "requirements.txt").read_text()).items():
        assert dev[name] == one, f"{name}: {RENEW}"


def test_a_lock_that_parts_from_the_declarations_is_found() -> None:
    lock = locked((ROOT / "requirements.txt").read_text())
    # What alembic needs, and nothing here names.
    without = {name: one for name, one in lock.items() if name != "mako"}
    assert apart(RUNTIME, without) == ["mako is needed and not locked"]
    assert apart([*RUNTIME, Requirement("hypothesis==6.170.17")], lock)[0].endswith("and nothing is locked")
    newer = [Requirement("numpy==99") if one.name == "numpy" else one for one in RUNTIME]
    assert apart(newer, lock) == [f"numpy==99 is declared, and {lock['numpy'].version} is locked"]
    assert "plotly is locked and nothing needs it" in apart([one for one in RUNTIME if one.name != "plotly"], lock)


@pytest.mark.parametrize(
    "line",
    [
        "six==1.17.0",
        "six>=1.17.0 --hash=sha256:" + "0" * 64,
        "six==1.17.0 --hash=md5:" + "0" * 32,
        "six @ https://example.org/six.whl --hash=sha256:" + "0" * 64,
        "--index-url https://example.org/simple",
        "-r other.txt",
    ],
)
def test_a_lock_names_versions_and_hashes_and_nothing_else(line: str) -> None:
    with pytest.raises(AssertionError):
        locked(f"# comment\n{line}\n")


@pytest.mark.parametrize("place", ["setup.sh", "Dockerfile", "docs/deployment.md"])
def test_every_place_that_installs_a_lock_asks_for_its_hashes(place: str) -> None:
    text = re.sub(r"\\\n\s*", " ", (ROOT / place).read_text())
    installs = re.findall(r"""^.* "?-r"?,? .*(?:requirements\.txt|\$1).*$""", text, re.MULTILINE)
    assert installs
    assert all("--require-hashes" in line for line in installs)
