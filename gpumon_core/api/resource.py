"""What all routes share: they read a query, choose a format, and answer with a problem where something is wrong.

An endpoint is a plain function that Starlette runs in a thread. A long answer is an iterator, and Starlette takes
its pieces in a thread, too, so that the server serves pages meanwhile. A table lists the parameters of a query
(safety.parameters). A problem is application/problem+json (RFC 9457).
"""

from __future__ import annotations

import base64
import itertools
import json
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

from gpumon_core.export.formats import FORMATS, served
from gpumon_core.recording import runtime
from gpumon_core.safety.masking import hide
from gpumon_core.safety.parameters import LARGEST, LAST_MOMENT, BadParameter, Parameter, one_of, read, whole, words
from gpumon_core.store import database
from gpumon_core.store.queries import gpu_selector
from gpumon_core.web import accept

if TYPE_CHECKING:
    import pandas as pd

    from gpumon_core.export.tables import Table
    from gpumon_core.store.queries.processes import Position

log = logging.getLogger(__name__)

ParameterValues = Mapping[str, Any]
Schema = Mapping[str, Any]
# The formats of an answer: JSON, which every route has, and files.
MEDIA_TYPES = {"json": "application/json", **{name: one.media_type for name, one in served().items()}}
PROBLEM = "application/problem+json"
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Vary": "Accept"}
MOST_ROWS = 1000

FORMAT = Parameter("format", "The answer's format; without it, what Accept prefers.", one_of(*MEDIA_TYPES))
PAGING = (
    Parameter("limit", "How many rows an answer has at most.", whole(1, MOST_ROWS), default=100, only=("json",)),
    Parameter(
        "cursor", "Where to go on: `next` of the answer before, with the same filters.", words(), only=("json",)
    ),
)


@dataclass(frozen=True, slots=True)
class Resource:
    """A route: what it is for, what it takes, and what answers it.

    schema: what its JSON is, as JSON Schema. example: a query to show. replaces: the file of the original with
    the same content. reads: whether it reads the database; otherwise it gets None. takes_turns: whether its answer
    may be long, so that it waits for its turn (web.turns).
    """

    path: str
    summary: str
    parameters: tuple[Parameter, ...]
    answer: Callable[[Request, ParameterValues, Any], Response]
    schema: Callable[[], Schema]
    example: str = ""
    replaces: str = ""
    reads: bool = True
    takes_turns: bool = False

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of its formats."""
        return tuple(MEDIA_TYPES) if FORMAT in self.parameters else ("json",)

    def endpoint(self, request: Request) -> Response:
        """The answer, or a problem."""
        try:
            values = read(self.parameters, request.query_params.multi_items())
            if FORMAT in self.parameters:
                values["format"] = values["format"] or preferred(request.headers.getlist("accept"))
                self._check(request, values["format"])
            engine = _engine() if self.reads else None
            if engine is not None and values.get("gpu"):
                values["gpu"] = _gpu_ids(engine, values["gpu"])
            return self.answer(request, values, engine)
        except BadParameter as error:
            return problem(HTTPStatus.BAD_REQUEST, str(error), error.name)
        except ResourceMissing as error:
            return problem(HTTPStatus.NOT_FOUND, str(error), error.name)
        except NoDatabase as error:
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            # The driver's message has the reason, but neither the query nor the password.
            why = hide(" ".join(str(getattr(error, "orig", None) or error).split()))
            log.warning("%s cannot be answered: the database says %s", self.path, why)
            detail = f"The database cannot be read ({why}). Try again, or look at the System page."
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, detail)

    def _check(self, request: Request, chosen: str) -> None:
        for one in self.parameters:
            if one.only and chosen not in one.only and one.name in request.query_params:
                why = f"“{one.name}” is for {' and '.join(one.only)} alone: {chosen} has all rows."
                raise BadParameter(one.name, why)


class NoDatabase(Exception):
    """The database does not exist yet."""


class ResourceMissing(Exception):
    """What is asked for does not exist; `name` is the parameter that asks for it, if one does."""

    def __init__(self, why: str, name: str | None = None) -> None:
        super().__init__(why)
        self.name = name


def _engine() -> Engine:
    engine = runtime.engine()
    path = database.file_of(str(engine.url))
    # SQLite would create a missing file.
    if path is not None and not path.is_file():
        raise NoDatabase("Nothing has been recorded yet: the database comes with the first sample.")
    return engine


def _gpu_ids(engine: Engine, given: str | tuple[str, ...]) -> int | tuple[int, ...]:
    """The ids of the GPUs that a query names, as many as it may name. Raises BadParameter, ResourceMissing."""
    named = gpu_selector.known(engine)
    texts = (given,) if isinstance(given, str) else given
    try:
        ids = tuple(dict.fromkeys(gpu_selector.find(text, named, "id").id for text in texts))
    except gpu_selector.AmbiguousGpu as error:
        raise BadParameter("gpu", f"{error}.") from error
    except gpu_selector.UnknownGpu as error:
        sentence = str(error)
        raise ResourceMissing(f"{sentence[0].upper()}{sentence[1:]}.", "gpu") from error
    return ids[0] if isinstance(given, str) else ids


def problem(
    status: HTTPStatus, detail: str, parameter: str | None = None, headers: Mapping[str, str] = HEADERS
) -> Response:
    """An answer that says what is wrong, as RFC 9457 has it, and which parameter causes it."""
    answer = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail}
    return JSONResponse(
        answer if parameter is None else {**answer, "parameter": parameter}, status.value, headers, PROBLEM
    )


PROBLEM_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "const": "about:blank"},
        "title": {"type": "string", "description": "The status in words."},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What is wrong, and what to do about it."},
        "parameter": {"type": "string", "description": "The parameter of the query that is wrong, if one is."},
    },
    "required": ["type", "title", "status", "detail"],
    "additionalProperties": False,
}


def preferred(headers: Iterable[str]) -> str:
    """The format that the Accept headers of a request prefer; JSON where they name none that there is."""
    chosen = accept.preferred(headers, MEDIA_TYPES.values())
    return next((name for name, media_type in MEDIA_TYPES.items() if media_type == chosen), "json")


def as_json(answer: Any) -> Response:
    """Plain values as JSON."""
    return JSONResponse(answer, headers=HEADERS)


def listed(name: str, more: Mapping[str, Any], items: Iterable[Iterable[str]]) -> Response:
    """A JSON object of any length: `more`, and under `name` the items, each as pieces of its own JSON text, one of
    which is in memory at a time."""

    def chunks() -> Iterator[bytes]:
        yield f"{written(more)[:-1]}{',' if more else ''}{written(name)}:[".encode()
        for number, item in enumerate(items):
            if number:
                yield b","
            for piece in item:
                yield piece.encode()
        yield b"]}"

    return streamed(chunks(), HEADERS, MEDIA_TYPES["json"])


def written(value: Any) -> str:
    """Plain values as JSON text."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def streamed(chunks: Iterator[bytes], headers: Mapping[str, str], media_type: str) -> Response:
    """Bytes as they come. The first two pieces are read before the answer begins: what fails at once becomes a
    problem, and not an answer that breaks off."""
    begun = list(itertools.islice(chunks, 2))
    return StreamingResponse(itertools.chain(begun, chunks), headers=headers, media_type=media_type)


