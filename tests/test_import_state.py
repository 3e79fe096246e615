"""How much of a file was imported, and the page that offers the rest."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import importing
import pytest
import sqlalchemy as sa
import streamlit as st
from importing import GPUS, NOW, digest, record, span
from originals import INTERVAL_S, OriginalFile
from test_pages import open_page, texts, url, writer  # noqa: F401 - the fixtures of pages
from ticks import ask

from gpumon_core.legacy_import import import_state, importer, merger, reader
from gpumon_core.settings import Settings, load
from gpumon_core.store import database
from gpumon_core.store.writer import Writer
from gpumon_core.telemetry.records import GpuReading, HostInfo, Snapshot

# The fixtures that these tests share.
engine, settings, file = importing.engine, importing.settings, importing.file


def state_of(engine: sa.Engine, path: Path) -> import_state.ImportState:
    with reader.OriginalReader(path) as opened:
        return import_state.import_state(engine, "here", path, opened.indices(), opened.contents())


def test_another_file_of_the_same_name_was_not_imported(
    engine: sa.Engine, settings: Settings, tmp_path: Path, file: OriginalFile
) -> None:
    file.ticks(span(400))
    importer.run(settings, file.path, now=NOW)
    (tmp_path / "other").mkdir()
    other = OriginalFile(tmp_path / "other" / "gpu_metrics.db")
    other.ticks(span(200, NOW - 200))
    assert state_of(engine, file.path) == import_state.ImportState(span(400)[-1], True)
    assert state_of(engine, other.path) == import_state.ImportState(None, False)


def test_a_file_is_imported_when_all_of_its_gpus_are(
    engine: sa.Engine, settings: Settings, tmp_path: Path
) -> None:
    file = OriginalFile(tmp_path / "gpu_metrics.db", "several")
    for index in (0, 1):
        file.ticks(span(400), index)
    # The host has one of them.
    importer.run(settings, file.path, now=NOW)
    assert state_of(engine, file.path) == import_state.ImportState(span(400)[-1], False)
    record(engine, range(NOW + 4, NOW + 5), GPUS)
    importer.run(settings, file.path, now=NOW)
    assert state_of(engine, file.path).is_complete


def test_a_file_with_nothing_new_is_offered_until_it_was_imported(
    engine: sa.Engine, settings: Settings, file: OriginalFile
) -> None:
    record(engine, span(800))
    file.ticks(span(400))
    assert not state_of(engine, file.path).is_complete
    assert not any(importer.run(settings, file.path, now=NOW).taken.values())
    assert state_of(engine, file.path).is_complete


def test_a_file_that_grows_while_gpumon_records_has_nothing_new_until_there_is_a_gap(
    engine: sa.Engine, settings: Settings, file: OriginalFile
) -> None:
    begin = NOW - 2000
    file.ticks(range(begin, begin + 400, INTERVAL_S))
    importer.run(settings, file.path, now=NOW)
    record(engine, range(begin + 400, begin + 800, INTERVAL_S))
    file.ticks(range(begin + 400, begin + 800, INTERVAL_S))
    assert state_of(engine, file.path).is_complete
    record(engine, range(begin + 1000, begin + 1200, INTERVAL_S))
    file.ticks(range(begin + 800, begin + 1200, INTERVAL_S))
    assert state_of(engine, file.path) == import_state.ImportState(begin + 396, False)


def test_an_import_that_was_broken_off_says_how_far_it_came(
    engine: sa.Engine, settings: Settings, file: OriginalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merger, "BATCH_ROWS", 60)
    file.ticks(span(1200))

    def interrupt(self: merger.Merger, until: int | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merger.Merger, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        importer.run(settings, file.path, now=NOW)
    state = state_of(engine, file.path)
    assert state.until is not None
    assert span(1200)[0] < state.until < span(1200)[-1]
    assert not state.is_complete


def test_the_system_page_offers_a_file_in_the_data_directory_and_never_touches_it(
    url: str,  # noqa: F811
    writer: Writer,  # noqa: F811
    tmp_path: Path,
) -> None:
    now = int(time.time())
    values = {"temperature": 40.0}
    writer.write(Snapshot(now, HostInfo("here"), GPUS[:1], (GpuReading("GPU-00", values),)), {})
    assert not any("import" in block.value for block in open_page("system").code)
    (tmp_path / "other.db").write_text("nothing")
    file = OriginalFile(tmp_path / "gpu metrics.db")
    file.ticks(range(now - 4000, now - 3000, 4))
    file.seen(7, "train", range(now - 4000, now - 3000, 4))
    before = digest(tmp_path)["gpu metrics.db"]
    st.cache_resource.clear()
    app = open_page("system")
    [command] = [block.value for block in app.code if "import" in block.value]
    assert command == f"{sys.executable} -m gpumon_core import '{tmp_path / 'gpu metrics.db'}'"
    shown = texts(app) + " ".join(str(element.value) for element in app.markdown)
    assert "250 ticks" in shown
    assert "Not imported" in shown
    assert digest(tmp_path)["gpu metrics.db"] == before
    assert ask(database.open_for_reading(url), "SELECT count(*) FROM imports") == [(0,)]
    done = importer.run(load(data_dir=tmp_path, host_name="here"), file.path)
    assert done.taken["ticks"] == 250
    st.cache_resource.clear()
    app = open_page("system")
    shown = texts(app) + " ".join(str(element.value) for element in app.markdown)
    assert "Imported." in shown
    assert not any("import" in block.value for block in app.code)
