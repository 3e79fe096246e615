"""What a command line must not give away."""

# ruff: noqa: E501 - a case a line
from __future__ import annotations

import time

import pytest

from gpumon_core.attribution.secrets import Mask

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


@pytest.mark.parametrize(
    "piece",
    ["a", "=", ":", "--token ", "://", "a:", "token=", "eyJ", "Bearer ", '"token":"', "hf_", "http://a:b", "-" * 5,
     "-----BEGIN PRIVATE KEY-----"],
)  # fmt: skip
def test_time_grows_with_the_length_and_not_with_its_square(piece: str) -> None:
    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        best = []
        for _ in range(3):
            begin = time.process_time()
            Mask().text(text)
            best.append(time.process_time() - begin)
        return min(best)

    assert seconds(400_000) < 30 * seconds(40_000) + 0.05


def test_many_arguments_are_no_trouble() -> None:
    arguments = ["x", *["--token", "s"] * 50_000]
    assert Mask().arguments(arguments).count("***") == 50_000
