"""What the pages' own components load from this server."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

import plotly
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# The library that the plotly package carries. Its address has its version, so that browsers may keep it for good,
# and is relative to that of a page, so that a proxy may serve all of this in a folder.
_PLOTLY_JS = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
PLOTLY_URL = f"assets/plotly-{plotly.__version__}.min.js"
_FOR_GOOD = "public, max-age=31536000, immutable"


@lru_cache(maxsize=1)
def plotly_js() -> bytes:
    """Plotly's own library, compressed: a third of its five megabytes."""
    return gzip.compress(_PLOTLY_JS.read_bytes(), 6)


def _serve(request: Request) -> Response:
    headers = {"Cache-Control": _FOR_GOOD, "X-Content-Type-Options": "nosniff", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(plotly_js(), media_type="text/javascript", headers={**headers, "Content-Encoding": "gzip"})
    return Response(_PLOTLY_JS.read_bytes(), media_type="text/javascript", headers=headers)


ROUTES = [Route(f"/{PLOTLY_URL}", _serve)]
