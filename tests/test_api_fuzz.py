"""Whatever a client sends, the routes answer as their description says, and never with an error of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import quote

import pytest
from conftest import PATIENCE_S
from filled import filled, serving
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis import Case, GenerationMode, openapi
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from gpumon_core import api
from gpumon_core.api.resource import PROBLEM_SCHEMA, Resource
from gpumon_core.recording import runtime
from gpumon_core.store import database

CONFORMS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# The same examples each time: what fails here fails everywhere, and what passes is not luck.
STEADY = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
NAMES = sorted({one.name for resource in api.RESOURCES for one in resource.parameters})
HOSTILE = [
    *("", " ", "\0", "a\0b", "null", "undefined", "-1", "-0", "+1", "1e309", "NaN", "Infinity", "0x10", "1_000"),
    *(str(2**31), str(2**63), str(2**64), "9" * 400, "١", "１", "½", "\ud800", "\udfff\ud800", "%00", "%", "%%zz"),
    *("' OR 1=1 --", '";DROP TABLE gpus;--', "../../etc/passwd", "/etc/passwd", "{{7*7}}", "${7*7}", "<script>"),
    *("1970-01-01", "0001-01-01T00:00:00", "9999-12-31T23:59:59-23:59", "2026-03-29T02:30:00", "253402214399"),
    *(
        "0s",
        "1y",
        "9999y",
        "999999999999y",
        "Europe",
        "localtime",
        "posix/UTC",
        "right/UTC",
        "UTC\0",
        "=1+1",
        "x" * 5000,
    ),
]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where the routes are served, on a filled database."""
    engine = database.open_for_reading(filled(tmp_path_factory.mktemp("fuzz")))
    with pytest.MonkeyPatch.context() as patched, serving() as found:
        patched.setattr(runtime, "engine", lambda: engine)
        yield found


ROUTES_AND_MODES = [
    (one.path, mode)
    for one in api.RESOURCES
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if one.parameters or mode is GenerationMode.POSITIVE
]


@pytest.mark.parametrize(("path", "mode"), ROUTES_AND_MODES, ids=str)
def test_every_route_answers_as_the_served_description_says(port: int, path: str, mode: GenerationMode) -> None:
    base = f"http://127.0.0.1:{port}"
    described = openapi.from_url(f"{base}/api/v1/openapi.json")
    checks = CONFORMS if mode is GenerationMode.POSITIVE else [*CONFORMS, negative_data_rejection]

    @settings(STEADY, max_examples=12)
    @given(case=described[path]["GET"].as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        # The server under it hangs up on a request line that is longer than its buffer of 64 KiB.
        assume(len(case.as_curl_command()) < 60_000)
        case.call_and_validate(base_url=base, checks=checks, timeout=PATIENCE_S)

    ask()


def ask(port: int, target: str, **headers: str) -> tuple[int, str, bytes]:
    """Status, type and body of an answer to a request line as it is."""
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def holds(port: int, path: str, query: str) -> None:
    """An answer is what it should be, or a problem that names a parameter."""
    status, kind, body = ask(port, f"{path}?{query}")
    assert status in (200, 400, 404), body
    if status == 200:
        assert kind.split(";")[0] in api.MEDIA_TYPES.values()
        return
    assert kind == api.PROBLEM
    Draft202012Validator(PROBLEM_SCHEMA).validate(json.loads(body))
    assert "parameter" in json.loads(body)
    assert b"Traceback" not in body


def percent(text: str) -> str:
    """A text in a query, lone surrogates and all."""
    return quote(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("resource", api.RESOURCES, ids=lambda one: one.path)
def test_hostile_values_of_any_parameter_are_answered_or_refused(port: int, resource: Resource) -> None:
    for name in (one.name for one in resource.parameters):
        for value in HOSTILE:
            holds(port, resource.path, f"{name}={percent(value)}")
    holds(port, resource.path, "&".join(f"{name}={percent(value)}" for name in NAMES for value in HOSTILE[:12]))


@settings(STEADY, max_examples=60)
@given(
    path=st.sampled_from(sorted(api.PATHS)),
    pairs=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(HOSTILE) | st.text(max_size=30)), max_size=6),
)
def test_any_texts_in_any_parameters_are_answered_or_refused(
    port: int, path: str, pairs: list[tuple[str, str]]
) -> None:
    holds(port, path, "&".join(f"{name}={percent(value)}" for name, value in pairs))


@settings(STEADY, max_examples=40)
@given(path=st.sampled_from(sorted(api.PATHS)), query=st.binary(max_size=60))
def test_any_bytes_as_a_query_are_answered_or_refused(port: int, path: str, query: bytes) -> None:
    text = quote(query, safe="%&=+;?/:@!$'()*,~")
    holds(port, path, text)


@pytest.mark.parametrize("resource", api.RESOURCES, ids=lambda one: one.path)
def test_a_query_of_100_kilobytes_is_refused(port: int, resource: Resource) -> None:
    for query in ("q=" + "x" * 100_000, "x" * 100_000, "gpu=1&" * 17_000):
        # More than 64 kB of it the server does not even hand on.
        assert ask(port, f"{resource.path}?{query}")[0] in (400, 414)
    holds(port, resource.path, "q=" + "x" * 50_000)
    holds(port, resource.path, "&".join(["gpu=1"] * 5000))


@settings(STEADY, max_examples=30)
@given(accept=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_any_accept_header_chooses_a_format(port: int, accept: str) -> None:
    status, kind, _ = ask(port, "/api/v1/usage", Accept=accept)
    assert status == 200
    assert kind.split(";")[0] in api.MEDIA_TYPES.values()
