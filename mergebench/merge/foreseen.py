"""What a recipe will want of kernels, as far as it can be said before anything is opened."""

from __future__ import annotations

from mergebench.core.errors import MergebenchError
from mergebench.merge.kernels import ready
from mergebench.merge.variants import make_variants
from mergebench.recipe import Recipe


def foresee(recipe: Recipe) -> None:
    """Import and compile kernels in the background, if inputs on this machine are large enough.

    Parameters
    ----------
    recipe : Recipe
        Its mistakes are left to the plan.
    """
    ready.foresee((each.path for each in recipe.models), looks_at_rows(recipe))


def looks_at_rows(recipe: Recipe) -> bool:
    """Whether the chain of a tensor that nothing singles out has an op of whole rows."""
    try:
        _, variants = make_variants(recipe)
    except MergebenchError:
        return False
    return any(op.granularity == "row" for each in variants for op in each.ops)
