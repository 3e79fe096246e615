"""What a link asks for that is not there, or not any more. It is told until the reader chooses something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import streamlit as st

from gpumon_core import format as fmt

# Of what a link asks for, so many values are named for each filter, and so many characters of each.
MOST_NAMED, LONGEST = 3, 60


@dataclass(frozen=True, slots=True)
class Missed:
    """The values of one filter that are not there, and what is shown instead."""

    what: str
    values: tuple[str, ...]
    instead: str


def arrive(page: str) -> None:
    """A page begins: what a link asked of another one is past."""
    if st.session_state.get("links_page") != page:
        st.session_state["links_page"] = page
        forget()


def check(key: str, what: str, known: Callable[[str], bool], instead: str) -> None:
    """Before a filter is drawn, which drops from the address what it does not know: note which values of `key`
    these are. `instead` says what is shown where none is known."""
    asked = [value for value in st.query_params.get_all(key) if value]
    unknown = tuple(value for value in asked if not known(value))
    if unknown:
        rest = ", ".join(value for value in asked if known(value))
        st.session_state.setdefault("links_missed", {})[key] = Missed(what, unknown, rest or instead)


def forget() -> None:
    """The reader has chosen something: what the link asked for does not matter any more."""
    st.session_state["links_missed"] = {}


def show() -> None:
    """One sentence about what was not there. Its place is kept when it goes: nothing below is built anew."""
    with st.container():
        missed: dict[str, Missed] = st.session_state.get("links_missed", {})
        if missed:
            st.warning(_sentence(list(missed.values())), icon=":material/link_off:")


def _sentence(missed: list[Missed]) -> str:
    asked = ", ".join(f"{one.what} {_named(one.values)}" for one in missed)
    instead = ", ".join(_short(one.instead) for one in missed)
    return f"This link asks for what is not here, or not any more: {asked}. Shown instead: {instead}."


def _named(values: tuple[str, ...]) -> str:
    more = len(values) - MOST_NAMED
    named = ", ".join(f"“{_short(value)}”" for value in values[:MOST_NAMED])
    return named + (f" and {more} more" if more > 0 else "")


def _short(text: str) -> str:
    """Text from an address, made safe to stand in a sentence."""
    return fmt.plain(fmt.printable(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"))
