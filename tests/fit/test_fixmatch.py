"""Unsupervised FixMatch of aTLAS, by hand."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench.merge.fit.atlas import SETTINGS
from mergebench.merge.fit.fixmatch import FixMatch, flattened, trusted
from mergebench.merge.fit.forward import Forward
from mergebench.merge.fit.learn import learn
from mergebench.merge.fit.settings import Settings
from mergebench.merge.fit.task import Task
from tests.fit.lines import lines, three_vectors


class Given:
    """Logits that stand in the batches."""

    def forward(self, module: Any, batch: Mapping[str, Any]) -> Any:
        """The logits themselves."""
        return batch["logits"]

    def logits(self, outputs: Any, batch: Mapping[str, Any]) -> Any:
        """The same."""
        return outputs


class Doubled(Given):
    """Sees every augmented example with twice the logits."""

    def augment(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Twice the logits."""
        return {"logits": 2 * batch["logits"]}


def forward(scorer: Any, *batches: list[float]) -> Forward:
    """Batches of two classes, by the probabilities of the first."""
    held = [{"logits": torch.log(torch.tensor([[p, 1 - p] for p in each]))} for each in batches]
    return Forward(None, {}, (Task("t", scorer, "t"),), (held,), "cpu", "float32")


def loss(objective: FixMatch, number: int = 0, done: float = 0.0) -> float:
    """Of one batch."""
    objective.begin()
    return float(objective.of(0, number, done, torch.Generator().manual_seed(0)))


#: Four examples are predicted as the second class and four as the first are trusted: N/C = 4.
SHARES = [0.99, 0.01, 0.99, 0.99, 0.989, 0.99, 0.6, 0.01]


def test_it_flattens() -> None:
    """What the paper calls sharpening: [.8, .2] becomes [2/3, 1/3]."""
    got = flattened(torch.tensor([[0.8, 0.2]], dtype=torch.float64))
    np.testing.assert_allclose(got, [[2 / 3, 1 / 3]], rtol=1e-12)


def test_whom_it_trusts() -> None:
    """The most confident of those predicted as each class, N/C and 100 at most, one at least."""
    shares = torch.tensor([[p, 1 - p] for p in SHARES])
    assert torch.nonzero(~trusted(shares)).flatten().tolist() == [4, 6]
    assert trusted(torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]])).tolist() == [True, False]
    many = torch.rand(700, 2, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert int(trusted(many).sum()) == 200
    assert int(trusted(many, official=True).sum()) == 70
    # The authors rank all examples by the probability of a class, predicted or not.
    lonely = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    assert trusted(lonely, official=True).tolist() == [True, True]
    assert trusted(lonely).tolist() == [True, False]


@pytest.mark.parametrize("done", [0.0, 0.5])
def test_golden(done: float) -> None:
    """A quarter is cross-entropy on the trusted, the rest agreement of what passes ω."""
    root, rest = 0.989**0.5, 0.011**0.5
    soft = root / (root + rest)
    assert 0.9 < soft < 0.95
    agrees = -(soft * log(0.989) + (1 - soft) * log(0.011))
    # .6 becomes .551, which is never enough; .989 becomes .905, which is until ω has risen.
    others = (agrees if done == 0 else 0.0) / 2
    wanted = 0.75 * others + 0.25 * -log(0.99)
    assert loss(FixMatch(forward(Given(), SHARES)), done=done) == pytest.approx(wanted, rel=1e-5)


def test_augmented() -> None:
    """Targets are of what is seen, logarithms of what is augmented."""

    def twice(p: float) -> float:
        return p**2 / (p**2 + (1 - p) ** 2)

    root, rest = 0.989**0.5, 0.011**0.5
    soft, seen = root / (root + rest), twice(0.989)
    others = -(soft * log(seen) + (1 - soft) * log(1 - seen)) / 2
    wanted = 0.75 * others + 0.25 * -log(twice(0.99))
    assert loss(FixMatch(forward(Doubled(), SHARES))) == pytest.approx(wanted, rel=1e-4)


def test_official() -> None:
    """Everything is learned as the start predicts it, whatever the model says later."""
    given = forward(Given(), [0.9, 0.6, 0.8, 0.7], [0.2, 0.4, 0.3, 0.4])
    objective = FixMatch(given, official=True)
    # One of each class: .9, and .2 of the second batch.
    assert loss(objective) == pytest.approx(
        0.75 * -(log(0.6) + log(0.8) + log(0.7)) / 3 + 0.25 * _trusted(objective, given), rel=1e-5
    )
    later = given.batches[0]
    later[0]["logits"] = later[0]["logits"].flip(1)
    assert loss(objective) == pytest.approx(
        0.75 * -(log(0.4) + log(0.2) + log(0.3)) / 3 + 0.25 * _trusted(objective, given), rel=1e-5
    )
    assert [marks.tolist() for marks in objective.trusted[0]] == [
        [True, False, False, False],
        [True, False, False, False],
    ]


def _trusted(objective: FixMatch, given: Forward) -> float:
    """The one trusted example that is drawn: of the first batch or of the second."""
    counts = torch.ones(2)
    number = int(torch.multinomial(counts, 1, generator=torch.Generator().manual_seed(0)))
    logits = given.batches[0][number]["logits"][0]
    return -float(torch.log_softmax(logits, 0)[[0, 1][number]])


def test_the_paper_trusts_anew(tmp_path: Path) -> None:
    """Every epoch; the code once."""
    for official, wanted in ((False, 4), (True, 1)):
        given = forward(Given(), SHARES)
        objective = FixMatch(given, official=official)
        objective.begin()
        given.batches[0][0]["logits"] = given.batches[0][0]["logits"].flip(1)
        before = [each.clone() for each in objective.taken_for[0]]
        objective.begin()
        changed = not torch.equal(before[0], objective.taken_for[0][0])
        assert changed == (wanted == 4)


@pytest.mark.parametrize("compat", ["", "official"])
def test_learned_without_labels(tmp_path: Path, compat: Any) -> None:
    """From a start that tells classes apart a little, predictions become surer; labels unused."""
    mixture = three_vectors(tmp_path)
    task = lines(count=64)
    task.scorer.loss = None
    settings = Settings(objective="ufm", compat=compat, epochs=20, rate=0.05, start=0.5)
    learned = learn(mixture, [task], settings, "val")
    row = [Path(each.label).name for each in mixture.plan.models].index("right")
    assert float(learned.coefficients[row, mixture.names.index("w")]) > 0.7
    assert SETTINGS["test-time"].objective == "ufm"
