"""Which processes are meant: one filter for pages, routes, downloads and the command line.

A condition is one field of ProcessFilter. The field has with it the condition's parameter in a query, its SQL and
its words, so that a new condition is a new field, and nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal
from zoneinfo import ZoneInfo

import sqlalchemy as sa

from gpumon_core import format as fmt
from gpumon_core.safety import parameters
from gpumon_core.safety.parameters import (
    LARGEST,
    LAST_MOMENT,
    MOMENT,
    BadParameter,
    Parameter,
    one_of,
    whole,
    words,
)
from gpumon_core.safety.text import clean
from gpumon_core.store.queries.current import ANSWERS
from gpumon_core.store.schema import gpu_processes, gpus, hosts, process_gpus, programs

ProcessKind = Literal["C", "G", "M"]
ProcessState = Literal["running", "ended"]
Sql = sa.ColumnElement[bool]
LARGEST_PID = 2**31 - 1
PID_DIGITS = len(str(LARGEST_PID))
# The most of a value that a description quotes: a link may ask for thousands of letters.
LONGEST_IN_WORDS = 80
# Pages name a container by its pod, its name, or the beginning of its id.
CONTAINER = sa.func.coalesce(
    programs.c.pod, programs.c.container_name, sa.func.substr(programs.c.container_id, 1, 12)
)


@dataclass(frozen=True, slots=True)
class Wording:
    """How a description names things: times in this zone, GPUs (by id) by these names."""

    zone: ZoneInfo
    gpus: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FilterField:
    """A field of the filter.

    parameters: those of a query that mean it; none where no query can ask for it. sql: the condition for the rows
    of `gpu_processes`, from the field's value and the database's dialect; None where it excludes nothing.
    words: the value in words.
    """

    parameters: tuple[Parameter, ...]
    sql: Callable[[Any, str], Sql | None]
    words: Callable[[Any, Wording], str]

    def read(self, values: Mapping[str, Any]) -> Any:
        """The field's value, from those of the parameters."""
        [one] = self.parameters
        return values[one.name]

    def pairs(self, value: Any) -> list[tuple[str, Any]]:
        """The field's value as it is written in a query."""
        [one] = self.parameters
        return [(one.name, each) for each in (value if one.is_repeatable else (value,))]


class OfPrograms(FilterField):
    """The field that has a parameter for each column of `programs`."""

    def read(self, values: Mapping[str, Any]) -> Any:
        """(Column, values) pairs."""
        return tuple((one.name, values[one.name]) for one in self.parameters if values[one.name])

    def pairs(self, value: Any) -> list[tuple[str, Any]]:
        """Each value under its column's name."""
        return [(column, each) for column, chosen in value for each in chosen]


def _either(values: Sequence[object]) -> str:
    return " or ".join(clean(str(value), LONGEST_IN_WORDS) for value in values)


def _containing(text: str) -> str:
    text = text.strip()
    return f"with “{clean(text, LONGEST_IN_WORDS)}” in the name or command line, or as PID" if text else ""


def _field(
    default: Any,
    parameter: Parameter | tuple[Parameter, ...],
    sql: Callable[[Any, str], Sql | None],
    in_words: Callable[[Any, Wording], str],
) -> Any:
    several = parameter if isinstance(parameter, tuple) else (parameter,)
    kind = OfPrograms if len(several) > 1 else FilterField
    return field(default=default, metadata={"condition": kind(several, sql, in_words)})


# ---- SQL ---------------------------------------------------------------------------------------------


def running() -> sa.Select[tuple[int]]:
    """The ids of the processes that are on a GPU at their host's newest tick."""
    return (
        sa.select(process_gpus.c.process_id)
        .join(gpus, gpus.c.id == process_gpus.c.gpu_id)
        .join(hosts, hosts.c.id == gpus.c.host_id)
        .where(process_gpus.c.active == 1, ANSWERS)
    )


def _seen_since(start: int, _: str) -> Sql:
    # The writer updates the rows of running processes only now and then: a running process was seen just now.
    still = running().where(hosts.c.last_seen >= start)
    return sa.or_(gpu_processes.c.last_seen >= start, gpu_processes.c.id.in_(still))


def _lived(seconds: int, _: str) -> Sql:
    this, began = gpu_processes.c, gpu_processes.alias()
    still = running().join(began, began.c.id == process_gpus.c.process_id)
    still = still.where(hosts.c.last_seen - began.c.first_seen >= seconds)
    return sa.or_(this.last_seen - this.first_seen >= seconds, this.id.in_(still))


