"""The filters in the sidebar. The address has every choice, so that a link shows the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import pandas as pd
import streamlit as st

from gpumon_core import figures
from gpumon_core.store.queries import processes
from gpumon_core.store.queries.frames import gpu_labels
from pages.components import chrome, data, links, plot

MINUTE, HOUR, DAY = 60, 3600, 86400
RANGES = {
    "15m": 15 * MINUTE,
    "30m": 30 * MINUTE,
    "1h": HOUR,
    "6h": 6 * HOUR,
    "12h": 12 * HOUR,
    "24h": DAY,
    "3d": 3 * DAY,
    "7d": 7 * DAY,
    "30d": 30 * DAY,
    "1y": 365 * DAY,
}
CUSTOM = "Custom"
ALL = "All"
# The shortest time to which a chart can be zoomed.
SHORTEST_S = MINUTE
# The format of a beginning and an end in an address.
MOMENT = "%Y-%m-%dT%H:%M"
# The number of zooms that a reader can undo.
MOST_ZOOMS = 20


@dataclass(frozen=True, slots=True)
class Window:
    """A time range: the last `length_s` seconds before the newest sample, or from `start` to `end` (UTC
    seconds); all of it where neither is given."""

    name: str
    length_s: int | None = None
    start: int | None = None
    end: int | None = None

    @property
    def follows(self) -> bool:
        """Whether its end moves with every sample."""
        return self.end is None

    def span(self, newest: int) -> tuple[int, int]:
        """From when to when it is, in UTC seconds."""
        if self.start is not None and self.end is not None:
            return self.start, self.end
        return (0 if self.length_s is None else newest - self.length_s), newest

    def says(self) -> str:
        """In words, for charts that are read aloud."""
        if self.name == ALL:
            return "all of its history"
        return "the chosen time" if self.name == CUSTOM else f"the last {self.name}"


def window(names: Sequence[str], default: str, newest: int, label: str = "Time range") -> Window:
    """The chosen time range: one of `names` of RANGES (or ALL), or a stretch with a beginning and an end."""
    zone = chrome.zone()
    state = st.session_state
    _read_range((*names, CUSTOM))
    if state.get("range", default) not in (*names, CUSTOM):
        # A range of another page, which this page does not have.
        del state["range"]
    links.check("range", "time range", (*names, CUSTOM).__contains__, default)
    # After a zoom the choice is set already: Streamlit then wants no default.
    chosen = st.sidebar.pills(
        label,
        [*names, CUSTOM],
        default=None if "range" in st.session_state else default,
        key="range",
        bind="query-params",
        required=True,
        on_change=links.forget,
    )
    if chosen != CUSTOM:
        # A choice of the reader's own ends the zooms.
        state.pop("zoomed_from", None)
        name = chosen if chosen is not None and chosen in names else default
        return Window(name, RANGES.get(name))
    latest = datetime.fromtimestamp(newest, zone).replace(tzinfo=None, second=0, microsecond=0)
    minute = timedelta(minutes=1)
    latest += minute
    ends = (("From", latest - timedelta(hours=1), "from"), ("To", latest, "to"))
    address = st.query_params
    # A link to this page, and the way back to it, must show the same range.
    unsaid = {key: value.strftime(MOMENT) for _, value, key in ends if key not in address and key not in state}
    if unsaid:
        address.update(unsaid)
    for name, value, key in ends:
        links.check(key, f"“{name}”", _is_moment, f"{value:%d %b %H:%M}")
    since, until = (  # A zoom has set the value already.
        st.sidebar.datetime_input(
            name,
            key=key,
            step=minute,
            required=True,
            bind="query-params",
            value="now" if key in st.session_state else value,
            on_change=links.forget,
        )
        for name, value, key in ends
    )
    start, end = (figures.from_wall_clock(str(moment or latest), zone) for moment in (since, until))
    if end <= start:
        st.sidebar.error("“To” must be later than “From”.", icon=":material/error:")
        end = start + SHORTEST_S
    return Window(CUSTOM, None, start, end)


def _read_range(names: Sequence[str]) -> None:
    """Read the address of a link generously: a range in any case, and a beginning or an end without a range as a
    custom range."""
    address = st.query_params
    if "range" in st.session_state:
        # Read already: now the reader chooses.
        return
    asked = address.get("range") or (CUSTOM if "from" in address or "to" in address else "")
    meant = {name.lower(): name for name in names}.get(asked.lower())
    if meant is not None and meant != address.get("range"):
        address["range"] = meant
        # This run has used the old address.
        st.rerun()


def _is_moment(text: str) -> bool:
    try:
        time.strptime(text, MOMENT)
    except ValueError:
        return False
    return True


def zoom(key: str) -> None:
    """Show the time range that the reader has chosen in a chart, or the range before it."""
    state = st.session_state
    chosen = plot.zoomed(key)
    before: list[tuple[object, ...]] = state.setdefault("zoomed_from", [])
    has_inputs = state.get("range") == CUSTOM
    if chosen is None:
        if not before:
            return
        state["range"], state["from"], state["to"] = before.pop()
    else:
        before.append((state.get("range"), state.get("from"), state.get("to")))
        del before[:-MOST_ZOOMS]
        since, until = (pd.Timestamp(text).to_pydatetime().replace(tzinfo=None) for text in chosen)
        since = since.replace(second=0, microsecond=0)
        until = max(until.replace(second=0, microsecond=0), since) + timedelta(minutes=1)
        state["range"], state["from"], state["to"] = CUSTOM, since, until
    for name in ("from", "to"):
        if state.get(name) is None:
            state.pop(name, None)
        elif not has_inputs:
            # An input that is not on the page yet writes its address only when a reader changes it.
            st.query_params[name] = state[name].isoformat(timespec="minutes")
    state["moved"] = True
    links.forget()


def follow_zoom() -> None:
    """Within a fragment: run the page again after `zoom`, because the sidebar has changed, too."""
    if st.session_state.pop("moved", False):
        st.rerun()


def named_gpus(gpus: pd.DataFrame) -> dict[str, int]:
    """Every GPU's short name ("GPU 0", "GPU 0:1", "rack1 GPU 0" where there are several hosts) and id. Of several
    GPUs that used one slot one after the other, the newest has the name, and the others have their id after it."""
    names = "GPU " + gpu_labels(gpus["gpu_index"], gpus["mig_index"])
    if gpus["host"].nunique() > 1:
        names = gpus["host"] + " " + names
    ids = gpus["id"].astype(int)
    newest = ids.groupby(names).transform("max") == ids
    names = names.where(newest, names + " #" + ids.astype(str))
    return dict(zip(names, ids, strict=True))


def gpu_filter(gpus: pd.DataFrame) -> list[str]:
    """The names of the chosen GPUs; none chosen means all of them."""
    return choices("GPUs", list(named_gpus(gpus)), "gpu")


def user_filter(at: data.Tick) -> list[str]:
    """The chosen users; none chosen means all of them."""
    return choices("Users", data.ask(at, processes.usernames), "user")


def choices(label: str, options: Sequence[str], key: str) -> list[str]:
    """Some of `options`; none chosen means all of them."""
    label_within = label if label == "GPUs" else label.lower()
    links.check(key, label_within.removesuffix("s"), options.__contains__, f"all {label_within}")
    return st.sidebar.multiselect(
        label,
        list(options),
        placeholder=f"All {label_within}",
        key=key,
        bind="query-params",
        on_change=links.forget,
    )


def program_filters(at: data.Tick, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The chosen values for each of some columns of `programs`; a column without a choice is missing."""
    chosen = {
        name: choices(f"{name.capitalize()}s", data.ask(at, processes.program_values, name), name)
        for name in names
    }
    return {name: tuple(values) for name, values in chosen.items() if values}
