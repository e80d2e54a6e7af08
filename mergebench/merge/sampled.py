"""What a bounded sample of entries says about models: cosines, and norms of task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt

import numpy as np

from mergebench.adapters_zoo.computed import Computed
from mergebench.adapters_zoo.scattered import Scattered
from mergebench.core.delta import Delta, Dense, Difference, LowRank, factors, reads, resident
from mergebench.core.site import kind_of
from mergebench.core.tensor import DTYPES, FLOATING, Array, Tensor, read_runs, size_of
from mergebench.merge.item import Item
from mergebench.sources import Applied

#: Entries of a run: one read of 1 KiB (bf16) to 4 KiB (float64), a page of a file or less.
RUN = 512
#: At most this many tensors are looked at per group, so many runs in all of them together, and
#: so many in one.
TENSORS, RUNS, EACH = 256, 512, 32
#: Entries of factors that are read, or of updates computed from them, about: they have no sample
#: that would do. At least FEW tensors are looked at, and FEW runs of one that is computed.
FACTORS, FEW = 1 << 22, 4
#: Matrices by group. Heads, norms, biases and buffers are not counted: heads are made anew by
#: fine-tuning, and the others are alike in models that have nothing to do with each other.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "linear": ("linear", "conv"),
    "embedding": ("embedding",),
}


@dataclass(frozen=True)
class Pair:
    """One matrix of a model beside the same matrix of its reference.

    Attributes
    ----------
    name : str
    size, entries : int
        Of the tensor, and of the sample.
    cosine : float
        Between the sampled entries of both.
    ratio : float
        ``‖model - reference‖ / ‖reference‖`` over the sample.
    moved, length : float
        Mean squares of ``model - reference`` and of ``reference``.
    """

    name: str
    size: int
    entries: int
    cosine: float
    ratio: float
    moved: float
    length: float


@dataclass(frozen=True)
class Likeness:
    """How alike a model and its reference are, over the matrices of one group.

    Attributes
    ----------
    pairs : tuple of Pair
        At least one.
    """

    pairs: tuple[Pair, ...]

    @property
    def entries(self) -> int:
        """Sampled entries."""
        return sum(pair.entries for pair in self.pairs)

    @property
    def cosine(self) -> float:
        """Mean of the cosines, weighted by size.

        A mean rather than the cosine of everything strung together: few matrices with large
        entries that every model has (Mamba's ``A_log``) would outweigh all others there.
        """
        return sum(p.size * p.cosine for p in self.pairs) / sum(p.size for p in self.pairs)

    @property
    def ratio(self) -> float:
        """Estimate of ``‖τ‖ / ‖θ‖`` over the whole group."""
        length = sum(pair.size * pair.length for pair in self.pairs)
        return sqrt(sum(pair.size * pair.moved for pair in self.pairs) / length)

    @property
    def deviation(self) -> float:
        """Standard deviation of :attr:`cosine` between models that are unrelated.

        The cosine of n independent entries of mean zero has variance 1/n, whatever their
        distribution.
        """
        total = sum(pair.size for pair in self.pairs)
        return sqrt(sum((pair.size / total) ** 2 / pair.entries for pair in self.pairs))

    def worst(self, count: int = 3) -> list[Pair]:
        """The matrices that are least alike."""
        return sorted(self.pairs, key=lambda pair: (pair.cosine, pair.name))[:count]


def runs(size: int, count: int) -> Iterator[tuple[int, int]]:
    """``count`` runs of :data:`RUN` entries, evenly spread over a tensor; all of a small one."""
    if size <= count * RUN:
        if size:
            yield 0, size
        return
    for number in range(count):
        start = (size - RUN) * (2 * number + 1) // (2 * count)
        yield start, start + RUN


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most ``most`` of the names, evenly spread over their order."""
    if len(names) <= most:
        return list(names)
    return [names[(2 * place + 1) * len(names) // (2 * most)] for place in range(most)]


@np.errstate(over="ignore", invalid="ignore")
def likeness(
    reference: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Likeness]]:
    """Compare models with a reference, matrix by matrix, on the same entries.

    Parameters
    ----------
    reference, models : mappings of name to Tensor
        Tensors that a model lacks, has in another shape, or takes from the reference itself (as
        filters make it) are passed over; so are those that are zero in either.

    Returns
    -------
    list of {group: Likeness}
        Per model; groups without a matrix are left out.
    """
    found: list[dict[str, Likeness]] = [{} for _ in models]
    for group, kinds in GROUPS.items():
        names = [
            name
            for name, tensor in reference.items()
            if len(tensor.shape) > 1
            and tensor.dtype in FLOATING
            and kind_of(name, tensor.shape) in kinds
            and any(model.get(name) is not tensor for model in models)
        ]
        chosen = _spread(sorted(names, key=str.encode), TENSORS)
        each = min(RUNS // max(len(chosen), 1), EACH)
        pairs: list[list[Pair]] = [[] for _ in models]
        for name in chosen:
            for place, pair in _pairs(name, reference[name], models, each):
                pairs[place].append(pair)
        for place, some in enumerate(pairs):
            if some:
                found[place][group] = Likeness(tuple(some))
    return found


def _pairs(
    name: str, origin: Tensor, models: Sequence[Mapping[str, Tensor]], each: int
) -> Iterator[tuple[int, Pair]]:
    shape, size = tuple(origin.shape), size_of(origin.shape)
    places = list(runs(size, each))
    start = _entries(origin, places)
    for place, model in enumerate(models):
        own = model.get(name)
        if own is None or own.dtype not in FLOATING or tuple(own.shape) != shape:
            continue
        other = _entries(own, places)
        # NaN and infinity are the business of the merge, which names them.
        good = np.isfinite(start) & np.isfinite(other)
        left, right = (start, other) if good.all() else (start[good], other[good])
        one, two = _dot(left, left), _dot(right, right)
        if not 0 < one * two < inf:
            continue
        step = right - left
        far = _dot(step, step)
        yield (
            place,
            Pair(
                name,
                size,
                left.size,
                _dot(left, right) / sqrt(one * two),
                sqrt(far / one),
                far / left.size,
                one / left.size,
            ),
        )


def _dot(left: Array, right: Array) -> float:
    # Not by BLAS, which would wake threads for a product this small.
    return float(np.einsum("i,i->", left, right))


def _entries(tensor: Tensor, places: Sequence[tuple[int, int]]) -> Array:
    size = sum(stop - start for start, stop in places)
    room = np.empty(size * DTYPES[tensor.dtype].itemsize, np.uint8)
    return read_runs(tensor, places, room).astype(np.float64)


@np.errstate(over="ignore", invalid="ignore")
def task_norms(items: Mapping[str, Item]) -> list[tuple[float, float]]:
    """Estimates of ``‖τ_i‖`` and ``‖w_i τ_i‖`` per model, from a sample of what is merged.

    Parameters
    ----------
    items : mapping of name to Item
        In delta space.
    """
    names = sorted(items, key=str.encode)
    if not names:
        return []
    norms: list[tuple[float, float]] = []
    bases: dict[tuple[int, int], Array] = {}
    for place in range(len(items[names[0]].deltas)):
        own = [name for name in names if items[name].deltas[place] is not None]
        stored = sum(_stored(items[name].deltas[place]) for name in own)
        chosen = _spread(own, min(TENSORS, max(FACTORS * len(own) // max(stored, 1), FEW)))
        total = sum(items[name].site.size for name in own)
        looked = sum(items[name].site.size for name in chosen)
        squares = weighted = 0.0
        for name in chosen:
            delta = items[name].deltas[place]
            assert delta is not None
            square = _square(delta, RUNS // len(chosen), bases) * total / max(looked, 1)
            squares += square
            weighted += square * items[name].weights[place] ** 2
        norms.append((sqrt(squares), sqrt(weighted)))
    return norms


def _stored(delta: Delta | None) -> int:
    if isinstance(delta, LowRank):
        return delta.rank * sum(delta.shape[:2])
    return size_of(delta.shape) if delta is not None and _is_computed(delta) else 0


def _is_computed(delta: Delta) -> bool:
    """Whether reading an entry costs the work of a whole block (LoHa), or weight (DoRA)."""
    return isinstance(delta, Dense) and isinstance(delta.values, Computed)


def _square(delta: Delta, each: int, bases: dict[tuple[int, int], Array]) -> float:
    """Estimate of ``‖τ‖²``; exact for factors and for a few stored entries.

    ``bases`` keeps the samples of bases, which models share, by the base and how many entries.
    """
    size = size_of(delta.shape)
    if isinstance(delta, LowRank):
        left, right = factors(delta, np.dtype(np.float64))
        # ‖LR‖² = ⟨LᵀL, RRᵀ⟩, without the product itself.
        square = float(np.sum((left.T @ left) * (right @ right.T)))
    elif isinstance(delta, Dense) and isinstance(delta.values, Scattered):
        values = delta.values.values.read(0, delta.values.stored).astype(np.float64)
        square = _dot(values, values)
    else:
        places = list(runs(size, min(each, FEW) if _is_computed(delta) else each))
        values = _entries(_values(reads(delta)[0]), places)
        if isinstance(delta, Difference):
            key = id(delta.base), values.size
            if key not in bases:
                bases[key] = _entries(_values(delta.base), places)
            values = values - bases[key]
        values = values[np.isfinite(values)]
        square = _dot(values, values) * size / max(values.size, 1)
    return max(square, 0.0) if isfinite(square) else 0.0


def _values(tensor: Tensor) -> Tensor:
    """The tensor with low-rank factors read once rather than for every run."""
    if isinstance(tensor, Applied):
        return Applied(tensor.weight, resident(tensor.delta))
    return tensor
