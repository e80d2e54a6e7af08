"""A base and task vectors in memory, mixed by one coefficient per vector and tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mergebench.core.delta import Delta, LowRank, factors, tile
from mergebench.core.errors import ParameterError
from mergebench.core.schedule import ByName
from mergebench.merge.api import to_torch
from mergebench.merge.plan import Plan
from mergebench.recipe import Recipe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Whole:
    """The displacement of one tensor."""

    values: torch.Tensor

    def add_to(self, out: torch.Tensor, coefficient: float) -> None:
        """``out += coefficient · τ``."""
        out.add_(self.values.to(out.dtype), alpha=coefficient)

    def dot(self, gradient: torch.Tensor) -> torch.Tensor:
        """``⟨gradient, τ⟩``, a scalar."""
        return (gradient * self.values.to(gradient.dtype)).sum()


@dataclass(frozen=True, eq=False)
class Factored:
    """A displacement whose 2-D form is ``left @ right``: (rows, r) and (r, columns)."""

    left: torch.Tensor
    right: torch.Tensor

    def add_to(self, out: torch.Tensor, coefficient: float) -> None:
        """``out += coefficient · τ``."""
        out.view(self.left.shape[0], -1).addmm_(self.left, self.right, alpha=coefficient)

    def dot(self, gradient: torch.Tensor) -> torch.Tensor:
        """``⟨gradient, τ⟩``, a scalar, without the product of the factors."""
        flat = gradient.reshape(self.left.shape[0], -1)
        return ((self.left.T @ flat) * self.right).sum()


Vector = Whole | Factored


@dataclass(frozen=True, eq=False)
class Mixture:
    """``θ_j = θ0_j + Σ_i c_ij τ_ij`` (arXiv:2407.02880, section 3; arXiv:2310.02575, section 3.2).

    Attributes
    ----------
    plan : Plan
        Of task arithmetic over the models; its order of models is that of coefficients.
    base : mapping of tensor name to torch tensor
        float32, of the tensors that any vector moves.
    vectors : tuple of mapping of tensor name to Vector
        One per model, of tensors that it moves.
    """

    plan: Plan
    base: Mapping[str, torch.Tensor]
    vectors: tuple[Mapping[str, Vector], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Tensors that have coefficients, in the order of columns."""
        return tuple(self.base)

    def values(self, coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
        """Name -> θ_j in float32 for (models, tensors) coefficients."""
        found = {}
        for column, (name, start) in enumerate(self.base.items()):
            out = start.clone()
            for row, vectors in enumerate(self.vectors):
                # Multiplied by zero, an overflowing entry would not be zero.
                if name in vectors and (c := float(coefficients[row, column])) != 0.0:
                    vectors[name].add_to(out, c)
            found[name] = out
        return found

    def gradient(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """∂L/∂c_ij = ⟨∂L/∂θ_j, τ_ij⟩, (models, tensors), from the gradients of parameters.

        What a tensor without gradient contributes is zero.
        """
        import torch

        out = torch.zeros(len(self.vectors), len(self.base))
        for column, name in enumerate(self.base):
            if name in gradients:
                for row, vectors in enumerate(self.vectors):
                    if name in vectors:
                        out[row, column] = vectors[name].dot(gradients[name].float())
        return out

    def recipe(self, coefficients: torch.Tensor) -> Recipe:
        """Task arithmetic with these coefficients as weights: what `run` merges at any size."""
        variant = self.plan.variants[0]
        stored, rows = variant.stored, coefficients.double().tolist()
        order = variant.listed or tuple(range(len(rows)))
        refs = tuple(
            replace(ref, weight=ByName(tuple(zip(self.names, rows[place], strict=True)), 0.0))
            for ref, place in zip(stored.models, order, strict=True)
        )
        return replace(stored, models=refs)


def load_mixture(plan: Plan, dtype: torch.dtype | None = None) -> Mixture:
    """Read base and task vectors of a plan into memory.

    Parameters
    ----------
    plan : Plan
        Of ``task_arithmetic`` with ``lam=1``.
    dtype : torch dtype, default torch.float16
        In which vectors are held, as the authors do; factors are held in float32.

    Raises
    ------
    ParameterError
        If there is no base, or nothing is moved.
    """
    import torch

    if plan.base is None:
        raise ParameterError("learning coefficients needs the base", fix="give --base")
    held = torch.float16 if dtype is None else dtype
    base, vectors = {}, tuple({} for _ in plan.models)  # type: ignore[var-annotated]
    for name in sorted(plan.aligned.items, key=str.encode):
        item = plan.aligned.items[name]
        if item.base is None:
            continue
        stored = item.base.read(0, item.site.size).astype(np.float32)
        base[name] = to_torch({"": stored})[""].reshape(item.site.shape)
        for row, delta in zip(vectors, item.deltas, strict=True):
            if delta is not None and (vector := _vector(delta, item.site.shape, held)) is not None:
                row[name] = vector
    moved = {name: value for name, value in base.items() if any(name in v for v in vectors)}
    if not moved:
        raise ParameterError("no model moves any tensor of the base", fix="check the models")
    return Mixture(plan, moved, vectors)


def _vector(delta: Delta, shape: Sequence[int], dtype: torch.dtype) -> Vector | None:
    import torch

    if isinstance(delta, LowRank):
        left, right = factors(delta, np.dtype(np.float32))
        return Factored(torch.from_numpy(left.copy()), torch.from_numpy(right.copy()))
    size = int(np.prod(shape, dtype=np.int64))
    values = tile(delta, 0, size, np.dtype(np.float32))
    if not values.any():
        return None
    whole = torch.from_numpy(values).reshape(tuple(shape))
    narrow = whole.to(dtype)
    # What float16 cannot hold stays as it is.
    return Whole(narrow if bool(torch.isfinite(narrow).all()) else whole)
