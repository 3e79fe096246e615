"""The registry of file formats: a row in it is all that a new format needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cli import NOON, record

from gpumon_core.export.formats import FORMATS, served

# In a Python of its own: what is derived from the registry is derived when it is imported.
WITH_ANOTHER = """
import json, sys
from http.client import HTTPConnection

from gpumon_core.export import formats

def write(columns, pieces, zone):
    yield "|".join(one.key for one in columns).encode() + b"\\n"
    for piece in pieces:
        for row in zip(*formats.in_zone(columns, piece, zone), strict=True):
            yield "|".join(map(str, row)).encode() + b"\\n"

formats.FORMATS["pipes"] = formats.FileFormat("pipes", "Pipes", "text/x-pipes", (".pipes",), write)

from gpumon_core.__main__ import main
from gpumon_core.recording import runtime
from gpumon_core.store import database
from filled import serving
from pages.components import download
from zoneinfo import ZoneInfo

url, out = sys.argv[1:]
assert main(["export", "--table", "gpus", "--out", out]) == 0, "the name of the file says which format"
engine = database.open_for_reading(url)
runtime.engine = lambda: engine

def ask(path, **headers):
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return [answer.headers["Content-Type"], answer.headers["Content-Disposition"], answer.read().decode()]

with serving() as port:
    found = {
        "query": ask("/api/v1/gpus?format=pipes"),
        "accept": ask("/api/v1/gpus", Accept="text/x-pipes"),
        "openapi": json.loads(ask("/api/v1/openapi.json")[2])["paths"]["/api/v1/gpus"]["get"],
        "links": download.html("api/v1/gpus", [], ZoneInfo("UTC")),
    }
with open(out + ".json", "w") as file:
    json.dump(found, file)
"""


def test_a_new_row_is_served_described_linked_and_exported(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'gpumon.db'}"
    record(url, 2).dispose()
    root = Path(__file__).resolve().parent.parent
    out = tmp_path / "gpus.pipes"
    done = subprocess.run(
        [sys.executable, "-c", WITH_ANOTHER, url, str(out)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GPUMON_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    head, *lines = out.read_text().splitlines()
    assert {"uuid", "host", "first_seen"} <= set(head.split("|"))
    assert [dict(zip(head.split("|"), line.split("|"), strict=True))["uuid"] for line in lines] == [
        "GPU-0",
        "GPU-1",
    ]
    assert "2025-11-24T" in lines[0], NOON
    found = json.loads(Path(f"{out}.json").read_text())
    for way in ("query", "accept"):
        media_type, disposition, text = found[way]
        assert media_type.startswith("text/x-pipes")
        assert disposition.endswith('.pipes"')
        assert len(text.splitlines()) == 3
    assert found["openapi"]["responses"]["200"]["content"]["text/x-pipes"] == {"schema": {"type": "string"}}
    [chosen] = [one for one in found["openapi"]["parameters"] if one["name"] == "format"]
    assert chosen["schema"]["enum"] == ["json", *served(), "pipes"]
    assert "format=pipes" in found["links"]


def test_no_two_formats_share_a_name_a_suffix_or_a_media_type() -> None:
    suffixes = [suffix for one in FORMATS.values() for suffix in one.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    assert all(suffix.startswith(".") and suffix.islower() for suffix in suffixes)
    assert len({one.media_type for one in FORMATS.values()}) == len(FORMATS)
    assert [one.name for one in FORMATS.values()] == list(FORMATS)
