"""How far a merged model is from its base, block by block, and which inputs took it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.passing import Passing
from mergebench.compute.entrywise import SUMS, Passes, Rows, passes
from mergebench.compute.machine import cores
from mergebench.compute.pairwise import as_matrix, every_pair, inner_products
from mergebench.compute.threads import one_thread
from mergebench.core.delta import Delta, Difference, Replacement
from mergebench.core.errors import MismatchError
from mergebench.core.site import make_sites
from mergebench.core.tensor import FLOATING, Array, Tensor, size_of
from mergebench.merge.kernels import ready
from mergebench.merge.verify import in_order
from mergebench.sources import Applied, Source

_SINGULAR = 1e-9

#: ``(what is being done, entries done, entries in all)``.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Part:
    """What one input contributes, where τ is the merged displacement and τᵢ that of the input.

    Attributes
    ----------
    cosine : float
        Of the angle between τ and τᵢ; ``nan`` where one is zero.
    coefficient : float
        cᵢ of the least squares fit τ ≈ Σ cᵢ τᵢ: the weight in a linear merge.
    share : float
        cᵢ ⟨τᵢ, τ⟩ / ‖τ‖²: the part of ‖τ‖² that the fit owes to this input. Shares sum up to what
        the inputs explain, 1 for a linear merge; inputs that oppose the result are below 0.
    """

    cosine: float
    coefficient: float
    share: float


@dataclass(frozen=True)
class Layer:
    """One block, or one class of tensors outside of blocks.

    Attributes
    ----------
    where : str
        Such as ``model.layers.3`` or ``embedding``; ``all`` for the sum.
    tensors, entries : int
    norm : float
        ‖merged - base‖ (Frobenius).
    drift : float
        ‖merged - base‖ / ‖base‖; ``nan`` without a base.
    parts : tuple of Part
        One for each input.
    """

    where: str
    tensors: int
    entries: int
    norm: float
    drift: float
    parts: tuple[Part, ...]

    @property
    def unexplained(self) -> float:
        """The part of ‖τ‖² that no combination of the inputs gives."""
        return 1.0 - sum(each.share for each in self.parts) if self.parts else nan

    def to_json(self) -> dict[str, Any]:
        """Plain data, ``None`` for ``nan``."""

        def plain(value: float) -> float | None:
            return value if isfinite(value) else None

        return {
            "where": self.where,
            "tensors": self.tensors,
            "entries": self.entries,
            "norm": plain(self.norm),
            "drift": plain(self.drift),
            "inputs": [
                {
                    "cosine": plain(each.cosine),
                    "coefficient": plain(each.coefficient),
                    "share": plain(each.share),
                }
                for each in self.parts
            ],
            "unexplained": plain(self.unexplained),
        }


@dataclass(frozen=True)
class Drift:
    """What :func:`drift` measured.

    Attributes
    ----------
    inputs : tuple of str
    layers : tuple of Layer
        Blocks in the order of the model, then classes outside of blocks.
    total : Layer
    notes : tuple of str
    """

    inputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    total: Layer
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "inputs": list(self.inputs),
            "layers": [each.to_json() for each in self.layers],
            "total": self.total.to_json(),
            "notes": list(self.notes),
        }


def drift(
    merged: Source,
    base: Source | None,
    inputs: Sequence[Source] = (),
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Drift:
    """Measure ‖merged - base‖ / ‖base‖ and what each input has to do with it, streamed.

    Sums are in float64. Tied weights count once; tensors that the base does not have in the same
    shape, and those that are no floating-point numbers, are left out and noted.

    Parameters
    ----------
    merged : Source
        A model, or an adapter or task vector.
    base : Source or None
        A checkpoint; only adapters and task vectors do without.
    inputs : sequence of Source
        What was merged.
    workers : int, optional
        Threads; the number of usable cores by default.
    progress : callable, optional

    Raises
    ------
    MismatchError
        If a base is needed and there is none.
    """
    under = None if base is None else base.checkpoint
    if under is None and any(each.checkpoint is not None for each in (merged, *inputs)):
        raise MismatchError(
            f"{merged.label}: how far it is from its base needs the base", fix="add --base"
        )
    notes: list[str] = []
    names, left = _names(merged, under)
    if left:
        notes.append(f"{left} tensors are not in the base, or of another shape there")
    rows = {
        name: [_displacement(each, under, name) for each in (merged, *inputs)] for name in names
    }
    for position, each in enumerate(inputs, 1):
        lacking = sum(row[position] is None for row in rows.values())
        if lacking and each.checkpoint is not None:
            notes.append(f"{each.label} lacks {lacking} tensors, which count as unchanged")
    shapes = {name: _shape(row) for name, row in rows.items()}
    total = sum(size_of(shape) for shape in shapes.values())
    compiled = passes() if ready.wanted(total * (len(inputs) + 1) // SUMS) else None
    done = 0
    sums: dict[str, _Sum] = {}
    whole = _Sum.empty(len(inputs))
    sites = make_sites(shapes)
    blocks = sorted({(site.stack, site.block) for site in sites.values() if site.block is not None})
    order = [f"{stack}.{block}" for stack, block in blocks]

    def measured(name: str) -> Array:
        return _products(rows[name], _origin(under, name), size_of(shapes[name]), compiled)

    passing = Passing((_origin(under, name), row) for name, row in rows.items())
    with one_thread():
        for name, products in in_order(measured, list(rows), workers or cores()):
            passing.done(_origin(under, name), rows[name])
            site = sites[name]
            where = site.kind if site.block is None else f"{site.stack}.{site.block}"
            for one in (sums.setdefault(where, _Sum.empty(len(inputs))), whole):
                one.add(products, site.size)
            done += site.size
            if progress is not None:
                progress("measuring drift", done, total)
    passing.over()
    listed = [*(each for each in order if each in sums), *sorted(sums.keys() - set(order))]
    return Drift(
        tuple(each.label for each in inputs),
        tuple(sums[where].layer(where, under is not None) for where in listed),
        whole.layer("all", under is not None),
        tuple(notes),
    )


def _names(merged: Source, base: Checkpoint | None) -> tuple[list[str], int]:
    """Tensors to measure, and how many are left out."""
    if merged.checkpoint is None:
        deltas: Mapping[str, Delta] = merged.deltas if merged.deltas is not None else {}
        if base is None:
            # New values have no displacement where there is nothing to take it from.
            names = [name for name, each in deltas.items() if not isinstance(each, Replacement)]
        else:
            names = [
                name
                for name, each in deltas.items()
                if name in base.tensors and base.tensors[name].shape == each.shape
            ]
        return names, len(deltas) - len(names)
    assert base is not None
    own = merged.checkpoint
    wanted = [
        name
        for name, tensor in own.tensors.items()
        if tensor.dtype in FLOATING and name not in own.aliases
    ]
    names = [
        name
        for name in wanted
        if name in base.tensors
        and base.tensors[name].shape == own.tensors[name].shape
        and base.tensors[name].dtype in FLOATING
    ]
    return names, len(wanted) - len(names)


def _origin(base: Checkpoint | None, name: str) -> Tensor | None:
    return None if base is None else base.tensors.get(name)


def _displacement(source: Source, base: Checkpoint | None, name: str) -> Delta | None:
    """What a source changes a tensor by; ``None`` for nothing."""
    origin = _origin(base, name)
    delta = None if source.deltas is None else source.deltas.get(name)
    own = source.checkpoint
    if own is None:
        if isinstance(delta, Replacement):
            return None if origin is None else _against(delta.values, origin)
        return delta
    assert origin is not None
    if name not in own.tensors:
        return None
    if delta is None:
        return _against(own.tensors[name], origin)
    if isinstance(delta, Replacement):
        return _against(delta.values, origin)
    same = base is not None and _same(own.path, base.path)
    return delta if same else _against(Applied(own.tensors[name], delta), origin)


def _same(one: Path, two: Path) -> bool:
    return one.resolve() == two.resolve()


def _against(values: Tensor, origin: Tensor) -> Delta | None:
    return Difference(values, origin) if values.shape == origin.shape else None


def _shape(row: Sequence[Delta | None]) -> tuple[int, ...]:
    assert row[0] is not None
    return row[0].shape


def _products(
    row: Sequence[Delta | None], origin: Tensor | None, size: int, compiled: Passes | None
) -> Array:
    """Inner products of all displacements and, in the last row and column, the base's square."""
    rows = Rows(origin, row, size)
    own = [] if origin is None else [(0, 0)]
    pairs = [*every_pair(rows.count, rows.first), *own]
    sums, _ = inner_products(rows, pairs, (), compiled)
    found = as_matrix(pairs, sums, rows.count)
    # The base stands first there.
    order = [*range(rows.first, rows.count), *range(rows.first)]
    return found[np.ix_(order, order)]


