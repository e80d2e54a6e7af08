"""How entries lose: ternary, one bit, two bits, the largest only, or none of these.

A scheme looks at sums of all tensors, settles thresholds, and gives every tensor a :class:`Coder`.
What the codes stand for is settled once all entries have been coded, as the best levels are means
over codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import floor
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Interval

from mergebench.compute.cut import ALL, Cut
from mergebench.compute.rounding import round_to
from mergebench.core.errors import ParameterError, did_you_mean
from mergebench.core.params import Param, bind, declared
from mergebench.core.tensor import Array
from mergebench.ship.measure import Sums, together
from mergebench.ship.pieces import Piece

Scope = Literal["model", "tensor"]
Density = Annotated[float, Interval(gt=0, le=1)]
#: Finds what keeps so many of the largest magnitudes of some pieces.
Search = Callable[[Sequence[Piece], int], Cut]
# Conditional medians of the normal distribution in each half, and in quarters of two sizes.
_HALF, _INNER, _OUTER = 0.6744897501960817, 0.3777785283, 1.2656665543
_EPS = 1e-5
_STORED = {"bf16": "BF16", "f16": "F16", "f32": "F32", "int8": "I8"}


@dataclass
class Tally:
    """Of each code but 0: how many entries have it, and the sum of their magnitudes."""

    counts: dict[int, int] = field(default_factory=dict)
    sums: dict[int, float] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Take those of more entries."""
        for code, count in other.counts.items():
            self.counts[code] = self.counts.get(code, 0) + count
            self.sums[code] = self.sums.get(code, 0.0) + other.sums[code]

    def mean(self, code: int) -> float:
        """The mean magnitude of a code; 0 where none has it."""
        return self.sums[code] / self.counts[code] if self.counts.get(code) else 0.0


def tally_of(coded: Array, values: Array) -> Tally:
    """Of int8 codes whose magnitude is the class of an entry, and of the entries."""
    found = Tally()
    classes = np.abs(coded)
    for code in (1, 2):
        inside = classes == code
        if count := int(np.count_nonzero(inside)):
            found.counts[code] = count
            found.sums[code] = float(np.abs(values[inside]).sum(dtype=np.float64))
    return found


@dataclass(frozen=True, eq=False)
class Coder:
    """How one tensor is coded.

    Attributes
    ----------
    codec : str
    code : callable
        ``(values, start) ->`` what the codec packs, of entries from ``start`` on.
    numbers : callable
        ``(tally) ->`` the numbers of the head.
    group : str
        Tensors of one group share a tally; empty where none is needed.
    mean : float
        What codes are taken around.
    stored : str
        Dtype of stored values.
    """

    codec: str
    code: Callable[[Array, int], Array]
    numbers: Callable[[Tally], tuple[float, ...]]
    group: str = ""
    mean: float = 0.0
    stored: str = "BOOL"


Settled = Mapping[str, Coder]


def _kept(cut: Cut, name: str, values: Array, start: int) -> Array:
    """Where entries are kept."""
    magnitudes = np.abs(values)
    kept: Array = magnitudes > cut.value
    if ties := cut.ties_until(name, start, start + values.size):
        kept[:ties] |= magnitudes[:ties] == cut.value
    return kept


def _cuts(
    pieces: Sequence[Piece], density: float, scope: str, search: Search, more: int = 0
) -> dict[str, Cut]:
    """Of each tensor, what keeps ⌊density · d⌋ of d entries (and ``more``)."""

    def found(scoped: Sequence[Piece]) -> Cut:
        size = sum(piece.size for piece in scoped)
        rank = floor(density * size) + more
        return ALL if rank >= size else search(scoped, max(rank, 1))

    if scope == "tensor":
        return {piece.name: found([piece]) for piece in pieces}
    cut = found(pieces)
    return {piece.name: cut for piece in pieces}


def ternary(
    pieces: Sequence[Piece],
    sums: Mapping[str, Sums],
    search: Search,
    density: Density = 0.2,
    alpha: Annotated[float, Gt(0)] = 1.0,
    level: Literal["std", "mse"] = "std",
    scope: Scope = "model",
    compat: Literal["none", "official"] = "none",
) -> Settled:
    """ComPEFT (arXiv:2311.13171): signs of the largest entries, times one level.

    Parameters
    ----------
    density : float in (0, 1], default 0.2
        Share of entries that keep their sign, ⌊density · d⌋ of d.
    alpha : float > 0, default 1.0
        Multiplies the level; the paper takes the best of 0.5 to 10 on validation data.
    level : std or mse, default std
        The unbiased standard deviation of all entries (the paper's), or the mean magnitude of
        those kept, which has the least squared error.
    scope : model or tensor, default model
        What threshold and level are taken over; the paper flattens the model.
    compat : none or official, default none
        ``official``: the authors' code, which keeps one entry more, and takes the factors of a
        LoRA as they are stored.
    """
    cuts = _cuts(pieces, density, scope, search, more=int(compat == "official"))
    whole = together(sums[piece.name] for piece in pieces)

    def code(piece: Piece, values: Array, start: int) -> Array:
        kept = _kept(cuts[piece.name], piece.name, values, start)
        return (np.sign(values) * kept).astype(np.int8)

    def numbers(piece: Piece, tally: Tally) -> tuple[float, ...]:
        spread = (whole if scope == "model" else sums[piece.name]).std
        return piece.centre, alpha * (spread if level == "std" else tally.mean(1))

    return {
        piece.name: Coder(
            "ternary",
            partial(code, piece),
            partial(numbers, piece),
            "model" if scope == "model" else piece.name,
        )
        for piece in pieces
    }


