"""`top` on a pseudo-terminal: it fits, no name gets at the terminal, and the terminal is given back as it was."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cli import PROGRAM, gpumon, recorded_just_now, settings
from conftest import PATIENCE_S, ROOT
from fake_nvml import FakeNvml, environment

from gpumon_core.export.text_columns import width

OURS = re.compile(r"\x1b\[(\?1049[hl]|\?25[hl]|\?2026[hl]|2J|H|K|J|0m|33m|1;31m)")
COLOURS = re.compile(r"\x1b\[(0|33|1;31)m")
ENDED = "\x1b[0m\x1b[?25h\x1b[?1049l"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    recorded_just_now(folder)
    return folder


class Terminal:
    """A pseudo-terminal with `top` on it."""

    def __init__(self, environ: dict[str, str], columns: int, lines: int, *arguments: str) -> None:
        self.master, self.slave = os.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.slave)
        self.text = ""
        self.process = subprocess.Popen(
            [*PROGRAM, "top", *arguments],
            cwd=ROOT,
            env={**environ, "TERM": "xterm-256color"},
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            # Its own session, whose terminal this is: Ctrl-C and a new size reach it as signals.
            preexec_fn=lambda: os.login_tty(os.dup(0)),  # noqa: PLW1509 - nothing else runs here
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def until(self, done: Callable[[str], Any]) -> str:
        """All that was written, once it satisfies `done`."""
        deadline = time.monotonic() + PATIENCE_S
        while not done(self.text):
            assert time.monotonic() < deadline, repr(self.text[-2000:])
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 65536).decode()
        return self.text

    def frames(self) -> list[list[str]]:
        """Every picture as lines without our own sequences."""
        # A terminal adds a carriage return of its own to each line feed.
        pictures = self.text.replace("\r", "").split("\x1b[H")[1:]
        return [OURS.sub("", one.split("\x1b[J")[0]).splitlines() for one in pictures if "\x1b[J" in one]

    def key(self, key: str) -> None:
        os.write(self.master, key.encode())

    def end(self) -> int:
        """The exit status, of a program that has given the terminal back."""
        self.until(lambda text: text.endswith(ENDED))
        status = self.process.wait(timeout=PATIENCE_S)
        assert termios.tcgetattr(self.slave) == self.before
        assert "Traceback" not in self.text
        return status


@contextmanager
def top(environ: dict[str, str], columns: int, lines: int, *arguments: str) -> Iterator[Terminal]:
    terminal = Terminal(environ, columns, lines, *arguments)
    try:
        terminal.until(lambda text: "\x1b[J" in text)
        yield terminal
    finally:
        if terminal.process.poll() is None:
            terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
        os.close(terminal.slave)


def test_at_80_by_24_it_fits_follows_a_new_size_and_no_name_gets_at_the_terminal(folder: Path) -> None:
    with top(settings(folder), 80, 24, "--interval", "0.5") as terminal:
        terminal.until(lambda text: text.count("\x1b[J") >= 2)
        terminal.resize(46, 9)
        terminal.until(lambda _: len(terminal.frames()[-1]) <= 9)
        terminal.key("q")
        assert terminal.end() == 0
        foreign = OURS.sub("", terminal.text)
        assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", foreign), "only our own sequences"
        first, last = terminal.frames()[0], terminal.frames()[-1]
        for frame, columns, lines in ((first, 80, 24), (last, 46, 9)):
            assert len(frame) <= lines
            assert max(map(width, frame)) <= columns
        assert "recorded" in first[0]
        shown = "\n".join(first)
        for text in ("H100 80GB", "93 °C", "250/700 W", "[", "ada", "vLLM", "a:7b", "chat-0", "\\x1b]0;"):
            assert text in shown, text
        assert terminal.text.count("\x1b[2J") == 1, "redrawn in place, not wiped"


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_however_it_ends_the_terminal_is_as_it_was(folder: Path, how: str) -> None:
    with top(settings(folder), 80, 24) as terminal:
        if how == "Ctrl-C":
            terminal.key("\x03")
        else:
            terminal.process.terminate()
        assert terminal.end() == (130 if how == "Ctrl-C" else 143)
        assert terminal.text.startswith("\x1b[?1049h\x1b[?25l")


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_suspended_it_gives_the_terminal_back_and_takes_it_again(folder: Path) -> None:
    with top(settings(folder), 80, 24) as terminal:
        terminal.process.send_signal(signal.SIGTSTP)
        terminal.until(lambda text: text.endswith(ENDED))
        # What it was to be continued from must have come first.
        terminal.until(lambda _: stopped(terminal.process.pid))
        terminal.process.send_signal(signal.SIGCONT)
        terminal.until(lambda text: text.count("\x1b[?1049h") == 2)
        terminal.key("q")
        assert terminal.end() == 0


def test_colours_are_for_terminals_without_no_color(folder: Path) -> None:
    with top(settings(folder), 100, 24) as terminal:
        terminal.key("q")
        terminal.end()
        assert re.search(r"\x1b\[1;31m +93 °C", terminal.text)
    with top(settings(folder, NO_COLOR="1"), 100, 24) as terminal:
        terminal.key("q")
        terminal.end()
        assert not COLOURS.search(terminal.text.removesuffix(ENDED))


def test_in_a_pipe_it_is_one_plain_table_of_what_is_recorded(folder: Path) -> None:
    plain = settings(folder, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = gpumon(plain, "top")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout) is None
    lines = done.stdout.splitlines()
    assert re.match(r"box  driver 580.159.03  CUDA 13.0  recorded \d+ s ago", lines[0])
    assert lines[3].split()[:5] == ["0", "H100", "80GB", "HBM3", "93"]
    assert [line.split()[:2] for line in lines[7:]] == [["0", "7"], ["1", "9"], ["1", "7"]], "most memory first"
    assert "–" in done.stdout, "UTF-8 in the C locale, too"


def test_without_a_recorder_and_with_live_the_driver_is_asked(
    folder: Path, tmp_path: Path, fake: FakeNvml
) -> None:
    # The kernel's name of a process is anybody's text.
    program = tmp_path / "\x1b[2J\x9bevil"
    program.write_text("#!/bin/sh\nsleep 60\n")
    program.chmod(0o755)
    process = subprocess.Popen([program])
    try:
        gpu = fake.add_gpu(name="NVIDIA L\x1b[41m4", temperature=44)
        gpu.add_process(process.pid, 3 << 30)
        # A newest tick of long ago is not what is going on.
        for where, words in ((tmp_path / "none", ("top",)), (folder, ("top", "--live")), (folder, ("snapshot",))):
            done = gpumon(settings(where, **environment(fake)), *words)
            assert done.returncode == 0, done.stderr
            assert "44 °C" in done.stdout
            assert str(process.pid) in done.stdout
            assert "evil" in done.stdout
            assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", done.stdout) is None
            assert ("asked of the driver" in done.stdout) == (words[0] == "top")
    finally:
        process.kill()
        process.wait()
    fake.driver_loaded = False
    done = gpumon(settings(tmp_path / "none", **environment(fake)), "top")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "modprobe nvidia" in done.stderr
