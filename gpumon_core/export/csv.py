"""Tables as CSV (RFC 4180), with units in the header."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Literal
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

from gpumon_core.store.queries.frames import gpu_labels

# A spreadsheet takes text that begins like this for a formula, and process names are anybody's text. Where East
# Asian scripts are written the wide forms of these signs mean the same.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "﹦", "﹢", "﹣", "﹫")
# Blanks and signs without a width before it are no protection. Where a comma is the decimal sign, the cells of a
# CSV end at semicolons, and quotes within one mean nothing: a formula may begin behind each.
_BLANK = r"[\s\x00-\x1f\u00ad\u200b-\u200f\u2060-\u2064\ufeff]*"
_FORMULA = re.compile(rf"(?:^|(?<=;))(?={_BLANK}[=+\-@＝＋－＠﹦﹢﹣﹫])|^(?=[\t\r\n])")


# What a process runs: title -> column of `programs`.
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


def harmless(text: object) -> object:
    """Text that no spreadsheet runs as a formula: with an apostrophe before what it would take for one."""
    return _FORMULA.sub("'", text) if isinstance(text, str) and _FORMULA.search(text) else text


def _written(table: pd.DataFrame) -> bytes:
    # pandas quotes what its own line end has in it: with "\n" alone, a name with "\r=1" would begin a cell.
    return table.to_csv(index=False, lineterminator="\r\n").encode()


def iso(epoch: pd.Series, zone: ZoneInfo, unit: Literal["s", "ms"] = "s") -> pd.Series:
    """UTC seconds as ISO 8601 in `zone`, to the second or the millisecond, with its offset; None where there
    are none."""
    known = epoch.dropna().astype("float64")
    utc = (known * (1 if unit == "s" else 1000)).round().to_numpy("int64").astype(f"datetime64[{unit}]")
    aware = pd.DatetimeIndex(utc, tz="UTC").tz_convert(zone)
    local = aware.tz_localize(None).to_numpy(f"datetime64[{unit}]")
    # All at once, and not moment by moment: a long file has millions of them, with few offsets.
    texts = pd.Series(np.datetime_as_string(local, unit=unit), index=known.index, dtype="object")
    ahead = pd.Series((local - utc) // np.timedelta64(1, "s"), index=known.index)
    texts += ahead.map({seconds: _offset(seconds) for seconds in ahead.unique().tolist()}).astype("object")
    return texts.reindex(epoch.index).astype("object").where(epoch.notna(), None)


def _offset(seconds: int) -> str:
    """So many seconds ahead of UTC, as +02:00."""
    return datetime(2000, 1, 1, tzinfo=timezone(timedelta(seconds=seconds))).isoformat()[19:]


# Of tables.time_split.
TIME_UNITS = dict.fromkeys(("Busy", "Held idle", "Free", "Unknown", "Not recorded"), "h")


def plain_csv(table: pd.DataFrame, units: Mapping[str, str]) -> bytes:
    """A table as UTF-8 CSV, its columns with their units."""
    texts = table.select_dtypes(["object", "string"]).columns
    shown = table.assign(**{name: table[name].map(harmless) for name in texts})
    return _written(shown.rename(columns={name: f"{name} ({unit})" for name, unit in units.items()}))


def idle_csv(frame: pd.DataFrame, zone: ZoneInfo) -> bytes:
    """usage.idle_holders as UTF-8 CSV."""
    table = pd.DataFrame(
        {
            "Host": frame["host"].map(harmless),
            "GPU": gpu_labels(frame["gpu_index"], frame["mig_index"]),
            "PID": frame["pid"],
            "Name": frame["name"].map(harmless),
            "User": frame["username"].map(harmless),
            "Running": frame["running"],
            "Memory held (MiB)": frame["memory"].round(1),
            "Idle since": iso(frame["idle_since"], zone),
            "Held idle (s)": frame["idle_s"].round(),
            "Memory wasted (GiB h)": (frame["wasted_mib_s"] / 1024 / 3600).round(3),
            **{title: frame[column].map(harmless) for title, column in PROGRAM.items()},
        }
    )
    return _written(table)
