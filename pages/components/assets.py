"""Files that the pages' components load from this server."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# Plotly's own build with lines and bars only, which is all that the pages draw. It is a quarter of the library in
# the plotly package, and of the same version (from the package plotly.js-basic-dist-min). The address contains the
# version, so that a browser may cache it forever, and is relative to that of a page, so that a proxy may serve
# everything below a path.
PLOTLY_JS = Path(__file__).parent / "vendor" / "plotly-basic-4.1.1.min.js"
PLOTLY_URL = f"assets/{PLOTLY_JS.name}"
_FOREVER = "public, max-age=31536000, immutable"


@lru_cache(maxsize=1)
def plotly_js() -> bytes:
    """The library, compressed to a third of its size."""
    return gzip.compress(PLOTLY_JS.read_bytes(), 6)


def _serve(request: Request) -> Response:
    headers = {"Cache-Control": _FOREVER, "X-Content-Type-Options": "nosniff", "Vary": "Accept-Encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(plotly_js(), media_type="text/javascript", headers={**headers, "Content-Encoding": "gzip"})
    return Response(PLOTLY_JS.read_bytes(), media_type="text/javascript", headers=headers)


ROUTES = [Route(f"/{PLOTLY_URL}", _serve)]
