"""Compare mergekit's recorded outputs with the float64 reference, and class every difference.

``python tests/parity/classify.py`` prints the tables of ``README.md`` and fails if anything is
unexplained. Per entry the recorded value is, in this order:

* **equal** to the reference rounded to the stored dtype;
* **rounding**: within the error that the arithmetic of the case can make;
* **threshold tie**: explained by keeping or dropping entries whose magnitude is that of both a
  kept and a dropped entry of the same tensor and model, where the equations do not decide;
* **sign tie**: explained by the other sign, where the votes cancel within the arithmetic;
* **unexplained**.

Explaining threshold ties one by one is not enough: per tensor and model it must also be possible
that as many tied entries were kept as there was room for. That is counted as well.
"""

# ruff: noqa: T201  a script reports by printing

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# As a script this file has its own folder on the path, and not the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.oracle import methods
from tests.parity.cases import BF16_MATH, Case, cases
from tests.parity.models import BASE, DTYPES, FINE_TUNES, tensors

CLASSES = ("equal", "rounding", "threshold tie", "sign tie", "unexplained")
UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
# Roundings between the task vectors and the merged one: a product per model, two additions, the
# divisor, the division and lambda.
OPERATIONS = 6


@dataclass(frozen=True)
class Rule:
    """How one entry of a case is merged, read from its configuration.

    A column is the vector [models] of one entry: of the trimmed task vectors, or of the models
    themselves where ``method`` is ``linear``.
    """

    method: str
    weights: np.ndarray
    density: list[float]
    gamma: list[float]
    normalize: bool
    lam: float
    arithmetic: str
    stored: str

    @classmethod
    def of(cls, case: Case) -> Rule:
        """Return the rule of ``case``; what is not configured has mergekit's default."""
        config = case.config
        shared = config.get("parameters", {})

        def per_model(key: str, default: float) -> list[float]:
            return [float(model["parameters"].get(key, default)) for model in config["models"]]

        method = config["merge_method"]
        return cls(
            method=method,
            weights=np.array(per_model("weight", 1.0)),
            density=per_model("density", 1.0),
            gamma=per_model("gamma", 0.01),
            normalize=shared.get("normalize", method in ("linear", "ties")),
            lam=shared.get("lambda", 1.0),
            arithmetic=config["dtype"],
            stored=case.dtype,
        )

    @property
    def elects(self) -> bool:
        """Whether the method elects a sign."""
        return self.method in ("ties", "breadcrumbs_ties")

    def mask(self, deltas: methods.PerModel) -> np.ndarray:
        """Return the boolean matrix [models, entries] of what the reference keeps."""
        if self.method == "ties":
            return methods.ties_mask(deltas, self.density, "tensor", "at_least_one")
        if self.method in ("breadcrumbs", "breadcrumbs_ties"):
            return methods.breadcrumbs_mask(
                deltas, self.density, self.gamma, "tensor", conflict="keep", at_least_one=False
            )
        return np.ones((len(self.weights), sum(d[0].size for d in deltas.values())), bool)

    def merged(self, inputs: methods.PerModel) -> methods.Tensors:
        """Return the reference merge of task vectors (of models, where linear)."""
        weights = self.weights.tolist()
        if self.method == "linear":
            return methods.linear(inputs, weights, normalize=self.normalize)
        if self.method == "task_arithmetic":
            return methods.task_arithmetic(inputs, weights)
        trim: dict[str, Any] = {"density": self.density, "weights": weights}
        if self.method == "ties":
            return methods.ties_mergekit(inputs, normalize=self.normalize, **trim)
        trim["gamma"] = self.gamma
        if self.method == "breadcrumbs":
            return methods.breadcrumbs_mergekit(inputs, **trim)
        return methods.breadcrumbs_ties_mergekit(inputs, normalize=self.normalize, **trim)

    def signs(self, column: np.ndarray) -> tuple[float, ...]:
        """Return the elected sign of a column, then the other one if the votes nearly cancel."""
        votes = self.weights * column
        elected = 1.0 if votes.sum() >= 0 else -1.0
        doubt = OPERATIONS * UNIT_ROUNDOFF[self.arithmetic] * abs(votes).sum()
        if self.elects and votes.any() and abs(votes.sum()) <= doubt:
            return elected, -elected
        return (elected,)

    def entry(self, theta: float, column: np.ndarray, sign: float) -> tuple[float, float]:
        """Return the parameter that a trimmed column makes of ``theta``, and its possible error."""
        agreeing = self.weights * column * sign > 0 if self.elects else np.full(len(column), True)
        parts = (self.weights * column)[agreeing]
        weight = self.weights[agreeing].sum()
        divisor = weight if self.normalize and weight != 0 else 1.0
        delta = self.lam * parts.sum() / divisor
        reach = abs(self.lam * parts / divisor).sum()
        if self.normalize:  # cancelling weights make the divisor itself inexact
            reach *= max(1.0, abs(self.weights[agreeing] / divisor).sum())
        error = OPERATIONS * reach * UNIT_ROUNDOFF[self.arithmetic]
        if self.arithmetic != self.stored:  # the sum with the base is rounded twice
            error += abs(theta + delta) * UNIT_ROUNDOFF[self.arithmetic]
        return theta + delta, error

    def stores(self, got: float, value: float, error: float) -> bool:
        """Tell whether ``value``, give or take ``error``, can have been stored as ``got``."""
        return self.store(value - error) <= got <= self.store(value + error)

    def store(self, value: float) -> float:
        """Round to the stored dtype."""
        return float(np.array(value).astype(DTYPES[self.stored]))


