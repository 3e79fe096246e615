"""Masks secrets in a text: after names, in headers, URLs, JSON and code. The time is linear in the length."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from gpumon_core.attribution.secrets import shapes
from gpumon_core.attribution.secrets.words import is_value_harmless, kind_of, looks_random, word_set

STARS = "***"
# The most characters of a value to look at before it is known to be a secret.
LOOKED_AT = 512
# A quote, also one that is escaped once or more, as in JSON inside JSON.
QUOTE = r"\\{0,15}[\"'`]"
NAME = re.compile(
    rf"""(?:(?<![\w.-])-{{0,2}}(?<![\w.])|(?<=%[0-9A-Fa-f]{{2}}))(?P<name>[A-Za-z_][\w.-]{{0,127}})(?P<close>(?:{QUOTE})?[\])]?(?:{QUOTE})?)"""
    r"""(?P<before>[ \t]{0,8})(?P<separator>:-|:=|=>|={1,3}|:|%3[dDaA]|>(?=[^\s<>]))(?P<after>\s{0,8})(?!//)"""
)
QUOTED = re.compile(
    rf"(?:[bBfFrRuU]{{1,2}}|\$|(?!getenv|getpass|input|open|environ)\w{{1,32}}\()?(?P<quote>{QUOTE})"
)
QUOTE_AT = re.compile(r"(?P<slashes>\\*)(?P<quote>[\"'`])")
UNQUOTED = re.compile(r"(?:\\[^\"'`]|[^\s\"'`&;,}\])<>|\\]++)++")
CALLED = re.compile(r"(?:new\s+)?[A-Za-z_][\w.]{0,128}[(\[]")
NAMED = re.compile(rf"{CALLED.pattern}|[A-Za-z_.]{{1,64}}(?![\w=/+-])")
GOES_ON = re.compile(r"\s{0,4}(?:[+%]\s|,\s|\))")
PART = re.compile(r"[^;\n\"'`]+")
TO_THE_END = re.compile(r"[^\n\"'`]+")
BRACKETS = {"[": "]", "(": ")"}
SCHEME = re.compile(
    r"(?:Bearer|Basic|Token|Negotiate|Digest|NTLM|Api-?Key|GoogleLogin|OAuth|DPoP|Splunk|Bot|AWS4-HMAC-SHA256"
    r"|GenieKey|SSWS|Key|PVEAPIToken=|token=|auth=)(?:\s{1,8}|(?<==))",
    re.IGNORECASE,
)
# Names with values up to the end of the line: headers.
HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "set-cookie", "x-authorization"})
SCHEMES = re.compile(
    r"(?P<scheme>(?<![\w-])(?P<word>Bearer|Basic|Negotiate)(?:\s{1,8}|%20|\+))(?P<value>[A-Za-z0-9+/._~=-]{6,})",
    re.IGNORECASE,
)
URL_PASSWORD = re.compile(
    r"(?P<user>://[^:/@\s?#\"'<>]{0,256}:)"
    r"(?P<value>(?!\d{1,5}[/?#])(?!\*{3}@)[^@\s\"'<>]{1,1024}+(?:@[^/@\s?#\"'<>]{0,256}+){0,4})(?=@)"
)
URL_TOKEN = re.compile(r"(?<=://)(?P<value>[A-Za-z0-9_.~-]{20,1024})(?=@)")
# The same with blanks in the password, where the text is only the URL.
URL_WITH_BLANKS = re.compile(
    r"(?P<user>(?:[\w.-]{1,64}=)?[A-Za-z][\w+.-]{0,32}://[^:/@\s]{0,256}:)(?P<value>(?!\d{1,5}[/?#])[^@\n\"'<>]{1,256})"
    r"(?P<host>@[^\s@]{1,512})"
)
# ada:s3cret@host, without a scheme before it.
BARE_PASSWORD = re.compile(
    r"(?P<user>(?<![\w./:@-])(?!(?:mailto|npm|git|sip|sips|xmpp|acct|pkg|tel|ssh|docker|oci|s3|gs|file)\b)"
    r"[A-Za-z][\w.-]{0,63}:)(?P<value>(?!//)[^\s@/:\"'<>,;]{1,256}+)"
    r"(?=@(?:(?:tcp|tcp6|unix|udp)\(|(?:localhost|\d{1,3}(?:\.\d{1,3}){3}|[A-Za-z][\w-]{0,62}(?:\.[A-Za-z][\w-]{0,62}){1,8}|[A-Za-z][\w-]{0,62}:\d{1,5})"
    r"(?![\w])))"
)
PEM = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----.*?"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|$)",
    re.DOTALL,
)
# {"name": "HF_TOKEN", "value": "..."}, a variable of Kubernetes, ECS or Helm.
PAIR = re.compile(
    rf"(?:name|key|variable|Name|Key)(?:{QUOTE})?\s{{0,4}}[:=]\s{{0,4}}(?:{QUOTE})?(?P<name>[\w.-]{{1,64}})(?:{QUOTE})?"
    rf"\s{{0,4}}[,;\s]\s{{0,4}}(?:{QUOTE})?(?:[\w.\[\]-]{{0,48}}\.)?[vV]alue(?:{QUOTE})?\s{{0,4}}[:=]\s{{0,4}}"
)
# setenv("TOKEN", "..."), ("password", "..."), ["--token", "..."]
CALL = re.compile(
    rf"(?P<open>(?<=\w\(){QUOTE}|{QUOTE}(?=-))(?P<name>-{{0,2}}[A-Za-z_][\w.-]{{1,63}})(?:{QUOTE})\s{{0,4}},\s{{0,4}}(?=[bfru]?\\{{0,15}}[\"'])"
)
NETRC = re.compile(r"(?P<words>\blogin\s{1,4}\S{1,64}\s{1,4}password\s{1,4})(?P<value>(?!\*)[^\s\"'\\]{1,256})")
SQL = re.compile(
    r"(?P<words>\b(?:identified\s{1,4}by|password(?:\s{0,4}=)?)\s{1,4})(?P<value>'[^']{1,256}'|\"[^\"]{1,256}\")",
    re.IGNORECASE,
)
# wandb.login(key="..."), comet.login(..., key=...)
LOGIN = re.compile(r"\b(?:login|authenticate|configure)\([^()]*$")
# smtp.login("ada", "..."), HTTPBasicAuth("ada", "..."), login("...")
LOGIN_CALL = re.compile(
    rf"(?P<call>\b(?:login|authenticate|auth|\w{{0,16}}BasicAuth|basic_auth|set_auth|save_token|set_access_token)\(\s{{0,4}}"
    rf"(?:{QUOTE}[^\"'`\n]{{1,128}}{QUOTE}\s{{0,4}},\s{{0,4}})?(?P<quote>{QUOTE}))"
    r"(?P<value>[^\"'`\\\n]{4,256})(?P<end>(?P=quote)\s{0,4}\))",
    re.IGNORECASE,
)
# the password is ...
IS = re.compile(
    r"(?P<words>\b(?:password|passwd|passphrase|passcode|token|api[ _-]?key|secret)"
    r"\s{1,4}(?:is|was|->|=>)\s{1,4}[\"']?)"
    r"(?P<value>(?=[^\s\"']{0,64}\d)(?=[^\s\"']{0,64}[A-Za-z])[^\s\"']{6,256})",
    re.IGNORECASE,
)
# Words of sentences: after "token:" they make a sentence, not a value.
PROSE = word_set(
    "a an the is are was of for to and or in that your you this not as by no with which be must has"
    " have it its will can should we they when where if each every all any from on at"
)


