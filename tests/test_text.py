"""The one gate for texts: whatever a program chooses, what passes can be stored, and does not deceive."""

from __future__ import annotations

import json
import pwd
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attribution import FakeProc
from test_inquirer import Server

from gpumon_core.attribution import containers, users
from gpumon_core.attribution.describe import Describer
from gpumon_core.attribution.inquirer import Inquirer
from gpumon_core.attribution.local import LocalAttribution
from gpumon_core.attribution.records import Ask, Endpoint, ProcessIdentity, Program
from gpumon_core.attribution.rules import Rules
from gpumon_core.legacy_import import reader
from gpumon_core.legacy_import.discovery import named_gpus
from gpumon_core.safety import text
from gpumon_core.settings import load

# What deceives, ends a row, or is no text at all.
SIGNS = {
    "NUL": "\0",
    "C0": "\x1b[31m\x07",
    "C1": "\x9b\x85",
    "DEL": "\x7f",
    "line ends": "a\r\nb\vc\fd",
    "separators": "\u2028\u2029",
    "half of a pair": "\ud800",
    "another half": "\udcff",
    "bidi": "\u202a\u202b\u202c\u202d\u202e",
    "isolates": "\u2066\u2067\u2068\u2069",
    "marks of direction": "\u200e\u200f\u061c",
    "unseen": "a\u200bb\u2060c\ufeffd\u00ade",
    "joiners of nothing": "a\u200db\u200cc",
    "fillers": "\u3164\uffa0\u115f\u1160\u2800\u17b4\u180e\u034f",
    "tags": "\U000e0041\U000e007f",
    "selectors": "a\ufe0fb\U000e0101\U000e0102",
    "old": "\u206a\u206f\ufff9\ufffb",
    "none": "\ufffe\uffff\U0010ffff",
    "tower": "Z" + "\u0351" * 40,
    "long": "x" * 120_000,
    "long and wide": "\U0001f600" * 9000,
    "blanks": "a\u00a0b\u3000c\u2003d",
}
SEEN = {
    "ASCII": "python train.py --model Qwen/Qwen3-8B 'a b'",
    "German": "Größe_straße",
    "Persian": "می\u200cخواهم",
    "Hindi": "क्\u200dष",
    "Chinese": "模型/通义千问",
    "Japanese": "葛\U000e0100城",
    "Hebrew": "דגם",
    "Thai": "ที่",
    "Vietnamese": "Tiê\u0301ng",
    "emoji": "🤗 👩\u200d💻 ❤\ufe0f ❤\ufe0f\u200d🔥",
}
ANY = st.text(st.characters() | st.sampled_from("".join(SIGNS.values())), max_size=300)


def is_clean(value: str, longest: int) -> bool:
    """Whether a text is what every reader may rely on; said without the gate's own words."""
    value.encode()
    forbidden = [*range(32), *range(127, 160), 0xAD, 0x34F, 0x61C, 0x2028, 0x2029, 0x3164, 0xFEFF, 0xFFA0]
    forbidden += [*range(0x2060, 0x2070), *range(0x202A, 0x202F), 0x200B, 0x200E, 0x200F, *range(0xE0000, 0xE0080)]
    return len(value) <= longest and not set(map(ord, value)) & set(forbidden) and value.isprintable() | any(
        sign in value for sign in "\u200c\u200d"
    )  # fmt: skip


def check(record: Any) -> None:
    """That every text of a record is clean, and as long as its field may be."""
    for about in fields(record):
        value = getattr(record, about.name)
        if isinstance(value, str):
            assert is_clean(value, text.LONGEST_OF.get(about.name, text.LONGEST)), (about.name, ascii(value[:99]))


@pytest.mark.parametrize("sign", SIGNS)
def test_what_deceives_does_not_pass(sign: str) -> None:
    for around in ("", "a", "模", "ا"):
        found = text.clean(f"{around}{SIGNS[sign]}{around}", 500)
        assert is_clean(found, 500), ascii(found)


@pytest.mark.parametrize("language", SEEN)
def test_what_people_write_passes_as_it_is(language: str) -> None:
    assert text.clean(SEEN[language], 500) == SEEN[language]
    assert text.decoded(SEEN[language].encode(), 500) == SEEN[language]


