"""Texts in files: times as ISO 8601, and cells that no spreadsheet runs as a formula."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Literal
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd

# A spreadsheet runs text that begins with one of these signs as a formula, and every user chooses the names of
# processes. In East Asian scripts the wide forms mean the same. Spreadsheets skip blanks and signs without a width
# before it. Where a comma is the decimal sign, the cells of a
# CSV end at semicolons, and quotes within one mean nothing: a formula may begin after each semicolon.
_BLANK = r"[\s\x00-\x1f\u00ad\u200b-\u200f\u2060-\u2064\ufeff]*"
_FORMULA = re.compile(rf"(?:^|(?<=;))(?={_BLANK}[=+\-@＝＋－＠﹦﹢﹣﹫])|^(?=[\t\r\n])")


def harmless(text: object) -> object:
    """Text that no spreadsheet runs as a formula: an apostrophe precedes what it would run."""
    return _FORMULA.sub("'", text) if isinstance(text, str) and _FORMULA.search(text) else text


def without_formulas(texts: Sequence[Any]) -> Sequence[Any]:
    """`harmless` of many texts."""
    # Few texts differ, and hardly any is a formula.
    safe = {text: harmless(text) for text in set(texts)}
    if all(text is one for text, one in safe.items()):
        return texts
    return list(map(safe.__getitem__, texts))


def iso(epoch: pd.Series, zone: ZoneInfo, unit: Literal["s", "ms"] = "s") -> pd.Series:
    """UTC seconds as ISO 8601 in `zone`, to the second or the millisecond, with its offset; None for None."""
    known = epoch.dropna().astype("float64")
    utc = (known * (1 if unit == "s" else 1000)).round().to_numpy("int64").astype(f"datetime64[{unit}]")
    aware = pd.DatetimeIndex(utc, tz="UTC").tz_convert(zone)
    local = aware.tz_localize(None).to_numpy(f"datetime64[{unit}]")
    # All at once: a long file has millions of times, and few offsets.
    texts = pd.Series(np.datetime_as_string(local, unit=unit), index=known.index, dtype="object")
    ahead = pd.Series((local - utc) // np.timedelta64(1, "s"), index=known.index)
    texts += ahead.map({seconds: _offset(seconds) for seconds in ahead.unique().tolist()}).astype("object")
    return texts.reindex(epoch.index).astype("object").where(epoch.notna(), None)


def iso_texts(epochs: Sequence[int | float | None], zone: ZoneInfo) -> list[str | None]:
    """`iso` of many times: an int, as ticks have, to the second, a float, as the kernel gives a start, to the
    millisecond."""
    texts: dict[int | float | None, str | None] = {None: None}
    # The rows of one tick have one time.
    distinct = set(epochs)
    units: dict[type, Literal["s", "ms"]] = {int: "s", float: "ms"}
    for kind, unit in units.items():
        found = [value for value in distinct if isinstance(value, kind)]
        if found:
            texts.update(zip(found, iso(pd.Series(found), zone, unit).tolist(), strict=True))
    return [texts[value] for value in epochs]


def _offset(seconds: int) -> str:
    """So many seconds ahead of UTC, as +02:00."""
    return datetime(2000, 1, 1, tzinfo=timezone(timedelta(seconds=seconds))).isoformat()[19:]
