"""A run that was killed goes on, and ends as one that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mergebench.core.errors import FormatError, ParameterError
from mergebench.merge.fit.adamerging import SETTINGS as ADAMERGING
from mergebench.merge.fit.atlas import SETTINGS as ATLAS
from mergebench.merge.fit.learn import Learned, Settings, learn
from mergebench.merge.fit.learned_soup import SETTINGS as SOUPS
from mergebench.merge.fit.mixture import Mixture
from mergebench.merge.fit.state import Kept
from tests.fit.lines import lines, three_vectors

FEW = {"epochs": 5, "rate": 0.05}
WAYS = {
    "addition": replace(ATLAS["addition"], **FEW),
    "cosine": replace(ATLAS["few-shot"], **FEW),
    "ufm": replace(ATLAS["test-time"], **FEW),
    "ufm official": replace(ATLAS["test-time"], **FEW, compat="official"),
    "entropy by steps": replace(ADAMERGING["tensor"], steps=14, rate=0.05),
    "float16": replace(ATLAS["addition"], **FEW, precision="float16"),
    "soup": replace(SOUPS["layer"], epochs=5),
    "patience": replace(ATLAS["addition"], **FEW, patience=2),
}


class KilledError(Exception):
    """What stops a run in the middle."""


def run(
    mixture: Mixture,
    settings: Settings,
    kept: Kept | None = None,
    stop: int | None = None,
    **more: Any,
) -> Learned:
    """Two tasks, with batches of their own; killed after ``stop`` steps."""

    def tell(what: str, done: int, total: int) -> None:
        if done == stop:
            raise KilledError

    tasks = [lines("a"), lines("b", seed=1, count=16)]
    return learn(mixture, tasks, settings, "val", kept=kept, tell=tell, **more)


def assert_equal(one: Learned, two: Learned) -> None:
    """To the bit, in everything."""
    assert torch.equal(one.coefficients, two.coefficients)
    assert (one.history, one.scores, one.epoch, one.heat) == (
        two.history,
        two.scores,
        two.epoch,
        two.heat,
    )


@pytest.mark.parametrize("way", WAYS)
def test_as_if_it_had_never_been_killed(tmp_path: Path, way: str) -> None:
    """Wherever it stops: in an epoch, at its end, twice."""
    mixture = three_vectors(tmp_path)
    wanted = run(mixture, WAYS[way])
    for stop in (1, 4, 9):
        kept = Kept(tmp_path / "x.state", way, every=0.0)
        # The step that is killed was not kept yet, so that it is taken again.
        with pytest.raises(KilledError):
            run(mixture, WAYS[way], kept, stop)
        assert kept.path.exists() == (stop > 1)
        state = kept.load()
        done = 0 if state is None else state.epoch * 3 + state.turn
        assert done == stop - 1
        with pytest.raises(KilledError):
            run(mixture, WAYS[way], kept, stop + 1)
        assert_equal(run(mixture, WAYS[way], kept), wanted)
        assert not kept.path.exists()
        assert not list(tmp_path.glob(".x.state*"))


def test_with_scores(tmp_path: Path) -> None:
    """The best epoch so far is part of what is kept, and no epoch is scored twice."""
    mixture = three_vectors(tmp_path)
    values = [0.5, 0.25, 0.75, 0.5, 0.25, 0.125]
    told: list[int] = []

    def watch(coefficients: torch.Tensor, epoch: int) -> float:
        told.append(epoch)
        return values[epoch]

    wanted = run(mixture, WAYS["addition"], watch=watch)
    assert (wanted.epoch, wanted.scores) == (2, tuple(values))
    told.clear()
    kept = Kept(tmp_path / "x.state", "way", every=0.0)
    with pytest.raises(KilledError):
        run(mixture, WAYS["addition"], kept, stop=11, watch=watch)
    assert told == [0, 1, 2, 3]
    assert_equal(run(mixture, WAYS["addition"], kept, watch=watch), wanted)
    assert told == [0, 1, 2, 3, 4, 5]


def test_states_of_others(tmp_path: Path) -> None:
    """Another fit's state, and what is none, are refused in one line that says what to do."""
    mixture = three_vectors(tmp_path)
    kept = Kept(tmp_path / "x.state", "one", every=0.0)
    with pytest.raises(KilledError):
        run(mixture, WAYS["addition"], kept, stop=4)
    with pytest.raises(ParameterError, match="another fit that did not end") as error:
        run(mixture, WAYS["addition"], Kept(kept.path, "two"))
    assert "remove" in error.value.fix
    kept.path.write_bytes(b"what is this")
    with pytest.raises(FormatError, match="cannot be gone on with"):
        run(mixture, WAYS["addition"], kept)


def test_an_interrupt_says_that_it_is_kept(tmp_path: Path) -> None:
    """As the command line shows it."""
    mixture = three_vectors(tmp_path)
    kept = Kept(tmp_path / "x.state", "one", every=0.0)

    def tell(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        learn(mixture, [lines()], WAYS["addition"], "val", kept=kept, tell=tell)
    assert error.value.__notes__ == [
        "what was learned is kept: run the same command again to go on from there"
    ]


def test_the_scale_of_losses_is_kept(tmp_path: Path) -> None:
    """In float16 losses are scaled so far that gradients do not overflow, found step by step."""
    mixture = three_vectors(tmp_path)
    task = lines()
    given = task.scorer.loss
    # So steep that the first steps overflow, and are not taken.
    task.scorer.loss = lambda outputs, batch: 100 * given(outputs, batch)
    seen: list[torch.Tensor] = []

    def watch(coefficients: torch.Tensor, epoch: int) -> float:
        seen.append(coefficients.clone())
        return float(epoch)

    def tell(what: str, done: int, total: int) -> None:
        if done == stop:
            raise KilledError

    stop = 0
    wanted = learn(mixture, [task], WAYS["float16"], "val", tell=tell, watch=watch)
    steps = round(float(seen[1].abs().max()) / 0.05)
    assert steps < 3
    kept, stop = Kept(tmp_path / "x.state", "way", every=0.0), 6
    with pytest.raises(KilledError):
        learn(mixture, [task], WAYS["float16"], "val", tell=tell, watch=watch, kept=kept)
    stop = 0
    again = learn(mixture, [task], WAYS["float16"], "val", tell=tell, watch=watch, kept=kept)
    assert_equal(again, wanted)
