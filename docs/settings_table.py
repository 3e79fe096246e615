"""Writes the table of docs/settings.md from the settings themselves:

.venv/bin/python docs/settings_table.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpumon_core.settings import markdown_table

PAGE = ROOT / "docs" / "settings.md"
PLACE = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def main() -> None:
    """Put the table between its two marks."""
    PAGE.write_text(PLACE.sub(lambda _: markdown_table() + "\n", PAGE.read_text()))


if __name__ == "__main__":
    main()
