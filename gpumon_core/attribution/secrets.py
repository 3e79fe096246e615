"""Masks what a command line must not give away, before it is stored anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

STARS = "***"

# What makes a name that of a secret: one of these words, or these words next to each other.
SECRET_WORDS = frozenset(
    {"password", "passwd", "passphrase", "pwd", "secret", "secrets", "token", "credential", "credentials"}
    | {"apikey", "authorization", "bearer", "sig", "signature"}
)
SECRET_PAIRS = frozenset(
    (first, second)
    for first in (
        "api",
        "access",
        "private",
        "secret",
        "encryption",
        "auth",
        "account",
        "license",
        "wandb",
        "signing",
    )
    for second in ("key", "keys")
)
# Words before or after which the same names are harmless: numbers of tokens, special tokens, and places.
HARMLESS_BEFORE = frozenset(
    {"max", "min", "num", "pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "no", "image"}
)
HARMLESS_AFTER = frozenset(
    {"file", "path", "dir", "id", "ids", "limit", "count", "length", "size", "type", "name", "env"}
)

# Tokens that are known by their shape, wherever they stand, as their makers document them.
SHAPES = (
    r"hf_[A-Za-z0-9]{16,}",
    r"sk-[A-Za-z0-9_-]{16,}",
    r"gh[pousr]_[A-Za-z0-9]{16,}",
    r"github_pat_[A-Za-z0-9_]{16,}",
    r"glpat-[A-Za-z0-9_-]{16,}",
    r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}",
    r"AIza[A-Za-z0-9_-]{35}",
    r"nvapi-[A-Za-z0-9_-]{16,}",
    r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
)
# What may follow the name of a secret in a text: an end of the value that the text itself shows.
VALUE = re.compile(r"""(?P<quote>["'])[^"']*(?P=quote)|[^\s"'&;,}\])]+""")
NAME = re.compile(r"""(?<![\w.-])([A-Za-z][\w.-]{1,63})["']?\s{0,8}[:=]\s{0,8}(?!//)""")
SCHEME_WORDS = ("Bearer", "Basic", "Negotiate")
SCHEMES = re.compile(r"(?P<scheme>\b(?:Bearer|Basic|Negotiate)\s{1,8})(?P<value>[A-Za-z0-9+/._~=-]{6,})")
URL_PASSWORD = re.compile(
    r"(?P<user>://[^:/@\s?#]{0,256}:)(?P<value>[^/@\s?#]{1,1024}(?:@[^/@\s?#]{0,256}){0,4})(?=@)"
)
URL_TOKEN = re.compile(r"(?<=://)(?P<value>[A-Za-z0-9_.~-]{20,1024})(?=@)")
PEM = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|$)", re.DOTALL
)
WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")

# Programs whose own short options take a password: (program, option), and whether it may stand alone.
SHORT_OPTIONS = {("sshpass", "-p"), ("curl", "-u"), ("curl", "--user"), ("curl", "-U"), ("curl", "--proxy-user")}
MYSQL = frozenset({"mysql", "mysqldump", "mysqladmin", "mariadb", "mariadb-dump"})


def is_secret(name: str) -> bool:
    """Whether a name is one under which people keep secrets: "--hf-token", "apiKey", "DB_PASSWORD"."""
    words = [word.lower() for word in WORDS.findall(name[:128])]
    for place, word in enumerate(words):
        pair = (word, words[place + 1]) if place + 1 < len(words) else None
        if word in SECRET_WORDS or pair in SECRET_PAIRS:
            rest = words[place + (1 if word in SECRET_WORDS else 2) :]
            before = words[place - 1] if place else ""
            if before not in HARMLESS_BEFORE and not HARMLESS_AFTER.intersection(rest[-1:]):
                return True
    return False


class Mask:
    """Puts stars in the place of secrets.

    `patterns` are further regular expressions: what their group "secret" (or their first group, or else the
    whole of them) matches is masked. Raises ValueError for one that cannot be used.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self._shapes = re.compile("|".join(rf"(?<![A-Za-z0-9]){shape}" for shape in SHAPES))
        self._patterns = [_compiled(pattern) for pattern in patterns]

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """The arguments of a program with every secret among them masked."""
        masked: list[str] = []
        program = arguments[0].rsplit("/", 1)[-1] if arguments else ""
        hiding = False
        for position, argument in enumerate(arguments):
            previous = arguments[position - 1] if position else ""
            if argument.startswith("-") and argument != "-":
                hiding = False
                name, separator, value = argument.partition("=")
                if separator and value and is_secret(name):
                    masked.append(f"{name}={STARS}")
                elif program in MYSQL and re.match(r"-p.", argument):
                    masked.append(f"-p{STARS}")
                else:
                    hiding = not separator and is_secret(name)
                    masked.append(self.text(argument))
            elif hiding and argument:
                # An option may take several values (vLLM's --api-key does): all up to the next option.
                masked.append(STARS)
            elif argument and (program, previous) in SHORT_OPTIONS:
                user, separator, _ = argument.partition(":")
                masked.append(f"{user}:{STARS}" if separator else STARS)
            elif (previous == "login" and program in ("wandb", "huggingface-cli", "hf")) or (
                previous == "login" and any(part.endswith("/wandb") for part in arguments[:2])
            ):
                masked.append(STARS)
            else:
                masked.append(self.text(argument))
        return masked

    def text(self, text: str) -> str:
        """A text with every secret in it masked."""
        if "PRIVATE KEY-----" in text:
            text = PEM.sub(STARS, text)
        if "://" in text:
            text = URL_TOKEN.sub(STARS, URL_PASSWORD.sub(rf"\g<user>{STARS}", text))
        text = SCHEMES.sub(rf"\g<scheme>{STARS}", text)
        if "=" in text or ":" in text:
            text = _named(text)
        text = self._shapes.sub(STARS, text)
        for substitute in self._patterns:
            text = substitute(text)
        return text


def _named(text: str) -> str:
    """The text with the values of names that are those of secrets masked."""
    parts, done = [], 0
    for found in NAME.finditer(text):
        if found.start() < done or not is_secret(found[1]):
            continue
        value = VALUE.match(text, found.end())
        # After the word of a scheme its secret is masked already.
        if value is None or value[0] in SCHEME_WORDS or not value[0].strip("\"'"):
            continue
        quote = value["quote"] or ""
        parts += [text[done : value.start()], quote, STARS, quote]
        done = value.end()
    return "".join([*parts, text[done:]])


def _compiled(pattern: str) -> Callable[[str], str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    if expression.search(""):
        raise ValueError(f"the pattern {pattern!r} matches the empty text, and would mask everything")
    group = "secret" if "secret" in expression.groupindex else 1 if expression.groups else 0

    def hide(found: re.Match[str]) -> str:
        begin, end = found.start(group) - found.start(), found.end(group) - found.start()
        return found[0] if begin < 0 else found[0][:begin] + STARS + found[0][end:]

    return lambda text: expression.sub(hide, text)
