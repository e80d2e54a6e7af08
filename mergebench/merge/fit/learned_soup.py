"""Learned soups: a softmax over models, by labels (arXiv:2203.05482, section 2).

θ = Σ_i softmax(a)_i θ_i with one vector of logits a for the whole model, or one per parameter
tensor ("by layer"), from equal weights; AdamW at 0.05 without decay for 5 epochs of cross-entropy,
along with a factor of the logits of predictions that starts at 1 and is no part of the model.

Deviations: with several tasks, which the paper does not have, losses add up and each task has a
factor of its own, if it has logits and labels at all. The models are held as differences to the
first, or to the base where there is one, in float16: as weights sum to one, that is the same soup.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mergebench.core.schedule import ByName
from mergebench.merge.fit.mixture import Mixture
from mergebench.merge.fit.settings import Settings
from mergebench.recipe import ModelRef, Recipe

if TYPE_CHECKING:
    import torch

_PUBLISHED = Settings(
    epochs=5, rate=0.05, decay=0.0, clip=0.0, start=1.0, softmax=True, temperature=True
)
#: By what has weights of its own.
SETTINGS = {
    "model": Settings(**{**vars(_PUBLISHED), "shared": True}),
    "layer": _PUBLISHED,
}


def differences(recipe: Recipe) -> Recipe:
    """The merge whose mixture is the soup where weights sum to one."""
    plain = tuple(ModelRef(ref.path) for ref in recipe.models)
    base = recipe.base if recipe.base is not None else plain[0].path
    return Recipe(models=plain, method="task_arithmetic", params={"lam": 1.0}, base=base)


def soup_of_weights(
    mixture: Mixture, weights: torch.Tensor, base: str | None, *, shared: bool
) -> Recipe:
    """The recipe of a soup: ``linear`` with a weight per model, or per model and tensor.

    Parameters
    ----------
    mixture : Mixture
        Of :func:`differences`.
    weights : torch tensor, (models, columns)
    base : str or None
        Where models are adapters.
    shared : bool
        Whether the weights of a model are one number.
    """
    variant = mixture.plan.variants[0]
    stored, count = variant.stored, len(mixture.vectors)
    numbers = weights.numpy().astype(np.float32)
    refs = []
    order = variant.listed or tuple(range(count))
    for ref, place in zip(stored.models, order, strict=True):
        row = [float(str(number)) for number in numbers[place]]
        # Where all models are equal any weights that sum to one do.
        weight = (
            row[0] if shared else ByName(tuple(zip(mixture.names, row, strict=True)), 1 / count)
        )
        refs.append(replace(ref, weight=weight))
    return replace(stored, models=tuple(refs), method="linear", params={}, compat=None, base=base)
