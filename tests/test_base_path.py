"""Below a base path (server.baseUrlPath) everything works as without one: pages, charts, downloads, routes."""

from __future__ import annotations

import csv
import io
import urllib.request
from collections.abc import Callable
from pathlib import Path

from conftest import PATIENCE_S, Server
from playwright.sync_api import Page, expect


def test_pages_charts_downloads_and_routes_work_below_a_base_path(
    page: Page, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(None, GPUMON_DEMO_GPUS="1", STREAMLIT_SERVER_BASE_URL_PATH="lab/gpus").ready()
    for route in ("/healthz", "/api/v1/gpus", "/metrics"):
        with urllib.request.urlopen(f"{server.url}/lab/gpus{route}", timeout=PATIENCE_S) as answer:
            assert "html" not in answer.headers["Content-Type"], route
    page.goto(f"{server.url}/lab/gpus/")
    with page.expect_download() as loading:
        page.get_by_role("link", name="↓ CSV", exact=True).click()
    loading.value.save_as(tmp_path / "active.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "active.csv").read_text(), newline="")))
    assert rows
    assert {row["GPU"] for row in rows} == {"0"}
    page.goto(f"{server.url}/lab/gpus/history")
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