@dataclass(frozen=True, slots=True)
class Value:
    """A value in a text: where it begins and ends, and whether the text quotes it."""

    begin: int
    end: int
    is_quoted: bool = False
    is_list: bool = False


def starred(text: str) -> str:
    """The text with every secret replaced by stars."""
    if "PRIVATE KEY" in text:
        text = PEM.sub(STARS, text)
    if "://" in text and "@" in text:
        if blank := URL_WITH_BLANKS.fullmatch(text):
            text = f"{blank['user']}{STARS}{blank['host']}"
        text = URL_TOKEN.sub(_url_token, URL_PASSWORD.sub(rf"\g<user>{STARS}", text))
    if "@" in text and ":" in text:
        text = BARE_PASSWORD.sub(_bare, text)
    if "=" in text or ":" in text or "%3" in text or ">" in text:
        text = _named(text)
    if "alue" in text:
        text = _behind(PAIR, text)
    if "," in text:
        text = _behind(CALL, text)
    if len(text) > 8:
        text = SCHEMES.sub(_scheme, text)
        if "(" in text:
            text = LOGIN_CALL.sub(rf"\g<call>{STARS}\g<end>", text)
        lower = text.lower()
        if "identified" in lower or "password" in lower:
            text = SQL.sub(lambda found: found["words"] + found["value"][0] + STARS + found["value"][-1], text)
            text = NETRC.sub(rf"\g<words>{STARS}", text)
        text = IS.sub(rf"\g<words>{STARS}", text)
    return shapes.starred(text, STARS)


