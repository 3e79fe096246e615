"""Attributes that live in the shared structure: numbers and texts."""

from __future__ import annotations

from typing import Any, TypeAlias

from .layout import UNSUPPORTED

TextValue: TypeAlias = "str | bytes | None"


class View:
    """An object whose attributes are fields of a structure in the shared file."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw


class Number:
    """A number of the structure; None is one that the board does not have.

    Typed Any, so that `gpu.energy_mj += 5` needs no check for None first.
    """

    def __init__(self, field: str | None = None, index: int | None = None) -> None:
        self._field, self._index = field, index

    def __set_name__(self, owner: type, name: str) -> None:
        self._field = self._field or name

    def __get__(self, view: View, owner: type | None = None) -> Any:
        value = getattr(view._raw, str(self._field))
        value = value if self._index is None else value[self._index]
        return None if value == UNSUPPORTED else value

    def __set__(self, view: View, value: int | None) -> None:
        number = UNSUPPORTED if value is None else int(value)
        if self._index is None:
            setattr(view._raw, str(self._field), number)
        else:
            getattr(view._raw, str(self._field))[self._index] = number


class Text:
    """A text of the structure: str, bytes (garbage included), Unterminated, or None for absent."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, view: View, owner: type | None = None) -> Any:
        text = getattr(view._raw, self._name)
        return text.bytes.decode(errors="replace") if text.form else None

    def __set__(self, view: View, value: TextValue) -> None:
        text = getattr(view._raw, self._name)
        if value is None:
            text.form = 0
            return
        encoded = value.encode() if isinstance(value, str) else value
        if len(encoded) > type(text).bytes.size:
            raise ValueError(f"The fake keeps texts of up to {type(text).bytes.size} bytes, not {len(encoded)}.")
        text.bytes, text.length = bytes(encoded), len(encoded)
        text.form = 2 if isinstance(value, Unterminated) else 1


class Unterminated(bytes):
    """Text that fills the caller's whole buffer, without the NUL that NVML promises."""


def free_slot(slots: Any, what: str, used: str = "used") -> int:
    for index, slot in enumerate(slots):
        if not getattr(slot, used):
            return index
    raise ValueError(f"The fake has room for {len(slots)} {what}, and all are taken.")


def set_all(view: View, values: dict[str, Any]) -> None:
    settable = _settable(type(view))
    for name, value in values.items():
        if name not in settable:
            raise TypeError(f"{type(view).__name__} has no value {name!r}.")
        setattr(view, name, value)


def _settable(kind: type) -> frozenset[str]:
    return frozenset(
        name
        for base in kind.__mro__
        for name, value in vars(base).items()
        if isinstance(value, Number | Text) or (isinstance(value, property) and value.fset)
    )
