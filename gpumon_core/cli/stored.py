"""The recorded history, for verbs that read it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import sqlalchemy as sa

from gpumon_core.cli import terminal
from gpumon_core.settings import Settings, mask_password
from gpumon_core.store import database
from gpumon_core.store.queries import gpu_selector

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


def url_of(settings: Settings) -> str:
    """The URL of the database that the settings mean. Raises Failure where nothing has been recorded."""
    url, demo = settings.database_of(settings.source), settings.demo_database_url
    path = database.file_of(url)
    if path is not None and not path.is_file():
        if settings.source == "auto" and database.exists(demo):
            terminal.say(f"{path} does not exist yet: this is the simulated history of {database.file_of(demo)}")
            return demo
        raise terminal.Failure(
            f"{path} does not exist yet: nothing has been recorded. Start gpumon with ./setup.sh run, or name "
            "another folder in GPUMON_DATA_DIR"
        )
    return url


@contextmanager
def history(settings: Settings, url: str | None = None) -> Iterator[Engine]:
    """An engine that reads it, or the one at `url`. Raises Failure where it cannot be read, in here or in the
    block."""
    url = url or url_of(settings)
    engine = database.open_for_reading(url)
    try:
        with engine.connect() as connection:
            found, wanted = database.revision(connection), database.head()
        if found is None:
            raise terminal.Failure(f"{_named(url)} is not a database of gpumon: look at GPUMON_DATABASE_URL")
        if found != wanted:
            remedy = (
                "start the recorder once, which brings it up to date"
                if found < wanted
                else "use that version of gpumon"
            )
            raise terminal.Failure(f"{_named(url)} has schema {found}, and this gpumon reads {wanted}: {remedy}")
        yield engine
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        why = " ".join(str(getattr(error, "orig", None) or error).split())
        remedy = (
            "move the file away, and gpumon starts a new one"
            if database.is_damage(error)
            else "look at what else uses it, and at GPUMON_DATABASE_URL"
        )
        raise terminal.Failure(f"{_named(url)} cannot be read ({why}): {remedy}") from error
    finally:
        engine.dispose()


def _named(url: str) -> str:
    return str(database.file_of(url) or mask_password(url))


# How a command line names a GPU: see store.queries.gpu_selector.
SPELLINGS = (
    "its index (3 or index:3), its UUID or the beginning of one, either with its host before it where that is "
    "needed (rack1/3), or gpumon's id of it (id:7)"
)


def add_gpu(parser: argparse.ArgumentParser) -> None:
    """The argument --gpu."""
    parser.add_argument(
        "--gpu",
        metavar="GPU",
        action="append",
        help=f"only this GPU or MIG instance (3:1): {SPELLINGS}; may be given several times",
    )


def gpu_ids(engine: Engine, wanted: Sequence[str] | None) -> tuple[int, ...] | None:
    """The ids of the GPUs that --gpu names; None where it is not given. Raises Usage."""
    if not wanted:
        return None
    named = gpu_selector.known(engine)
    try:
        return tuple(sorted({gpu_selector.find(text, named, "index").id for text in wanted}))
    except (gpu_selector.UnknownGpu, gpu_selector.AmbiguousGpu) as error:
        raise terminal.Usage(str(error)) from error
