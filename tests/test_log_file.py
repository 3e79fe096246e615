"""The server's log goes into a file as well: it stays small, and its troubles never end the server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import PATIENCE_S, Server
from fake_nvml import FakeNvml

from gpumon_core import logs
from gpumon_core.settings import SettingsError

Serve = Callable[..., Server]
log = logging.getLogger("gpumon_core.test")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    loggers = [
        logging.getLogger(name)
        for name in ("gpumon_core", "apscheduler", "asyncio", "sqlalchemy.pool", "uvicorn.error")
    ]
    before = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    yield
    for one, handlers, level, propagate in before:
        for handler in one.handlers:
            with suppress(OSError):  # what /dev/full did not take
                handler.close()
        one.handlers[:], one.propagate = handlers, propagate
        one.setLevel(level)


def test_the_file_has_what_stderr_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "logs" / "gpumon.log"
    logs.configure("INFO", file)
    log.info("a line with an umlaut: ü")
    log.debug("nobody reads this")
    assert file.read_text(encoding="utf-8") == capsys.readouterr().err
    assert "umlaut: ü" in file.read_text(encoding="utf-8")


def test_without_the_setting_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logs.configure("INFO")
    log.info("a line")
    assert list(tmp_path.iterdir()) == []


def test_a_full_file_is_renamed_and_the_last_three_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILE_BYTES", 1000)
    logs.configure("INFO", tmp_path / "gpumon.log")
    for number in range(200):
        log.info("line %s", number)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["gpumon.log", "gpumon.log.1", "gpumon.log.2", "gpumon.log.3"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert "line 199" in (tmp_path / "gpumon.log").read_text()


def test_a_full_disk_costs_lines_of_the_file_and_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("INFO", Path("/dev/full"))
    log.info("first")
    log.info("second")
    said = capsys.readouterr().err
    assert "first" in said
    assert "second" in said
    assert said.count("/dev/full cannot be written ([Errno 28] No space left on device)") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "is_logged"), [(KeyboardInterrupt, False), (SystemExit, False), (OSError, True)]
)
def test_a_ctrl_c_while_a_connection_closes_is_not_logged_as_an_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
    is_logged: bool,
) -> None:
    logs.configure("INFO")
    engine = sa.create_engine("sqlite://", poolclass=sa.NullPool)

    def close(connection: object) -> None:
        raise error

    with monkeypatch.context() as patch, suppress(error):
        patch.setattr(engine.dialect, "do_close", close)
        with engine.connect():
            pass
    shown = capsys.readouterr().err
    assert ("Exception closing connection" in shown) == is_logged
    assert ("Traceback" in shown) == is_logged


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SettingsError, match=r"^GPUMON_LOG_FILE=.*taken/gpumon\.log: must be a file"):
        logs.configure("INFO", tmp_path / "taken" / "gpumon.log")


def test_a_server_that_cannot_write_its_log_file_ends_with_one_line(
    serve: Serve, fake: FakeNvml, tmp_path: Path
) -> None:
    server = serve(fake, GPUMON_LOG_FILE=str(tmp_path))
    assert server.process.wait(timeout=PATIENCE_S) != 0
    (line,) = server.log.read_text().splitlines()
    assert f"GPUMON_LOG_FILE={tmp_path}: must be a file" in line


def test_the_servers_log_is_in_its_file(serve: Serve, fake: FakeNvml, tmp_path: Path) -> None:
    fake.add_gpu()
    file = tmp_path / "logs" / "gpumon.log"
    server = serve(fake, GPUMON_LOG_FILE=str(file)).ready()
    server.stop()
    assert "serving on http://127.0.0.1:" in file.read_text()
    assert "recorder stopped" in file.read_text()