def header(text: str) -> str:
    """A header ("Authorization: Bearer x") with its value starred where that is a secret."""
    name, separator, value = text.partition(":")
    if not re.fullmatch(r"[\w-]{1,64}", name) or not separator or is_starred(value):
        return starred(text)
    kind = kind_of(name)
    if not kind or kind == "weak":
        return starred(text)
    blank = value[: len(value) - len(value.lstrip())]
    value = value.strip()
    scheme = SCHEME.match(value)
    rest = value[scheme.end() :] if scheme else value
    if not rest or is_value_harmless("password", rest):
        return text
    return f"{name}:{blank}{scheme[0] if scheme else ''}{STARS}"


def is_starred(value: str) -> bool:
    """Whether a value is already starred."""
    return value.lstrip("\"'`\\ ([{").startswith(STARS) or value.rstrip("\"'`\\ ,;)]}").endswith(STARS)


def _named(text: str) -> str:
    """The text with the values of secret names masked."""
    parts, done = [], 0
    for found in NAME.finditer(text):
        if found.start() < done:
            continue
        kind = _kind(text, found)
        if not kind:
            continue
        value = _value(text, found, kind)
        if value is None:
            continue
        parts += [text[done : value.begin], STARS]
        done = value.end
    return "".join([*parts, text[done:]])


def _kind(text: str, found: re.Match[str]) -> str:
    name = found["name"]
    kind = kind_of(name)
    if kind in ("weak", "") and len(name) <= 16:
        # "API key: x", "secret key = x"
        words = text[max(0, found.start("name") - 17) : found.start("name")].split(" ")
        if len(words) > 1 and not words[-1] and words[-2].isalpha():
            kind = kind_of(f"{words[-2]}-{name}") or kind
    if name == "key" and LOGIN.search(text, max(0, found.start() - 64), found.start()):
        return "password"
    if kind == "signature" and text[found.start("name") - 1 : found.start("name")] in ("?", "&"):
        return "password"
    if ")" in found["close"] and found["separator"] == ":":
        # def login(password): ...
        return ""
    if found["separator"] == ">" and text[found.start() - 1 : found.start()] != "<":
        return ""
    return kind


