"""The settings of gpumon: read once from GPUMON_* variables and from .env, and validated.

docs/settings.md and the System page show the descriptions below.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from gpumon_core.safety.masking import Secret, mask_password, remember, secrets_in
from gpumon_core.safety.private_files import make_folder
from gpumon_core.safety.text import clean, escaped

__all__ = ["Settings", "SettingsError", "load", "mask_password"]

PREFIX = "GPUMON_"
ENV_FILE = ".env"


class SettingsError(Exception):
    """A setting that cannot be used; `str()` is one line with the variable, its value and what is allowed."""


class Settings(BaseSettings):
    """The settings. Make them with `load()`, which explains errors."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    source: Annotated[
        Literal["auto", "nvml", "demo"],
        Field(
            description="`nvml` reads the driver; `demo` simulates GPUs; `auto` reads the driver, and simulates "
            "GPUs under a banner until the driver loads"
        ),
    ] = "auto"
    interval: Annotated[float, Field(ge=1, le=3600, description="seconds between two readings, 1 to 3600")] = 4
    data_dir: Annotated[Path, Field(description="folder of the database; created when missing")] = Path("history")
    database_url: Annotated[
        str | None,
        Secret(mask_password, secrets_in),
        Field(
            description="database: `sqlite:///PATH` or `postgresql+psycopg://USER:PASSWORD@HOST/NAME`; by default "
            "`sqlite:///<data dir>/gpumon.db`"
        ),
    ] = None
    host_name: Annotated[
        str,
        Field(
            default_factory=lambda: clean(socket.gethostname()),
            min_length=1,
            max_length=255,
            description="name of this machine in the history; by default the system's host name",
        ),
    ]
    record: Annotated[bool, Field(description="`true` or `false`; `false` serves the pages without recording")] = (
        True
    )
    retention_raw_days: Annotated[
        float,
        Field(
            ge=0.05,
            le=3650,
            description="days for which every tick is stored, 0.05 to 3650",
        ),
    ] = 3
    retention_minute_days: Annotated[
        float,
        Field(ge=0.05, le=3650, description="days for which minutes are stored, 0.05 to 3650"),
    ] = 30
    retention_hour_days: Annotated[
        float,
        Field(
            ge=0.05,
            le=36500,
            description="days for which hours and the list of processes are stored, 0.05 to 36500",
        ),
    ] = 730
    commands: Annotated[
        Literal["full", "masked", "name", "off"],
        Field(
            description="how much of a command line is stored: `full`; `masked`, with stars for passwords, keys "
            "and tokens; `name`, without arguments; `off`, only the kernel's name"
        ),
    ] = "masked"
    rules: Annotated[
        Path | None,
        Field(description="your file of further workload rules and secrets to mask: see docs/workloads.md"),
    ] = None
    ask_servers: Annotated[
        bool,
        Field(
            description="`true` or `false`: whether gpumon asks local model servers (Ollama, vLLM, ...) for their "
            "loaded models, and container engines for the names of containers"
        ),
    ] = True
    container_socket: Annotated[
        Path | None,
        Field(description="socket of the container engine, where it is not Docker's or Podman's usual one"),
    ] = None
    let_sleep: Annotated[
        Literal["auto", "true", "false"],
        Field(
            description="whether an unused GPU may switch itself off, as in laptops, and is not asked then: "
            "`auto`, where its driver manages that; `true`, wherever the kernel can; `false`, never"
        ),
    ] = "auto"
    idle_minutes: Annotated[
        float,
        Field(
            ge=1,
            le=1440,
            description="minutes without work after which a process holds its memory idle, 1 to 1440",
        ),
    ] = 10
    price_per_kwh: Annotated[
        float | None, Field(ge=0, le=1e6, description="price of a kilowatt-hour; without a price no cost is shown")
    ] = None
    price_per_gpu_hour: Annotated[
        float | None,
        Field(ge=0, le=1e6, description="price of an hour of a busy GPU, beside its energy"),
    ] = None
    currency: Annotated[
        str,
        Field(
            min_length=1, max_length=8, pattern=r"^\S+$", description="currency of these prices: a code or a sign"
        ),
    ] = "EUR"
    metrics_processes: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="how many processes have series in `/metrics`, those with the most memory first, 0 to "
            "1000",
        ),
    ] = 20
    demo_gpus: Annotated[int, Field(ge=1, le=64, description="how many GPUs to simulate, 1 to 64")] = 4
    demo_processes: Annotated[
        int | None,
        Field(
            ge=0,
            le=4096,
            description="about how many processes to simulate at once over all GPUs, 0 to 4096; by default as "
            "many as the simulation has",
        ),
    ] = None
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        Field(description="least severe message to log: `DEBUG`, `INFO`, `WARNING` or `ERROR`"),
    ] = "INFO"
    log_file: Annotated[
        Path | None,
        Field(
            description="file for a copy of the server's log; at 10 MB a new file begins, and the last three "
            "files stay"
        ),
    ] = None

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("source", "commands", "let_sleep", mode="before")
    @classmethod
    def _lower_case(cls, value: object) -> object:
        return str(value).lower() if isinstance(value, str | bool) else value

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str | None) -> str | None:
        if value is None or re.match(r"sqlite:///(?!$|:memory:)", value):
            return value
        # Other tools write the scheme of PostgreSQL in other ways.
        url, is_postgresql = re.subn(r"^postgres(ql)?(\+psycopg)?://", "postgresql+psycopg://", value)
        if not is_postgresql:
            raise ValueError("must begin with sqlite:/// and name a file, or begin with postgresql+psycopg://")
        from sqlalchemy.engine import make_url

        refusal = ValueError("has a part that cannot be read; write @ : / in a password as %40 %3A %2F")
        try:
            parsed = make_url(url)
        except Exception:
            # The message of SQLAlchemy may quote a part of the password.
            raise refusal from None
        # After an unescaped @ a part of the password would be the host or the database, which errors show.
        if "@" in f"{parsed.host} {parsed.database}":
            raise refusal
        return url

    @field_validator("host_name")
    @classmethod
    def _clean_name(cls, value: str) -> str:
        return clean(value)

    @field_validator("rules")
    @classmethod
    def _readable_rules(cls, value: Path | None) -> Path | None:
        if value is not None:
            from gpumon_core.attribution.rules import Rules, RulesError
            from gpumon_core.attribution.secrets import Mask

            try:
                Mask(Rules.load(value).secrets)
            except (RulesError, ValueError) as error:
                # pydantic cannot pass on a path of bytes that are no text.
                raise ValueError(escaped(str(error))) from None
        return value

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name in type(self).model_fields:
            yield name, shown(name, getattr(self, name))

    @property
    def real_database_url(self) -> str:
        """The URL of the database of real GPUs."""
        return self.database_url or f"sqlite:///{self.data_dir / 'gpumon.db'}"

    @property
    def demo_database_url(self) -> str:
        """The URL of the database of simulated GPUs, which is never the one of real GPUs."""
        return f"sqlite:///{self.data_dir / 'demo.db'}"

    def database_of(self, source: str) -> str:
        """The URL of the database of a source; `auto` means real GPUs."""
        return self.demo_database_url if source == "demo" else self.real_database_url


