"""What a command line must not give away."""

# ruff: noqa: E501 - a case a line
from __future__ import annotations

import gc
import re
import runpy
import shlex
import subprocess
import sys
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpumon_core.attribution.secrets import Mask
from gpumon_core.attribution.secrets.lines import LONGEST_LINE

HF = "hf_" + "aB3" * 10
HEX = "0123456789abcdef0123456789abcdef01234567"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["x", "--api-key", "s3cret"], ["x", "--api-key", "***"]),
        (["x", "--api-key=s3cret"], ["x", "--api-key=***"]),
        (["vllm", "serve", "--api-key", "s3cret", "s3cret2", "--port", "80"], ["vllm", "serve", "--api-key", "***", "***", "--port", "80"]),
        (["x", "-password", "s3cret"], ["x", "-password", "***"]),
        (["x", "--db-passwd=s3cret"], ["x", "--db-passwd=***"]),
        (["x", "--aws-secret-access-key", "s3cret"], ["x", "--aws-secret-access-key", "***"]),
        (["x", "--auth-token", "s3cret", "-v"], ["x", "--auth-token", "***", "-v"]),
        (["x", "--apiKey", "s3cret"], ["x", "--apiKey", "***"]),
        (["x", "--client_secret", "s3cret"], ["x", "--client_secret", "***"]),
        (["x", "trainer.wandb.api_key=s3cret"], ["x", "trainer.wandb.api_key=***"]),
        (["env", "OPENAI_API_KEY=s3cret", "python"], ["env", "OPENAI_API_KEY=***", "python"]),
        (["x", '{"api_key": "s3cret", "model": "y"}'], ["x", '{"api_key": "***", "model": "y"}']),
        (["x", "{'password':'s3 cret'}"], ["x", "{'password':'***'}"]),
        (["x", "name:token=s3cret"], ["x", "name:token=***"]),
        (["mysql", "-ps3cret", "db"], ["mysql", "-p***", "db"]),
        (["sshpass", "-p", "s3cret", "ssh"], ["sshpass", "-p", "***", "ssh"]),
        (["curl", "-u", "ada:s3cret"], ["curl", "-u", "ada:***"]),
        (["curl", "-H", "Authorization: Bearer s3cret00"], ["curl", "-H", "Authorization: Bearer ***"]),
        (["curl", "-H", "Authorization: Basic czNjcmV0"], ["curl", "-H", "Authorization: Basic ***"]),
        (["curl", "-H", "X-Api-Key: s3cret"], ["curl", "-H", "X-Api-Key: ***"]),
        (["x", "postgresql://ada:s3cret@db/x"], ["x", "postgresql://ada:***@db/x"]),
        (["x", "postgresql://ada:s3@cret@db/x"], ["x", "postgresql://ada:***@db/x"]),
        (["git", "clone", f"https://{HF}@hub/x"], ["git", "clone", "https://***@hub/x"]),
        (["x", "http://h/?a=1&token=s3cret&b=2&sig=s3cret"], ["x", "http://h/?a=1&token=***&b=2&sig=***"]),
        (["x", "https://s3/k?X-Amz-Signature=s3cret"], ["x", "https://s3/k?X-Amz-Signature=***"]),
        (["wandb", "login", HEX], ["wandb", "login", "***"]),
        (["x", f"prefix,{HF}"], ["x", "prefix,***"]),
        (["x", "sk-proj-abcdefghijklmnop"], ["x", "***"]),
        (["x", "AKIAABCDEFGHIJKLMNOP"], ["x", "***"]),
        (["x", f"jwt {JWT}"], ["x", "jwt ***"]),
        (["x", "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----"], ["x", "***"]),
    ],
)  # fmt: skip
def test_a_secret_is_masked_and_all_else_stays(arguments: list[str], kept: list[str]) -> None:
    assert Mask().arguments(arguments) == kept
    assert Mask().arguments(kept) == kept, "what is masked stays as it is"


