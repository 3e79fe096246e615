"""gpumon's own routes below the base path at which Streamlit serves its pages (server.baseUrlPath).

Streamlit prefixes its own routes alone. The pages' links to routes are relative, and so need them there, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send


class BasePath:
    """An ASGI middleware: a request below the base path for one of `routes` reaches that route."""

    def __init__(self, app: ASGIApp, base: str, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._prefix = f"/{base.strip('/')}" if base.strip("/") else ""
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, without the base path where it is for a route."""
        if self._prefix and scope["type"] == "http" and scope["path"].startswith(f"{self._prefix}/"):
            below = {**scope, "path": scope["path"].removeprefix(self._prefix)}
            if any(route.matches(below)[0] is not Match.NONE for route in self._routes):
                scope = below
        await self._app(scope, receive, send)
