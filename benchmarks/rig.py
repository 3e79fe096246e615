"""What the measuring scripts and the picture script share: ports, servers, Chromium and lines of results."""

from __future__ import annotations

import random
import shutil
import socket
import time
import urllib.request

CHROMIUM = shutil.which("chromium")
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# Below those that the kernel gives to connections, which come and go until a server listens (ip_local_port_range).
PORTS = range(10_000, 32_000)


def free_port() -> int:
    """A TCP port that nothing listens on, and that nobody is given by chance before a server has started."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def wait_for_server(port: int, path: str) -> None:
    """Until the server answers with 200. Raises RuntimeError after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"nothing answers on port {port}")


def say(what: str, figure: float, unit: str, limit: float, more: str = "") -> None:
    """One line of the result."""
    verdict = "within" if figure <= limit else "ABOVE"
    print(f"  {what:<44} {figure:8.2f} {unit:<3} {verdict} {limit:g} {unit}{more}", flush=True)
