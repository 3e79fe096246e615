"""How the recorder fares."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from gpumon_core import __version__, figures, runtime, settings
from gpumon_core import format as fmt
from gpumon_core.settings import mask_password
from pages.ui import chrome, data, filters, tables

DAY = 86400
SAMPLING = {
    "interval": "interval: mean of the driver's samples since the tick before",
    "point": "point: as it was at the moment of the tick",
}
ENERGY = {"counter": "counted by the driver", "power": "power times time"}
KEPT = {"raw": "retention_raw_days", "minute": "retention_minute_days", "hour": "retention_hour_days"}

found = chrome.top("System")


@st.fragment(run_every=chrome.refresh_s())
def recorder() -> None:
    """What it has done since it started."""
    counts = runtime.vitals()
    state = runtime.state()
    st.subheader("Recorder", anchor=False)
    if counts is None or state.role != "recording":
        st.caption("This program does not record; the figures of the one that does are below, minute by minute.")
        return
    figures_shown = (
        ("Ticks", f"{counts.ticks:,}", "Committed since this program started"),
        ("Skipped", f"{counts.skipped:,}", "Fell out because the tick before them was not done"),
        ("Failed", f"{counts.failed:,}", "Nothing could be read"),
        ("Waiting", f"{counts.buffered:,}", "In memory, until the database takes them"),
        ("Dropped", f"{counts.dropped:,}", "Waited too long and made room for newer ones"),
        (
            "Newest tick took",
            fmt.MISSING if counts.duration_ms is None else f"{counts.duration_ms:.1f} ms",
            "From the first call of the driver to the commit, waiting included",
        ),
    )
    for column, (label, value, hint) in zip(st.columns(len(figures_shown)), figures_shown, strict=True):
        column.metric(label, value, help=hint)
    if counts.last_error:
        st.warning(f"Newest error: {fmt.plain(counts.last_error)}", icon=":material/error:")


def sampling() -> None:
    """What each GPU's numbers are."""
    now = data.health()
    if now is None or now.newest is None:
        return
    gpus = data.gpu_table(data.tick(now))
    if gpus.empty:
        return
    st.subheader("Sampling", anchor=False)
    names = filters.named_gpus(gpus)
    shown = pd.DataFrame(
        {
            "GPU": list(names),
            "Name": gpus["name"],
            "State": gpus["state"],
            "Utilization": gpus["sampling"].map(SAMPLING),
            "Energy": gpus["energy_from"].map(ENERGY),
            "UUID": gpus["uuid"],
        }
    )
    st.dataframe(shown, key="sampling", hide_index=True, alt="How each GPU is sampled")


def pulse() -> None:
    """The last day, minute by minute."""
    now = data.health()
    if now is None or now.newest is None:
        return
    frame = data.recorder_history(data.tick(now), runtime.settings().host_name, now.newest - DAY, now.newest + 60)
    if len(frame) < 2:
        st.caption("The minutes of the recorder are drawn here as soon as there are some.")
        return
    st.plotly_chart(
        figures.pulse(frame, chrome.zone(), chrome.is_dark()),
        key="pulse",
        theme=None,
        config={"displayModeBar": False},
        alt="Duration of ticks, and skipped, failed and waiting ticks, over the last day",
    )


def database() -> None:
    """How large it is, and what it holds."""
    now = data.health()
    state = runtime.state()
    st.subheader("Database", anchor=False)
    chosen = runtime.settings()
    size = data.database_bytes(state.database_url) if now is not None else None
    grown = ""
    if now is not None and now.newest is not None:
        frame = data.recorder_history(data.tick(now), chosen.host_name, now.newest - DAY, now.newest + 60)
        sizes = frame["database_bytes"].dropna()
        if len(sizes) > 1:
            change = (sizes.iloc[-1] - sizes.iloc[0]) / 2**20
            over = fmt.duration(float(frame["timestamp_epoch"].iloc[-1] - frame["timestamp_epoch"].iloc[0]))
            grown = f", {change:+.1f} MiB in the last {over}"
    shown = fmt.MISSING if size is None else f"{size / 2**20:,.1f} MiB"
    st.markdown(f"`{mask_password(state.database_url)}`: **{shown}**{grown}")
    if now is None or now.newest is None:
        return
    kept = data.resolutions(data.tick(now))
    names = kept["seconds"].map(lambda seconds: fmt.span(seconds) if seconds else "every tick")
    table = pd.DataFrame(
        {
            "Resolution": names,
            "From": tables.local_time(kept["first"], chrome.zone()),
            "To": tables.local_time(kept["last"], chrome.zone()),
            "Kept for (days)": [getattr(chosen, KEPT[name]) for name in kept["kept"]],
            "Setting": [settings.variable(KEPT[name]) for name in kept["kept"]],
        }
    )
    moment = st.column_config.DatetimeColumn(format="D MMM YYYY HH:mm")
    st.dataframe(
        table,
        key="resolutions",
        hide_index=True,
        column_config={"From": moment, "To": moment},
        alt="What is kept at which resolution",
    )


def in_force() -> None:
    """The settings, and the versions of what runs."""
    st.subheader("Settings in force", anchor=False)
    rows = [
        (name, value, meaning.replace("`", "")) for name, value, meaning in settings.in_force(runtime.settings())
    ]
    st.dataframe(
        pd.DataFrame(rows, columns=["Setting", "Value", "Meaning"]),
        key="settings",
        hide_index=True,
        alt="Settings in force, passwords masked",
    )
    st.caption(
        f"gpumon {__version__}. `python -m gpumon_core doctor` examines this machine: driver, permissions, PID "
        f"namespace and disk. Times in {chrome.zone_label()}."
    )


recorder()
sampling()
pulse()
database()
in_force()
