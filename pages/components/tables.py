"""The tables of the pages: their columns, and how a page shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal
from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow as pa
import streamlit as st
from pyarrow import compute

from gpumon_core import format as fmt
from gpumon_core.format import JOULES_PER_KWH, MIB_PER_GIB, MISSING, sortable_duration
from gpumon_core.store.queries.current import NamedRow
from gpumon_core.store.queries.frames import gpu_labels
from gpumon_core.web import turns

# The columns that a table shows even where no row has a value.
ALWAYS = ("GPU", "PID", "Name", "Memory")
MOMENT, MOMENT_OF_A_YEAR = "D MMM HH:mm:ss", "D MMM YYYY HH:mm:ss"


def local_time(epoch: pd.Series, zone: ZoneInfo) -> pd.Series:
    """UTC seconds as time-zone aware datetimes of the viewer."""
    return pd.to_datetime(epoch, unit="s", utc=True).dt.tz_convert(zone)


def active(rows: Sequence[NamedRow], zone: ZoneInfo) -> pa.Table:
    """Rows of current.processes as a page shows them, in the order of the columns. Without pandas, because every
    tick makes them."""

    def column(name: str, kind: pa.DataType | None = None, scale: float = 1) -> pa.Array:
        if scale == 1:
            return pa.array([row[name] for row in rows], kind)
        return pa.array([None if row[name] is None else row[name] / scale for row in rows], pa.float64())

    text = pa.string()
    columns = {
        "GPU": pa.array([fmt.gpu_label(row["gpu_index"], row["mig_index"]) for row in rows], text),
        "PID": column("pid", pa.int64()),
        "Name": column("name", text),
        "Workload": column("workload", text),
        "Model": column("model", text),
        "User": column("username", text),
        "Type": column("kind", text),
        "Memory": column("memory", scale=MIB_PER_GIB),
        "Share": pa.array([_share(row["memory"], row["memory_total_mib"]) for row in rows], pa.float64()),
        "SM": column("sm_utilization", pa.float64()),
        "First seen": column("first_seen", pa.timestamp("s", zone.key)),
        "Lifetime": pa.array([sortable_duration(row["last_seen"] - row["first_seen"]) for row in rows], text),
        "Maximum": column("max_memory", scale=MIB_PER_GIB),
        "Average": column("avg_memory", scale=MIB_PER_GIB),
        "Container": pa.array(
            [fmt.container(row["pod"], row["container_name"], row["container_id"]) for row in rows], text
        ),
        "Command": column("command", text),
    }
    if len({row["host"] for row in rows}) > 1:
        columns = {"Host": column("host", text)} | columns
    return pa.table(columns)


def _share(part: float | None, total: float | None) -> float | None:
    """In percent; None where one of them is not known."""
    return None if part is None or not total else 100 * part / total


def matching(shown: pa.Table, text: str) -> pa.Table:
    """The rows of `active` that have this text in their name or PID."""
    wanted = text.strip().lower()
    names, pids = shown["Name"].to_pylist(), shown["PID"].to_pylist()
    found = [wanted in (name or "").lower() or wanted in str(pid) for name, pid in zip(names, pids, strict=True)]
    return shown.filter(pa.array(found, pa.bool_()))


def container(frame: pd.DataFrame) -> pd.Series:
    """format.container of many."""
    parts = zip(frame["pod"], frame["container_name"], frame["container_id"], strict=True)
    return pd.Series([fmt.container(*one) for one in parts], index=frame.index, dtype="object")


# The ledger's columns that a page shows only where the reader asks for them.
ON_DEMAND = (
    *("Type", "Last seen", "Average", "Memory-hours", "SM maximum", "GPU time", "Samples"),
    *("Container", "Unit", "Job", "Notebook", "Started by", "Folder", "Command"),
)


def ledger(frame: pd.DataFrame, zone: ZoneInfo) -> pd.DataFrame:
    """processes.process_history as a page shows it, with every column that the reader can ask for."""
    shown = pd.DataFrame(
        {
            "GPU": frame["gpus"],
            "PID": frame["pid"],
            "Name": frame["name"],
            "Workload": frame["workload"],
            "Model": frame["model"],
            "User": frame["username"],
            "State": frame["running"].map({True: "running", False: "ended"}),
            "First seen": local_time(frame["first_seen"], zone),
            "Lifetime": frame["lifetime_s"].map(sortable_duration),
            "Maximum": frame["max_memory"] / MIB_PER_GIB,
            "SM mean": frame["sm_mean"],
            "Energy": frame["energy_j"] / JOULES_PER_KWH,
            "Type": frame["kind"],
            "Last seen": local_time(frame["last_seen"], zone),
            "Average": frame["avg_memory"] / MIB_PER_GIB,
            "Memory-hours": frame["memory_mib_s"] / MIB_PER_GIB / 3600,
            "SM maximum": frame["max_sm"],
            "GPU time": frame["busy_s"].map(sortable_duration),
            "Samples": frame["sample_count"],
            "Container": container(frame),
            "Unit": frame["unit"],
            "Job": frame["job_id"],
            "Notebook": frame["notebook"],
            "Started by": frame["parents"],
            "Folder": frame["working_directory"],
            "Command": frame["command"],
        }
    )
    if frame["host"].nunique() > 1:
        shown.insert(0, "Host", frame["host"])
    return shown


def ledger_order(frame: pd.DataFrame, more: Sequence[str]) -> list[str]:
    """The ledger's columns to show: the usual ones, and those that the reader asked for."""
    usual = ("GPU", "PID", "Name", "Workload", "Model", "User", "State", "Maximum", "First seen", "Lifetime")
    figures = ("SM mean", "Energy")
    host = ("Host",) if frame["host"].nunique() > 1 else ()
    return [*host, *usual, *figures, *(name for name in ON_DEMAND if name in more)]


