"""The server: Streamlit's pages, the recorder as long as the server runs, and the routes for machines.

Start it with `streamlit run app.py`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

import streamlit as st
from sqlalchemy.exc import DBAPIError
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gpumon_core import api, logs
from gpumon_core.prometheus import exposition
from gpumon_core.recording import allocator, runtime
from gpumon_core.safety import log_limit
from gpumon_core.safety.masking import hide
from gpumon_core.settings import SettingsError, check_data_dir, unknown_variables
from gpumon_core.web import descriptors
from gpumon_core.web.base_path import BasePath
from gpumon_core.web.connections import Connections
from gpumon_core.web.request_limits import RequestLimits
from pages.components import assets, document, streamlit_private

log = logging.getLogger("gpumon_core.server")

# How long a failure of a page has the same reference, and how many failures have one.
REFERENCE_FOR_S, MOST_REFERENCES = 60.0, 100
_references: dict[log_limit.MessageKind, tuple[str, float]] = {}


def _prepare_pages() -> None:
    """Import what the first page needs, so that its viewer does not wait for it."""
    import gpumon_core.figures
    import gpumon_core.store.queries.frames
    import gpumon_core.store.queries.history  # noqa: F401

    assets.plotly_js()
    # The objects that exist now stay: Python need not look at them in each full collection. The first collection
    # frees garbage before that. The last one shows Python how few objects remain: by their number it decides when
    # the next full collection is due.
    gc.collect()
    gc.freeze()
    gc.collect()


@asynccontextmanager
async def lifespan(_: st.App) -> AsyncIterator[None]:
    """Record from the moment the server boots until it ends."""
    accepted.limit(asyncio.get_running_loop(), runtime.stop)
    await asyncio.to_thread(runtime.start)
    log.info("serving on http://%s:%s", st.get_option("server.address"), st.get_option("server.port"))
    threading.Thread(target=_prepare_pages, name="prepare-pages", daemon=True).start()
    try:
        yield
    finally:
        await asyncio.to_thread(runtime.stop)


def healthz(_: Request) -> JSONResponse:
    """The state of the recording as JSON; 503 where there is no fresh sample."""
    try:
        found = runtime.check_health()
    except DBAPIError as error:
        counts = runtime.counters()
        problem = runtime.state().recording
        answer = {
            "status": "stale",
            "recording_problem": hide(problem.reason if problem else str(error.orig)),
            "recorder": counts and asdict(counts),
        }
        return JSONResponse(answer, status_code=503)
    return JSONResponse(found.as_json(), status_code=200 if found.is_fresh else 503)


def show_script_error(error: Exception) -> bool:
    """A page's failure as one sentence for its viewer; the log has the rest under the same reference."""
    # By place, not by text: that may contain what the browser sent.
    kind = log_limit.place_of(error)
    reference, since = _references.get(kind, ("", 0.0))
    if time.monotonic() - since > REFERENCE_FOR_S:
        # A part that is drawn with every sample fails with every sample: the log has it once a minute.
        reference = secrets.token_hex(4)
        if len(_references) >= MOST_REFERENCES:
            _references.clear()
        _references[kind] = reference, time.monotonic()
        log.error("page error %s", reference, exc_info=error)
    st.error(
        f"This part of the page could not be drawn. The log says why, under the reference **{reference}**.",
        icon=":material/error:",
    )
    return True


def _configure() -> None:
    """Read the settings, or end with one line that says which is wrong."""
    try:
        settings = runtime.settings()
        if settings.record:
            check_data_dir(settings)
        logs.configure(settings.log_level, settings.log_file)
        log_limit.install()
    except SettingsError as error:
        sys.exit(f"gpumon: {error}")
    for sentence in unknown_variables():
        log.warning("%s", sentence)


# Before threads start: each would get an arena of its own.
allocator.limit_arenas()
_configure()
descriptors.raise_limit()
accepted = Connections()
routes = [Route("/healthz", healthz), *exposition.ROUTES, *api.ROUTES, *assets.ROUTES, *document.routes()]
app = st.App(
    "pages/main.py",
    lifespan=lifespan,
    routes=routes,
    middleware=[
        Middleware(RequestLimits, accepted=accepted, uploads=streamlit_private.UPLOADS),
        Middleware(BasePath, base=st.get_option("server.baseUrlPath"), routes=routes),
    ],
    on_script_error=show_script_error,
)
