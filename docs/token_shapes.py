"""Writes gpumon_core/attribution/secrets/library.py: the shapes of tokens that detect-secrets knows.

The library itself is not loaded while gpumon records: its plugins import requests, which takes 70 ms and 4 MB. Run
this after another version of it is pinned in requirements-dev.txt; a test compares the two.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from importlib.metadata import version
from pathlib import Path

TARGET = Path(__file__).parent.parent / "gpumon_core" / "attribution" / "secrets" / "library.py"
# Plugins with expressions that are used, and the others with the reason.
USED = [
    "artifactory",
    "aws",
    "azure_storage_key",
    "discord",
    "github_token",
    "gitlab_token",
    "mailchimp",
    "openai",
    "pypi_token",
    "sendgrid",
    "slack",
    "square_oauth",
    "stripe",
    "telegram_token",
    "twilio",
]
LEFT_OUT = {
    "base": "no plugin",
    "basic_auth": "takes the user's name for a part of the password; texts.py knows URLs",
    "cloudant": "goes by names, which words.py knows",
    "high_entropy_strings": "guesses",
    "ibm_cloud_iam": "goes by names",
    "ibm_cos_hmac": "goes by names",
    "ip_public": "an address is no secret",
    "jwt": "looks back from every part of a text to its end: shapes.py has one that does not",
    "keyword": "guesses",
    "npm": "a name, which words.py knows, and the rest of the line",
    "private_key": "only the first line of a key; texts.py takes all of it",
    "softlayer": "goes by names",
}
# Single expressions that are not used, by what they begin with.
LEFT_OUT_EXPRESSIONS = {
    r"aws.{0,20}?": "goes by names",
    r"(?:\s|=|:|" + '"' + r"|^)AP[\dABCDEF]": "words in capitals look like it",
    r"sk-[A-Za-z0-9-_]*[A-Za-z0-9]{20}T3": "looks back from every part of a text: shapes.py has one that does not",
    r"AccountKey=": "goes by the name",
}


def expressions() -> list[tuple[str, str]]:
    """The plugin and the expression, with its flags inside, of each shape that is used."""
    plugins = importlib.import_module("detect_secrets.plugins")
    known = {module.name for module in pkgutil.iter_modules(plugins.__path__)}
    if undecided := known.symmetric_difference([*USED, *LEFT_OUT]):
        sys.exit(f"decide in docs/token_shapes.py whether to use: {', '.join(sorted(undecided))}")
    found = []
    for name in USED:
        module = importlib.import_module(f"detect_secrets.plugins.{name}")
        for detector in vars(module).values():
            if isinstance(detector, type) and detector.__module__ == module.__name__:
                found += [
                    (name, _with_flags(expression))
                    for expression in detector.denylist  # type: ignore[attr-defined]
                    if not expression.pattern.startswith(tuple(LEFT_OUT_EXPRESSIONS))
                ]
    return found


def _with_flags(expression: re.Pattern[str]) -> str:
    # What leads to the token in an expression of artifactory's is not a part of it.
    pattern = re.sub(r'^\(\?:\\s\|=\|:\|"\|\^\)|\(\?:\\s\|"\|\$\)$', "", expression.pattern)
    letters = "".join(
        letter for letter, flag in (("i", re.IGNORECASE), ("x", re.VERBOSE)) if expression.flags & flag
    )
    return f"(?{letters}:{pattern})" if letters else pattern


def module() -> str:
    """The text of the module."""
    rows = "\n".join(f'    # {name}\n    r"""{pattern}""",' for name, pattern in expressions())
    return f'''"""Shapes of tokens from detect-secrets {version("detect-secrets")} (Yelp, Apache License 2.0).

Written by docs/token_shapes.py, which says what is used of it and why.
"""

LIBRARY_SHAPES = (
{rows}
)
'''


if __name__ == "__main__":
    TARGET.write_text(module(), "utf-8")
