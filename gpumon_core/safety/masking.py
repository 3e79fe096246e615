"""Masks the secrets of settings, in their values and in texts of other programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote, unquote_plus

STARS = "***"
# A secret with fewer characters is masked only where it is a word of its own.
SHORT = 4

_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*"
_BEGIN = re.compile(rf"\s*[\"']?({_SCHEME}):/")
# A URL with a strict form for every part that is shown, so that an unescaped password never counts as another
# part: the password ends at the first @ with a valid host and database after it. SQLAlchemy is less strict: for
# u:pass@word@host its host is word@host.
_NAME = r"[\w.,%~+\-]*"
_SERVER = re.compile(
    rf"(?P<scheme>{_SCHEME})://"
    rf"(?:(?P<user>{_NAME})(?::(?P<password>.*?))?@(?P<host>(?:\[[\w.:%]*\]|{_NAME})(?::[\w,.:\-]*)?)"
    rf"|(?P<alone>(?:\[[\w.:%]*\]|{_NAME})(?::\d*)?))"
    r"(?P<database>/[\w.%~+\-/]*)?(?:\?(?P<query>.*))?",
    re.DOTALL,
)
_FILE = re.compile(r"(?P<scheme>sqlite(?:\+\w+)?)://(?P<path>/[^?]*)(?:\?(?P<query>.*))?", re.DOTALL)
# Parameters of drivers that are no secrets. Any other one is shown only as a number or a switch.
_HARMLESS = {
    *("host", "hostaddr", "port", "dbname", "user", "sslmode", "sslcert", "sslkey", "sslrootcert", "sslcrl"),
    *(
        "application_name",
        "client_encoding",
        "target_session_attrs",
        "channel_binding",
        "gssencmode",
        "krbsrvname",
    ),
    *("service", "passfile", "load_balance_hosts", "ssl_min_protocol_version", "mode", "cache", "vfs", "uri"),
}
_SECRET_WORDS = re.compile(r"pass|pw|secret|token|key|auth|cred|pin|salt|sign", re.IGNORECASE)
_SWITCH = re.compile(r"\d{1,9}|true|false|on|off|yes|no", re.IGNORECASE)
_PLAIN = re.compile(r"[\w./:,~\-]*")


@dataclass(frozen=True, slots=True)
class Secret:
    """Marks a setting that holds a secret. `shown` gives the text that may be shown, `hidden` the secrets in
    it."""

    shown: Callable[[str], str] = lambda text: STARS if text else ""
    hidden: Callable[[str], Iterator[str]] = lambda text: iter((text,))


def mask_password(url: str) -> str:
    """A URL with stars for its password and for secret parameters. A text without the form of a URL is shown up to
    its scheme, or not at all, because any part of it may belong to a password."""
    if not url.strip():
        return url
    begin = _BEGIN.match(url)
    if begin is None:
        return STARS
    nothing = f"{begin[1]}://{STARS}"
    if file := _FILE.fullmatch(url):
        is_path = not re.search(r":[^/]*@|:/", file["path"])
        return f"{file['scheme']}://{file['path']}{_shown_query(file['query'])}" if is_path else nothing
    found = _SERVER.fullmatch(url)
    if found is None or (found["user"] is not None and "@" in (found["query"] or "")):
        return nothing
    user = (
        "" if found["user"] is None else found["user"] + ("" if found["password"] is None else f":{STARS}") + "@"
    )
    place = (found["host"] or found["alone"] or "") + (found["database"] or "")
    return f"{found['scheme']}://{user}{place}{_shown_query(found['query'])}"


def _shown_query(query: str | None) -> str:
    if query is None:
        return ""
    return "?" + "&".join(_shown_parameter(*part.partition("=")) for part in query.split("&"))


def _shown_parameter(name: str, equals: str, value: str) -> str:
    if not equals or not re.fullmatch(r"[\w.\-]{1,40}", name):
        return f"{STARS}{equals}{STARS if equals else ''}"
    known = name.lower() in _HARMLESS and _PLAIN.fullmatch(unquote_plus(value))
    switch = not _SECRET_WORDS.search(name) and _SWITCH.fullmatch(value)
    return f"{name}={value if known or switch else STARS}"


def secrets_in(url: str) -> Iterator[str]:
    """The secrets of a URL, as written and decoded. A secret that is also the name of its user, host or database
    is left out, because these are shown."""
    found = _SERVER.fullmatch(url) or _FILE.fullmatch(url)
    if found is None:
        yield from re.findall(r"://[^:/@]*:(.*)@", url, re.DOTALL)
        return
    parts = found.groupdict()
    seen = {parts.get(name) for name in ("user", "host", "alone")} | {(parts.get("database") or "/")[1:]}
    values = [parts.get("password") or ""]
    for part in (parts["query"] or "").split("&"):
        name, equals, value = part.partition("=")
        if equals and not _shown_parameter(name, equals, value).endswith(f"={value}"):
            values.append(value)
    for value in values:
        meant = unquote_plus(value), unquote(value)
        # Also in the quotes of libpq and Python.
        yield from {value, *meant, meant[1].replace("\\", r"\\").replace("'", r"\'"), repr(meant[1])[1:-1]} - seen


# The secrets of the current settings.
_known: list[str] = []


def remember(secrets: Iterator[str]) -> None:
    """Add secrets to those that `hide` masks."""
    _known.extend(secret for secret in dict.fromkeys(secrets) if secret and secret not in _known)
    # The longest first, because a shorter one may be a part of it.
    _known.sort(key=len, reverse=True)


def hide(text: str) -> str:
    """A text, such as an error of a library, with stars for the secrets of the current settings."""
    for secret in _known:
        if secret in text:
            # A short secret, or a word, may be a part of any word.
            is_word = secret.isalpha() or len(secret) < SHORT
            text = re.sub(rf"\b{re.escape(secret)}\b", STARS, text) if is_word else text.replace(secret, STARS)
    return text
