"""The container's health: ends with 0 where /healthz answers 200, and says why where it does not."""

from __future__ import annotations

import http.client
import os
import sys


def main() -> int:
    """Ask the server of this container, past any proxy that the environment names."""
    port = int(os.environ.get("STREAMLIT_SERVER_PORT", "8081"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=8)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        print(answer.status, answer.read(4000).decode(errors="replace"))  # noqa: T201 - `docker inspect` shows it
    except (OSError, http.client.HTTPException) as error:
        print(f"nothing answers on port {port}: {error}")  # noqa: T201
        return 1
    return int(answer.status != http.HTTPStatus.OK)


if __name__ == "__main__":
    sys.exit(main())
