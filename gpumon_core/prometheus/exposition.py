"""/metrics for Prometheus: its text format or OpenMetrics, rendered once for each tick and sent to whoever asks.

Everything comes from memory: a scrape asks neither the driver nor the database.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterable, Mapping

from prometheus_client import exposition
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.utils import floatToGoString
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gpumon_core.prometheus.families import Families, collect
from gpumon_core.prometheus.scrape_data import ScrapeData
from gpumon_core.recording import runtime
from gpumon_core.recording.health import fresh_within_s
from gpumon_core.web import accept

PATH = "/metrics"
TEXT, OPENMETRICS = exposition.CONTENT_TYPE_PLAIN_0_0_4, openmetrics.CONTENT_TYPE_LATEST
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})


def render(families: Families, as_openmetrics: bool) -> bytes:
    """The exposition, as OpenMetrics or in Prometheus's text format.

    Line for line it is what the client library writes (a test holds it to that), in a fraction of the time: a
    GPU's labels are written out once, not once for each of its sixty series. Only DCGM's counters differ. The
    library calls every counter ..._total, and DCGM's exporter none: to the library they are families without a
    type. The text format then says counter. OpenMetrics allows no counter without _total: there they have no type.
    """
    texts: dict[int, str] = {}
    lines: list[str] = []
    for family in families.collected:
        name, kind = family.name, family.type
        if not as_openmetrics:
            name += "_total" if kind == "counter" else ""
            kind = "counter" if kind == "unknown" else kind
        lines.append(f"# HELP {name} {family.documentation}\n# TYPE {name} {kind}\n")
        for sample in family.samples:
            labels = texts.get(id(sample.labels))
            if labels is None:
                labels = texts[id(sample.labels)] = _written(sample.labels)
            value = floatToGoString(sample.value)  # type: ignore[no-untyped-call]
            lines.append(f"{sample.name}{labels} {value}\n")
    if as_openmetrics:
        lines.append("# EOF\n")
    return "".join(lines).encode()


def _written(labels: Mapping[str, str]) -> str:
    """Labels in the text format, behind the name of a series."""
    pairs = (f'{name}="{text.translate(_ESCAPES)}"' for name, text in sorted(labels.items()))
    return f"{{{','.join(pairs)}}}"


def scrape_data() -> ScrapeData:
    """What a scrape reports now, from memory."""
    settings, latest = runtime.settings(), runtime.latest_tick()
    is_fresh = latest is not None and time.monotonic() - latest.at <= fresh_within_s(settings.interval)
    return ScrapeData(
        host=settings.host_name,
        state=runtime.state(),
        counters=runtime.counters(),
        interval_s=settings.interval,
        processes=settings.metrics_processes,
        latest=latest,
        is_fresh=is_fresh,
    )


class ExpositionCache:
    """The exposition in each format: rendered when it is first asked for, and again when there is other data."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._data: ScrapeData | None = None
        self._families = Families(())
        self._bodies: dict[tuple[bool, bool], bytes] = {}

    def families(self, now: ScrapeData) -> Families:
        """The families that have samples."""
        with self._guard:
            return self._of(now)

    def body(self, now: ScrapeData, as_openmetrics: bool, zipped: bool) -> bytes:
        """The exposition, as it is or compressed."""
        # Scrapes that come together wait for the one that renders.
        with self._guard:
            families = self._of(now)
            for packed in (False, True) if zipped else (False,):
                if (as_openmetrics, packed) not in self._bodies:
                    made = (
                        compress(self._bodies[as_openmetrics, False])
                        if packed
                        else render(families, as_openmetrics)
                    )
                    self._bodies[as_openmetrics, packed] = made
            return self._bodies[as_openmetrics, zipped]

    def _of(self, now: ScrapeData) -> Families:
        if self._data != now:
            self._data, self._families, self._bodies = now, collect(now), {}
        return self._families


def compress(body: bytes) -> bytes:
    """Fast rather than small: label sets that repeat shrink to a twentieth all the same."""
    return gzip.compress(body, compresslevel=1, mtime=0)


cache = ExpositionCache()


def wants_openmetrics(headers: Iterable[str]) -> bool:
    """Whether a client's Accept would rather have OpenMetrics 1.0 than the text format."""
    return accept.preferred(headers, (TEXT, OPENMETRICS)) == OPENMETRICS


def wants_gzip(headers: Iterable[str]) -> bool:
    """Whether a client's Accept-Encoding takes gzip, and would not rather have the body as it is."""
    return accept.preferred(headers, ("gzip", "identity")) == "gzip"


def metrics(request: Request) -> Response:
    """The exposition; `name[]` names the only families that are wanted."""
    as_openmetrics = wants_openmetrics(request.headers.getlist("accept"))
    zipped = wants_gzip(request.headers.getlist("accept-encoding"))
    names = frozenset(request.query_params.getlist("name[]"))
    now = scrape_data()
    if names:
        body = render(cache.families(now).named(names), as_openmetrics)
        body = compress(body) if zipped else body
    else:
        body = cache.body(now, as_openmetrics, zipped)
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Vary": "Accept, Accept-Encoding"}
    if zipped:
        headers["Content-Encoding"] = "gzip"
    media_type = OPENMETRICS if as_openmetrics else TEXT
    return Response(body, headers=headers | {"Content-Type": media_type})


ROUTES = [Route(PATH, metrics, methods=["GET"])]
