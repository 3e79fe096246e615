"""Every process that was seen on a GPU, and the story of each."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pandas as pd
import streamlit as st

from gpumon_core import format as fmt
from gpumon_core.recording.health import Health
from gpumon_core.store.queries import frames, processes
from gpumon_core.store.queries.process_filter import ProcessFilter, Wording
from pages.components import chrome, data, download, filters, links, story, tables

# A table of more rows than FEW is this many pixels high; a shorter one takes what it needs.
FEW, TALL = 10, 560
# The most rows that the page shows; a download has all.
MOST = 5000
RANGES = [*filters.RANGES, filters.ALL]
KINDS = {"Compute": "C", "Graphics": "G", "MPS": "M"}
LIFETIMES = {"Any": None, "1 minute": 60, "10 minutes": 600, "1 hour": 3600, "1 day": 86400}
STATES = ("running", "ended")
REFRESH_S = 10.0
# As large as the database's numbers are.
PROCESS_ID = re.compile(r"[0-9]{1,9}")


def _read_address(at: data.Tick) -> None:
    """Choose the process that the address names. A run of the page follows the address: a link or the way back has
    caused it. A refresh does not: the browser may send it before it knows of a row that was just chosen."""

    def known(text: str) -> bool:
        if not PROCESS_ID.fullmatch(text):
            return False
        return not data.ask(at, processes.process_history, ProcessFilter(process_ids=(int(text),))).empty

    links.check("process", "process", known, "the list alone")
    text = st.query_params.get("process", "")
    process_id = int(text) if known(text) else None
    if process_id != st.session_state.get("process"):
        # Forget the row that was chosen before, and its filters.
        for name in ("shown_of", "shown_ids"):
            st.session_state.pop(name, None)
        st.session_state["mark_anew"] = True
    _open(process_id)


def _open(process_id: int | None) -> None:
    """Choose a process, here and in the address."""
    st.session_state["process"] = process_id
    address = st.query_params
    if process_id is None:
        address.pop("process", None)
    elif address.get("process") != str(process_id):
        address["process"] = str(process_id)


found = chrome.ready()
if found is not None and found.latest is not None:
    at = data.minute(found)
    text = st.sidebar.text_input(
        "Name, command or PID",
        placeholder="train.py or 4711",
        key="q",
        bind="query-params",
        live=True,
        type="search",
        on_change=links.forget,
    )
    window = filters.window(RANGES, "24h", found.latest, "Seen within")
    gpus = data.ask(data.tick(found), frames.gpu_table)
    chosen_gpus = filters.gpu_filter(gpus)
    users = filters.user_filter(at)
    containers = filters.choices("Containers", data.ask(at, processes.containers), "container")
    programs_with = filters.program_filters(at, ("workload", "model"))
    kinds = filters.choices("Types", list(KINDS), "type")
    states = filters.choices("States", STATES, "state")
    least_gib = st.sidebar.number_input(
        "Held at least (GiB)",
        min_value=0.0,
        max_value=4096.0,
        step=1.0,
        key="memory",
        bind="query-params",
        on_change=links.forget,
    )
    links.check("lifetime", "lifetime", LIFETIMES.__contains__, "any lifetime")
    lived = st.sidebar.selectbox(
        "Lived at least", list(LIFETIMES), key="lifetime", bind="query-params", on_change=links.forget
    )
    links.check("columns", "column", tables.ON_DEMAND.__contains__, "the usual columns")
    more = st.sidebar.multiselect(
        "More columns",
        tables.ON_DEMAND,
        placeholder="None",
        key="columns",
        bind="query-params",
        on_change=links.forget,
    )
    _read_address(data.tick(found))
zone = chrome.zone()


def wanted(newest: int) -> ProcessFilter:
    """The filter that the sidebar shows."""
    ids = filters.named_gpus(gpus)
    start, end = window.span(newest)
    return ProcessFilter(
        start=None if window.name == filters.ALL else start,
        end=None if window.follows else end,
        gpu_ids=tuple(ids[name] for name in chosen_gpus if name in ids),
        users=tuple(users),
        containers=tuple(containers),
        programs_with=tuple(programs_with.items()),
        kinds=tuple(KINDS[name] for name in kinds),  # type: ignore[misc]
        states=tuple(states),  # type: ignore[arg-type]
        min_memory_mib=round(least_gib * fmt.MIB_PER_GIB) or None,
        min_lifetime_s=LIFETIMES.get(lived or "Any"),
        text=text,
    )


def body(now: Health) -> None:
    """The table, and the story of the chosen row."""
    assert now.latest is not None
    # The same filter for REFRESH_S, so that its result is cached.
    chosen = wanted(now.latest - now.latest % int(REFRESH_S))
    _follow_filters(data.tick(now), chosen)
    total = data.ask(data.tick(now), processes.count, chosen)
    st.markdown(f"**{total:,}** processes, newest first", width="content")
    if total == 0:
        names = {gpu_id: name for name, gpu_id in filters.named_gpus(gpus).items()}
        asked = chosen.describe(Wording(zone, names)) or "all time"
        st.info(
            f"No process matches these filters: {fmt.plain(asked)}. Choose a longer time range, or clear a filter "
            "in the sidebar."
        )
        if "rows_changed" in st.session_state:
            _open(None)
    else:
        table(now, chosen, total)
    process_id: int | None = st.session_state.get("process")
    if process_id is not None:
        with st.container(key="story"):
            story.show(data.tick(now), process_id)
    elif total:
        st.caption(f"Choose a row to see its story. Times in {chrome.zone_label()}.")


def table(now: Health, chosen: ProcessFilter, total: int) -> None:
    """The rows, with the chosen process marked, and their downloads."""
    frame = _rows(data.tick(now), chosen, total)
    ids = frame["process_id"].tolist()
    places = _keep_if_among(ids)
    edition = st.session_state.get("edition", 0)
    if total > len(frame):
        st.caption(f"The newest {len(frame):,} are shown; a download has all {total:,}.")
    tables.show(
        tables.ledger(frame, zone),
        "process_history",
        "Processes seen on the GPUs, newest first; choose a row for its story",
        height=TALL if len(frame) > FEW else "auto",
        order=tables.ledger_order(frame, more),
        asked=more,
        on_select=partial(_choose, edition),
        chosen_rows=places,
        largest_gib=_largest_gib(),
        edition=edition,
    )
    # Below: above the table its toolbar would lie on them.
    download.show("api/v1/processes/history", chosen.query(), zone)


def _rows(at: data.Tick, chosen: ProcessFilter, total: int) -> pd.DataFrame:
    """The rows of the table. They stay the same while one is chosen: a newer process would move them down."""
    state = st.session_state
    if state.get("process") is not None and "shown_ids" in state:
        shown = ProcessFilter(process_ids=tuple(state["shown_ids"]))
        return data.ask(at, processes.process_history, shown)
    # A few rows are found fastest by what they are, many by their times.
    frame = data.ask(at, processes.process_history, chosen, MOST if total > MOST else None)
    state["shown_ids"] = frame["process_id"].tolist()
    return frame


def _follow_filters(at: data.Tick, chosen: ProcessFilter) -> None:
    """Forget the rows when the filters have changed."""
    state = st.session_state
    meant = (at[0], replace(chosen, start=None) if window.follows else chosen, window.name)
    if state.setdefault("shown_of", meant) != meant:
        state["shown_of"] = meant
        state.pop("shown_ids", None)
        state["rows_changed"] = True


def _keep_if_among(ids: list[int]) -> list[int]:
    """The row of the chosen process. After a change of filters the mark moves to its new row; where it has none,
    it is no longer chosen."""
    state = st.session_state
    process_id = state.get("process")
    places = [place for place, shown in enumerate(ids) if shown == process_id]
    are_others, anew = state.pop("rows_changed", False), state.pop("mark_anew", False)
    if are_others and not places:
        _open(None)
    edition = state.get("edition", 0)
    table = state.get(f"process_history_{edition}")
    if (are_others or anew) and table is not None and table.selection.rows != places:
        # The browser marks a row by its number, and may report the mark of before once more until it has heard of
        # the new one. What it reports of a table of another edition does not count.
        state["edition"] = edition + 1
    return places


def _choose(edition: int) -> None:
    """Remember the process of the chosen row: its row may change."""
    if edition != st.session_state.get("edition", 0):
        return
    rows = st.session_state[f"process_history_{edition}"].selection.rows
    ids: list[int] = st.session_state.get("shown_ids", [])
    links.forget()
    _open(ids[rows[0]] if rows and rows[0] < len(ids) else None)


def _largest_gib() -> float:
    """The memory at which a bar is full, in GiB."""
    largest = pd.to_numeric(gpus["memory_total_mib"]).max()
    return 1.0 if pd.isna(largest) else float(largest) / fmt.MIB_PER_GIB


chrome.live("Processes", body, REFRESH_S)
