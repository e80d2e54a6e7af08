"""Results of sweeps, folded by those who made them: thresholds and sums to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.compute.gram import gram, grouped_sums
from mergebench.compute.magnitudes import bits
from mergebench.compute.scores import kth_smallest
from mergebench.compute.search import Search
from mergebench.compute.seen import Seen, fold_of
from mergebench.compute.select import kth_magnitudes
from mergebench.compute.sums import totals
from mergebench.compute.survey import Survey
from mergebench.core.site import Site
from mergebench.merge.at import At
from tests.unit.sweeps import Tables, assert_exact


class Folded(Tables):
    """Tables whose results of each tensor are folded, a few at a time."""

    together = 3

    def __call__(self, visit: Callable[[Any, At], Any]) -> Iterator[tuple[At, Any]]:
        """One result per tensor, if the visitor can fold; else all of them."""
        fold = fold_of(visit)
        held: list[tuple[Any, int, int, Any]] = []
        for at, result in super().__call__(visit):
            if fold is None:
                yield at, result
                continue
            if held and held[0][0].name != at.site.name:
                yield self._one(held, fold)
                held = []
            held.append((at.site, at.start, at.stop, result))
            if len(held) == self.together:
                site, start, _, _ = held[0]
                held = [(site, start, at.stop, fold([each[1:] for each in held]))]
        if held and fold is not None:
            yield self._one(held, fold)

    def _one(self, held: Any, fold: Any) -> tuple[At, Any]:
        site: Site = held[0][0]
        found = fold([each[1:] for each in held])
        weights, keys = (1.0,) * self.models, tuple(range(self.models))
        return At(site, held[0][1], held[-1][2], weights, keys=keys), found

    def again(self, visit: Any, spans: Any) -> Iterator[tuple[At, Any]]:
        """Single tiles, as a sweep over files gives them."""
        for at, result in super().__call__(visit):
            if (at.site.name, at.start, at.stop) in spans:
                yield at, result


def tables(seed: int, few: bool) -> dict[str, np.ndarray]:
    """Three tensors of two models; with few values there are many ties."""
    random = np.random.default_rng(seed)
    sizes = {"b": 9001, "a": 12_288, "c": 5}
    made = {name: random.standard_normal((2, size), np.float32) for name, size in sizes.items()}
    return {name: np.round(each * 4) / 4 for name, each in made.items()} if few else made


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 99), st.integers(0, 22_000), st.booleans(), st.sampled_from((1000, 1024, 4096))
)
def test_thresholds(seed: int, rank: int, few: bool, tile: int) -> None:
    """Exactly the largest entries, by the same cut."""
    stacks = tables(seed, few)
    expected = kth_magnitudes(Tables(stacks, tile), [[rank], [rank // 2]])

    found = kth_magnitudes(Folded(stacks, tile), [[rank], [rank // 2]])

    assert found == expected
    for model, (own, of) in enumerate(zip(found, (rank, rank // 2), strict=True)):
        assert_exact(stacks, model, of, own[0])


def test_thresholds_of_many_entries_inside_the_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is counted in bins, and the bracket narrowed."""
    monkeypatch.setattr("mergebench.compute.select.CAPACITY", 64)
    monkeypatch.setattr("mergebench.compute.search.BINS", 16)
    monkeypatch.setattr("mergebench.compute.select._targets", _wide)
    stacks = tables(3, few=False)
    for rank in (1, 777, 15_000):
        sweep = Folded(stacks, 500)
        ((cut,), _) = kth_magnitudes(sweep, [[rank], [0]])
        assert sweep.sweeps > 2
        assert_exact(stacks, 0, rank, cut)


def test_what_is_folded_stays_small() -> None:
    """Of a large tensor, entries are kept in proportion to what a search can keep of the model."""
    stacks = tables(4, few=False)
    target = Search(0, 5000, 1, int(np.iinfo(np.int32).max), np.dtype(np.int32), capacity=100)
    survey = Survey([target], size=10**9)
    magnitudes = bits(stacks["a"])[0]
    parts = [
        (at, at + 4096, [target.look(magnitudes[at : at + 4096], at)])
        for at in range(0, 12_288, 4096)
    ]
    assert all(found.values is not None for _, _, (found,) in parts)

    (found,) = survey.fold(parts)

    assert found.values is None
    assert found.counts.sum() == found.inside == np.count_nonzero(magnitudes)
    (few,) = survey.fold(parts[:1])
    assert few.values.tolist() == parts[0][2][0].values.tolist()


def _wide(sweep: Any, wanted: Any) -> Any:
    top = int(np.iinfo(np.int32).max)
    return [Search(model, rank, 1, top, np.dtype(np.int32), 64) for model, rank in wanted]


@pytest.mark.parametrize("tile", [1000, 4096, 5000])
def test_sums(tile: int) -> None:
    """Over blocks that tiles cut, tensor by tensor."""
    stacks = tables(1, few=False)

    def terms(stack: Any, at: At) -> Any:
        return np.abs(stack) / 3

    whole, folded = (kind(stacks, tile) for kind in (Tables, Folded))
    assert totals(whole, terms, 2).tobytes() == totals(folded, terms, 2).tobytes()
    blocks = [
        sum(
            (
                (np.abs(stacks[name][:, at : at + 4096]) / 3).astype(np.float64).sum(axis=1)
                for at in range(0, stacks[name].shape[1], 4096)
            ),
            np.zeros(2),
        )
        for name in "abc"
    ]
    assert totals(whole, terms, 2).tobytes() == ((blocks[0] + blocks[1]) + blocks[2]).tobytes()


@pytest.mark.parametrize("tile", [1000, 4096, 5000])
def test_products(tile: int) -> None:
    """Of one tensor, and of groups of tensors."""
    stacks = tables(2, few=False)
    one = {"a": stacks["a"]}
    assert gram(Tables(one, tile)).tobytes() == gram(Folded(one, tile)).tobytes()
    assert np.allclose(gram(Tables(one, tile)), stacks["a"] @ stacks["a"].T.astype(np.float64))

    def squares(stack: Any) -> Any:
        return np.moveaxis((stack.astype(np.float64) ** 2).sum(axis=2), 0, 1)

    def group(site: Site) -> str:
        return "rest" if site.name != "b" else "b"

    found = [grouped_sums(kind(stacks, tile), squares, group) for kind in (Tables, Folded)]
    assert list(found[0]) == list(found[1]) == ["rest", "b"]
    assert all(found[0][key].tobytes() == found[1][key].tobytes() for key in found[0])
    assert np.allclose(found[0]["b"], (stacks["b"].astype(np.float64) ** 2).sum(axis=1))


def test_numbers_in_order() -> None:
    """Of either sign, whatever a visitor sees instead of the entries."""
    stacks = tables(5, few=True)
    flat = np.sort(np.concatenate([stacks[name] for name in "abc"], axis=1), axis=1)
    for place in (0, 5000, 21_293):
        assert kth_smallest(Folded(stacks, 1000), [place] * 2).tolist() == flat[:, place].tolist()


def test_a_visitor_that_sees_something_else_folds_as_it_did() -> None:
    """And one that cannot, cannot."""

    def plain(stack: Any, at: At) -> None:
        return None

    assert fold_of(Seen(plain, lambda stack, at: (stack, at))) is None