def _value(text: str, found: re.Match[str], kind: str) -> Value | None:  # noqa: PLR0911 - a form a branch
    """The value after a name, or None where it is no secret."""
    begin = found.end()
    if begin >= len(text):
        return None
    is_compared = found["separator"] in ("==", "===") and found["after"]
    is_header = found["name"].lower() in HEADERS and ":" in found["separator"]
    opening = QUOTED.match(text, begin)
    if opening is not None and opening["quote"]:
        if _is_closing(text, found, opening):
            return None
        return _quoted_value(text, opening, kind, is_header)
    if text[begin] in BRACKETS and kind != "weak":
        return _list(text, begin, kind)
    if text[begin] in "{[(" or is_compared:
        return None
    if is_header or (kind in ("auth", "token") and SCHEME.match(text, begin) is not None):
        # Judge a value by its beginning: to find the end of every value would take quadratic time.
        near = TO_THE_END.match(text, begin, min(len(text), begin + 2 * LOOKED_AT)) or found
        value = _header_value(text, begin, near.end(), kind == "cookie")
        if value is None or near.end() < begin + 2 * LOOKED_AT:
            return value
        return _header_value(text, begin, (TO_THE_END.match(text, begin) or found).end(), kind == "cookie")
    return _plain_value(text, found, kind)


def _plain_value(text: str, found: re.Match[str], kind: str) -> Value | None:  # noqa: PLR0911 - each reason
    """A value without quotes."""
    begin = found.end()
    is_code = bool(found["before"] and found["after"] and found["separator"] == "=")
    if is_code and (CALLED if kind in ("password", "pass", "secret") else NAMED).match(text, begin):
        # password = ask_for(prompt), token = following
        return None
    plain = UNQUOTED.match(text, begin, min(len(text), begin + LOOKED_AT))
    if plain is None:
        return None
    end = plain.end()
    if found["separator"] == "=" and text[found.start() - 1 : found.start()] == ";" and kind != "weak":
        # ...;Password=two words;... in a connection string.
        part = PART.match(text, begin)
        end = max(end, part.end() if part else end)
    if end - begin < LOOKED_AT and is_value_harmless(kind, plain[0]):
        return None
    if end - begin >= LOOKED_AT:
        if kind == "weak":
            return None
        longer = UNQUOTED.match(text, begin)
        end = longer.end() if longer else end
    if is_starred(plain[0]):
        return None
    if found["separator"] == ":" and found["after"] and not found["close"]:
        return _spoken_value(text, begin, end, kind)
    return Value(begin, end)


def _is_closing(text: str, found: re.Match[str], opening: re.Match[str]) -> bool:
    """Whether a quote after a name ends the text that contains the name: input("Password: "), "token=" + x."""
    if found["close"] or opening.start("quote") != found.end():
        return False
    is_opened = text[found.start() - 1 : found.start()] == opening["quote"]
    return is_opened or GOES_ON.match(text, opening.end()) is not None


def _quoted_value(text: str, opening: re.Match[str], kind: str, is_header: bool) -> Value | None:
    begin = opening.end()
    end = _closing(text, opening["quote"], begin, begin + LOOKED_AT)
    if end is None:
        if kind == "weak":
            return None
        end = _closing(text, opening["quote"], begin, len(text))
        end = len(text) if end is None else end
    inside = text[begin:end]
    if is_starred(inside):
        return None
    scheme = SCHEME.match(text, begin, end)
    if is_header or (scheme is not None and kind in ("auth", "token")):
        return _header_value(text, begin, end, kind == "cookie")
    if is_value_harmless(kind, inside):
        return None
    return Value(begin, end, is_quoted=True)


def _closing(text: str, quote: str, begin: int, limit: int) -> int | None:
    """The end of the text that this quote opened, with the backslashes before the closing quote."""
    level = len(quote) - 1
    for found in QUOTE_AT.finditer(text, begin, min(limit, len(text))):
        if found["quote"] != quote[-1]:
            continue
        slashes = len(found["slashes"])
        if slashes == level or slashes < level or (level == 0 and slashes % 2 == 0):
            return found.end() - 1 - (level if slashes >= level else slashes)
    return None