@pytest.mark.parametrize(
    "arguments",
    [
        ["x", "--tokenizer", "org/name", "--max-tokens", "100", "--max-num-batched-tokens=8192"],
        ["x", "--pad-token", "<pad>", "--eos-token-id", "2", "--token-limit", "4", "--tokens", "5"],
        ["x", "--key-frames", "3", "--keyboard", "us", "--monkey", "x", "--author", "me", "--authority", "y"],
        ["x", "--password-file", "/run/x", "--token-file=/run/y", "--api-key-path", "/run/z"],
        ["x", "--secretary-mode", "on", "--no-auth", "now", "--passes", "3"],
        ["x", "--token", "--port", "80", "--token"],
        ["x", "--password", "", "--x"],
        ["x", HEX, "123e4567-e89b-12d3-a456-426614174000", "meta-llama/Llama-3-8B", "sha256-" + HEX],
        ["x", "http://127.0.0.1:8000/v1?page=2", "a:b", "C:\\Games\\x.exe", "host:8080", "key=value"],
        [],
        ["x"],
    ],
)
def test_what_is_no_secret_stays_as_it_is(arguments: list[str]) -> None:
    assert Mask().arguments(arguments) == arguments


def test_a_users_patterns_mask_their_group_or_all_that_they_match() -> None:
    mask = Mask([r"corp-\d+", r"ticket (?P<secret>\w+) end", r"id(\d+)"])
    assert mask.text("corp-12 ticket abc end id7") == "*** ticket *** end id***"


@pytest.mark.parametrize(("pattern", "why"), [("(", "not a regular expression"), ("x*", "matches the empty text")])
def test_a_pattern_that_cannot_be_used_is_named(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Mask([pattern])


def grows_with_the_length(work: Callable[[str], object], piece: str, length: int = 6_000) -> bool:
    """Whether ten times the text takes far less than the hundred times that a square would take.

    It is the CPU time of this thread, measured again until it is small: other work on the machine makes a
    measurement longer now and then, and a square makes each of them longer.
    """
    short, long = (piece * (size // len(piece)) for size in (length, 10 * length))

    def seconds(text: str) -> float:
        gc.disable()
        begin = time.thread_time()
        work(text)
        taken = time.thread_time() - begin
        gc.enable()
        return taken

    base = min(seconds(short) for _ in range(3))
    return any(seconds(long) < 40 * base for _ in range(10))


def test_the_square_of_a_length_is_noticed() -> None:
    assert not grows_with_the_length(re.compile("a*b").findall, "a", 300)


@pytest.mark.parametrize(
    "piece",
    ["a", "=", ":", "--token ", "://", "a:", "token=", "eyJ", "Bearer ", '"token":"', "hf_", "http://a:b", "-" * 5,
     "-----BEGIN PRIVATE KEY-----"],
)  # fmt: skip
def test_time_grows_with_the_length_and_not_with_its_square(piece: str) -> None:
    assert grows_with_the_length(Mask().text, piece)


def test_many_arguments_are_no_trouble() -> None:
    arguments = ["x", *["--token", "s"] * 50_000]
    assert Mask().arguments(arguments).count("***") == 50_000


def forms() -> Iterator[tuple[str, str, list[str]]]:
    """The project's list: whether a form is secret, the line, and its arguments with the marks in them."""
    for sort, kinds in tomllib.loads(Path(__file__).with_name("secret_forms.toml").read_text("utf-8")).items():
        for lines in kinds.values():
            for line in filter(None, lines.splitlines()):
                yield sort, line, shlex.split(line)


def test_of_the_projects_list_secrets_are_starred_and_all_else_is_untouched() -> None:
    counts, failed = Counter[str](), defaultdict[str, list[str]](list)
    for sort, line, marked in forms():
        counts[sort] += 1
        arguments = [re.sub("[«»]", "", argument) for argument in marked]
        hidden = [secret for argument in marked for secret in re.findall("«(.*?)»", argument)]
        assert bool(hidden) == (sort == "secret"), line
        shown = Mask().arguments(arguments)
        is_right = not any(secret in "\0".join(shown) for secret in hidden) if hidden else shown == arguments
        if not is_right:
            failed[sort].append(f"{line} -> {shown}")
        assert Mask().arguments(shown) == shown, f"what is masked stays as it is: {line}"
        assert len(shown) == len(arguments)
    share = {sort: 1 - len(failed[sort]) / count for sort, count in counts.items()}
    # pytest -s shows it.
    print({sort: f"{share[sort]:.1%} of {count}" for sort, count in counts.items()})  # noqa: T201
    assert counts.total() >= 300
    assert share["secret"] >= 0.95, "\n".join(failed["secret"])
    assert share["harmless"] >= 0.98, "\n".join(failed["harmless"])


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["x", "--password", "-abc", "--port", "5"], ["x", "--password", "***", "--port", "5"]),
        (["psql", "--password", "-abc"], ["psql", "--password", "-abc"]),
        (["sshpass", "-p", "--x", "ssh"], ["sshpass", "-p", "***", "ssh"]),
        (["sh", "-c", "curl -u 'ada:s3cret' h; ls"], ["sh", "-c", "curl -u 'ada:***' h; ls"]),
        (["bash", "-c", "x --api-key s3cret # it's"], ["bash", "-c", "x --api-key *** # it's"]),
        (["ssh", "h", 'bash -c "y --token \\"a b\\""'], ["ssh", "h", 'bash -c "y --token \\"***\\""']),
        (["python", "-c", "f(password='a b', user='c')"], ["python", "-c", "f(password='***', user='c')"]),
        (
            ["x", '{"a": "{\\"token\\": \\"s\\", \\"b\\": 1}"}'],
            ["x", '{"a": "{\\"token\\": \\"***\\", \\"b\\": 1}"}'],
        ),
        (["sudo", "-u", "ada", "mysql", "-ps3cret"], ["sudo", "-u", "ada", "mysql", "-p***"]),
        (["docker", "run", "-p", "80:80", "img"], ["docker", "run", "-p", "80:80", "img"]),
        (["x --password s3cret"], ["x --password ***"]),
    ],
)
def test_of_a_form_only_the_secret_is_starred(arguments: list[str], kept: list[str]) -> None:
    assert Mask().arguments(arguments) == kept
    assert Mask().arguments(kept) == kept


