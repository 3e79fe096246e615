"""The routes for machines: /api/v1, as JSON or as files of any length.

An endpoint is a plain function, which Starlette runs in a thread, and a file is an iterator that it asks there for
one piece after the other: pages are served meanwhile. What a query takes is a table (export.parameters); what is
wrong with one is told as application/problem+json (RFC 9457).
"""

from __future__ import annotations

import base64
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gpumon_core import runtime
from gpumon_core.export.parameters import (
    LARGEST,
    LAST_MOMENT,
    MOMENT,
    TZ,
    BadParameter,
    Parameter,
    one_of,
    read,
    whole,
    words,
)
from gpumon_core.store import database

if TYPE_CHECKING:
    from gpumon_core.store.processes import Position, ProcessFilter

log = logging.getLogger(__name__)

Values = Mapping[str, Any]
# What each format is called in Content-Type.
MEDIA_TYPES = {"json": "application/json", "csv": "text/csv", "parquet": "application/vnd.apache.parquet"}
# Accept also names families of them.
_ACCEPTED = {media_type: name for name, media_type in MEDIA_TYPES.items()} | {
    "text/*": "csv",
    "application/*": "json",
    "*/*": "json",
}
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Vary": "Accept"}
MOST_ROWS = 1000

PROCESS_FILTERS = (
    Parameter("from", "Processes that were seen at this time or later.", MOMENT),
    Parameter("to", "Processes that were seen at this time or earlier.", MOMENT),
    Parameter("gpu", "Processes that were on this GPU, by gpumon's id of it.", whole(1, LARGEST), many=True),
    Parameter("user", "Processes of this user.", words(), many=True),
    Parameter(
        "container",
        "Processes in this container, by pod, name, or the first 12 digits of its id.",
        words(),
        many=True,
    ),
    Parameter("workload", "Processes of this kind of workload, such as vLLM.", words(), many=True),
    Parameter("model", "Processes that serve this model.", words(), many=True),
    Parameter(
        "type",
        "Processes that compute (C), draw (G), or share a GPU through MPS (M).",
        one_of("C", "G", "M"),
        many=True,
    ),
    Parameter("state", "Processes that are on a GPU now, or no longer.", one_of("running", "ended"), many=True),
    Parameter("min_memory_mib", "Processes that held at least so much memory, in MiB.", whole(0, LARGEST)),
    Parameter(
        "min_lifetime_s", "Processes that were seen for at least so long, in seconds.", whole(0, LAST_MOMENT)
    ),
    Parameter("q", "A part of the name or of the command line, in any case, or the PID.", words(0), default=""),
)
FORMAT = Parameter("format", "The answer's format; without it, what Accept prefers.", one_of(*MEDIA_TYPES))
PAGING = (
    Parameter("limit", "How many rows an answer has at most.", whole(1, MOST_ROWS), default=100, only=("json",)),
    Parameter(
        "cursor", "Where to go on: `next` of the answer before, with the same filters.", words(), only=("json",)
    ),
)


@dataclass(frozen=True, slots=True)
class Resource:
    """A route: what it is for, what it takes, the formats it has, and what answers it."""

    path: str
    summary: str
    parameters: tuple[Parameter, ...]
    answer: Callable[[Request, Values, Engine], Response]

    def endpoint(self, request: Request) -> Response:
        """The answer, or what is in its way."""
        try:
            values = read(self.parameters, request.query_params.multi_items())
            values["format"] = values["format"] or preferred(request.headers.getlist("accept"))
            self._check(request, values["format"])
            return self.answer(request, values, _engine())
        except BadParameter as error:
            return problem(HTTPStatus.BAD_REQUEST, str(error), parameter=error.name)
        except NoDatabase as error:
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            # The driver's own words have the reason, and neither the query nor the password.
            why = " ".join(str(getattr(error, "orig", None) or error).split())
            log.warning("%s cannot be answered: the database says %s", self.path, why)
            detail = f"The database cannot be read ({why}). Try again, or look at the System page."
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, detail)

    def _check(self, request: Request, chosen: str) -> None:
        for one in self.parameters:
            if one.only and chosen not in one.only and one.name in request.query_params:
                why = f"“{one.name}” is for {' and '.join(one.only)} alone: {chosen} has all rows."
                raise BadParameter(one.name, why)


class NoDatabase(Exception):
    """There is no database to be read yet."""


def _engine() -> Engine:
    engine = runtime.engine()
    path = database.file_of(str(engine.url))
    # To connect to a file that does not exist makes an empty one.
    if path is not None and not path.is_file():
        raise NoDatabase("Nothing has been recorded yet: the database comes with the first sample.")
    return engine


