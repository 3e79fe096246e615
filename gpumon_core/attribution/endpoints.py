"""Asks local servers what they serve: short HTTP requests that nobody but the inquirer's thread waits for."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpumon_core.attribution.files import read
from gpumon_core.attribution.records import Endpoint

if TYPE_CHECKING:
    from http.client import HTTPConnection

# Of one request: to connect or to hear something, and altogether.
SILENCE_S = 1.0
WHOLE_S = 3.0
LARGEST = 1 << 20
# So many models are named of a process that serves several.
MOST_MODELS = 4


def address_of(
    endpoint: Endpoint, pid: int, arguments: Sequence[str], environment: Mapping[str, str], proc: str = "/proc"
) -> tuple[str, int] | None:
    """Host and port of the server that a process is; None where no port is known."""
    port = _after_option(arguments, endpoint.option) if endpoint.option else None
    if port is None and endpoint.environment:
        # OLLAMA_HOST is a port, an address, or both.
        port = _port(environment.get(endpoint.environment, "").rstrip("/").rpartition(":")[2])
    if port is None:
        port = endpoint.port
    return None if port is None else (_host(pid, proc), port)


def _after_option(arguments: Sequence[str], option: str) -> int | None:
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            return _port(arguments[position + 1])
        if argument.startswith(f"{option}="):
            return _port(argument[len(option) + 1 :])
    return None


def _port(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65536 else None


def _host(pid: int, proc: str) -> str:
    """The loopback, or where the process has a network of its own its address there."""
    try:
        if os.readlink(f"{proc}/{pid}/ns/net") == os.readlink(f"{proc}/self/ns/net"):
            return "127.0.0.1"
    except OSError:
        return "127.0.0.1"
    # Local addresses stand before "host LOCAL" in the routing table: proc_pid_net(5), net/ipv4/fib_trie.c.
    before = ""
    for line in (read(f"{proc}/{pid}/net/fib_trie") or b"").decode("ascii", "replace").splitlines():
        if "host LOCAL" in line:
            if before and not before.startswith("127."):
                return before
        elif "|--" in line:
            before = line.rpartition(" ")[2]
    return "127.0.0.1"


def get(host: str, port: int, path: str) -> Any:
    """The JSON at http://host:port/path. Raises OSError and ValueError."""
    # Imported by those who have somebody to ask: it is a megabyte and a half.
    from http.client import HTTPConnection

    return _ask(HTTPConnection(host, port, timeout=SILENCE_S), path)


def get_over_socket(socket_path: str, path: str) -> Any:
    """The JSON at a path behind a Unix socket, as container engines offer it. Raises OSError and ValueError."""
    from http.client import HTTPConnection

    connection = HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(SILENCE_S)
    try:
        connection.sock.connect(socket_path)
    except OSError:
        connection.close()
        raise
    return _ask(connection, path)


def _ask(connection: HTTPConnection, path: str) -> Any:
    from http.client import OK, HTTPException

    ends = time.monotonic() + WHOLE_S
    try:
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
        connection.close()
    return json.loads(b"".join(parts))


def values_at(answer: Any, way: str) -> list[Any]:
    """What stands in a JSON document at a way such as "data.0.id" or "models.*.name"."""
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
