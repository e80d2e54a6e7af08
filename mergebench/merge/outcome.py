"""What is to be said of merged tensors and of finished outputs, beside their bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from mergebench.merge.at import Reading
from mergebench.merge.plan import Plan
from mergebench.merge.resume import Ledger

T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """One finished output.

    Attributes
    ----------
    label : str
        Which of several, such as ``lam=0.4``.
    path : Path or None
        ``None`` for an output in memory.
    bytes : int
    residuals : mapping of tensor name to float
        ``‖ΔW - B A‖ / ‖ΔW‖`` where a merged update had to be truncated to a rank.
    digests : mapping of tensor name to str
        xxh3-128 of the stored bytes.
    nonfinite : mapping of tensor name to {model: count}
        Entries of inputs that are NaN or infinite, and that were passed through.
    readings : mapping of tensor name to tuple of Reading
        What ops have reported; models by their place in ``plan.models``.
    """

    label: str
    path: Path | None
    bytes: int
    residuals: Mapping[str, float]
    digests: Mapping[str, str]
    nonfinite: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    readings: Mapping[str, tuple[Reading, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What is to be known of one tensor of the plan, once it has been merged or copied.

    Attributes
    ----------
    residuals : tuple of float or None
        What truncation has cost; ``None`` where nothing was truncated. In the order of
        ``plan.variants``.
    readings : tuple of tuples of Reading
        What ops have reported, in the same order.
    nonfinite : mapping of model to count
        Empty where all entries are finite, or where none was passed through.
    """

    residuals: tuple[float | None, ...]
    readings: tuple[tuple[Reading, ...], ...]
    nonfinite: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Found:
    """What a run has found, beside the bytes.

    Attributes
    ----------
    residuals, readings : list of mappings of tensor name to what :class:`Written` has
        In the order of ``plan.variants``.
    nonfinite : mapping of tensor name to {model: count}
    """

    residuals: list[dict[str, float]]
    readings: list[dict[str, tuple[Reading, ...]]]
    nonfinite: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def nothing(cls, plan: Plan) -> Self:
        """Before the first tensor."""
        return cls([{} for _ in plan.variants], [{} for _ in plan.variants])

    def add(self, name: str, outcome: Outcome) -> None:
        """Take note of one tensor."""
        for index, lost in enumerate(outcome.residuals):
            if lost is not None:
                self.residuals[index][name] = lost
        for index, readings in enumerate(outcome.readings):
            if readings:
                self.readings[index][name] = readings
        if outcome.nonfinite:
            self.nonfinite[name] = dict(outcome.nonfinite)


def written(plan: Plan, found: Found, digests: Sequence[Mapping[str, str]]) -> list[Written]:
    """What is said of outputs that are in their places, in the order of ``plan.variants``."""

    def in_order(by_name: Mapping[str, T]) -> dict[str, T]:
        return {name: by_name[name] for name in plan.aligned.order if name in by_name}

    return [
        Written(variant.label, variant.out, plan.layout.total_bytes,
                in_order(found.residuals[index]), digests[index], in_order(found.nonfinite),
                in_order(found.readings[index]))
        for index, variant in enumerate(plan.variants)
    ]  # fmt: skip


def earlier(ledger: Ledger, count: int, name: str) -> Outcome:
    """What an earlier run has noted of a tensor of ``count`` outputs that it has finished."""
    return Outcome(
        tuple(ledger.lost(index, name) for index in range(count)),
        tuple(ledger.reported(index, name) for index in range(count)),
        ledger.passed(name).get(name, {}),
    )


def record(ledger: Ledger, name: str, outcome: Outcome) -> None:
    """Note for a later run what is known of a tensor; before it is finished."""
    for index, lost in enumerate(outcome.residuals):
        if lost is not None:
            ledger.lose(index, name, lost)
    for index, readings in enumerate(outcome.readings):
        if readings:
            ledger.report(index, name, readings)
    if outcome.nonfinite:
        ledger.pass_through(name, outcome.nonfinite)
