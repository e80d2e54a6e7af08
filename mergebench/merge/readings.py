"""What ops report, with names for the models; and the comparison of models that only reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergebench.core.errors import ParameterError
from mergebench.core.tensor import Array
from mergebench.merge.at import Reading
from mergebench.merge.engine import Progress, execute_into
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from mergebench.steps import OpRef


@dataclass(frozen=True)
class Row:
    """A number that an op has reported.

    Attributes
    ----------
    tensor, what : str
    models : tuple of str
        The model, or the pair of models, that it is about.
    value : float
    """

    tensor: str
    what: str
    models: tuple[str, ...]
    value: float

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "tensor": self.tensor,
            "what": self.what,
            "models": list(self.models),
            "value": self.value,
        }


@dataclass(frozen=True)
class Span:
    """What one number is over all tensors: the smallest, the mean and the largest."""

    what: str
    models: tuple[str, ...]
    least: Row
    mean: float
    most: Row

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "what": self.what,
            "models": list(self.models),
            "least": self.least.value,
            "least_in": self.least.tensor,
            "mean": self.mean,
            "most": self.most.value,
            "most_in": self.most.tensor,
        }


def rows(readings: Mapping[str, Sequence[Reading]], plan: Plan) -> list[Row]:
    """Readings by tensor as rows, models by their labels in the order of the user.

    Parameters
    ----------
    readings : mapping of tensor name to readings
    plan : Plan
        Of the merge that they are about.
    """
    labels = [model.label for model in plan.models]
    given = {model.path: place for place, model in enumerate(plan.recipe.models)}

    def named(models: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(sorted((labels[place] for place in models), key=lambda one: given.get(one, 0)))

    return [
        Row(name, one.what, named(one.models), one.value)
        for name, several in readings.items()
        for one in several
    ]


def spans(found: Iterable[Row], *, by_model: bool = False) -> list[Span]:
    """What was reported, over all tensors, in the order of its first appearance.

    Parameters
    ----------
    found : iterable of Row
    by_model : bool, default False
        Whether every model, or pair, has a span of its own.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in found:
        groups.setdefault((row.what, row.models if by_model else ()), []).append(row)
    return [
        Span(
            what,
            models,
            min(some, key=lambda row: row.value),
            sum(row.value for row in some) / len(some),
            max(some, key=lambda row: row.value),
        )
        for (what, models), some in groups.items()
    ]


class _Nowhere:
    """A sink for an output that nobody wants."""

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Forget the bytes."""

    def finish(self, name: str) -> None:
        """Nothing is left to do."""


def compare(
    models: Sequence[str],
    base: str | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lora_alpha: float | None = None,
    kernels: str = "matrix",
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """How far several models answer each other's inputs, per pair and weight.

    Parameters
    ----------
    models : sequence of str
        Two or more references, without weights.
    base : str, optional
        What full checkpoints were fine-tuned from.
    include, exclude : sequence of str
        Selectors of tensors.
    lora_alpha : float, optional
        Of bare adapter files that do not name theirs.
    kernels : vector or matrix
        Whether kernels of convolutions are left out.
    memory, workers
        As for a merge.

    Returns
    -------
    list of Row

    Raises
    ------
    MergebenchError
        As a merge does, and for fewer than two models.
    """
    if len(models) < 2:
        raise ParameterError(
            "crosstalk: number of models", got=str(len(models)), expected="2 or more"
        )
    recipe = Recipe(
        models=tuple(ModelRef(path) for path in models),
        method="",
        ops=(OpRef("crosstalk", {"kernels": kernels}), OpRef("sum")),
        include=tuple(include),
        exclude=tuple(exclude),
        base=base,
        form="delta",
        lora_alpha=lora_alpha,
    )
    plan = make_plan(recipe, memory=memory, workers=workers)
    found = execute_into(plan, [_Nowhere()], progress)
    return rows(found.readings[0], plan)