def _in_states(states: Sequence[ProcessState], _: str) -> Sql | None:
    if len(set(states)) != 1:
        return None
    is_running = gpu_processes.c.id.in_(running())
    return is_running if states[0] == "running" else sa.not_(is_running)


def _runs(condition: Sql) -> Sql:
    return gpu_processes.c.program_id.in_(sa.select(programs.c.id).where(condition))


def _of_programs(chosen: Sequence[tuple[str, Sequence[str]]], _: str) -> Sql | None:
    found = [(programs.c[column], values) for column, values in chosen]
    conditions = [_runs(column.in_(values)) for column, values in found if values]
    return sa.and_(*conditions) if conditions else None


def _used(condition: Sql) -> Sql:
    return gpu_processes.c.id.in_(sa.select(process_gpus.c.process_id).where(condition))


def _of_kinds(kinds: Sequence[ProcessKind], _: str) -> Sql:
    # A kind may be a sum, such as C+G.
    return _used(sa.or_(*(process_gpus.c.kind.contains(kind, autoescape=True) for kind in kinds)))


def _matches(text: str, dialect: str) -> Sql | None:
    """A text is in a process's name or command line, or is its PID."""
    text = text.strip()
    if not text:
        return None
    this = gpu_processes.c
    commanded = sa.select(programs.c.id).where(_contains(programs.c.command, text, dialect))
    found = [
        sa.select(this.id).where(this.name.in_(_names_with(text, dialect))),
        sa.select(this.id).where(this.program_id.in_(commanded)),
    ]
    # Python refuses to make a number of thousands of digits.
    if text.isdecimal() and len(text) <= PID_DIGITS and int(text) <= LARGEST_PID:
        # The key of processes begins with the host.
        found.append(sa.select(this.id).where(this.host_id.in_(sa.select(hosts.c.id)), this.pid == int(text)))
    # One list of ids: SQLite would run the inner queries twice for conditions joined by OR.
    return this.id.in_(sa.union(*found))


def _names_with(text: str, dialect: str) -> sa.Select[tuple[object]]:
    """The names that contain a text. There are few names, however many processes: the query walks the index from
    one name to the next, and does not read every process."""
    name = gpu_processes.c.name
    names = sa.select(sa.func.min(name).label("name")).cte("names", recursive=True)
    after = sa.select(sa.func.min(name)).where(name > names.c.name).scalar_subquery()
    names = names.union_all(sa.select(after).where(names.c.name.is_not(None)))
    return sa.select(names.c.name).where(_contains(names.c.name, text, dialect))


def _contains(value: sa.ColumnElement[Any], text: str, dialect: str) -> Sql:
    # SQLite's LIKE ignores case by itself; with lower() it takes twice as long.
    contains = value.contains if dialect == "sqlite" else value.icontains
    return contains(text, autoescape=True)