@dataclass
class Outcome:
    """The classes of all entries of one case."""

    counts: Counter[str] = field(default_factory=Counter)
    largest_rounding: float = 0.0  # absolute, against the rounded reference
    impossible_ties: int = 0  # pairs of tensor and model whose kept ties cannot add up


def inputs_of(case: Case) -> dict[str, list[np.ndarray]]:
    """Return the task vectors, subtracted in the dtype of the arithmetic; the models if linear."""
    base = tensors(BASE, case.dtype)
    tuned = [tensors(name, case.dtype) for name in FINE_TUNES]
    models = {name: [model[name] for model in tuned] for name in base}
    if case.config["merge_method"] == "linear":
        return models
    deltas = methods.task_vectors(base, models)
    if case.config["dtype"] == "bfloat16":
        for name, vectors in deltas.items():
            deltas[name] = [v.astype(ml_dtypes.bfloat16).astype(np.float64) for v in vectors]
    return deltas


def tied_entries(matrix: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return which entries [models, entries] have the magnitude of a kept and a dropped one.

    Zeros are left out: whether a zero is kept changes nothing.
    """
    tied = np.zeros(mask.shape, bool)
    for i, row in enumerate(abs(matrix)):
        both = np.intersect1d(row[mask[i]], row[~mask[i]])
        tied[i] = np.isin(row, both[both > 0])
    return tied


def explain(
    rule: Rule, theta: float, column: np.ndarray, mask: np.ndarray, tied: np.ndarray, got: float
) -> tuple[str, list[np.ndarray]]:
    """Return the class of one recorded value, and every choice of tied entries that allows it.

    ``column``, ``mask`` and ``tied`` are [models]; a choice is a boolean [models] of what is kept.
    """
    kind = "unexplained"
    choices: list[np.ndarray] = []
    alternatives = [(False, True) if t else (bool(m),) for t, m in zip(tied, mask, strict=True)]
    for alternative in itertools.product(*alternatives):
        choice = np.array(alternative)
        kept = np.where(choice, column, 0.0)
        for at, sign in enumerate(rule.signs(kept)):
            value, error = rule.entry(theta, kept, sign)
            if not rule.stores(got, value, error):
                continue
            choices.append(choice)
            if at > 0:
                this = "sign tie"
            elif not np.array_equal(choice, mask):
                this = "threshold tie"
            else:
                this = "equal" if got == rule.store(value) else "rounding"
            kind = min(kind, this, key=CLASSES.index)
    return kind, choices


def classify(case: Case, outputs: Mapping[str, np.ndarray] | None = None) -> Outcome:
    """Class every entry of ``outputs``, by default of what was recorded for ``case``."""
    rule, outcome = Rule.of(case), Outcome()
    outputs = case.recorded() if outputs is None else outputs
    inputs = inputs_of(case)
    base = tensors(BASE, case.dtype)
    if rule.method == "linear":  # a merge of models, not of task vectors: nothing is added to it
        base = {name: np.zeros_like(array) for name, array in base.items()}
    expected = methods.apply_to_base(base, rule.merged(inputs), rule.lam)
    for name, vectors in inputs.items():
        matrix = np.array([np.asarray(v, np.float64).ravel() for v in vectors])
        mask = rule.mask({name: vectors})
        tied = tied_entries(matrix, mask)
        theta, got, want = (
            np.asarray(part[name], np.float64).ravel() for part in (base, outputs, expected)
        )
        fewest, most = np.zeros(len(matrix), int), np.zeros(len(matrix), int)
        for j in range(matrix.shape[1]):
            if not tied[:, j].any() and got[j] == rule.store(want[j]):
                outcome.counts["equal"] += 1
                continue
            kind, choices = explain(rule, theta[j], matrix[:, j], mask[:, j], tied[:, j], got[j])
            outcome.counts[kind] += 1
            if kind == "rounding":
                difference = abs(got[j] - rule.store(want[j]))
                outcome.largest_rounding = max(outcome.largest_rounding, difference)
            if choices:
                fewest += np.min(choices, axis=0) & tied[:, j]
                most += np.max(choices, axis=0) & tied[:, j]
        room = (mask & tied).sum(axis=1)
        outcome.impossible_ties += int(((room < fewest) | (room > most)).sum())
    return outcome


def main() -> int:
    """Print the tables; return 1 if anything is unexplained."""
    heads = ("case", *CLASSES, "largest rounding")
    print("| " + " | ".join(heads) + " |")
    print("|---|" + "---:|" * (len(heads) - 1))
    failures = 0
    for case in cases():
        outcome = classify(case)
        cells = [case.label, *(str(outcome.counts[kind]) for kind in CLASSES)]
        print("| " + " | ".join([*cells, f"{outcome.largest_rounding:.1e}"]) + " |", flush=True)
        failures += outcome.counts["unexplained"] + outcome.impossible_ties
    print("\n| bfloat16 arithmetic against float32 | differing entries | largest | mean |")
    print("|---|---:|---:|---:|")
    for case in cases():
        if case.name.endswith(BF16_MATH):
            other = Case(case.name.removesuffix(BF16_MATH), case.dtype).recorded()
            gap = np.concatenate(
                [
                    abs(array.astype(np.float64) - other[name].astype(np.float64)).ravel()
                    for name, array in case.recorded().items()
                ]
            )
            numbers = f"{int((gap > 0).sum())} | {gap.max():.1e} | {gap.mean():.1e}"
            print(f"| {case.name} | {numbers} |")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