def variable(field: str) -> str:
    """The environment variable that sets `field`."""
    return PREFIX + field.upper()


def load(**overrides: Any) -> Settings:
    """Read the settings from the environment and .env; `overrides` win. Raises SettingsError."""
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(detail) for detail in error.errors())) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{ENV_FILE} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        for marker in _secret(field):
            for one in value if isinstance(value, list | tuple) else (value,):
                remember(marker.hidden(_text(one)))
    return settings


def _secret(field: FieldInfo) -> list[Secret]:
    """The mark of a setting that holds a secret; [] for others."""
    return [one for one in field.metadata if isinstance(one, Secret)]


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def shown(name: str, value: object) -> str:
    """The value of a setting without secrets: those of a setting that is marked as a Secret, and the password of a
    URL in any other setting."""
    text = _text(value)
    for marker in _secret(Settings.model_fields[name]):
        return marker.shown(text)
    return mask_password(text) if re.match(r"\s*[\"']?[\w+.\-]+:/", text) else text


def _explain(detail: Mapping[str, Any]) -> str:
    field = str(detail["loc"][0])
    message = str(detail["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given, value = str(detail["input"]), shown(field, detail["input"])
    if value != given:
        # The message may quote the value.
        for quoted in (given, escaped(given), escaped(str(Path(given)))):
            message = message.replace(quoted, value) if quoted.strip(".") else message
    return escaped(f"{variable(field)}={value}: {message} ({Settings.model_fields[field].description})")


def in_force(settings: Settings) -> list[tuple[str, str, str]]:
    """The variable of every setting, its value without secrets, and its description."""
    rows = []
    for name, field in Settings.model_fields.items():
        rows.append((variable(name), shown(name, getattr(settings, name)), field.description or ""))
    return rows


def markdown_table() -> str:
    """The table of docs/settings.md: every setting with its default and description."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default
        has_none = field.default_factory is not None or default is None
        written = "" if has_none else f"`{shown(name, default)}`"
        lines.append(f"| `{variable(name)}` | {written} | {field.description} |")
    return "\n".join(lines)


def check_data_dir(settings: Settings) -> None:
    """Make the data folder. Raises SettingsError where it cannot be written to."""
    path = settings.data_dir
    try:
        make_folder(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SettingsError(
            f"{variable('data_dir')}={shown('data_dir', path)}: must be a folder that this user can write to "
            f"({error.strerror})"
        ) from None


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """One sentence for each GPUMON_ variable that no setting reads, with the likely intended name."""
    known = [variable(field) for field in Settings.model_fields]
    sentences = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            sentences.append(f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else ""))
    return sentences