def _list(text: str, begin: int, kind: str) -> Value | None:
    """A list or a pair of secrets: ["a", "b"], ("ada", "s3cret")."""
    end = text.find(BRACKETS[text[begin]], begin)
    inside = text[begin + 1 : end if end >= 0 else len(text)]
    if text[begin] == "(" and not ("'" in inside or '"' in inside):
        # A cast or a condition in code, not a pair of texts.
        return None
    if not inside.strip() or is_starred(inside) or inside.lstrip().startswith(("{", "[")):
        return None
    if all(is_value_harmless(kind, one.strip(" \"'\\")) for one in inside[:LOOKED_AT].split(",")):
        return None
    return Value(begin + 1, end if end >= 0 else len(text), is_list=True)


def _header_value(text: str, begin: int, end: int, is_cookie: bool = False) -> Value | None:
    scheme = SCHEME.match(text, begin, end)
    start = scheme.end() if scheme else begin
    while end > start and text[end - 1] in " \\\r":
        end -= 1
    value = text[start : min(end, start + LOOKED_AT)]
    if not value.strip() or is_starred(value) or is_value_harmless("password", value):
        return None
    words = value.split()
    if is_cookie and "=" not in value and not looks_random(value):
        return None
    if scheme is None and len(words) > 1 and words[1].lower() in PROSE:
        return None
    return Value(start, end)


def _spoken_value(text: str, begin: int, end: int, kind: str) -> Value | None:
    """A value after a colon and a blank, in YAML or a header; or the beginning of a sentence."""
    first = text[begin:end]
    rest = text[end : end + 64].partition("\n")[0].split()
    is_odd = any(c.isdigit() or not (c.isalnum() or c in "-./") for c in first.rstrip(".,:;!?"))
    is_odd = is_odd or looks_random(first) or (len(first) > 5 and not (first.islower() or first.istitle()))
    if is_odd or not rest or rest[0][0] in "#,;}]&|":
        return Value(begin, end)
    words = [first.lower(), *(word.lower().strip(".,") for word in rest[:4])]
    if PROSE.intersection(words[:4]) or kind not in ("password", "pass", "secret"):
        return None
    # "password: correct horse battery staple"
    line = TO_THE_END.match(text, begin)
    return Value(begin, line.end() if line else end)


def _behind(expression: re.Pattern[str], text: str) -> str:
    """The text with the values after every match of an expression masked."""
    parts, done = [], 0
    for found in expression.finditer(text):
        kind = kind_of(found["name"]) if found.start() >= done else ""
        if not kind:
            continue
        opening = QUOTED.match(text, found.end())
        if opening is not None:
            value = _quoted_value(text, opening, kind, is_header=False)
        else:
            plain = UNQUOTED.match(text, found.end())
            value = Value(*plain.span()) if plain and not is_value_harmless(kind, plain[0][:LOOKED_AT]) else None
        if value is None or is_starred(text[value.begin : value.end]):
            continue
        parts += [text[done : value.begin], STARS]
        done = value.end
    return "".join([*parts, text[done:]])


def _scheme(found: re.Match[str]) -> str:
    value = found["value"]
    word = found["word"].lower()
    if word == "bearer":
        is_one = any(c.isdigit() for c in value) or looks_random(value) or len(value) > 24
    else:
        is_one = _is_base64(value) if word == "basic" else len(value) > 24
    return found["scheme"] + STARS if is_one else found[0]


def _is_base64(value: str) -> bool:
    try:
        inside = base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        return False
    return b":" in inside or any(c.isdigit() or c == "=" for c in value)


def _url_token(found: re.Match[str]) -> str:
    value = found["value"]
    is_host = "." in value and not any(c.isdigit() for c in value)
    return value if is_host else STARS


def _bare(found: re.Match[str]) -> str:
    value = found["value"]
    is_odd = any(not (c.isalnum() or c in "-._") for c in value) or (
        any(c.isdigit() for c in value) and any(c.isalpha() for c in value)
    )
    is_version = re.fullmatch(r"v?\d[\w.-]*|latest|\d+[bBmM]", value) is not None
    return found["user"] + STARS if (is_odd or value.isalpha()) and not is_version else found[0]
