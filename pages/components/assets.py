"""What the pages' own components load from this server."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# The lines and bars of Plotly's library, which are all that the pages draw with: a quarter of the whole that the
# plotly package carries, and as much sooner there. It is Plotly's own build of the same version (from the package
# plotly.js-basic-dist-min). Its address has the version, so that browsers may keep it for good, and is relative to
# that of a page, so that a proxy may serve all of this in a folder.
PLOTLY_JS = Path(__file__).parent / "vendor" / "plotly-basic-4.1.1.min.js"
PLOTLY_URL = f"assets/{PLOTLY_JS.name}"
_FOR_GOOD = "public, max-age=31536000, immutable"


@lru_cache(maxsize=1)
def plotly_js() -> bytes:
    """The library, compressed to a third."""
    return gzip.compress(PLOTLY_JS.read_bytes(), 6)


def _serve(request: Request) -> Response:
    headers = {"Cache-Control": _FOR_GOOD, "X-Content-Type-Options": "nosniff", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(plotly_js(), media_type="text/javascript", headers={**headers, "Content-Encoding": "gzip"})
    return Response(PLOTLY_JS.read_bytes(), media_type="text/javascript", headers=headers)


ROUTES = [Route(f"/{PLOTLY_URL}", _serve)]
