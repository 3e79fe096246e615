"""What a link asks for that does not exist, or no longer. The page says so until the reader chooses something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import streamlit as st

from gpumon_core import format as fmt

# How many values of a filter the page names, and how many characters of each.
MOST_NAMED, LONGEST = 3, 60


@dataclass(frozen=True, slots=True)
class NotFound:
    """The values of one filter that do not exist, and what is shown instead."""

    what: str
    values: tuple[str, ...]
    instead: str


def arrive(page: str) -> None:
    """A page begins: what a link asked of another page is over."""
    if st.session_state.get("links_page") != page:
        st.session_state["links_page"] = page
        forget()


def check(key: str, what: str, known: Callable[[str], bool], instead: str) -> None:
    """Note which values of `key` in the address are not known. To be called before the filter is drawn: that drops
    them from the address. `instead` says what is shown where none is known."""
    asked = [value for value in st.query_params.get_all(key) if value]
    unknown = tuple(value for value in asked if not known(value))
    if unknown:
        rest = ", ".join(value for value in asked if known(value))
        st.session_state.setdefault("links_not_found", {})[key] = NotFound(what, unknown, rest or instead)


def forget() -> None:
    """The reader has chosen something: what the link asked for no longer matters."""
    st.session_state["links_not_found"] = {}


def show() -> None:
    """One sentence about what was not found. Its place stays when it goes, so that nothing below is built anew."""
    with st.container():
        not_found: dict[str, NotFound] = st.session_state.get("links_not_found", {})
        if not_found:
            st.warning(_sentence(list(not_found.values())), icon=":material/link_off:")


def _sentence(not_found: list[NotFound]) -> str:
    asked = ", ".join(f"{one.what} {_named(one.values)}" for one in not_found)
    instead = ", ".join(_short(one.instead) for one in not_found)
    return f"This link asks for something that does not exist, or no longer: {asked}. Shown instead: {instead}."


def _named(values: tuple[str, ...]) -> str:
    more = len(values) - MOST_NAMED
    named = ", ".join(f"“{_short(value)}”" for value in values[:MOST_NAMED])
    return named + (f" and {more} more" if more > 0 else "")


def _short(text: str) -> str:
    """Text from an address, made safe for a sentence."""
    return fmt.plain(fmt.printable(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"))