def one_bit(
    pieces: Sequence[Piece],
    sums: Mapping[str, Sums],
    search: Search,
    level: Literal["mse", "median"] = "mse",
    centre: Literal["mean", "zero"] = "mean",
) -> Settled:
    """The sign of each entry around the mean of its tensor, times a level.

    Parameters
    ----------
    level : mse or median, default mse
        The mean distance, which has the least squared error, or the median one of a normal
        distribution, .6745 s with s = std + 1e-5.
    centre : mean or zero, default mean
        ``zero`` with ``mse`` is BitDelta (arXiv:2402.10193) before its scales are trained.
    """
    del search

    def numbers(piece: Piece, mean: float, tally: Tally) -> tuple[float, ...]:
        spread = sums[piece.name].std + _EPS
        return piece.centre + mean, tally.mean(1) if level == "mse" else _HALF * spread

    made = {}
    for piece in pieces:
        mean = sums[piece.name].mean if centre == "mean" else 0.0
        made[piece.name] = Coder("one_bit", _signs, partial(numbers, piece, mean), piece.name, mean)
    return made


def _signs(values: Array, start: int) -> Array:
    del start
    # A zero has a sign too: there are two values, and no third.
    return np.where(values < 0, np.int8(-1), np.int8(1))


def two_bit(
    pieces: Sequence[Piece],
    sums: Mapping[str, Sums],
    search: Search,
    level: Literal["mse", "median"] = "mse",
    centre: Literal["mean", "zero"] = "mean",
) -> Settled:
    """The sign of each entry around the mean of its tensor, times the nearer of two levels.

    Parameters
    ----------
    level : mse or median, default mse
        The mean distances of both groups, or the median ones of a normal distribution, .3778 s
        and 1.2657 s with s = std + 1e-5. Entries are told apart half way between the latter.
    centre : mean or zero, default mean
    """
    del search

    def numbers(piece: Piece, mean: float, tally: Tally) -> tuple[float, ...]:
        spread = sums[piece.name].std + _EPS
        levels = (tally.mean(1), tally.mean(2))
        if level == "median":
            levels = (_INNER * spread, _OUTER * spread)
        return piece.centre + mean, *levels

    def code(limit: float, values: Array, start: int) -> Array:
        return _signs(values, start) * np.where(np.abs(values) > limit, np.int8(2), np.int8(1))

    made = {}
    for piece in pieces:
        own = sums[piece.name]
        mean = own.mean if centre == "mean" else 0.0
        limit = (_INNER + _OUTER) / 2 * (own.std + _EPS)
        made[piece.name] = Coder(
            "two_bit", partial(code, limit), partial(numbers, piece, mean), piece.name, mean
        )
    return made


def sparse(
    pieces: Sequence[Piece],
    sums: Mapping[str, Sums],
    search: Search,
    density: Density = 0.1,
    values: Literal["bf16", "f16", "f32", "int8"] = "bf16",
    scope: Scope = "model",
) -> Settled:
    """The largest entries with their values.

    Parameters
    ----------
    density : float in (0, 1], default 0.1
        Share of entries that are kept, ⌊density · d⌋ of d.
    values : bf16, f16, f32 or int8, default bf16
        What they are rounded to; ``int8`` is in steps of the tensor's largest magnitude / 127.
    scope : model or tensor, default model
    """
    cuts = _cuts(pieces, density, scope, search)
    stored = _STORED[values]

    def code(piece: Piece, step: np.float32, entries: Array, start: int) -> Array:
        kept = np.where(_kept(cuts[piece.name], piece.name, entries, start), entries, 0)
        if stored == "I8":
            return np.clip(np.rint(kept / step), -127, 127).astype(np.int8)
        return round_to(kept.astype(np.float32, copy=False), stored, piece.name)

    made = {}
    for piece in pieces:
        step = np.float32(sums[piece.name].largest / 127) if stored == "I8" else np.float32(1)
        step = step if step > 0 else np.float32(1)
        made[piece.name] = Coder(
            "sparse", partial(code, piece, step), partial(_fixed, float(step)), stored=stored
        )
    return made


def _fixed(number: float, tally: Tally) -> tuple[float, ...]:
    del tally
    return (number,)


@dataclass(frozen=True)
class Scheme:
    """A scheme with its parameters."""

    name: str
    settle: Callable[..., Settled]
    params: Mapping[str, Param]
    summary: str

    def bound(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, the given ones checked.

        Raises
        ------
        ParameterError
            For an unknown name or a value outside what is declared.
        """
        values = bind(self.name, self.params, given)
        for name, value in values.items():
            if not isinstance(value, bool | int | float | str):
                raise ParameterError(f"{self.name}: `{name}`", got=str(value), expected="one value")
        return values


def _scheme(name: str, settle: Callable[..., Settled]) -> Scheme:
    summary = (settle.__doc__ or "").splitlines()[0]
    return Scheme(name, settle, declared(settle, skip=3), summary)


#: By the name that users give.
SCHEMES: Mapping[str, Scheme] = {
    name: _scheme(name, settle)
    for name, settle in (
        ("ternary", ternary),
        ("one-bit", one_bit),
        ("two-bit", two_bit),
        ("sparse", sparse),
    )
}
LOWRANK = "lowrank"


def scheme_named(name: str) -> Scheme:
    """A scheme by its name.

    Raises
    ------
    ParameterError
        If there is none, with the nearest.
    """
    if name not in SCHEMES:
        raise ParameterError(
            f"no scheme {name!r}", fix=did_you_mean(name, [*SCHEMES, LOWRANK, "lowrank+ternary"])
        )
    return SCHEMES[name]
