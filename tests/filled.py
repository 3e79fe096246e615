"""Hours of simulated GPUs in a database, and a server that has the routes on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from rig import free_port
from starlette.applications import Starlette

from gpumon_core import api
from gpumon_core.settings import Settings
from gpumon_core.simulation.past import fill
from gpumon_core.store import database

# The simulation is the same at the same time. Late on a Tuesday several models were loaded.
NOW, HOURS = 1_795_563_514, 2


def filled(folder: Path) -> str:
    """The URL of a database with the two hours before NOW of four GPUs."""
    url = f"sqlite:///{folder / 'demo.db'}"
    engine = database.open_for_writing(url)
    fill(engine, Settings(interval=4, host_name="demo"), HOURS / 24, 4, None, lambda *_: None, NOW)
    engine.dispose()
    return url


@contextmanager
def serving() -> Iterator[int]:
    """The port of a server that has the routes for machines, and nothing else."""
    app = Starlette(routes=api.ROUTES)
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.config.port
    server.should_exit = True
    thread.join()