@dataclass(eq=False)
class _Sum:
    """Inner products summed over tensors."""

    products: Array
    own: float = 0.0
    tensors: int = 0
    entries: int = 0

    @classmethod
    def empty(cls, inputs: int) -> _Sum:
        return cls(np.zeros((inputs + 1, inputs + 1)))

    def add(self, products: Array, entries: int) -> None:
        count = len(self.products)
        self.products += products[:count, :count]
        if len(products) > count:
            self.own += float(products[-1, -1])
        self.tensors += 1
        self.entries += entries

    def layer(self, where: str, based: bool) -> Layer:
        norm = sqrt(max(float(self.products[0, 0]), 0.0))
        ratio = nan
        if based:
            ratio = norm / sqrt(self.own) if self.own > 0 else (0.0 if norm == 0 else nan)
        return Layer(where, self.tensors, self.entries, norm, ratio, self._parts())

    def _parts(self) -> tuple[Part, ...]:
        count = len(self.products) - 1
        if count == 0:
            return ()
        gram, inner = self.products[1:, 1:], self.products[1:, 0]
        square = float(self.products[0, 0])
        if square <= 0:
            return tuple(Part(nan, 0.0, nan) for _ in range(count))
        # Scaled to length 1, so that a small input counts as much as a large one.
        lengths = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
        safe = np.where(lengths > 0, lengths, 1.0)
        scaled = gram / np.outer(safe, safe)
        found = np.linalg.lstsq(scaled, inner / safe, rcond=_SINGULAR)[0] / safe
        return tuple(
            Part(
                float(inner[i] / (lengths[i] * sqrt(square))) if lengths[i] > 0 else nan,
                float(found[i]),
                float(found[i] * inner[i] / square),
            )
            for i in range(count)
        )