def test_what_is_replaced_is_seen_to_be() -> None:
    assert text.clean("a\x1b[31mb\u202ec\nd\te\u00a0f") == "a\ufffd[31mb\ufffdc d e f"
    assert text.clean("a\ud800b") == "a\ufffdb"
    assert text.decoded(b"a\xff\0b") == "a\ufffd\ufffdb"
    assert text.clean("Z" + "\u0301" * 50 + "a") == "Z" + "\u0301" * 4 + "a"


def test_what_is_cut_is_seen_to_be() -> None:
    assert text.clean("a" * 10, 10) == "a" * 10
    assert text.clean("a" * 11, 10) == "a" * 9 + "…"
    assert text.decoded(b"a" * 5000, 10) == "a" * 9 + "…"
    assert text.decoded("é".encode() * 11, 10) == "é" * 9 + "…"


def test_nothing_is_no_text() -> None:
    assert (text.field("model", None), text.field("model", ""), text.decoded(None)) == (None, None, "")


@given(ANY, st.none() | st.integers(1, 300))
@settings(max_examples=300, deadline=None)
def test_any_text_passes_and_passes_again_unchanged(value: str, longest: int | None) -> None:
    once = text.clean(value, longest)
    assert is_clean(once, 300)
    assert text.clean(once, longest) == once
    assert len(once) <= len(value)


@given(st.binary(max_size=300), st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_text(value: bytes, longest: int) -> None:
    assert is_clean(text.decoded(value, longest), longest)


@given(st.builds(Program, **{about.name: st.none() | ANY for about in fields(Program)}))
@settings(max_examples=50, deadline=None)
def test_every_field_of_a_record_passes(program: Program) -> None:
    cleaned = text.record(program)
    check(cleaned)
    assert text.record(cleaned) is cleaned
    for about in fields(program):
        assert (getattr(program, about.name) is None) == (getattr(cleaned, about.name) is None)


def test_what_has_passed_can_be_stored(database_url: str) -> None:
    engine = sa.create_engine(database_url)
    table = sa.Table("texts", sa.MetaData(), sa.Column("id", sa.Integer), sa.Column("text", sa.Text))
    table.create(engine)
    told = [text.clean(value, 4096) for value in (*SIGNS.values(), *SEEN.values())]
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"id": number, "text": one} for number, one in enumerate(told)])
    with engine.connect() as connection:
        assert list(connection.execute(sa.select(table.c.text).order_by(table.c.id)).scalars()) == told
    engine.dispose()


# ---- Where they come in --------------------------------------------------------------------------


