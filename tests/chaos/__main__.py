"""Runs it: `python -m tests.chaos`, or `python -m tests.chaos --seed 7 --minutes 20 --only fifo,vanish`."""

from __future__ import annotations

import argparse
import glob
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

TESTS = Path(__file__).resolve().parents[1]
# The root first: benchmarks/ has a module of the name of pages/.
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS.parent / "benchmarks")]

if TYPE_CHECKING:
    from .cluster import Cluster
    from .troubles import Trouble

APART = "GPUMON_CHAOS_APART"


def main() -> int:
    """0 where everything held that is promised."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="the same seed is the same schedule; by default a new one")
    parser.add_argument("--minutes", type=float, help="let troubles come for so long; by default each comes once")
    parser.add_argument("--only", metavar="NAMES", help="these troubles alone: names with a comma between two")
    parser.add_argument("--without", metavar="NAMES", help="all but these")
    parser.add_argument("--spare", type=int, default=0, help="so many more, by chance, where each comes once")
    parser.add_argument("--postgresql", action="store_true", help="let both record in one PostgreSQL database")
    parser.add_argument("--keep", action="store_true", help="leave the folder with logs and databases")
    parser.add_argument("--list", action="store_true", help="say which troubles there are")
    arguments = parser.parse_args()
    if _goes_apart():
        # Mounts of its own, which end with it.
        return subprocess.call(
            ["unshare", "--mount", "--fork", "--kill-child", sys.executable, "-m", "tests.chaos", *sys.argv[1:]],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, APART: "1"},
        )
    return _run(parser, arguments)


def _goes_apart() -> bool:
    if os.geteuid() != 0 or APART in os.environ:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from .cluster import cluster
    from .director import chosen

    kind = "postgresql" if arguments.postgresql else "sqlite"
    try:
        troubles = chosen(kind, arguments.only, arguments.without)
    except ValueError as error:
        parser.error(str(error))
    if arguments.list:
        sys.stdout.write("".join(f"{one.name}\n" for one in troubles))
        return 0
    if not arguments.postgresql:
        return _let_happen(arguments, troubles, None)
    try:
        with cluster() as server:
            return _let_happen(arguments, troubles, server)
    except RuntimeError as error:
        parser.error(str(error))


def _let_happen(arguments: argparse.Namespace, troubles: tuple[Trouble, ...], server: Cluster | None) -> int:
    from .account import judge
    from .director import Director
    from .programs import Failed
    from .world import World

    # What is made here lies beside what gpumon makes, which looks after its own.
    os.umask(0o077)
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    needs_clock = any(one.takes == "clock" for one in troubles)
    faketime = next(iter(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), None) if needs_clock else None
    folder = Path(tempfile.mkdtemp(prefix="gpumon-chaos-"))
    world = World(folder, seed, faketime, server)
    world.is_hurried = not arguments.minutes
    world.say(f"seed {seed}, in {folder}")
    director = Director(world, troubles)
    try:
        director.begin()
        director.run(
            director.until(arguments.minutes) if arguments.minutes else director.once_each(arguments.spare)
        )
        judge(world)
    except Failed as error:
        world.fail(str(error))
    finally:
        world.close(arguments.keep)
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    world.say(f"{len(world.events)} troubles, {len(world.failures)} failures, seed {seed}")
    for failure in world.failures:
        sys.stdout.write(f"FAILED {failure}\n")
    return 1 if world.failures else 0


if __name__ == "__main__":
    sys.exit(main())
