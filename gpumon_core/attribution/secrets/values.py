"""Masks values that are partly secret: ada:s3cret, pass:s3cret, a=b; c=d. See programs.py for the kinds."""

from __future__ import annotations

import re
from collections.abc import Callable

from gpumon_core.attribution.secrets.programs import SecretKind
from gpumon_core.attribution.secrets.texts import STARS
from gpumon_core.attribution.secrets.words import word_set

HEX40 = re.compile(r"[0-9a-f]{40}")


def _split(separator: str, value: str) -> str:
    user, found, secret = value.partition(separator)
    return f"{user}{separator}{STARS}" if found and secret else value


def _userpass(value: str) -> str:
    user, separator, secret = value.partition(":")
    if not separator:
        return STARS
    if not secret:
        # curl -u TOKEN: has the secret as the user.
        return f"{STARS}:" if re.search(r"\d|.{16}", user) else value
    return f"{user}:{STARS}"


def _cookie(value: str) -> str:
    if "=" not in value:
        return value
    return "; ".join(
        f"{name.strip()}={STARS}" if separator else name.strip()
        for name, separator, _ in (part.partition("=") for part in value.split(";") if part.strip())
    )


def _cert(value: str) -> str:
    file, separator, _ = value.rpartition(":")
    return f"{file}:{STARS}" if separator and len(file) > 1 else value


def _source(value: str) -> str:
    return f"pass:{STARS}" if value.startswith("pass:") else value


def _slash(value: str) -> str:
    if value.startswith("/") or "/" not in value:
        return value
    return re.sub(r"^(\w+=)?([\w$#.]{1,64})/(?!/)[^@\s]+", rf"\1\2/{STARS}", value)


SPLITS: dict[SecretKind, Callable[[str], str]] = {
    "userpass": _userpass,
    "percent": lambda value: _split("%", value),
    "comma": lambda value: _split(",", value),
    "after": lambda value: _split(":", value),
    "cookie": _cookie,
    "cert": _cert,
    "source": _source,
    "slash": _slash,
    "wandb": lambda value: STARS if HEX40.fullmatch(value) else value,
}
# Options, of any program, with a user and a password as their value.
SPLIT_OPTIONS = {
    **dict.fromkeys(
        word_set(
            "--basic-auth --basicauth --http-auth --http-basic-auth --proxy-user --proxy-auth"
            " --userpass --user-pass --creds --auth-basic --http-user-pass --gradio-auth"
        ),
        "userpass",
    ),
    **dict.fromkeys(word_set("--header --headers --http-header --extra-header -H"), "header"),
}
