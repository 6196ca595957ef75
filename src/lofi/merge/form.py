"""What a merged model may be: dense or quantized, rounded how, onto which weights. Words and checks, no work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from lofi.errors import RequestError

INTO = ("dense", "nf4", "int8")
ROUNDINGS = ("auto", "nearest", "compensated", "stochastic")
ONTO = ("auto", "original", "dequantized")


@dataclass(frozen=True)
class Form:
    """How to merge; RequestError for a word that is none of INTO, ROUNDINGS and ONTO."""

    into: str = "dense"
    rounding: str = "auto"
    """Of nf4 and int8. "auto" measures compensated against nearest and keeps the better."""
    onto: str = "auto"
    """The weights that the update is added to: "auto" takes the base as it is given."""

    def __post_init__(self) -> None:
        for name, known in (("into", INTO), ("rounding", ROUNDINGS), ("onto", ONTO)):
            _known(name, getattr(self, name), known)
        if self.into == "dense" and self.rounding != "auto":
            raise RequestError(
                f"rounding is {self.rounding}, but a dense merge has one rounding, to the base's dtype; "
                "leave it out, or merge into nf4 or int8"
            )

    @property
    def roundings(self) -> tuple[str, ...]:
        """The roundings to try."""
        return ("nearest", "compensated") if self.rounding == "auto" else (self.rounding,)

    @property
    def calibrates(self) -> bool:
        """Whether the layers' inputs have to be seen."""
        return self.into != "dense" and "compensated" in self.roundings

    def __str__(self) -> str:
        """ "nf4, compensated", "dense, onto the original weights"."""
        onto = {"auto": "", "original": "onto the original weights", "dequantized": "onto the dequantized weights"}
        return ", ".join(filter(None, (self.into, "" if self.rounding == "auto" else self.rounding, onto[self.onto])))


def _known(name: str, value: str, known: Sequence[str]) -> None:
    if value in known:
        return
    near = get_close_matches(str(value), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}."
    raise RequestError(f"{name} is {value!r}, which a merge does not know; {hint}")