def problem(status: HTTPStatus, detail: str, **more: str) -> Response:
    """What is wrong, as RFC 9457 has it."""
    answer = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail, **more}
    return JSONResponse(answer, status.value, HEADERS, "application/problem+json")


def preferred(accept: Iterable[str]) -> str:
    """The format that the Accept headers of a request prefer; JSON where they name none that there is."""
    best, most = "json", 0.0
    for part in ",".join(accept).split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weights = [piece[2:] for piece in parameters if re.fullmatch(r"q=[01](\.\d{0,3})?", piece, re.ASCII)]
        weight = float(weights[0]) if weights else 1.0
        if media_type in _ACCEPTED and weight > most:
            best, most = _ACCEPTED[media_type], weight
    return best


def process_history(request: Request, values: Values, engine: Engine) -> Response:
    """The ledger's rows that the filters leave, newest first."""
    # What reads the database needs pandas, which the server loads once it has answered its first visitor.
    from gpumon_core.store import processes

    wanted = process_filter(values)
    if values["format"] != "json":
        return _file(request, values, engine, wanted)
    from gpumon_core.export.processes import plain_rows

    after = None if values["cursor"] is None else position(values["cursor"])
    limit = values["limit"]
    total = processes.count(engine, wanted)
    # One more than asked for tells whether there is more.
    frame = processes.page(engine, wanted, limit + 1, after)
    shown = frame.head(limit)
    following = cursor(processes.position(shown)) if len(frame) > limit else None
    rows = plain_rows(shown, values["tz"])
    return JSONResponse({"processes": rows, "total": total, "next": following}, headers=HEADERS)


def process_filter(values: Values) -> ProcessFilter:
    """What PROCESS_FILTERS choose. Raises BadParameter."""
    from gpumon_core.store.processes import ProcessFilter

    start, end = values["from"], values["to"]
    if start is not None and end is not None and start > end:
        raise BadParameter("to", "“to” must not be earlier than “from”.")
    return ProcessFilter(
        start=start,
        end=end,
        gpu_ids=values["gpu"],
        users=values["user"],
        containers=values["container"],
        programs_with=tuple((name, values[name]) for name in ("workload", "model") if values[name]),
        kinds=values["type"],
        states=values["state"],
        min_memory_mib=values["min_memory_mib"],
        min_lifetime_s=values["min_lifetime_s"],
        text=values["q"],
    )


def _file(request: Request, values: Values, engine: Engine, wanted: ProcessFilter) -> Response:
    from gpumon_core.export.processes import csv_chunks, parquet_chunks
    from gpumon_core.store import processes

    total = processes.count(engine, wanted)
    chunks: Iterator[bytes] = iter(())
    if request.method != "HEAD":
        pages = processes.pages(engine, wanted)
        # Read before the answer begins: what fails at once is told as a problem, not as a file that breaks off.
        pages = itertools.chain(list(itertools.islice(pages, 1)), pages)
        chunks = csv_chunks(pages, values["tz"]) if values["format"] == "csv" else parquet_chunks(pages)
    stamp = f"{datetime.now(values['tz']):%Y%m%d-%H%M%S}"
    named = f'attachment; filename="gpumon-processes-{stamp}.{values["format"]}"'
    headers = {**HEADERS, "Content-Disposition": named, "X-Total-Rows": str(total)}
    return StreamingResponse(chunks, headers=headers, media_type=MEDIA_TYPES[values["format"]])


def cursor(at: Position) -> str:
    """A position as clients hand it back, without a meaning to them."""
    return base64.urlsafe_b64encode(f"{at[0]}.{at[1]}".encode()).decode().rstrip("=")


def position(text: str) -> Position:
    """The position of a cursor. Raises BadParameter for another text."""
    try:
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii")
        found = re.fullmatch("([0-9]{1,12})[.]([0-9]{1,10})", decoded)
    except ValueError:
        found = None
    at = (int(found[1]), int(found[2])) if found else (0, 0)
    # base64 is read with much that does not belong into it.
    if at[0] > LAST_MOMENT or at[1] > LARGEST or cursor(at) != text:
        raise BadParameter("cursor", "“cursor” must be the `next` of an answer.")
    return at


RESOURCES = (
    Resource(
        "/api/v1/processes/history",
        "Every process that was seen on a GPU, newest first.",
        (*PROCESS_FILTERS, TZ, FORMAT, *PAGING),
        process_history,
    ),
)
ROUTES = [Route(one.path, one.endpoint, methods=["GET"]) for one in RESOURCES]
