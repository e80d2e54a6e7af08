"""Elect one sign per entry and silence the models that disagree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from mergebench.compute.masking import silence
from mergebench.compute.namespace import as_numpy, namespace
from mergebench.merge.at import At, Stack, Statistic, Sweep
from mergebench.merge.kernels.stages import Elect, Stages
from mergebench.merge.op import op

Rule = Literal["mass", "count"]
Election = Literal["unweighted", "weighted"]
Tie = Literal["majority", "plus", "minus", "zero"]


def _votes(stack: Stack, at: At, rule: Rule, election: Election) -> tuple[Stack, Stack]:
    """The values as they vote, (n, m), and the sum that decides, (1, m)."""
    xp = namespace(stack)
    votes = stack
    if election == "weighted":
        votes = stack * xp.asarray(at.weights, dtype=stack.dtype, device=stack.device)[:, None]
    counted = votes if rule == "mass" else xp.sign(votes)
    total = counted[0:1, :]
    for model in range(1, counted.shape[0]):
        total = total + counted[model : model + 1, :]
    return votes, total


@dataclass(frozen=True)
class _Ballot:
    """How many more entries of a tile elect a positive sign than a negative one."""

    rule: Rule
    election: Election

    def __call__(self, stack: Stack, at: At) -> int:
        total = as_numpy(_votes(stack, at, self.rule, self.election)[1])
        return int(np.count_nonzero(total > 0)) - int(np.count_nonzero(total < 0))

    def by_kernel(self, kernel: Any, at: At) -> int | None:
        """The same from stored entries, where that can be."""
        found: int | None = kernel.ballot(
            self.rule, at.weights if self.election == "weighted" else ()
        )
        return found


def _measure(sweep: Sweep, rule: Rule, election: Election) -> int:
    return sum(result for _, result in sweep(_Ballot(rule, election)))


def _statistic(rule: Rule, election: Election, tie: Tie) -> Statistic | None:
    if tie != "majority":
        return None
    return Statistic("model", partial(_measure, rule=rule, election=election))


def _stages(at: At, rule: Rule, election: Election, tie: Tie) -> Stages:
    signs = {"plus": 1, "minus": -1, "zero": 0}
    sign = (1 if at.value > 0 else -1) if tie == "majority" else signs[tie]
    return (Elect(rule, at.weights if election == "weighted" else (), sign),)


@op(statistic=_statistic, fused=_stages)
def elect_sign(
    stack: Stack,
    at: At,
    rule: Rule = "mass",
    election: Election = "unweighted",
    tie: Tie = "majority",
) -> Stack:
    """Zero every value whose sign is not the elected sign of its entry (TIES, step 2).

    Parameters
    ----------
    rule : mass or count
        The sign of the sum of values, or of the sum of their signs.
    election : unweighted or weighted
        Whether the models' weights take part; a negative weight then flips a vote.
    tie : majority, plus, minus or zero
        The sign of an entry whose sum is exactly zero: the sign of the sum of all elected signs
        of the model (negative if that is zero too), positive, negative, or none.
    """
    votes, total = _votes(stack, at, rule, election)
    positive, negative = total > 0, total < 0
    if tie == "plus" or (tie == "majority" and at.value > 0):
        positive = ~negative
    elif tie != "zero":
        negative = ~positive
    agrees = ((votes > 0) & positive) | ((votes < 0) & negative)
    return silence(stack, agrees)
