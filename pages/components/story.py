"""The story of one process: its identity, what it ran, its models, and what it used over its life."""

from __future__ import annotations

from html import escape
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from gpumon_core import format as fmt
from gpumon_core.store.queries import frames, model_sessions, processes
from gpumon_core.store.queries.process_filter import ProcessFilter
from pages.components import charts, chrome, data, filters, tables

# The identity of a process beside its name: title -> column of processes.process_history.
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


# A story appears below its table, where a reader might not see it. It comes in pieces, and before them there is no
# room to scroll: so the page scrolls to it until its size is final, or the reader moves.
_reveal = st.components.v2.component(
    "gpumon_reveal",
    js="""
const FINAL_MS = 2000
const READER_MOVES = ["wheel", "touchstart", "pointerdown", "keydown"]
let revealed
function bring(element) {
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth"
  const sizes = new ResizeObserver(() => element.scrollIntoView({ behavior, block: "center" }))
  const end = () => {
    sizes.disconnect()
    clearTimeout(timer)
    for (const kind of READER_MOVES) removeEventListener(kind, end)
  }
  const timer = setTimeout(end, FINAL_MS)
  for (const kind of READER_MOVES) addEventListener(kind, end, { passive: true })
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
    frame = data.ask(at, processes.process_history, ProcessFilter(process_ids=(process_id,)))
    if frame.empty:
        st.info("This process is older than the retention, so it was deleted. Choose another row.")
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
    first, last = int(process["first_seen"]), int(process["last_seen"])
    notes = ["Means of the hours."] if charts.life(at, process_id, first, last, name) else []
    sessions = data.ask(at, model_sessions.of_process, process_id)
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
    # The browser's own blue is hard to read on a dark page.
    style = "color: light-dark(#0b6bcb, #58a6ff)"
    address = f"history?{escape(urlencode(query))}"
    st.html(f'<a href="{address}" target="_self" style="{style}">What its GPU did then</a>')


def _gpu_names(at: data.Tick, host: str, gpus: str) -> list[str]:
    named = filters.named_gpus(data.ask(at, frames.gpu_table))
    labels = str(gpus).split(", ")
    wanted = {f"GPU {label}" for label in labels} | {f"{host} GPU {label}" for label in labels}
    return [name for name in named if name in wanted]


def _percent(value: float | None) -> str:
    return fmt.MISSING if fmt.missing(value) else f"{value:.0f} %"
