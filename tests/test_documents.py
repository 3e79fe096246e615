"""What all documents have in common: links lead somewhere, pictures are shown, quoted words are the program's."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gpumon_core

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EACH_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()


def prose(document: Path) -> str:
    """A document without its code."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("](", "] ("), text)


def targets(document: Path) -> list[str]:
    """What a document links to or shows, here and not on the web."""
    text = prose(document)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(document: Path) -> set[str]:
    """The headings of a document as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")) for heading in headings)
    return {text.strip().replace(" ", "-") for text in plain}


def broken(document: Path) -> list[str]:
    """The targets that lead nowhere."""
    found = []
    for target in targets(document):
        name, _, anchor = target.partition("#")
        place = (document.parent / name).resolve() if name else document
        if not place.exists() or (anchor and anchor not in anchors(place)):
            found.append(target)
    return found


@EACH_DOCUMENT
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_a_link_to_nothing_and_an_anchor_without_a_heading_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two` (3)\n[a](#one-two-3) [b](#three) [c](missing.md) ![d](d.png) `[e](e.md)` [f](https://f)"
    )
    assert broken(page) == ["#three", "missing.md", "d.png"]


def test_every_document_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        document = todo.pop()
        seen.add(document)
        for target in targets(document):
            place = (document.parent / target.partition("#")[0]).resolve()
            if place.suffix == ".md" and place.is_file() and place not in seen:
                todo.append(place)
    assert set(DOCUMENTS) <= seen


def test_every_picture_is_shown() -> None:
    pictures = {path for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".svg")}
    shown = {
        (document.parent / target).resolve()
        for document in DOCUMENTS
        for target in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", document.read_text())
    }
    assert shown == pictures


def test_the_script_makes_every_picture_that_is_not_drawn_by_hand() -> None:
    pytest.importorskip("playwright")
    import screenshots

    assert {path.name for path in (ROOT / "docs").glob("*.png")} == set(screenshots.PICTURES)
    done = subprocess.run(
        [sys.executable, "docs/screenshots.py", "nothing.png"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("screenshots.py: nothing.png is none of the pictures: overview.png, ")


@EACH_DOCUMENT
def test_every_file_and_command_it_names_exists(document: Path) -> None:
    text = document.read_text()
    for name in re.findall(r"(?<![\w/.])(?:gpumon_core|pages|docs|tests|deploy|benchmarks)/[\w./-]*[\w/]", text):
        # Other documents are linked to, and tested as links.
        assert name.endswith(".md") or (ROOT / name).exists(), name
    from gpumon_core.__main__ import VERBS

    for verb in re.findall(r"(?:python -m gpumon_core|\./gpumon|exec gpumon gpumon) (?!VERB)(\w+)", text):
        assert verb in VERBS
    help_text = (ROOT / "setup.sh").read_text()
    for verb in re.findall(r"\./setup\.sh (?!VERB)([a-z]+)", text):
        assert re.search(rf"^  {verb} ", help_text, re.MULTILINE), verb


@EACH_DOCUMENT
def test_every_setting_it_names_exists(document: Path) -> None:
    from gpumon_core.settings import Settings, variable

    known = {variable(name) for name in Settings.model_fields}
    named = set(re.findall(r"GPUMON_[A-Z_]*[A-Z]", document.read_text()))
    assert {
        name for name in named if name not in known and not any(one.startswith(name) for one in known)
    } == set()


# -- the program's own words


# What a quote leaves out, and the words of SQLite and of the system.
NOT_OURS = re.compile(r"\.\.\.|database is locked|database or disk is full|Address already in use")


def program_texts() -> str:
    """All texts of the program: strings of Python with values as a gap, setup.sh, and the pages' own scripts."""
    # Two pieces of one text that stand below each other.
    found = [re.sub(r'"\n\s*f?"', "", (ROOT / "setup.sh").read_text())]
    sources = [ROOT / "app.py", *(ROOT / "gpumon_core").rglob("*.py"), *(ROOT / "pages").rglob("*.py")]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(str(part) for part in parts))
    found += [path.read_text() for path in (ROOT / "pages" / "components").glob("*.js")]
    return "\n".join(found)


def test_what_troubleshooting_quotes_is_what_the_program_says() -> None:
    said = program_texts()
    quoted = re.findall(r"“([^”]*)”", " ".join(TROUBLESHOOTING.split()))
    assert len(quoted) > 25
    for quote in quoted:
        for piece in NOT_OURS.split(quote):
            assert piece.strip(" ():;?") in said, quote


SYMPTOMS = (
    *(
        "Simulated GPUs",
        "PIDs without names",
        "permission denied",
        "stand still",
        "port is taken",
        "locked",
        "full",
    ),
    *("damaged", "newer gpumon", "lost or hung", "memory of processes", "no fan, power", "is recording into"),
    *("Times look wrong", "403", "gaps", "no effect"),
)


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_troubleshooting_knows_the_symptom(symptom: str) -> None:
    assert any(symptom in bold for bold in re.findall(r"\*\*([^*]+)\*\*", TROUBLESHOOTING))


# -- the changelog, and what the recorder loads


def test_the_changelog_knows_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == "Unreleased"
    assert gpumon_core.__version__ in versions


def test_the_recorder_alone_loads_no_library_of_the_pages() -> None:
    code = (
        "import sys; import gpumon_core.recording.recorder, "
        "gpumon_core.telemetry.nvml, gpumon_core.attribution.local; "
        + ("print(sorted({'pandas', 'numpy', 'plotly', 'pyarrow', 'streamlit', 'alembic'} & set(sys.modules)))")
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_line_length_that_contributing_names_is_that_of_the_tools() -> None:
    length = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["line-length"]
    assert f"Lines of {length} characters" in (ROOT / "CONTRIBUTING.md").read_text()
