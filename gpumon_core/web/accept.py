"""Which offer a client prefers, by Accept and Accept-Encoding (RFC 9110, sections 12.4 and 12.5)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

_TOKEN = r"[!#$%&'*+.^_`|~0-9a-z-]+"
_NAME = re.compile(rf"{_TOKEN}(/{_TOKEN})?")
_PARAMETER = re.compile(rf'({_TOKEN})=(?:({_TOKEN})|"((?:\\.|[^"\\])*)")')
_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
# A quoted string, closed or not, or a single character.
_PIECE = re.compile(r'"(?:\\.|[^"\\])*"?|.', re.DOTALL)
# Older name -> name (section 8.4.1.3).
_ALIASES = {"x-gzip": "gzip"}


@dataclass(frozen=True, slots=True)
class _Choice:
    """A media type or coding, or a range of them; its parameters and its weight."""

    name: str
    parameters: Mapping[str, str]
    weight: float

    def fits(self, offer: _Choice) -> int | None:
        """How closely it names an offer; None where it does not name it.

        A parameter that the offer lacks is ignored: clients add a charset, or an escaping.
        """
        if self.name in ("*", "*/*"):
            return 0
        if self.name.endswith("/*"):
            return 1 if offer.name.startswith(self.name[:-1]) else None
        both = self.parameters.keys() & offer.parameters.keys()
        same = self.name == offer.name and all(self.parameters[key] == offer.parameters[key] for key in both)
        return 2 + len(both) if same else None


def preferred(headers: Iterable[str], offers: Iterable[str]) -> str | None:
    """The offer to which the headers of a request give the most weight; None where they accept none, or are
    missing.

    An offer has the weight of the choice that names it most closely. Among offers of equal weight the most closely
    named wins, then the first named, then the first offered. Malformed choices are ignored.
    """
    choices = list(_choices(",".join(headers)))
    best, most = None, (0.0, 0, 0)
    for offer in offers:
        [offered] = _choices(offer)
        fitting = [
            (close, choice.weight, -place)
            for place, choice in enumerate(choices)
            if (close := choice.fits(offered)) is not None
        ]
        close, weight, place = max(fitting, default=(0, 0.0, 0))
        if weight > 0 and (best is None or (weight, close, place) > most):
            best, most = offer, (weight, close, place)
    return best


def _choices(header: str) -> Iterator[_Choice]:
    for part in _split(header.lower(), ","):
        name, *rest = (piece.strip(" \t") for piece in _split(part, ";"))
        found = [_PARAMETER.fullmatch(piece) for piece in rest if piece]
        parameters = {one[1]: one[2] or re.sub(r"\\(.)", r"\1", one[3] or "") for one in found if one}
        weight = parameters.pop("q", "1")
        if _NAME.fullmatch(name) and all(found) and _WEIGHT.fullmatch(weight):
            yield _Choice(_ALIASES.get(name, name), parameters, float(weight))


def _split(text: str, at: str) -> list[str]:
    """The parts of a text between separators; separators in quotes do not count."""
    parts: list[list[str]] = [[]]
    for piece in _PIECE.findall(text):
        if piece == at:
            parts.append([])
        else:
            parts[-1].append(piece)
    return ["".join(part) for part in parts]
