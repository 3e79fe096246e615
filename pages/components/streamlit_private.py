"""Every private part of Streamlit that gpumon uses. None of them is patched.

Streamlit documents none of these, so an upgrade may change them. tests/test_streamlit_private.py has one test for
each: the test that fails names the part that has changed.
"""

from __future__ import annotations

from pathlib import Path

import streamlit
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

__all__ = ["BackMsg", "ForwardMsg"]

# The page that every browser gets first; document.py inserts its lines before HEAD_END.
INDEX = Path(streamlit.__file__).parent / "static" / "index.html"
HEAD_END = "</head>"

# The object in which a page may say where its server is, before Streamlit's script starts.
SERVER_ADDRESS = "window.__streamlit = { BACKEND_BASE_URL: %s }"

# Where the browser stores the choice of light or dark: before and after the path of the page.
THEME_KEY = ("stActiveTheme-", "-v2")

# The classes of the block that holds a page, of the box around each element, and of a table.
MAIN_BLOCK, ELEMENT, TABLE = ".stMain .stMainBlockContainer", ".stElementContainer", ".stDataFrame"

# The button that closes the open sidebar.
CLOSE_MENU = "[data-testid=stSidebar][data-collapsed=false] [data-testid=stSidebarCollapseButton] button"

# Which other sites may steer a page that they embed: an option of .streamlit/config.toml.
ALLOWED_ORIGINS = "client.allowedOrigins"

# The route of st.file_uploader, which no page has and the server closes.
UPLOADS = "/_stcore/upload_file"

# The WebSocket of a page, for tests and benchmarks. BackMsg goes to the server, ForwardMsg comes from it.
STREAM = "/_stcore/stream"
