"""Asks local servers what they serve, by short HTTP requests. Only the inquirer's thread waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpumon_core.attribution.files import socket_at
from gpumon_core.attribution.listeners import addresses
from gpumon_core.attribution.records import Endpoint
from gpumon_core.attribution.rules import option

if TYPE_CHECKING:
    from http.client import HTTPConnection

# The limits of a request: to connect or to get some bytes, and in all.
SILENCE_S = 1.0
WHOLE_S = 3.0
LARGEST = 1 << 20
PORTS = {"http": "80", "https": "443"}
# The words of servers for a model that they could load but have not.
NOT_LOADED = frozenset(
    {"unloaded", "not-loaded", "not_loaded", "sleeping", "loading", "downloading", "downloaded", "failed"}
)
# The most models to name for a process that serves several.
MOST_MODELS = 4


def address_of(
    endpoint: Endpoint, pid: int, arguments: Sequence[str], environment: Mapping[str, str], proc: str = "/proc"
) -> tuple[str, int] | None:
    """The host and port at which a process serves; None where no port is known."""
    port = port_behind(endpoint.option, arguments)
    if port is None and endpoint.environment:
        port = _port(environment.get(endpoint.environment, ""))
    if port is None:
        port = endpoint.port
    return None if port is None else (_host(pid, proc), port)


def port_behind(name: str | None, arguments: Sequence[str]) -> int | None:
    """The port that an option of a command line gives."""
    return _port(option(arguments, name) or "") if name else None


def _port(text: str) -> int | None:
    """The port in a text that is a port, an address with one, or a URL."""
    scheme, separator, place = text.rpartition("://")
    place = place.partition("/")[0]
    if place.isdecimal() and not separator:
        digits = place
    else:
        before, colon, digits = place.rpartition(":")
        # An IPv6 address has colons itself: [::]:11434.
        if not colon or (":" in before and not before.endswith("]")):
            digits = PORTS.get(scheme, "")
    return int(digits) if re.fullmatch("[0-9]{1,5}", digits) and 0 < int(digits) < 65536 else None


def _host(pid: int, proc: str) -> str:
    """The loopback address, or the address of the process in a network of its own."""
    try:
        if os.readlink(f"{proc}/{pid}/ns/net") == os.readlink(f"{proc}/self/ns/net"):
            return "127.0.0.1"
    except OSError:
        return "127.0.0.1"
    return next(iter(addresses(pid, proc)), "127.0.0.1")


def get(host: str, port: int, path: str) -> Any:
    """The JSON at http://host:port/path. Raises OSError and ValueError."""
    # Imported only when there is a server to ask: it takes 1.5 MB.
    from http.client import HTTPConnection

    return _ask(HTTPConnection(host, port, timeout=SILENCE_S), path)


def get_over_socket(socket_path: str, path: str) -> Any:
    """The JSON at a path of the server at a Unix socket, such as a container engine. Raises OSError and
    ValueError."""
    from http.client import HTTPConnection

    connection = HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(SILENCE_S)
    try:
        with socket_at(socket_path) as (place, owner):
            connection.sock.connect(place)
        if owner is not None and _peer(connection.sock) != owner:
            raise PermissionError("another user listens at a user's socket")
    except OSError:
        connection.close()
        raise
    return _ask(connection, path)


def _ask(connection: HTTPConnection, path: str) -> Any:
    from http.client import OK, HTTPException

    ends = time.monotonic() + WHOLE_S
    # Each wait has a limit, but a server that sends one byte at a time could cause any number of waits.
    last = None
    try:
        if connection.sock is None:
            connection.connect()
        last = threading.Timer(WHOLE_S, _cut, (connection.sock,))
        last.daemon = True
        last.start()
        connection.request("GET", path, headers={"Accept": "application/json", "Connection": "close"})
        answer = connection.getresponse()
        if answer.status != OK:
            raise OSError(f"HTTP status {answer.status}")
        parts, size = [], 0
        while part := answer.read1(65536):
            parts.append(part)
            size += len(part)
            if size > LARGEST or time.monotonic() > ends:
                raise OSError("an answer without end")
    except HTTPException as error:
        raise OSError(f"no HTTP: {error!r}") from error
    finally:
        if last is not None:
            last.cancel()
        connection.close()
    return json.loads(b"".join(parts))


def _peer(stream: socket.socket) -> int:
    """The user that listens at the other end of a Unix socket: SO_PEERCRED of socket(7)."""
    _, uid, _ = struct.unpack(
        "3i", stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    return int(uid)


def _cut(stream: socket.socket) -> None:
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)


def values_at(answer: Any, way: str) -> list[Any]:
    """The values in a JSON document at a path such as "data.0.id" or "models.*.name"."""
    found = [answer]
    for step in filter(None, way.split(".")):
        beyond: list[Any] = []
        for value in found:
            if step == "*":
                beyond += value if isinstance(value, list) else value.values() if isinstance(value, dict) else []
            elif isinstance(value, dict):
                beyond += [value[step]] if step in value else []
            elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                beyond.append(value[int(step)])
        found = beyond
    return found


def names_at(answer: Any, way: str) -> list[str]:
    """The texts among `values_at`, without the empty ones."""
    return [value for value in values_at(answer, way) if isinstance(value, str) and value.strip()]


def loaded_at(answer: Any, way: str) -> tuple[list[str], bool]:
    """The names of the loaded models at a path, and whether the answer says which are loaded: a router also lists
    models that it could load."""
    above, _, last = way.rpartition(".")
    found, says = [], False
    for entry in values_at(answer, above):
        says = says or _state(entry) is not None
        if is_loaded(entry):
            found += names_at(entry, last)
    return found, says


def is_loaded(entry: Any) -> bool:
    """Whether a server has loaded a model; True where it does not say."""
    return _state(entry) not in NOT_LOADED


def _state(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return None
    state = entry.get("state", entry.get("status"))
    if isinstance(state, dict):
        state = state.get("value")
    return state.lower() if isinstance(state, str) else None
