"""Tables as CSV (RFC 4180), with units in the header."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import pandas as pd

# A spreadsheet takes text that begins like this for a formula, and process names are anybody's text.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


# What a process runs: title -> column of frames.process_history.
PROGRAM = {
    "Workload": "workload",
    "Model": "model",
    "Container engine": "container_engine",
    "Container id": "container_id",
    "Container": "container_name",
    "Image": "container_image",
    "Pod": "pod",
    "Namespace": "namespace",
    "Unit": "unit",
    "Job id": "job_id",
    "Job": "job_name",
    "Job user": "job_user",
    "Notebook": "notebook",
    "Started by": "parents",
    "Executable": "executable",
    "Working directory": "working_directory",
    "Command": "command",
}


def ledger_csv(frame: pd.DataFrame, zone: ZoneInfo) -> bytes:
    """frames.process_history as UTF-8 CSV; times are ISO 8601 in `zone`, with its offset."""
    table = pd.DataFrame(
        {
            "Host": frame["host"].map(harmless),
            "GPU": frame["gpus"],
            "PID": frame["pid"],
            "Name": frame["name"].map(harmless),
            "User": frame["username"].map(harmless),
            "Type": frame["kind"],
            "State": frame["running"].map({True: "running", False: "ended"}),
            "First seen": _iso(frame["first_seen"], zone),
            "Last seen": _iso(frame["last_seen"], zone),
            "Lifetime (s)": frame["lifetime_s"],
            "Maximum memory (MiB)": frame["max_memory"].astype("Int64"),
            "Average memory (MiB)": frame["avg_memory"].round(1),
            "Samples": frame["sample_count"],
            **{title: frame[column].map(harmless) for title, column in PROGRAM.items()},
        }
    )
    return table.to_csv(index=False).encode()


def harmless(text: object) -> object:
    """Text that no spreadsheet runs as a formula."""
    return "'" + text if isinstance(text, str) and text.startswith(FORMULA_STARTS) else text


def _iso(epoch: pd.Series, zone: ZoneInfo) -> pd.Series:
    local = pd.to_datetime(epoch, unit="s", utc=True).dt.tz_convert(zone)
    return local.map(lambda moment: moment.isoformat())
