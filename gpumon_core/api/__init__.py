"""The routes for machines: /api/v1, as JSON or as files of any length, and what describes them.

The routes, their description and their documentation follow from RESOURCES.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gpumon_core.api import gpus, history, openapi, original, processes, usage
from gpumon_core.api.resource import HEADERS, MEDIA_TYPES, PROBLEM, Resource, as_json, cursor, problem
from gpumon_core.web import turns

__all__ = ["MEDIA_TYPES", "PROBLEM", "RESOURCES", "ROUTES", "cursor"]

RESOURCES: tuple[Resource, ...] = (
    *gpus.RESOURCES,
    *processes.RESOURCES,
    *history.RESOURCES,
    *usage.RESOURCES,
    *original.RESOURCES,
    Resource(
        openapi.PATH,
        "This description, as OpenAPI 3.1.",
        (),
        lambda *_: as_json(openapi.document(RESOURCES)),
        lambda: {"type": "object", "required": ["openapi", "info", "paths"]},
        reads=False,
    ),
)
PATHS = {one.path for one in RESOURCES}


class _Elsewhere:
    """Every other path below /api/v1. An ASGI app, because Starlette calls a function for GET alone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _elsewhere(Request(scope))(scope, receive, send)


def _elsewhere(request: Request) -> Response:
    """The answer that there is no such route, or none with this method."""
    if f"/api/v1/{request.path_params.get('rest')}" in PATHS:
        detail = "Nothing can be changed here: ask with GET or HEAD."
        return problem(HTTPStatus.METHOD_NOT_ALLOWED, detail, headers={**HEADERS, "Allow": "GET, HEAD"})
    return problem(HTTPStatus.NOT_FOUND, f"There is nothing here: {openapi.PATH} says what there is.")


ROUTES = [
    *(
        Route(
            one.path,
            one.endpoint,
            methods=["GET"],
            middleware=[Middleware(turns.InTurn)] if one.takes_turns else None,
        )
        for one in RESOURCES
    ),
    *(Route(path, _Elsewhere()) for path in ("/api/v1", "/api/v1/{rest:path}")),
]
