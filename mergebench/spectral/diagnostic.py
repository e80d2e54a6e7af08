"""Diagnostics: registered functions from one site to rows, and how rows add up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any, Literal, NamedTuple, TypeVar

from mergebench.core.params import Param, declared
from mergebench.core.registry import Registry

#: Numbers of one row: floats, ints, ``None`` for what is not defined, or lists of such mappings.
Values = dict[str, Any]
Per = Literal["model", "site"]
On = Literal["matrix", "tensor"]
F = TypeVar("F", bound=Callable[..., Any])


class Row(NamedTuple):
    """What one diagnostic says of one site.

    Attributes
    ----------
    values : mapping
    model, other : int or None
        Of which model, and for pairs with which other; ``None`` for all of them together.
    """

    values: Values
    model: int | None = None
    other: int | None = None


@dataclass(frozen=True, eq=False)
class Diagnostic:
    """A registered diagnostic.

    Attributes
    ----------
    name : str
    function : callable
        ``(tuned, site, **params) -> values or None`` per model, else
        ``(spectrum, site, **params) -> rows`` once per site, for what compares models.
    params : mapping
        Declared parameters, from the annotated signature.
    combine : callable
        ``(list of values) -> values`` of a layer, of a type of modules, or of a whole model.
    headline : callable
        ``values -> {heading: number}``: what tables show, the most telling number first.
    say : callable
        ``values of a whole model -> sentence`` without its subject, or ``""``.
    finish : callable or None
        ``(values of all rows of one model, their shapes, **params) -> values of those rows``, for
        what depends on the whole model.
    per : model or site
    on : matrix or tensor
        Whether it sees matrices alone, or every floating-point tensor, embeddings and vectors too.
    base : bool
        Whether it needs the base.
    least : int
        Models that it needs.
    uses : frozenset of str
        Decompositions that it asks for: ``base.svd``, ``base.values``, ``tuned.svd``,
        ``tuned.values``, ``tuned`` (the matrix), ``delta.svd``, ``delta.values``; ``base.top`` and
        ``tuned.top`` where they are needed only if bounds do not settle what leading vectors are.
        ``products`` and ``signs`` of pairs of models are found by the reading that comes before
        everything else. What asks for ``entries`` alone never holds a whole matrix.
    work : callable
        ``(rows, columns, models) -> bytes`` that it holds besides those.
    """

    name: str
    function: Callable[..., Any]
    params: Mapping[str, Param]
    combine: Callable[[Sequence[Values]], Values]
    headline: Callable[[Values], dict[str, Any]]
    say: Callable[[Values], str]
    finish: Callable[..., list[Values]] | None = None
    per: Per = "model"
    on: On = "matrix"
    base: bool = True
    least: int = 1
    uses: frozenset[str] = frozenset()
    work: Callable[[int, int, int], int] = lambda _rows, _columns, _models: 0

    @property
    def doc(self) -> str:
        """The whole docstring."""
        return cleandoc(self.function.__doc__ or "")

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.split("\n")[0]


DIAGNOSTICS: Registry[Diagnostic] = Registry(
    "diagnostic", "mergebench.spectral.diagnostics", "mergebench.diagnostics"
)


def diagnostic(
    *,
    combine: Callable[[Sequence[Values]], Values],
    headline: Callable[[Values], dict[str, Any]],
    say: Callable[[Values], str],
    **declares: Any,
) -> Callable[[F], F]:
    """Register a function under its own name; the keywords are those of :class:`Diagnostic`."""

    def register(function: F) -> F:
        name = function.__name__.rstrip("_")
        uses = frozenset(declares.pop("uses", ()))
        DIAGNOSTICS.add(
            name,
            Diagnostic(
                name,
                function,
                declared(function, skip=2),
                combine,
                headline,
                say,
                uses=uses,
                **declares,
            ),
        )
        return function

    return register


def total(rows: Iterable[Values], key: str) -> float:
    """The sum of one number over rows that have it."""
    return sum((row[key] for row in rows if row.get(key) is not None), 0.0)


def mean(rows: Iterable[Values], key: str) -> float | None:
    """The mean of one number over rows that have it."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return sum(found) / len(found) if found else None


def ratio(part: float, whole: float) -> float | None:
    """A quotient, ``None`` for a denominator of zero."""
    return part / whole if whole else None
