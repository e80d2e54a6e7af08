"""One site under the glass: its matrices and their decompositions, each computed once, if asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mergebench.compute.decomposition import (
    Decomposition,
    decompose,
    decompose_product,
    singular_values,
)
from mergebench.compute.entrywise import Passes, Rows
from mergebench.compute.matrices import matrix_shape
from mergebench.compute.pairwise import inner_products
from mergebench.compute.supports import shared_supports
from mergebench.core.delta import Delta, Difference, LowRank, factors, resident, tile
from mergebench.core.site import Site
from mergebench.core.tensor import Array, Tensor, read_all
from mergebench.spectral.store import Store, key_of

_WIDE: np.dtype[Any] = np.dtype(np.float64)


def sides(site: Site) -> tuple[int, int]:
    """Output × input of a tensor taken as a matrix."""
    rows, columns = matrix_shape(site.shape)
    return (columns, rows) if site.transposed else (rows, columns)


#: Two models of a site.
Pair = tuple[int, int]


@dataclass(frozen=True)
class Looked:
    """What one pass over the entries of a site found, before anything is decomposed.

    Attributes
    ----------
    base : float or None
        ``‖W0‖²``; ``None`` without a base, NaN where an entry is not finite.
    deltas : mapping of model to float
        ``‖ΔW‖²`` of every model that has the tensor.
    products : mapping of two models to float, or None
        ``⟨ΔWᵢ, ΔWⱼ⟩`` of those that have the tensor, i before j; ``None`` if it was not asked for.
    signs : mapping of two models to (int, int), or None
        Entries that both change in opposite directions, and entries that both change.
    """

    base: float | None
    deltas: Mapping[int, float]
    products: Mapping[Pair, float] | None = None
    signs: Mapping[Pair, tuple[int, int]] | None = None


def look(
    base: Tensor | None,
    deltas: Mapping[int, Delta],
    size: int,
    uses: frozenset[str] = frozenset(),
    passes: Passes | None = None,
) -> Looked:
    """Sum up squares over a whole site, in float64 and piece by piece, and what else is asked.

    Parameters
    ----------
    base : Tensor or None
    deltas : mapping of model to Delta
    size : int
        Entries.
    uses : frozenset of str
        ``products`` and ``signs`` of pairs of models are found in the same reading.
    passes : Passes, optional
        Compiled ones; numpy without.
    """
    order = sorted(deltas)
    rows = Rows(base, [deltas[model] for model in order], size)
    models = dict(enumerate(order, rows.first))
    both = [(i, j) for i in models for j in models if i < j]
    inner = both if "products" in uses else []
    signed = both if "signs" in uses else []
    pairs = [*((row, row) for row in range(rows.count)), *inner]
    sums, conflicts = inner_products(rows, pairs, signed, passes)
    found = dict(zip(pairs, sums.tolist(), strict=True))
    opposed = dict(zip(signed, conflicts.tolist(), strict=True))
    return Looked(
        None if base is None else found[0, 0],
        {model: found[row, row] for row, model in models.items()},
        {(models[i], models[j]): found[i, j] for i, j in inner} if "products" in uses else None,
        {(models[i], models[j]): (a, b) for (i, j), (a, b) in opposed.items()}
        if "signs" in uses
        else None,
    )


class SiteSpectrum:
    """The base and the models that change it, at one site.

    Parameters
    ----------
    site : Site
    base : Tensor or None
    deltas : mapping of model to Delta
        Of the models whose displacement is finite and not zero.
    looked : Looked
    uses : frozenset of str
        What the diagnostics at hand will ask for (see
        :class:`~mergebench.spectral.diagnostic.Diagnostic`).
    everyone : sequence of int
        All models of the analysis.
    tasks : sequence of int
        Those that are not the merge.
    store : Store, optional
        Where decompositions of the base are kept.
    passes : Passes, optional
        Compiled ones, for what looks at every entry.
    """

    def __init__(
        self,
        site: Site,
        base: Tensor | None,
        deltas: Mapping[int, Delta],
        looked: Looked,
        uses: frozenset[str] = frozenset(),
        everyone: Sequence[int] | None = None,
        tasks: Sequence[int] | None = None,
        store: Store | None = None,
        passes: Passes | None = None,
    ) -> None:
        self.site, self.base, self.deltas = site, base, dict(sorted(deltas.items()))
        self.looked, self.uses, self.store, self.passes = looked, uses, store, passes
        self.everyone = list(self.deltas if everyone is None else everyone)
        self.tasks = [m for m in self.deltas if tasks is None or m in tasks]
        self.merged = [m for m in self.deltas if m not in self.tasks]
        self._decomposed: dict[int, Decomposition] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Output × input."""
        return sides(self.site)

    @property
    def models(self) -> list[int]:
        """Models that change the site."""
        return list(self.deltas)

    @cached_property
    def base_matrix(self) -> Array:
        """W0, output × input, in the narrowest of float32 and float64 that holds it exactly."""
        return self.oriented(self._stored_base)

    @cached_property
    def base_svd(self) -> Decomposition:
        """The decomposition of W0, kept where there is a store."""
        if self.store is None:
            return decompose(self.base_matrix)
        key = key_of(self._stored_base, self.site.transposed)
        if (kept := self.store.get(key)) is not None:
            return kept
        found = decompose(self.base_matrix)
        self.store.put(key, found)
        return found

    @cached_property
    def base_values(self) -> Array:
        """Singular values of W0."""
        return self.base_svd.S if self._keeps_base else singular_values(self.base_matrix)

    @property
    def _keeps_base(self) -> bool:
        return "base.svd" in self.uses or self.store is not None

    @property
    def _stored_base(self) -> Array:
        assert self.base is not None
        return read_all(self.base)

    def norm(self, model: int) -> float:
        """``‖ΔW‖`` (Frobenius); 0 for a model that leaves the site as it is."""
        return float(np.sqrt(max(self.looked.deltas.get(model, 0.0), 0.0)))

    @property
    def base_norm(self) -> float:
        """``‖W0‖``."""
        return float(np.sqrt(self.looked.base or 0.0))

    def delta_matrix(self, model: int) -> Array:
        """ΔW of a model, output × input, in float64."""
        delta = resident(self.deltas[model])
        flat = tile(delta, 0, self.site.size, _WIDE)
        return self.oriented(flat.reshape(self.site.shape))

    def delta_factors(self, model: int) -> tuple[Array, Array] | None:
        """ΔW as a product (output × r, r × input) in float64, where it is stored as one."""
        delta = self.deltas[model]
        if not isinstance(delta, LowRank):
            return None
        left, right = factors(delta, _WIDE)
        if left.shape[1] >= min(self.shape):
            return None
        return (right.T, left.T) if self.site.transposed else (left, right)

    def delta_svd(self, model: int) -> Decomposition:
        """The decomposition of ΔW: of the product, from two thin QRs, where it is one."""
        if model not in self._decomposed:
            product = self.delta_factors(model)
            self._decomposed[model] = (
                decompose(self.delta_matrix(model))
                if product is None
                else decompose_product(*product)
            )
        return self._decomposed[model]

    def delta_values(self, model: int) -> Array:
        """Singular values of ΔW."""
        if "delta.svd" in self.uses or isinstance(self.deltas[model], LowRank):
            return self.delta_svd(model).S
        return singular_values(self.delta_matrix(model))

    @cached_property
    def products(self) -> Mapping[Pair, float]:
        """``⟨ΔWᵢ, ΔWⱼ⟩`` of models that have the tensor, i before j."""
        return self._pairs("products").products or {}

    @cached_property
    def signs(self) -> Mapping[Pair, tuple[int, int]]:
        """Of the same pairs, entries that both change in opposite directions, or change at all."""
        return self._pairs("signs").signs or {}

    def _pairs(self, what: str) -> Looked:
        if getattr(self.looked, what) is not None:
            return self.looked
        return look(self._origin, self.deltas, self.site.size, frozenset({what}), self.passes)

    def shared_supports(self, kept: int) -> dict[Pair, int]:
        """Entries that two models both have among the ``kept`` that each changes most.

        Zeros never count, and among equals the earlier do. Of a model with itself: how many it
        has. Read piece by piece.
        """
        rows = Rows(self._origin, list(self.deltas.values()), self.site.size)
        found = shared_supports(rows, kept, self.passes)
        return {
            (one, other): int(found[i, j])
            for i, one in enumerate(self.deltas)
            for j, other in enumerate(self.deltas)
            if i <= j
        }

    @property
    def _origin(self) -> Tensor | None:
        """The base, where reading it once serves several models."""
        some = any(isinstance(d, Difference) and d.base is self.base for d in self.deltas.values())
        return self.base if some else None

    def pieces(self, models: Sequence[int]) -> Iterator[Array]:
        """ΔW of some models piece by piece: float64 arrays (n, m), in the order of storage."""
        rows = Rows(None, [self.deltas[model] for model in models], self.site.size)
        for start, stop in rows.spans():
            yield rows.wide(start, stop)

    def oriented(self, stored: Array) -> Array:
        """A stored tensor as a matrix output × input, float32 unless it is wider."""
        wide = np.float64 if stored.dtype == np.float64 else np.float32
        matrix = stored.astype(wide, copy=False).reshape(matrix_shape(self.site.shape))
        return matrix.T if self.site.transposed else matrix