@pytest.fixture
def answers() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("sign", SIGNS)
def test_nothing_that_a_process_says_of_itself_is_believed_to_be_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: Server, sign: str
) -> None:
    """A process that is hostile in every place that is looked at, and the engines and servers that speak of it."""
    odd = f"n{SIGNS[sign]}n"
    raw = odd.encode("utf-8", "surrogatepass").replace(b"\0", b"\1")
    rules = tmp_path / "rules.toml"
    quoted = "".join(f"\\U{ord(one):08x}" for one in odd[:100] if one.encode("utf-8", "ignore"))
    rules.write_text(
        f"[[workload]]\nname = \"{quoted}\"\ncategory = 'inference'\nmatch = {{ name = '' }}\n"
        "model = [{ option = '--model' }]\n"
        f"endpoint = {{ path = '/m', models = 'm.*', port = {answers.port} }}\n"
    )
    answers.answers["/m"] = {"m": [odd]}
    proc = FakeProc(tmp_path / "proc")
    proc.put(8, 50, raw[:15].replace(b")", b"("))
    proc.put(7, 100, raw[:15], b"prog\0--model\0" + raw + b"\0", uid=3_999_999_999)
    stat = (proc.path / "7" / "stat").read_bytes()
    (proc.path / "7" / "stat").write_bytes(stat.replace(b" S 1 ", b" S 8 ", 1))
    short = raw.replace(b"/", b"")[:1000] or b"n"
    for link in ("exe", "cwd"):
        (proc.path / "7" / link).symlink_to(b"/" + b"/".join(short[at : at + 200] for at in range(0, 1000, 200)))
    names = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_USER", "POD_NAME", "POD_NAMESPACE", "JPY_SESSION_NAME")
    environ = b"".join(name.encode() + b"=" + raw + b"\0" for name in (*names, "KUBERNETES_SERVICE_HOST"))
    (proc.path / "7" / "environ").write_bytes(environ)
    group = raw.replace(b"/", b"").replace(b"\n", b"")[:200].decode("utf-8", "ignore").encode()
    path = b"0::/system.slice/a" + group + b".service/docker-" + b"a1" * 32 + b".scope\n"
    (proc.path / "7" / "cgroup").write_bytes(path)
    facts = dict.fromkeys(("container_name", "container_image", "pod", "namespace"), odd)
    monkeypatch.setattr(containers, "facts_of", lambda *_: facts)
    login = pwd.struct_passwd((odd, "x", 1, 1, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: login)
    describer = Describer(str(proc.path), rules=Rules.load(rules))
    attribution, ask = LocalAttribution(proc.path, trusted=True, describer=describer), Inquirer()
    first = attribution.identify({7}, 0)[7]
    found = eventually(lambda: not (one := ask.add(attribution.identify({7}, 0), [])[7]).pending and one)
    ask.close()
    attribution.close()
    assert isinstance(found, ProcessIdentity)
    for one in (first, found):
        check(one)
        check(one.program)
    missing = [about.name for about in fields(found.program) if getattr(found.program, about.name) is None]
    assert set(missing) <= {"namespace"}, "all of them were said, and all but a name that is none are there"
    assert found.name is not None
    assert found.user is not None


@pytest.mark.parametrize("sign", SIGNS)
def test_what_a_server_says_is_text(answers: Server, sign: str) -> None:
    answers.answers["/m"] = {"m": [SIGNS[sign] + "x", "y"]}
    ask = Inquirer()
    identity = ProcessIdentity(
        7, "boot:1", pending=True, ask=Ask(Endpoint("/m", "m.*", port=1), ("127.0.0.1", answers.port))
    )
    found = eventually(lambda: not (one := ask.add({7: identity}, [])[7]).pending and one)
    ask.close()
    assert isinstance(found, ProcessIdentity)
    check(found.program)


@pytest.mark.parametrize("sign", SIGNS)
def test_a_history_of_the_original_is_text(tmp_path: Path, sign: str) -> None:
    odd = f"/opt/n{SIGNS[sign]}n"
    found = reader._name(odd.encode("utf-8", "replace"))
    assert is_clean(found, len(odd))
    config = {"gpus": [{"index": 0, "name": odd, "uuid": "GPU-0"}]}
    (tmp_path / "gpu_config.json").write_text(json.dumps(config))
    [named] = named_gpus(tmp_path / "gpu_metrics.db")
    assert named.name is None or is_clean(named.name, text.LONGEST)


@pytest.mark.parametrize("sign", [sign for sign in SIGNS if len(SIGNS[sign]) < 200 and "half" not in sign])
def test_the_name_of_a_host_is_text(sign: str) -> None:
    assert is_clean(load(host_name=f"n{SIGNS[sign]}n").host_name, 255)


@pytest.mark.parametrize("sign", SIGNS)
def test_the_name_of_a_user_is_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sign: str) -> None:
    login = pwd.struct_passwd((f"n{SIGNS[sign]}n", "x", 1, 1, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: login)
    assert is_clean(users.login_name(1) or "", text.LONGEST)
    (tmp_path / "subuid").write_bytes(f"n{SIGNS[sign]}n:100:10\n".encode("utf-8", "replace"))
    assert is_clean(users.subordinate_owner(105, str(tmp_path / "subuid")) or "", text.LONGEST)


def test_a_text_of_megabytes_passes() -> None:
    """Four megabytes of signs that are replaced, as a command line may have them."""
    for unit in ("a\x1b", "\u200d", "\U0001f600\u200d", "Z\u0301", "\u0301", "\ufe0f\ufe0f"):
        assert len(text.clean(unit * (2 << 20))) <= len(unit) * (2 << 20)
