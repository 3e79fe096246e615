"""Text from outside is never Markdown: it is seen as it was typed, whatever a page makes of text around it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, eventually
from playwright.sync_api import Error, Page, expect
from rig import free_port

# What Streamlit's renderer knows: CommonMark, GitHub's extensions, directives, emoji, icons, formulas, arrows.
MARKUP = (
    *("https://evil.example/a_b_c", "HTTP://evil.example", "www.evil.example", "see WWW.evil.example/x"),
    *("(https://evil.example)", "**https://evil.example**", "ftp://evil.example", "//evil.example"),
    *("mailto:eve@evil.example", "eve@evil.example", "a.b-c_d+e@evil.example", "xmpp:eve@evil.example/x"),
    *("<https://evil.example>", "<eve@evil.example>", "[a](https://evil.example)", "[a]: https://evil.example"),
    *(
        "![a](https://evil.example/a.png)",
        "[![a](x)](https://evil.example)",
        "[a][b]",
        "[^1]",
        "[^1]: https://a.bc",
    ),
    *("<img src=x onerror=window.owned=1>", "<script>window.owned=1</script>", "<!-- gone -->", "&lt;b&gt; &#65;"),
    *(":smile:", "a:+1:b", ":-1:", "12:100:05", ":material/delete:", ":streamlit:", "x :material_delete: y"),
    *(
        ":red[a]",
        ":blue-background[a]",
        ":green-badge[a]",
        ":small[a]",
        ":help[a]",
        ":shimmer[a]",
        "::a[b]",
        ":::a",
    ),
    *(
        ":color[a]{foreground=red}",
        ":color[a",
        "a]b{c}",
        "$x^2$",
        "$$x$$",
        r"\(x\)",
        r"\[x\]",
        r"a\*b\\c",
        r"\:smile\:",
    ),
    *(
        "`a`",
        "```a",
        "~~~a",
        "~a~",
        "~~a~~",
        "*a*",
        "**a**",
        "_a_",
        "__a__",
        "***",
        "---",
        "___",
        "- a",
        "+ a",
        "* a",
    ),
    *("1. a", "2) a", "# a", "> a", "- [x] a", "|a|b|", "==a==", "a^b^", "a -> b", "a <- b", "a <-> b", "a -- b"),
    *(
        "--",
        "->",
        "a >= b",
        "a <= b",
        "a ~= b",
        "https:// -- www. @ :x",
        "a::b:-- c:",
        "train.py --lr=1e-4 @host:0",
    ),
)

SHOWN = """
import json, sys
import streamlit as st
sys.path.insert(0, {root!r})
from gpumon_core import format as fmt
for place, text in enumerate(json.load(open({file!r}))):
    with st.container(key=f"text{{place}}"):
        st.markdown(fmt.plain(text))
        st.warning(f"“{{fmt.plain(text)}}”")
        st.caption("of " + fmt.plain(text) + ".")
        st.subheader(fmt.plain(text), anchor=False)
        st.metric(fmt.plain(text), fmt.plain(text))
"""


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[str]:
    """The address of a page that shows MARKUP in all the ways that gpumon's pages do."""
    file, script, port = tmp_path / "texts.json", tmp_path / "shown.py", free_port()
    file.write_text(json.dumps(MARKUP))
    script.write_text(SHOWN.format(root=str(ROOT), file=str(file)))
    with subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", str(script), "--server.port", str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        yield f"http://127.0.0.1:{port}"
        process.kill()


def come(page: Page, address: str) -> None:
    """Open a page as soon as its server answers."""

    def answers() -> bool:
        try:
            return page.goto(address) is not None
        except Error:
            return False

    eventually(answers)


def test_every_text_is_seen_as_it_was_typed(page: Page, shown: str) -> None:
    come(page, shown)
    expect(page.locator(f".st-key-text{len(MARKUP) - 1} [data-testid=stMetricValue]")).to_be_visible()
    expect(page.get_by_test_id("stSkeleton")).to_have_count(0)
    wrong = []
    for place, text in enumerate(MARKUP):
        box = page.locator(f".st-key-text{place}")
        seen = [part.inner_text().strip() for part in box.get_by_test_id("stMarkdownContainer").all()]
        seen += [box.get_by_test_id("stCaptionContainer").inner_text().strip()]
        # In the order in which they stand: Markdown, warning, heading, label and value; then the caption.
        if seen != [text, f"“{text}”", text, text, text, f"of {text}."]:
            wrong.append((text, seen))
    assert wrong == []
    main = page.get_by_test_id("stMain")
    for made in ("a", "img", "script", "code", "em", "strong", "del", "li", "hr", "table", ".katex", "input"):
        assert main.locator(made).count() == 0, made
    assert page.evaluate("window.owned") is None


# What makes Markdown of its texts, and what these may have in them that is not escaped: numbers, the program's own
# words, and the viewer's time zone, which is one of a list.
MARKDOWN = ("markdown", "caption", "info", "warning", "error", "success", "title", "header", "subheader", "metric")
MARKDOWN += ("toast", "expander", "button", "download_button", "popover", "tabs", "badge", "write", "toggle")
OWN = {"chrome.zone_label()", "hanging", "remedy", "found.lost", "reference", "unread", "len(found)"}
OWN |= {"shown", "grown", "counted", "state.capitalize()", "_moment(held.first)", "_moment(held.last)"}


def interpolated(call: ast.Call) -> Iterator[ast.FormattedValue]:
    """What is put into the texts that a call is given."""
    for argument in (*call.args, *(one.value for one in call.keywords if one.arg != "file_name")):
        for part in ast.walk(argument):
            if isinstance(part, ast.FormattedValue):
                yield part


@pytest.mark.parametrize("path", [*ROOT.glob("pages/**/*.py"), ROOT / "app.py"], ids=lambda path: path.stem)
def test_whatever_is_put_into_markdown_is_escaped_or_a_number(path: Path) -> None:
    wrong = []
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in MARKDOWN:
            for part in interpolated(call):
                text = ast.unparse(part.value)
                if not (text.startswith("fmt.") or part.format_spec is not None or text in OWN):
                    wrong.append((part.lineno, text))
    assert wrong == []
