"""How the columns of process tables are shown."""

from __future__ import annotations

from typing import Literal
from zoneinfo import ZoneInfo

import pandas as pd
import streamlit as st
from streamlit.elements.lib.column_types import ColumnConfig

from gpumon_core.format import MIB_PER_GIB, MISSING, sortable_duration
from gpumon_core.store.frames import gpu_labels


def local_time(epoch: pd.Series, zone: ZoneInfo) -> pd.Series:
    """UTC seconds as time-zone aware datetimes of the viewer."""
    return pd.to_datetime(epoch, unit="s", utc=True).dt.tz_convert(zone)


def active(frame: pd.DataFrame, zone: ZoneInfo) -> pd.DataFrame:
    """frames.active_processes as it is shown, in the order of its columns."""
    shown = pd.DataFrame(
        {
            "GPU": gpu_labels(frame["gpu_index"], frame["mig_index"]),
            "PID": frame["pid"],
            "Name": frame["name"],
            "Workload": frame["workload"],
            "Model": frame["model"],
            "User": frame["username"],
            "Type": frame["kind"],
            "Memory": frame["memory"] / MIB_PER_GIB,
            "Share": 100 * frame["memory"] / frame["memory_total_mib"],
            "SM": frame["sm_utilization"],
            "First seen": local_time(frame["first_seen"], zone),
            "Lifetime": (frame["last_seen"] - frame["first_seen"]).map(sortable_duration),
            "Maximum": frame["max_memory"] / MIB_PER_GIB,
            "Average": frame["avg_memory"] / MIB_PER_GIB,
            "Container": container(frame),
            "Command": frame["command"],
        }
    )
    if frame["host"].nunique() > 1:
        shown.insert(0, "Host", frame["host"])
    return shown


def container(frame: pd.DataFrame) -> pd.Series:
    """What a process's container is called: by its pod, its name, or as engines shorten its id."""
    return frame["pod"].fillna(frame["container_name"]).fillna(frame["container_id"].str.slice(0, 12))


def ledger(frame: pd.DataFrame, zone: ZoneInfo) -> pd.DataFrame:
    """frames.process_history as it is shown."""
    shown = pd.DataFrame(
        {
            "GPU": frame["gpus"],
            "PID": frame["pid"],
            "Name": frame["name"],
            "Workload": frame["workload"],
            "Model": frame["model"],
            "User": frame["username"],
            "Type": frame["kind"],
            "State": frame["running"].map({True: "running", False: "ended"}),
            "First seen": local_time(frame["first_seen"], zone),
            "Last seen": local_time(frame["last_seen"], zone),
            "Lifetime": frame["lifetime_s"].map(sortable_duration),
            "Maximum": frame["max_memory"] / MIB_PER_GIB,
            "Average": frame["avg_memory"] / MIB_PER_GIB,
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


def show(shown: pd.DataFrame, key: str, alt: str, height: int | Literal["auto"] = "auto") -> None:
    """Draw a table whose sorting, widths and scroll position survive a refresh under its `key`."""
    texts = shown.select_dtypes(["object", "string"]).columns
    shown = shown.assign(**{name: shown[name].fillna(MISSING) for name in texts})
    st.dataframe(shown, key=key, hide_index=True, height=height, column_config=columns(), alt=alt)


def columns() -> dict[str, ColumnConfig]:
    """The configuration of every column that one of the tables may have."""
    gib = "%.1f GiB"
    number, text, moment = (
        st.column_config.NumberColumn,
        st.column_config.TextColumn,
        st.column_config.DatetimeColumn,
    )
    return {
        "GPU": text(help="Index of the GPU; 0:1 is MIG instance 1 of GPU 0", width="small"),
        "PID": number(format="%d", width="small"),
        "Name": text(width=140),
        "Workload": text(help="What kind of program it is", width=130),
        "Model": text(help="The model that it serves or uses", width=170),
        "Container": text(help="Pod or container in which it runs", width="small"),
        "Unit": text(help="Service or session of systemd", width="small"),
        "Job": text(help="Number of its Slurm job", width="small"),
        "Notebook": text(help="The Jupyter notebook whose kernel it is", width="small"),
        "Started by": text(help="Its parents, down from the session or service", width="medium"),
        "Folder": text(help="Its working directory", width="medium"),
        "Command": text(help="Its command line; see GPUMON_COMMANDS for how much of it is kept", width="large"),
        "Type": text(help="C compute, G graphics, M client of the multi-process service (MPS)", width="small"),
        "Memory": number(format=gib, help="GPU memory in use now"),
        "Share": st.column_config.ProgressColumn(
            format="%.0f%%", min_value=0, max_value=100, help="Of the GPU's whole memory"
        ),
        "SM": number(
            format="%d%%", width="small", help="Of the GPU's SMs, used by this process since the tick before"
        ),
        "First seen": moment(format="D MMM HH:mm:ss"),
        "Last seen": moment(format="D MMM HH:mm:ss"),
        "Lifetime": text(alignment="right", help="From first to last seen on a GPU"),
        "Maximum": number(format=gib, help="Most GPU memory held at once"),
        "Average": number(format=gib, help="Mean GPU memory over all samples"),
        "Samples": number(format="%d", help="In how many readings the process was seen"),
    }
