"""A base and task vectors in memory, mixed by coefficients per vector and tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mergebench.core.errors import ParameterError
from mergebench.core.schedule import ByName
from mergebench.core.tensor import Array
from mergebench.merge.api import to_torch
from mergebench.merge.chains import needs_base
from mergebench.merge.engine import fuses, workers
from mergebench.merge.fit.vectors import Factored, Vector, Whole, vector_of, whole_of
from mergebench.merge.item import Item, load, located, opened
from mergebench.merge.op import Chain
from mergebench.merge.ops.scale_parts import partition
from mergebench.merge.plan import Plan
from mergebench.merge.runner import Room
from mergebench.merge.stream import Evaluator
from mergebench.recipe import Recipe

if TYPE_CHECKING:
    import torch

__all__ = ["Factored", "Mixture", "Whole", "each_tensor", "load_mixture"]

#: Whether the block (tensor, row of the model) is to be held.
Keep = Callable[[str, int], bool]


@dataclass(frozen=True, eq=False)
class Mixture:
    """``θ_j = θ0_j + Σ_i c_ij τ_ij`` (arXiv:2407.02880, section 3; arXiv:2310.02575, section 3.2).

    Attributes
    ----------
    plan : Plan
        Of the merge that the coefficients are weights of; its order of models is that of
        coefficients.
    base : mapping of tensor name to torch tensor
        float32, of the tensors that any vector moves.
    vectors : tuple of mapping of tensor name to Vector
        One per model, of tensors that it moves.
    parts : int
        K: coefficients per vector and tensor, each of a random part of the tensor (aTLAS × K).
    seed : int
        Of the partitions.
    """

    plan: Plan
    base: Mapping[str, torch.Tensor]
    vectors: tuple[Mapping[str, Vector], ...]
    parts: int = 1
    seed: int = 0
    _drawn: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that have coefficients, in the order of columns."""
        return tuple(self.base)

    @property
    def columns(self) -> int:
        """Coefficients per model: those of a tensor stand side by side."""
        return len(self.base) * self.parts

    @property
    def bytes(self) -> int:
        """What the vectors take in memory."""
        return sum(vector.bytes for row in self.vectors for vector in row.values())

    def to(self, device: str) -> Mixture:
        """The same elsewhere."""
        if device == "cpu":
            return self
        base = {name: value.to(device) for name, value in self.base.items()}
        vectors = tuple({n: vector.to(device) for n, vector in row.items()} for row in self.vectors)
        return replace(self, base=base, vectors=vectors, _drawn={})

    def values(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> θ_j in float32 for (models, columns) coefficients."""
        return dict(self.each_value(coefficients))

    def each_value(self, coefficients: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """As :meth:`values`, one tensor after the other."""
        for place, (name, start) in enumerate(self.base.items()):
            out = start.clone()
            for row, vectors in enumerate(self.vectors):
                if name not in vectors:
                    continue
                own = coefficients[row, place * self.parts : (place + 1) * self.parts]
                if self.parts > 1:
                    each = own.to(out.device, out.dtype)
                    vectors[name].add_parts(out, self._parts_of(name), each)
                # Multiplied by zero, an overflowing entry would not be zero.
                elif (c := float(own[0])) != 0.0:
                    vectors[name].add_to(out, c)
            yield name, out

    def gradient(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """∂L/∂c_ij = ⟨∂L/∂θ_j, τ_ij⟩, (models, columns) on the CPU, from those of parameters.

        What a tensor without gradient contributes is zero.
        """
        import torch

        found = []
        for row in self.vectors:
            for name, start in self.base.items():
                if name not in row or name not in gradients:
                    found.append(torch.zeros(self.parts, device=start.device))
                    continue
                gradient = gradients[name].float()
                found.append(
                    row[name].dot(gradient)[None]
                    if self.parts == 1
                    else row[name].dot_parts(gradient, self._parts_of(name), self.parts)
                )
        return torch.cat(found).reshape(len(self.vectors), -1).cpu()

    def recipe(self, coefficients: torch.Tensor) -> Recipe:
        """The same merge with these coefficients as weights: what `run` merges at any size."""
        variant = self.plan.variants[0]
        stored = variant.stored
        order = variant.listed or tuple(range(len(self.vectors)))
        if self.parts > 1:
            stored = replace(stored, method="atlas", params={"seed": self.seed}, compat=None)
        refs = []
        for ref, place in zip(stored.models, order, strict=True):
            held = self.vectors[place]
            # As short as float32 allows.
            numbers = coefficients[place].numpy().astype(np.float32).reshape(-1, self.parts)
            rows = [(n, row) for n, row in zip(self.names, numbers, strict=True) if n in held]
            if self.parts > 1:
                texts = tuple((n, "/".join(map(str, row))) for n, row in rows)
                params = {"coefficients": ByName(texts, "0") if texts else "0"}
                refs.append(replace(ref, weight=1.0, params=params))
                continue
            pairs = tuple((name, float(str(row[0]))) for name, row in rows)
            refs.append(replace(ref, weight=ByName(pairs, 0.0) if pairs else 0.0))
        return replace(stored, models=tuple(refs))

    def _parts_of(self, name: str) -> torch.Tensor:
        """Which part each entry of a tensor is in, (size,)."""
        import torch

        if name not in self._drawn:
            item = self.plan.aligned.items[name]
            found = partition(item.site, self.seed, 0, item.site.size, self.parts)
            narrow = found.astype(np.uint8 if self.parts <= 1 << 8 else np.int32)
            self._drawn[name] = torch.from_numpy(narrow).to(self.base[name].device)
        return self._drawn[name]


def load_mixture(
    plan: Plan,
    dtype: torch.dtype | None = None,
    *,
    parts: int = 1,
    seed: int = 0,
    keep: Keep | None = None,
) -> Mixture:
    """Read base and task vectors of a plan into memory.

    Parameters
    ----------
    plan : Plan
        Of a method that weighs task vectors and adds them up, such as ``task_arithmetic``; what
        ops do to the vectors before that is done here.
    dtype : torch dtype, default torch.float16
        In which vectors are held, as the authors do; factors are held in float32.
    parts, seed : int
        Of the mixture.
    keep : callable, optional
        Which blocks are held; all by default.

    Raises
    ------
    ParameterError
        If there is no base, or nothing is moved.
    """
    base, vectors = {}, tuple({} for _ in plan.models)  # type: ignore[var-annotated]
    for name, start, found in each_tensor(plan, dtype, keep):
        if any(vector is not None for vector in found):
            base[name] = start
        for row, vector in zip(vectors, found, strict=True):
            if vector is not None:
                row[name] = vector
    if not base:
        raise ParameterError("no model moves any tensor of the base", fix="check the models")
    return Mixture(plan, base, vectors, parts, seed)


def each_tensor(
    plan: Plan, dtype: torch.dtype | None = None, keep: Keep | None = None
) -> Iterator[tuple[str, torch.Tensor, list[Vector | None]]]:
    """``(name, base in float32, one vector per model)``, tensors in the order of their bytes.

    Raises
    ------
    ParameterError
        If there is no base.
    """
    import torch

    if plan.base is None:
        raise ParameterError("learning coefficients needs the base", fix="give --base")
    held = torch.float16 if dtype is None else dtype
    with workers(plan.tiling.workers) as pool:
        evaluator = Evaluator(plan.aligned.items, plan.tiling, pool, fusing=fuses(plan))
        for name in sorted(plan.aligned.items, key=str.encode):
            item, shape = plan.aligned.items[name], plan.aligned.items[name].site.shape
            if item.base is None:
                continue
            stored = item.base.read(0, item.site.size).astype(np.float32)
            start = to_torch({"": stored})[""].reshape(shape)
            wanted = [keep is None or keep(name, row) for row in range(len(item.deltas))]
            found: list[Vector | None]
            if before := _fixed(plan, name):
                rows = _processed(evaluator, before, item) if any(wanted) else ()
                found = [whole_of(row, shape, held) for row in rows] or [None] * len(wanted)
            else:
                found = [
                    None if delta is None or not wish else vector_of(delta, shape, held)
                    for delta, wish in zip(item.deltas, wanted, strict=True)
                ]
            yield name, start, [v if w else None for v, w in zip(found, wanted, strict=True)]


def _fixed(plan: Plan, name: str) -> Chain:
    """What is done to the vectors before they are weighed: it does not depend on weights."""
    ops = plan.variants[0].at(name)
    end = next(i for i, each in enumerate(ops) if each.spec.reduces or each.name == "weigh")
    return ops[:end]


def _processed(evaluator: Evaluator, ops: Chain, item: Item) -> Array:
    """Every task vector after some ops, (models, entries) in float32; by kernels if possible."""
    evaluator.prepare(ops, item)
    out = np.empty((len(item.deltas), item.site.size), np.float32)
    unit, jobs = evaluator.pieces([ops], item)
    item = opened(item)
    fused = evaluator.fused([ops], item, unit, ends=False)

    def by_ops(first: int, last: int) -> None:
        for start, stop in evaluator.tiling.tiles(first, last, unit):
            stack, base = load(item, start, stop)
            at = located(item, start, stop, base, needs_base(ops))
            out[:, start:stop] = evaluator.run(ops, item, at, stack)

    def by_kernel(first: int, last: int) -> None:
        assert fused is not None
        # Besides what was read there are float32 stacks.
        wide = evaluator.tiling.step(unit)
        with Room(fused, wide, evaluator.read_into) as room:
            for start in range(first, last, wide):
                stop = min(start + wide, last)
                room.buffers.read(start, stop)
                if (stack := fused.stack(room.buffers)) is None:
                    room.leave()
                    by_ops(start, stop)
                else:
                    out[:, start:stop] = stack

    work = by_ops if fused is None else by_kernel
    for _ in evaluator.each_job(partial(work, start, stop) for start, stop in jobs):
        pass
    evaluator.forget(item.site.name)
    return out