class Tuned:
    """One model at one site."""

    def __init__(self, at: SiteSpectrum, model: int) -> None:
        self.at, self.model = at, model

    @cached_property
    def matrix(self) -> Array:
        """W, output × input: as stored, or W0 + ΔW in float64 where only ΔW is."""
        delta = self.at.deltas[self.model]
        if isinstance(delta, Difference):
            return self.at.oriented(read_all(delta.finetuned))
        return self.at.base_matrix + self.at.delta_matrix(self.model)

    @cached_property
    def svd(self) -> Decomposition:
        """The decomposition of W."""
        return decompose(self.matrix)

    @cached_property
    def known_svd(self) -> Decomposition | None:
        """The decomposition of W where another diagnostic needs it too."""
        return self.svd if "tuned.svd" in self.at.uses else None

    @cached_property
    def values(self) -> Array:
        """Singular values of W."""
        return self.svd.S if "tuned.svd" in self.at.uses else singular_values(self.matrix)

    @cached_property
    def delta_values(self) -> Array:
        """Singular values of ΔW."""
        return self.at.delta_values(self.model)

    @cached_property
    def factors(self) -> tuple[Array, Array] | None:
        """ΔW as a product, where it is stored as one."""
        return self.at.delta_factors(self.model)

    @property
    def norm(self) -> float:
        """``‖ΔW‖``."""
        return self.at.norm(self.model)
