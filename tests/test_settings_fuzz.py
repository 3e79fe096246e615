"""Whatever a setting contains, the start has settings to go by or one sentence that names the wrong one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gpumon_core.settings import Settings, SettingsError, load, variable

VARIABLES = [variable(field) for field in Settings.model_fields]
# What the environment can hold: bytes without NUL, of which those that are no UTF-8 are lone surrogates in Python.
TEXTS = st.binary(max_size=60).map(lambda value: os.fsdecode(value.replace(b"\0", b"")))
NEARLY_RIGHT = st.sampled_from(
    [
        *(
            "nan",
            "inf",
            "-inf",
            "1e999",
            "-1",
            "0",
            "9" * 400,
            "1_000",
            "0x10",
            "１",
            "true ",
            "YES",
            "null",
            "[]",
            "{}",
        ),
        *(
            "sqlite://",
            "sqlite:///",
            "sqlite:///:memory:",
            "sqlite:///a?b=c",
            "postgresql://",
            "postgresql://a:b@c:d/e",
        ),
        *(
            "postgresql+psycopg://u:geheim@[::1/db",
            "postgres://u:ge@heim@h/db",
            "mysql://h/db",
            "~",
            "/",
            "/dev/null",
        ),
        *("a" * 300, "a\nb", "\udcff", "$HOME", "%(x)s", "€", " "),
    ]
)


@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=300,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(chosen=st.dictionaries(st.sampled_from(VARIABLES), TEXTS | NEARLY_RIGHT, min_size=1, max_size=3))
def test_any_text_in_any_setting_is_taken_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, str]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(Path(tmp_path_factory.getbasetemp()))
        for name, text in chosen.items():
            patched.setenv(name, text)
        try:
            found = load()
        except SettingsError as error:
            sentence = str(error)
            assert any(sentence.startswith(f"{name}=") for name in chosen)
            assert "Traceback" not in sentence
            assert "geheim" not in sentence
            assert sentence.isprintable()
        else:
            assert isinstance(found, Settings)
            assert found.real_database_url
            assert found.interval >= 1