@pytest.mark.parametrize(
    "piece",
    ["sh -c '", "\\\"", "'", '"', "`", "$(", "a b ", "{\"a\": ", "\\\\\\", "--token 'a ", "x=x=", "curl -u a:b;", "eyJ-", "a@b:c@",
     "token: ", "key=", "[(", "password=(", "\"--token\",", "wandb ", "name=TOKEN,", "/x/", "password ", "cookie: a;",
     "echo a|", "sudo -a ", "login <<< a ", "f('a b',", "s.login(\"a\", ", ";Password=a b"],
)  # fmt: skip
def test_time_of_commands_in_arguments_grows_with_the_length_and_not_with_its_square(piece: str) -> None:
    # Longer ones are not read as commands.
    assert LONGEST_LINE > 30_000
    assert grows_with_the_length(
        lambda text: (Mask().text(text), Mask().arguments(["bash", "-c", text])), piece, 3_000
    )


def test_only_the_stored_part_of_a_command_line_is_masked() -> None:
    assert len(Mask().arguments(["x", *["y" * 10] * 50_000], longest=100)) < 20
    [shown] = Mask().arguments(["z" * 1_000_000], longest=100)
    assert len(shown) <= 400


def test_the_shapes_of_tokens_are_those_of_the_installed_library() -> None:
    writer = Path(__file__).parent.parent / "docs" / "token_shapes.py"
    found = runpy.run_path(str(writer))
    assert found["TARGET"].read_text("utf-8") == found["module"](), "run docs/token_shapes.py"


def test_recording_does_not_load_the_library() -> None:
    code = (
        "import sys, gpumon_core.attribution.describe; from gpumon_core.attribution.secrets import Mask;"
        "Mask().text('a --token b'); print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"detect_secrets", "requests", "yaml"}.intersection(loaded)
