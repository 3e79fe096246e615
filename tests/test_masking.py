"""Passwords of settings are seen nowhere, however they are written or mistyped."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import pytest
from cli import PROGRAM, gpumon, settings
from conftest import PATIENCE_S, ROOT, Server, eventually
from pydantic import Field, ValidationError

from gpumon_core import settings as module
from gpumon_core.safety import masking
from gpumon_core.safety.masking import Secret, hide, mask_password
from gpumon_core.settings import Settings, SettingsError, in_force, load, variable

# URLs, and what may be seen of them. Every part of the password has "geheim" in it.
URLS = {
    "postgresql+psycopg://u:geheim geheim@h/db": "postgresql+psycopg://u:***@h/db",
    "postgresql://u:geheim\tgeheim@h/db": "postgresql://u:***@h/db",
    "postgresql://u: geheim@h/db": "postgresql://u:***@h/db",
    "postgresql://u:geheim@geheim@h/db": "postgresql://u:***@h/db",
    "postgresql://u:geheim:geheim/geheim?geheim#geheim@h/db": "postgresql://u:***@h/db",
    "postgresql://u:géheim-geheim→@hôst/db": "postgresql://u:***@hôst/db",
    "postgresql://:geheim@h/db": "postgresql://:***@h/db",
    "postgresql://u:geheim@[::1]:5432/db": "postgresql://u:***@[::1]:5432/db",
    "postgresql://u:geheim@[fe80::1%25eth0]/db": "postgresql://u:***@[fe80::1%25eth0]/db",
    "postgresql://u:geheim@[::1/db": "postgresql://***",
    "postgresql://u:geheim@h1:5432,h2:5433/db": "postgresql://u:***@h1:5432,h2:5433/db",
    "postgresql://u:geheim@db:often/gpumon": "postgresql://u:***@db:often/gpumon",
    "postgresql://u:geheim@/db?host=/run/postgresql": "postgresql://u:***@/db?host=/run/postgresql",
    "postgresql://u@h/db?password=geheim": "postgresql://u@h/db?password=***",
    "postgresql://u@h/db?sslmode=require&sslpassword=geheim": "postgresql://u@h/db?sslmode=require&sslpassword=***",
    "postgresql://u@h/db?PassWord=geheim&connect_timeout=5": "postgresql://u@h/db?PassWord=***&connect_timeout=5",
    "postgresql://u@h/db?%70assword=geheim": "postgresql://u@h/db?***=***",
    "postgresql://u@h/db?sslmode=require;password=geheim": "postgresql://u@h/db?sslmode=***",
    "postgresql://u@h/db?sslmode=require&amp;password=geheim": "postgresql://u@h/db?sslmode=require&***=***",
    "postgresql://u@h/db?sslmode=require?password=geheim": "postgresql://u@h/db?sslmode=***",
    "postgresql://u@h/db?sslmode=require#geheim": "postgresql://u@h/db?sslmode=***",
    "postgresql://u@h/db?options=-c password=geheim": "postgresql://u@h/db?options=***",
    "postgresql://u@h/db?geheim": "postgresql://u@h/db?***",
    "postgresql://u@h/db;password=geheim": "postgresql://***",
    "postgresql://u:x@h/db?password=geheim@geheim": "postgresql://***",
    "postgresql://u:geheim@geheim?x=1@h/db": "postgresql://***",
    "postgresql://geheim:geheim/db": "postgresql://***",
    "postgresql://u geheim@h/db": "postgresql://***",
    "postgresql://u：geheim@h/db": "postgresql://***",
    "postgresql:/u:geheim@h/db": "postgresql://***",
    "postgresql:///u:geheim@h/db": "postgresql://***",
    " postgresql://u:geheim@h/db": "postgresql://***",
    '"postgresql://u:geheim@h/db"': "postgresql://***",
    "postgresql//u:geheim@h/db": "***",
    "postgresql：//u:geheim@h/db": "***",
    "u:geheim@h/db": "***",
    "geheim": "***",
    "host=h user=u password=geheim": "***",
    "sqlite:////home/a b/gpumon.db": "sqlite:////home/a b/gpumon.db",
    "sqlite:///history/a@b.db": "sqlite:///history/a@b.db",
    "sqlite:///gpumon.db?key=geheim&mode=ro": "sqlite:///gpumon.db?key=***&mode=ro",
    "sqlite:///postgres://u:geheim@h/db": "sqlite://***",
    "sqlite://u:geheim@h/db": "sqlite://u:***@h/db",
    "mqtts://u:geheim@broker:8883": "mqtts://u:***@broker:8883",
    "http://u:geheim@h:80/a?token=geheim": "http://u:***@h:80/a?token=***",
    "": "",
}
# Names that say that a setting holds a secret, and those of which it is known that they do not.
TELLING = re.compile(r"url|pass|token|secret|key|credential|auth|hook")
OPEN = {"public_url"}


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", [])


@pytest.mark.parametrize("url", URLS)
def test_of_a_url_everything_is_seen_but_what_may_be_a_part_of_its_password(url: str) -> None:
    assert mask_password(url) == URLS[url]


# In a setting that should hold no secret, one without the form of a URL looks like what belongs there.
@pytest.mark.parametrize(
    ("name", "url"),
    [
        (name, url)
        for name in ("database_url", "data_dir", "rules", "log_level")
        for url in URLS
        if "geheim" in url and (name == "database_url" or ":/" in url)
    ],
)
def test_neither_a_setting_nor_the_error_about_it_shows_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        found = load(**{name: url})
    except SettingsError as error:
        seen = str(error)
    else:
        seen = f"{in_force(found)} {found!r} {found}"
    assert variable(name) in seen or name in seen
    assert "geheim" not in seen


def test_every_setting_that_can_hold_a_secret_is_marked_and_shown_without_it() -> None:
    for name, field in Settings.model_fields.items():
        marked = any(isinstance(one, Secret) for one in field.metadata)
        assert marked == bool(TELLING.search(name) and name not in OPEN), name
        if marked:
            for url in URLS:
                assert "geheim" not in module.shown(name, url), name


def test_a_setting_that_is_marked_is_hidden_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class More(Settings):
        hub_token: Annotated[str | None, Secret(), Field(description="a token", min_length=6)] = None
        notify_urls: Annotated[list[str], Secret(), Field(description="addresses", default=[])]

    monkeypatch.setattr(module, "Settings", More)
    found = load(hub_token="geheim-7", notify_urls=["discord://1/geheim-8", "ntfy://geheim-9"])
    seen = f"{in_force(found)} {found!r} {found}"
    assert "geheim" not in seen
    assert "***" in seen
    assert hide("no answer of discord://1/geheim-8 with geheim-7") == "no answer of *** with ***"
    for wrong in ({"hub_token": "geh"}, {"hub_token": ["geheim"]}, {"notify_urls": "geheim"}):
        with pytest.raises(SettingsError) as caught:
            load(**wrong)
        assert "geh" not in str(caught.value).removeprefix("GPUMON_")
        # Also where somebody constructs them otherwise.
        with pytest.raises(ValidationError) as raw:
            More(**wrong)  # type: ignore[arg-type]
        assert "geh" not in str(raw.value)


def test_in_texts_of_others_a_known_password_is_hidden_however_it_is_written() -> None:
    load(database_url="postgresql://u:ge%20h%27eim@h/db?sslpassword=tief%2Fgeheim")
    for text in ("ge%20h%27eim", "ge h'eim", r"'ge h\'eim'", "tief/geheim", "tief%2Fgeheim", "x=tief/geheim;"):
        assert not re.search("eim", hide(f"connection string {text} is wrong")), text
    assert hide("user u of db at h") == "user u of db at h"


def test_a_short_password_does_not_star_words_nor_does_one_that_is_seen_anyway() -> None:
    load(database_url="postgresql://gpumon:gpumon@h/db")
    load(database_url="postgresql://u:pg@h/db")
    load(database_url="postgresql://u:reader@h/db")
    assert (
        hide("role gpumon in pg_hba.conf: pg; readers of reader")
        == "role gpumon in pg_hba.conf: ***; readers of ***"
    )


@contextmanager
def talkative(text: str) -> Iterator[int]:
    """The port of a PostgreSQL server that lets nobody in, and says this of the reason."""
    listener = socket.create_server(("127.0.0.1", 0))
    body = f"SFATAL\0C28P01\0M{text}\0\0".encode()
    answer = b"E" + (len(body) + 4).to_bytes(4, "big") + body

    def refuse(client: socket.socket) -> None:
        with closing(client), contextlib.suppress(OSError):
            while client.recv(1000)[4:8] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):
                client.sendall(b"N")
            client.sendall(answer)

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=refuse, args=(client,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with closing(listener):
        yield listener.getsockname()[1]


SAYS = 'no entry for user "u", password "geheim-1 7"; sslpassword=geheim-2'


def test_no_library_that_quotes_a_password_makes_it_seen(serve: Callable[..., Server], tmp_path: Path) -> None:
    with talkative(SAYS) as port:
        url = f"postgresql://u:geheim-1%207@127.0.0.1:{port}/db?sslpassword=geheim-2&sslmode=disable"
        server = serve(None, GPUMON_DATABASE_URL=url, GPUMON_SOURCE="nvml", GPUMON_LOG_FILE=str(tmp_path / "log"))
        answer = server.wait(lambda status, answer: status == 503 and "no entry" in json.dumps(answer))
        assert "***" in json.dumps(answer)
        seen = json.dumps(answer)
        for path in ("/api/v1/gpus", "/api/v1/processes", "/metrics"):
            try:
                with urllib.request.urlopen(server.url + path, timeout=PATIENCE_S) as found:
                    seen += found.read().decode()
            except urllib.error.HTTPError as error:
                seen += error.read().decode()
        assert "no entry" in seen
        environ = settings(tmp_path, GPUMON_DATABASE_URL=url, GPUMON_LOG_LEVEL="DEBUG")
        for verb in (
            ("doctor",),
            ("usage",),
            ("backup",),
            ("export", "--table", "metrics"),
            ("top",),
        ):
            done = gpumon(environ, *verb)
            seen += done.stdout + done.stderr
        with subprocess.Popen(
            [*PROGRAM, "record"],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as recorder:
            # It tries again for as long as it runs.
            assert recorder.stdout is not None
            while "no entry" not in (line := recorder.stdout.readline()):
                assert line, "it has ended"
                seen += line
            recorder.terminate()
            seen += line + recorder.communicate(timeout=PATIENCE_S)[0]
        server.stop()
        eventually(lambda: "no entry" in (tmp_path / "log").read_text())
        seen += server.log.read_text() + (tmp_path / "log").read_text()
    assert "geheim" not in seen