def usage(ranked: pd.DataFrame) -> pd.DataFrame:
    """costs.ranked as a page shows it."""
    estimates = ranked["Estimate"].any()
    shown = ranked.assign(
        **{name: ranked[name].map(sortable_duration) for name in ("On GPU", "Held idle")},
    ).rename(columns={"Share": "Share of energy"})
    return shown if estimates else shown.drop(columns="Estimate")


def time_split(split: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """Each GPU's time by what it did, in hours."""
    names = {
        "Busy": "busy_s",
        "Held idle": "held_s",
        "Free": "free_s",
        "Unknown": "unknown_s",
        "Not recorded": "unrecorded_s",
    }
    hours = {name: (split[column] / 3600).round(3) for name, column in names.items() if column in split}
    return pd.DataFrame({"GPU": labels, **hours})


def idle_holders(frame: pd.DataFrame, zone: ZoneInfo, now: int) -> pd.DataFrame:
    """usage.idle_holders as a page shows it."""
    since = frame["idle_since"]
    shown = pd.DataFrame(
        {
            "GPU": gpu_labels(frame["gpu_index"], frame["mig_index"]),
            "PID": frame["pid"],
            "Name": frame["name"],
            "User": frame["username"],
            "Workload": frame["workload"],
            "Model": frame["model"],
            "State": [
                "idle" if pd.notna(idle) else "at work" if running else "ended"
                for idle, running in zip(since, frame["running"], strict=True)
            ],
            "Memory held": frame["memory"] / MIB_PER_GIB,
            "Idle since": local_time(since, zone),
            "Idle for": (now - since).map(sortable_duration),
            "Wasted": (frame["idle_s"]).map(sortable_duration),
            "Memory wasted": frame["wasted_mib_s"] / MIB_PER_GIB / 3600,
            "Container": container(frame),
            "Command": frame["command"],
        }
    )
    if frame["host"].nunique() > 1:
        shown.insert(0, "Host", frame["host"])
    return shown


def sessions(frame: pd.DataFrame, zone: ZoneInfo) -> pd.DataFrame:
    """usage.sessions as a page shows it."""
    shown = pd.DataFrame(
        {
            "Model": frame["model"],
            "GPU": gpu_labels(frame["gpu_index"], frame["mig_index"]),
            "Loaded": local_time(frame["first_seen"], zone),
            "Unloaded": local_time(frame["last_seen"].where(~frame["running"]), zone),
            "Loaded for": frame["lifetime_s"].map(sortable_duration),
            "Maximum": frame["max_memory"] / MIB_PER_GIB,
            "Average": frame["avg_memory"] / MIB_PER_GIB,
            "Workload": frame["workload"],
            "Name": frame["name"],
            "PID": frame["pid"],
            "User": frame["username"],
        }
    )
    if frame["host"].nunique() > 1:
        shown.insert(1, "Host", frame["host"])
    return shown


def download(what: str, content: Callable[[], bytes], zone: ZoneInfo, key: str) -> None:
    """A button that downloads as CSV a table that no route has."""
    st.download_button(
        "Download CSV",
        data=lambda: turns.made(content),
        file_name=f"gpumon-{what}-{datetime.now(zone):%Y%m%d-%H%M%S}.csv",
        mime="text/csv",
        icon=":material/download:",
        on_click="ignore",
        key=key,
    )


def show(
    shown: pd.DataFrame | pa.Table,
    key: str,
    alt: str,
    height: int | Literal["auto"] = "auto",
    currency: str = "",
    order: Sequence[str] | None = None,
    asked: Sequence[str] = (),
    on_select: Callable[[], None] | None = None,
    chosen_rows: Sequence[int] = (),
    largest_gib: float | None = None,
    edition: int = 0,
) -> None:
    """Draw a table. Its sorting, widths and scroll position survive a refresh under its `key`.

    order: the columns to show where they have a value. asked: those of them to show in any case. on_select: is
    called when the reader has chosen a row. chosen_rows: are chosen from the beginning. largest_gib: the maximum
    memory is drawn as a bar that is full at this value.
    edition: another number is a new table in the browser.
    """
    names = shown.column_names if isinstance(shown, pa.Table) else shown.columns.tolist()
    order = _with_values(shown, order or names, asked, key)
    shown = _with_dashes(shown)
    config = {name: how for name, how in columns(currency).items() if name in names}
    for name in _of_other_years(shown):
        if name in config:
            config[name] = st.column_config.DatetimeColumn(format=MOMENT_OF_A_YEAR, help=config[name].get("help"))
    if largest_gib is not None:
        config["Maximum"] = st.column_config.ProgressColumn(
            format="%.1f GiB", min_value=0, max_value=largest_gib, help="Most GPU memory held at once", width=130
        )
    selecting: dict[str, Any] = {}
    if on_select is not None:
        selecting = {"on_select": on_select, "selection_mode": "single-row"}
        if chosen_rows:
            selecting["selection_default"] = {"selection": {"rows": list(chosen_rows)}}
    st.dataframe(
        shown,
        key=f"{key}_{edition}",
        hide_index=True,
        height=height,
        column_config=config,
        column_order=order,
        alt=alt,
        placeholder=MISSING,
        **selecting,
    )


def _with_dashes(shown: pd.DataFrame | pa.Table) -> pd.DataFrame | pa.Table:
    """With a dash for each missing text."""
    if isinstance(shown, pd.DataFrame):
        texts = shown.select_dtypes(["object", "string"]).columns
        return shown.assign(**{name: shown[name].fillna(MISSING) for name in texts})
    for place, field in enumerate(shown.schema):
        if pa.types.is_string(field.type) and shown[place].null_count:
            filled = [MISSING if text is None else text for text in shown[place].to_pylist()]
            shown = shown.set_column(place, field, pa.array(filled, field.type))
    return shown


def _of_other_years(shown: pd.DataFrame | pa.Table) -> list[str]:
    """The columns of moments where one is not of the present year: all moments there show their year."""
    found = []
    for name in _moments(shown):
        column = shown[name]
        first = column.min() if isinstance(column, pd.Series) else compute.min(column).as_py()
        if first is not None and first is not pd.NaT and not fmt.is_of_this_year(first.timestamp(), first.tzinfo):
            found.append(name)
    return found


def _moments(shown: pd.DataFrame | pa.Table) -> list[str]:
    if isinstance(shown, pd.DataFrame):
        return shown.select_dtypes(["datetimetz"]).columns.tolist()
    return [field.name for field in shown.schema if pa.types.is_timestamp(field.type)]


def _with_values(
    shown: pd.DataFrame | pa.Table, order: Sequence[str], asked: Sequence[str], key: str
) -> list[str]:
    """The columns of `order` without texts and numbers that no row has: they would push known values over the
    right edge.

    A column that had a value once stays for the reader's session, or it would come and go with every program that
    starts or ends, and with every letter of a search. A moment stays, too: that it is missing has a meaning.
    """
    seen: set[str] = st.session_state.setdefault(f"{key}_seen", set())
    if isinstance(shown, pd.DataFrame):
        seen.update(name for name in order if name not in seen and shown[name].notna().any())
    else:
        seen.update(name for name in order if name not in seen and shown[name].null_count < len(shown))
    stay = {*ALWAYS, *asked, *_moments(shown), *seen}
    return [name for name in order if name in stay]


@lru_cache(maxsize=2)
def columns(currency: str) -> dict[str, Any]:
    """The configuration of every column that one of the tables may have."""
    gib = "%.1f GiB"
    number, text, moment = (
        st.column_config.NumberColumn,
        st.column_config.TextColumn,
        st.column_config.DatetimeColumn,
    )
    return {
        "GPU": text(help="Index of the GPU; 0:1 is MIG instance 1 of GPU 0", width=60),
        "PID": number(format="%d", width=70),
        "Name": text(width=130),
        "Workload": text(help="What kind of program it is", width=120),
        "Model": text(help="The model that it serves or uses", width=150),
        "Container": text(help="Pod or container in which it runs", width="small"),
        "Unit": text(help="Service or session of systemd", width="small"),
        "Job": text(help="Number of its Slurm job", width="small"),
        "Notebook": text(help="The Jupyter notebook of this kernel", width="small"),
        "Started by": text(help="Its parents, down from the session or service", width="medium"),
        "Folder": text(help="Its working directory", width="medium"),
        "Command": text(help="Its command line; GPUMON_COMMANDS decides how much of it is stored", width="large"),
        "Type": text(help="C compute, G graphics, M client of the multi-process service (MPS)", width=55),
        "Memory": number(format=gib, help="GPU memory in use now"),
        "SM mean": number(format="%.0f%%", width="small", help="Of the GPU's SMs, over its life"),
        "SM maximum": number(format="%d%%", width="small", help="Of the GPU's SMs, in one tick"),
        "GPU time": text(alignment="right", help="Its part of the GPUs' busy time, at full utilization"),
        "Share": st.column_config.ProgressColumn(
            format="%.0f%%", min_value=0, max_value=100, help="Of all the GPU's memory"
        ),
        "Share of energy": st.column_config.ProgressColumn(
            format="%.0f%%", min_value=0, max_value=100, help="Of what is in this table"
        ),
        "SM": number(format="%d%%", width=60, help="Of the GPU's SMs, used by this process since the tick before"),
        "First seen": moment(format=MOMENT),
        "Last seen": moment(format=MOMENT),
        "Lifetime": text(alignment="right", width=110, help="From first to last seen on a GPU"),
        "State": text(width="small"),
        "Processes": number(format="%d", width="small"),
        "GPU-hours": number(format="%.2f h", help="Hours in which a GPU was busy, at full utilization"),
        "Memory-hours": number(format="%.1f GiB·h", help="GPU memory held, times how long"),
        "Energy": number(format="%.3f kWh", help="Its part of the GPUs' measured energy"),
        "Cost": number(format=f"%.2f {currency.replace('%', '%%')}", help="Of its energy and busy hours"),
        "On GPU": text(alignment="right", help="How long processes were there, together"),
        "Held idle": text(alignment="right", help="Of that, memory was held for nothing; see GPUMON_IDLE_MINUTES"),
        "Estimate": st.column_config.CheckboxColumn(
            help="Split by memory, because the driver reports no share of each process"
        ),
        "Memory held": number(format=gib, help="Now, or on average where the process has ended"),
        "Idle since": moment(format=MOMENT, help="When it last did something"),
        "Idle for": text(alignment="right", help="Until now"),
        "Wasted": text(alignment="right", help="Time in which it held memory for nothing, within the range"),
        "Memory wasted": number(format="%.1f GiB·h", help="Memory held for nothing, times how long"),
        "Loaded": moment(format=MOMENT),
        "Unloaded": moment(format=MOMENT, help="Empty while it is loaded"),
        "Loaded for": text(alignment="right"),
        "Maximum": number(format=gib, help="Most GPU memory held at once"),
        "Average": number(format=gib, help="Mean GPU memory over all samples"),
        "Samples": number(format="%d", help="In how many readings the process was seen"),
    }
