"""The state of the recorder and its database."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib import metadata

import pandas as pd
import streamlit as st

from gpumon_core import __version__, figures, settings
from gpumon_core import format as fmt
from gpumon_core.doctor import examination
from gpumon_core.legacy_import import importer
from gpumon_core.recording import runtime
from gpumon_core.recording.health import Health
from gpumon_core.settings import mask_password
from gpumon_core.store.queries import current, frames
from gpumon_core.store.queries.current import NamedRow
from pages.components import chrome, data, filters, plot, tables

DAY = 86400
SAMPLING = {
    "interval": "interval: mean of the driver's samples since the tick before",
    "partial": "partial: mean of the newest samples; the driver has no longer those from the start of the tick",
    "point": "point: the value at the moment of the tick",
}
ENERGY = {"counter": "counted by the driver", "power": "power times time"}
VERDICTS = {"ok": "✓ ok", "warning": "▲ warning", "problem": "◆ problem"}
BYTES_PER_MIB = 2**20
RETENTION = {"raw": "retention_raw_days", "minute": "retention_minute_days", "hour": "retention_hour_days"}


def recorder() -> None:
    """What it has done since it started."""
    counts = runtime.counters()
    state = runtime.state()
    st.subheader("Recorder", anchor=False)
    if counts is None or state.role != "recording":
        st.caption(
            "This program does not record. The figures of the recorder that does are below, minute by minute."
        )
        return
    figures_shown = (
        ("Ticks", f"{counts.ticks:,}", "Committed since this program started"),
        ("Skipped", f"{counts.skipped:,}", "Left out because the tick before them was not done"),
        ("Failed", f"{counts.failed:,}", "Nothing could be read"),
        ("Waiting", f"{counts.buffered:,}", "In memory, until they are written to the database"),
        ("Dropped", f"{counts.dropped:,}", "Waited too long, and were deleted for newer ones"),
        (
            "Newest tick took",
            fmt.MISSING if counts.duration_ms is None else f"{counts.duration_ms:.1f} ms",
            "From the first call of the driver to the commit, waiting included",
        ),
    )
    with st.container(horizontal=True, gap="large"):
        for label, value, hint in figures_shown:
            st.metric(label, value, help=hint)
    if counts.last_error:
        st.warning(f"Newest error: {fmt.plain(counts.last_error)}", icon=":material/error:")


def sampling(gpus: pd.DataFrame) -> None:
    """How each GPU's numbers are measured."""
    if gpus.empty:
        return
    st.subheader("Sampling", anchor=False)
    names = filters.named_gpus(gpus)
    shown = pd.DataFrame(
        {
            "GPU": list(names),
            "Name": gpus["name"],
            "State": gpus["state"],
            "Utilization": gpus["sampling"].map(SAMPLING).fillna(fmt.MISSING),
            "Energy": gpus["energy_from"].map(ENERGY).fillna(fmt.MISSING),
            "UUID": gpus["uuid"],
        }
    )
    st.dataframe(shown, key="sampling", hide_index=True, alt="How each GPU is sampled")


def pulse(frame: pd.DataFrame) -> None:
    """The last day of the recorder, minute by minute."""
    if len(frame) < 2:
        st.caption("The charts of the recorder appear here when it has run for two minutes.")
        return
    drawn = [figures.pulse(frame, chrome.is_dark())]
    if frame["database_bytes"].notna().sum() > 1:
        drawn.append(figures.growth(frame, chrome.is_dark()))
    plot.show(
        [figures.as_json(figure) for figure in drawn],
        key="pulse",
        alt="Duration of ticks, skipped, failed and waiting ticks, and the size of the database over the last day",
        view="pulse",
    )


def database(at: data.Tick, frame: pd.DataFrame) -> None:
    """How large it is, how fast it grows, and what it holds."""
    st.subheader("Database", anchor=False)
    size = data.database_bytes(at[0])
    grown = ""
    sizes = frame.dropna(subset="database_bytes")
    if len(sizes) > 1:
        change = (sizes["database_bytes"].iloc[-1] - sizes["database_bytes"].iloc[0]) / BYTES_PER_MIB
        over = float(sizes["timestamp_epoch"].iloc[-1] - sizes["timestamp_epoch"].iloc[0])
        grown = f", {change:+.1f} MiB in the last {fmt.duration(over)}"
    shown = fmt.MISSING if size is None else f"{size / BYTES_PER_MIB:,.1f} MiB"
    st.markdown(f"{fmt.plain(mask_password(at[0]))}: **{shown}**{grown}")
    chosen = runtime.settings()
    stored = data.ask(at, frames.resolutions)
    names = stored["seconds"].map(lambda seconds: fmt.span(seconds) if seconds else "every tick")
    table = pd.DataFrame(
        {
            "Resolution": names,
            "From": tables.local_time(stored["first"], chrome.zone()),
            "To": tables.local_time(stored["last"], chrome.zone()),
            "Retention (days)": [getattr(chosen, RETENTION[name]) for name in stored["retention"]],
            "Setting": [settings.variable(RETENTION[name]) for name in stored["retention"]],
        }
    )
    moment = st.column_config.DatetimeColumn(format="D MMM YYYY HH:mm")
    st.dataframe(
        table,
        key="resolutions",
        hide_index=True,
        column_config={"From": moment, "To": moment},
        alt="What is stored at each resolution",
    )