# ---- The filter --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessFilter:
    """Which processes are meant. None and empty values exclude nothing; a process must meet all other conditions.

    start, end: UTC seconds; the process was seen between them. gpu_ids, users: any of them. containers: by pod,
    name, or the first 12 digits of the id. programs_with: (column of `programs`, values) pairs, any of the
    values. kinds: it was a process of one of these kinds on some GPU. min_memory_mib: of the most that it held at
    once over its GPUs. min_lifetime_s: from first to last seen. text: part of the name or the command line in
    any case, or the PID. process_ids: these rows.
    """

    start: int | None = _field(
        None,
        Parameter("from", "Processes that were seen at this time or later.", MOMENT),
        _seen_since,
        lambda start, wording: f"seen since {fmt.moment(start, wording.zone)}",
    )
    end: int | None = _field(
        None,
        Parameter("to", "Processes that were seen at this time or earlier.", MOMENT),
        lambda end, _: gpu_processes.c.first_seen <= end,
        lambda end, wording: f"seen before {fmt.moment(end, wording.zone)}",
    )
    gpu_ids: tuple[int, ...] = _field(
        (),
        Parameter(
            "gpu",
            f"Processes that were on this GPU, {parameters.GPU_SPELLINGS}.",
            parameters.GPU,
            is_repeatable=True,
        ),
        lambda ids, _: _used(process_gpus.c.gpu_id.in_(ids)),
        lambda ids, wording: f"on {_either([wording.gpus.get(one, f'GPU id:{one}') for one in ids])}",
    )
    users: tuple[str, ...] = _field(
        (),
        Parameter("user", "Processes of this user.", words(), is_repeatable=True),
        lambda users, _: gpu_processes.c.username.in_(users),
        lambda users, _: f"of user {_either(users)}",
    )
    containers: tuple[str, ...] = _field(
        (),
        Parameter(
            "container",
            "Processes in this container, by pod, name, or the first 12 digits of its id.",
            words(),
            is_repeatable=True,
        ),
        lambda containers, _: _runs(CONTAINER.in_(containers)),
        lambda containers, _: f"in container {_either(containers)}",
    )
    programs_with: tuple[tuple[str, tuple[str, ...]], ...] = _field(
        (),
        (
            Parameter(
                "workload", "Processes of this kind of workload, such as vLLM.", words(), is_repeatable=True
            ),
            Parameter("model", "Processes that serve this model.", words(), is_repeatable=True),
        ),
        _of_programs,
        lambda chosen, _: ", ".join(f"with {column} {_either(values)}" for column, values in chosen if values),
    )
    kinds: tuple[ProcessKind, ...] = _field(
        (),
        Parameter(
            "type",
            "Processes that compute (C), draw (G), or share a GPU through MPS (M).",
            one_of("C", "G", "M"),
            is_repeatable=True,
        ),
        _of_kinds,
        lambda kinds, _: f"of type {_either(kinds)}",
    )
    states: tuple[ProcessState, ...] = _field(
        (),
        Parameter(
            "state",
            "Processes that are on a GPU now, or no longer.",
            one_of("running", "ended"),
            is_repeatable=True,
        ),
        _in_states,
        lambda states, _: _either(states),
    )
    min_memory_mib: int | None = _field(
        None,
        Parameter("min_memory_mib", "Processes that held at least so much memory, in MiB.", whole(0, LARGEST)),
        lambda mib, _: gpu_processes.c.max_memory >= mib,
        lambda mib, _: f"that held at least {fmt.memory(mib)}",
    )
    min_lifetime_s: int | None = _field(
        None,
        Parameter(
            "min_lifetime_s", "Processes that were seen for at least so long, in seconds.", whole(0, LAST_MOMENT)
        ),
        _lived,
        lambda seconds, _: f"that lived at least {fmt.duration(seconds)}",
    )
    text: str = _field(
        "",
        Parameter(
            "q", "A part of the name or of the command line, in any case, or the PID.", words(0), default=""
        ),
        _matches,
        lambda text, _: _containing(text),
    )
    process_ids: tuple[int, ...] = _field(
        (),
        (),
        lambda ids, _: gpu_processes.c.id.in_(ids),
        lambda ids, _: f"with gpumon's id {_either(ids)}",
    )

    def conditions(self, dialect: str) -> list[Sql]:
        """SQL for the rows of `gpu_processes`, in a database of that dialect.

        Raises KeyError for a column that `programs` lacks.
        """
        found = (condition.sql(value, dialect) for condition, value in self._chosen())
        return [one for one in found if one is not None]

    def query(self) -> list[tuple[str, Any]]:
        """The filter as pairs of a query string, but for process_ids. `from_query` reads them."""
        return [
            pair for condition, value in self._chosen() if condition.parameters for pair in condition.pairs(value)
        ]

    def describe(self, wording: Wording) -> str:
        """The filter in words, separated by commas: "of user ada, running"; empty where it excludes nothing."""
        return ", ".join(filter(None, (condition.words(value, wording) for condition, value in self._chosen())))

    def _chosen(self) -> list[tuple[FilterField, Any]]:
        found = ((condition, getattr(self, name)) for name, condition in CONDITIONS.items())
        return [(condition, value) for condition, value in found if value not in (None, (), "")]


CONDITIONS: dict[str, FilterField] = {one.name: one.metadata["condition"] for one in fields(ProcessFilter)}
# What a query takes to choose processes.
PARAMETERS: tuple[Parameter, ...] = tuple(one for each in CONDITIONS.values() for one in each.parameters)
EVERYTHING = ProcessFilter()


def from_query(values: Mapping[str, Any]) -> ProcessFilter:
    """The filter that the values of PARAMETERS mean, or of some of them; `gpu` has ids. Raises BadParameter."""
    start, end = values.get("from"), values.get("to")
    if start is not None and end is not None and start > end:
        raise BadParameter("to", "“to” must not be earlier than “from”.")
    return ProcessFilter(
        **{
            name: condition.read(values)
            for name, condition in CONDITIONS.items()
            if condition.parameters and all(one.name in values for one in condition.parameters)
        }
    )
