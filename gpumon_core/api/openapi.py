"""The description of the routes, as OpenAPI 3.1. It follows from their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpumon_core import __version__
from gpumon_core.api.resource import MEDIA_TYPES, PROBLEM, PROBLEM_SCHEMA, Resource
from gpumon_core.export.formats import FORMATS
from gpumon_core.safety.parameters import MOST_VALUES, UTC_ZONE, Parameter

PATH = "/api/v1/openapi.json"
DESCRIPTION = (
    "What gpumon has recorded: GPUs, processes, history, use and models. Times are ISO 8601 in `tz`; what is not "
    "known is null. docs/api.md has examples."
)
# Why a route does not answer, by status.
PROBLEMS = {
    "400": "A parameter of the query is wrong: `parameter` names it, `detail` says what it must be.",
    "404": "There is no such GPU.",
    "405": "The method is neither GET nor HEAD.",
    "429": "Too many long answers are being made: come again after `Retry-After` seconds.",
    "503": "Nothing has been recorded yet, or the database cannot be read.",
}


def document(resources: Sequence[Resource]) -> dict[str, Any]:
    """The routes' description."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "gpumon", "version": __version__, "description": DESCRIPTION},
        # Relative to where this document is: a proxy may serve all of this in a folder.
        "servers": [{"url": "../.."}],
        "paths": {one.path: {"get": _operation(one)} for one in resources},
        "components": {"schemas": {"Problem": PROBLEM_SCHEMA}},
    }


def _operation(resource: Resource) -> dict[str, Any]:
    problems = {
        status: text
        for status, text in PROBLEMS.items()
        if (status != "404" or _names_gpus(resource)) and (status != "429" or resource.takes_turns)
    }
    return {
        "operationId": name(resource.path),
        "summary": resource.summary,
        "parameters": [_parameter(one) for one in resource.parameters],
        "responses": {
            "200": {
                "description": "The answer.",
                "content": {MEDIA_TYPES[one]: {"schema": _schema(resource, one)} for one in resource.formats},
            },
            **{
                status: {
                    "description": text,
                    "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
                }
                for status, text in problems.items()
            },
        },
    }


def name(path: str) -> str:
    """The name of a route for programs: processes_history."""
    return path.removeprefix("/api/v1/").replace("/", "_").replace(".", "_")


def _names_gpus(resource: Resource) -> bool:
    """Whether its query can name a GPU that does not exist."""
    return any(one.name == "gpu" for one in resource.parameters)


def _schema(resource: Resource, kind: str) -> Mapping[str, Any]:
    if kind == "json":
        return resource.schema()
    return {"type": "string"} if FORMATS[kind].is_text else {"type": "string", "format": "binary"}


def _parameter(one: Parameter) -> dict[str, Any]:
    schema: dict[str, Any] = dict(one.kind.schema)
    if one.default is not None:
        # JSON has the name of a zone.
        schema["default"] = UTC_ZONE.key if one.default is UTC_ZONE else one.default
    described = {"name": one.name, "in": "query", "description": says(one)}
    if not one.many:
        return {**described, "schema": schema}
    return {
        **described,
        "schema": {"type": "array", "items": schema, "maxItems": MOST_VALUES},
        "style": "form",
        "explode": True,
    }


def says(one: Parameter) -> str:
    """A parameter's description, with whether it is repeatable and which formats have it."""
    many = " Repeatable: any of its values holds." if one.many else ""
    return one.description + many + (f" In {' and '.join(one.only).upper()} alone." if one.only else "")