def file(
    request: Request,
    values: ParameterValues,
    table: Table,
    pieces: Iterable[pd.DataFrame],
    name: str,
    total: int | None,
) -> Response:
    """A table as a file in the format of the query, with all rows. `total` is how many there are,
    where known beforehand."""
    kind, zone = FORMATS[values["format"]], values["tz"]
    chunks = iter(()) if request.method == "HEAD" else table.write(kind.name, pieces, zone)
    named = f"gpumon-{name}-{datetime.now(zone):%Y%m%d-%H%M%S}{kind.suffixes[0]}"
    headers = {**HEADERS, "Content-Disposition": f'attachment; filename="{named}"'}
    if total is not None:
        headers["X-Total-Rows"] = str(total)
    return streamed(chunks, headers, kind.media_type)


def cursor(at: Position) -> str:
    """A position as a text for clients, which return it unread."""
    return base64.urlsafe_b64encode(f"{at[0]}.{at[1]}".encode()).decode().rstrip("=")


def position(text: str) -> Position:
    """The position of a cursor. Raises BadParameter for another text."""
    try:
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("ascii")
        found = re.fullmatch("([0-9]{1,12})[.]([0-9]{1,10})", decoded)
    except ValueError:
        found = None
    at = (int(found[1]), int(found[2])) if found else (0, 0)
    # Python's base64 ignores characters that do not belong into it.
    if at[0] > LAST_MOMENT or at[1] > LARGEST or cursor(at) != text:
        raise BadParameter("cursor", "“cursor” must be the `next` of an answer.")
    return at


def after(values: ParameterValues) -> Position | None:
    """The position after which the query continues; None for the beginning. Raises BadParameter."""
    return None if values["cursor"] is None else position(values["cursor"])


def page_schema(name: str, row: Schema, more: Mapping[str, Schema] | None = None) -> Schema:
    """The JSON Schema of a page of rows."""
    return object_schema(
        {
            **(more or {}),
            name: {"type": "array", "items": row},
            "total": {"type": "integer", "description": "How many rows there are on all pages."},
            "next": {"type": ["string", "null"], "description": "The cursor of the next page; null on the last."},
        }
    )


def object_schema(properties: Mapping[str, Schema]) -> Schema:
    """The JSON Schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


UNITS_SCHEMA: Schema = {
    "type": "object",
    "additionalProperties": {"type": "string"},
    "description": "The unit of each number that has one, by its key.",
}
