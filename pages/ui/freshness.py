"""The age of the newest sample, counted on by the browser itself.

So it also tells the truth when the server, or the connection to it, has stopped.
"""

from __future__ import annotations

import streamlit as st

from gpumon_core.health import fresh_within_s

_CSS = """
.fresh { font-family: var(--st-font); font-size: .9rem; text-align: right; color: var(--st-text-color);
         font-variant-numeric: tabular-nums; padding-bottom: .6rem; white-space: nowrap; }
.fresh .dot { display: inline-block; width: .6rem; height: .6rem; border-radius: 50%; margin-right: .45rem;
              background: var(--st-green-color); }
.fresh.stale { color: var(--st-red-text-color); font-weight: 600; }
.fresh.stale .dot { background: var(--st-red-color); border-radius: 0; }
"""

_JS = """
const timers = new WeakMap()

function words(seconds) {
  const s = Math.floor(seconds)
  if (s < 60) return `${s}s`
  if (s < 3600) return `${Math.floor(s / 60)}m ${s % 60}s`
  if (s < 86400) return `${Math.floor(s / 3600)}h ${Math.floor(s / 60) % 60}m`
  return `${Math.floor(s / 86400)}d ${Math.floor(s / 3600) % 24}h`
}

export default function ({ data, parentElement }) {
  const box = parentElement.querySelector(".fresh")
  const text = parentElement.querySelector(".text")
  const received = performance.now()
  const draw = () => {
    if (data.age === null) {
      box.classList.add("stale")
      text.textContent = "No sample yet"
      return
    }
    const age = data.age + (performance.now() - received) / 1000
    const stale = age > data.limit
    box.classList.toggle("stale", stale)
    text.textContent = stale ? `No new sample for ${words(age)}` : `Newest sample ${words(age)} ago`
  }
  clearInterval(timers.get(parentElement))
  timers.set(parentElement, setInterval(draw, 1000))
  draw()
  return () => clearInterval(timers.get(parentElement))
}
"""

_component = st.components.v2.component(
    "gpumon_freshness",
    html='<div class="fresh" role="status"><span class="dot"></span><span class="text"></span></div>',
    css=_CSS,
    js=_JS,
)


def show(age_s: float | None, interval_s: float) -> None:
    """Draw it; `age_s` is the age at this moment, None where nothing was sampled yet."""
    _component(data={"age": age_s, "limit": fresh_within_s(interval_s)}, key="freshness")