def originals() -> None:
    """Files of the original program in the data directory: offered for import, and never changed."""
    chosen = runtime.settings()
    urls = chosen.real_database_url, chosen.demo_database_url
    found = data.originals(chosen.data_dir, *urls, chosen.host_name)
    if not found:
        return
    st.subheader("History of the original GPU monitor", anchor=False)
    for file in found:
        held, imported = file.contents, file.state
        counted = ", ".join(
            f"{held.rows[table]:,} {importer.CALLED[name]}"
            for name, table in importer.COUNTED
            if table in held.rows
        )
        state = "not imported"
        if imported.until is not None:
            state = "imported" if imported.is_complete else f"imported up to {_moment(imported.until)}"
        st.markdown(
            f"**{fmt.plain(file.path.name)}**: {counted}, {_moment(held.first)} to {_moment(held.last)}. "
            f"{state.capitalize()}."
        )
        if not imported.is_complete:
            command = [sys.executable, "-m", "gpumon_core", "import", str(file.path)]
            st.code(shlex.join(command), language="bash", wrap_lines=True)
    if not all(file.state.is_complete for file in found):
        st.caption(
            "The command imports what is new, while gpumon records or not, and only reads the file. With "
            "--dry-run it only says what it would import. Run it where gpumon runs: for a container, after "
            "`docker exec gpumon`."
        )


def _moment(epoch: int | None) -> str:
    """A time for the viewer; a second that no calendar has is shown as its number."""
    try:
        return fmt.MISSING if epoch is None else fmt.moment(epoch, chrome.zone())
    except (ValueError, OverflowError, OSError):
        return f"second {epoch}"


def doctor() -> None:
    """What this machine lacks for a good recording."""
    st.subheader("Doctor", anchor=False)
    found = examination(runtime.settings())
    table = pd.DataFrame(
        [
            (VERDICTS[finding.verdict], finding.topic, finding.text, finding.remedy or fmt.MISSING)
            for finding in found.findings
        ],
        columns=["", "What", "Found", "What to do"],
    )
    wide = st.column_config.TextColumn(width="large")
    st.dataframe(
        table,
        key="doctor",
        hide_index=True,
        column_config={"": st.column_config.TextColumn(width=110), "Found": wide, "What to do": wide},
        alt="What was found about this machine",
        placeholder=fmt.MISSING,
    )
    if found.is_overdue:
        st.warning(
            "The driver or the database does not answer, so the examination is not complete. Look at dmesg.",
            icon=":material/warning:",
        )
    elif not found.is_complete:
        st.caption("gpumon is examining this machine.")


def in_force(hosts: list[NamedRow]) -> None:
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
    st.subheader("Versions", anchor=False)
    versions = {"gpumon": __version__, "Python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in ("streamlit", "pandas", "plotly", "sqlalchemy")}
    st.html(chrome.facts_html(versions))
    columns = {
        "Host": "name",
        "Driver": "driver_version",
        "CUDA": "cuda_version",
        "NVML": "nvml_version",
        "Every (s)": "interval_s",
    }
    machines = {title: [host[name] for host in hosts] for title, name in columns.items()}
    st.dataframe(pd.DataFrame(machines), key="hosts", hide_index=True, alt="The machines that are recorded")
    st.caption(f"Times in {chrome.zone_label()}.")


def body(now: Health) -> None:
    """Everything about the recording itself."""
    assert now.latest is not None
    this_minute, host = data.minute(now), runtime.settings().host_name
    frame = data.ask(this_minute, frames.health_history, host, now.latest - DAY, now.latest + 60)
    recorder()
    pulse(frame)
    sampling(data.ask(data.tick(now), frames.gpu_table))
    database(this_minute, frame)
    originals()
    doctor()
    in_force(data.ask(this_minute, current.hosts))


chrome.live("System", body)
