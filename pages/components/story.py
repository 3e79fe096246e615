"""The story of one process: who it is, what it ran, which models it had, and what it used over its life."""

from __future__ import annotations

from html import escape
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from gpumon_core import format as fmt
from pages.components import chrome, data, drawings, filters, plot, tables

# What is known of a process beside its name: title -> column of processes.process_history.
IDENTITY = {
    "PID": "pid",
    "User": "username",
    "State": "state",
    "GPU": "gpus",
    "Workload": "workload",
    "Model": "model",
    "Pod": "pod",
    "Namespace": "namespace",
    "Container": "container_name",
    "Image": "container_image",
    "Container id": "container_id",
    "Engine": "container_engine",
    "Unit": "unit",
    "Slurm job": "job_id",
    "Job name": "job_name",
    "Notebook": "notebook",
    "Started by": "parents",
    "Folder": "working_directory",
    "Executable": "executable",
}


# A story begins below its table, where a reader would not see that it has come. It comes in pieces, and only with
# them there is room to scroll: it is brought into sight until it has settled, or the reader goes elsewhere.
_reveal = st.components.v2.component(
    "gpumon_reveal",
    js="""
const SETTLED_MS = 2000
const ELSEWHERE = ["wheel", "touchstart", "pointerdown", "keydown"]
let revealed
function bring(element) {
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"
  const sizes = new ResizeObserver(() => element.scrollIntoView({ behavior, block: "center" }))
  const end = () => {
    sizes.disconnect()
    clearTimeout(timer)
    for (const kind of ELSEWHERE) removeEventListener(kind, end)
  }
  const timer = setTimeout(end, SETTLED_MS)
  for (const kind of ELSEWHERE) addEventListener(kind, end, { passive: true })
  sizes.observe(element.closest(".st-key-story"))
  return end
}
export default function ({ data, parentElement }) {
  const isOutOfSight = parentElement.getBoundingClientRect().top > innerHeight - 200
  const end = data.of !== revealed && isOutOfSight ? bring(parentElement) : undefined
  revealed = data.of
  return () => {
    end?.()
    revealed = undefined
  }
}
""",
    isolate_styles=False,
)


def show(at: data.Tick, process_id: int) -> None:
    """Draw it."""
    frame = data.one_process(at, process_id)
    if frame.empty:
        st.info("This process is not in the ledger any more.")
        return
    process = frame.astype("object").where(frame.notna(), None).iloc[0]
    name = process["name"] or f"PID {process['pid']}"
    zone = chrome.zone()
    st.subheader(fmt.plain(name), anchor=False)
    _reveal(key="reveal", data={"of": process_id})
    known = {title: process.get(column) for title, column in IDENTITY.items()}
    known["State"] = "running" if process["running"] else "ended"
    st.html(chrome.facts_html({title: value for title, value in known.items() if value}))
    used = {
        "First seen": fmt.moment(process["first_seen"], zone),
        "Last seen": "now" if process["running"] else fmt.moment(process["last_seen"], zone),
        "Lifetime": fmt.duration(process["lifetime_s"]),
        "Memory, maximum": fmt.memory(process["max_memory"]),
        "Memory, average": fmt.memory(process["avg_memory"]),
        "SM, mean": _percent(process["sm_mean"]),
        "SM, maximum": _percent(process["max_sm"]),
        "GPU time": fmt.duration(process["busy_s"]) + (" (estimate)" if process["estimated"] else ""),
        "Energy": fmt.energy(process["energy_j"]),
        "Samples": f"{process['sample_count']:,}",
    }
    st.html(chrome.facts_html(used))
    if process["command"]:
        st.code(process["command"], language=None, wrap_lines=True)
    look = drawings.look()
    first, last = int(process["first_seen"]), int(process["last_seen"])
    text, by_hour = drawings.life(at, process_id, first, last, look)
    if text is not None:
        plot.show(
            [text],
            key="life",
            alt=f"Memory and utilization of {name} over its life",
            view=str(process_id),
        )
    notes = ["Means of the hours."] if by_hour else []
    sessions = data.sessions_of(at, process_id)
    if len(sessions):
        st.markdown("**Model sessions**")
        tables.show(tables.sessions(sessions, zone), "story_sessions", "Models that it had loaded")
    st.caption(" ".join([*notes, f"Times in {chrome.zone_label()}."]))
    around = max(60, int(0.05 * process["lifetime_s"]))
    since, until = (
        pd.Timestamp(moment, unit="s", tz="UTC").tz_convert(zone).strftime("%Y-%m-%dT%H:%M")
        for moment in (process["first_seen"] - around, process["last_seen"] + around)
    )
    query = [("range", filters.CUSTOM), ("from", since), ("to", until)]
    query += [("gpu", gpu) for gpu in _gpu_names(at, process["host"], process["gpus"])]
    st.html(f'<a href="history?{escape(urlencode(query))}" target="_self">What its GPU did then</a>')


def _gpu_names(at: data.Tick, host: str, gpus: str) -> list[str]:
    named = filters.named_gpus(data.gpu_table(at))
    labels = str(gpus).split(", ")
    wanted = {f"GPU {label}" for label in labels} | {f"{host} GPU {label}" for label in labels}
    return [name for name in named if name in wanted]


def _percent(value: float | None) -> str:
    return fmt.MISSING if fmt.missing(value) else f"{value:.0f} %"
