"""Tied weights: merged once, stored as the base stores them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.compare import assert_close, assert_same
from tests.helpers.files import Array, listing, read
from tests.helpers.models import added, base_model, fine_tune, save_folder, task_vector
from tests.helpers.running import assert_done, assert_refused, call

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"tie_word_embeddings": True}


def with_head(arrays: dict[str, Array]) -> dict[str, Array]:
    """Both sides of the tie on disk."""
    return {**arrays, HEAD: arrays[EMBEDDING]}


def without_head(arrays: dict[str, Array]) -> dict[str, Array]:
    """The embedding alone on disk."""
    return {name: array for name, array in arrays.items() if name != HEAD}


SIDES = {"both": with_head, "one": without_head}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Tied models with the head on disk (base-both, …) and without (base-one, …)."""
    base = base_model()
    for name, arrays in (("base", base), ("ft1", fine_tune(base, 1)), ("ft2", fine_tune(base, 2))):
        for side, change in SIDES.items():
            save_folder(tmp_path / f"{name}-{side}", change(arrays), TIED)
    return tmp_path


@pytest.mark.parametrize("base", SIDES)
@pytest.mark.parametrize("first", SIDES)
@pytest.mark.parametrize("second", SIDES)
def test_output_has_the_sides_of_the_base(place: Path, base: str, first: str, second: str) -> None:
    """Whatever the inputs store, the output stores what the base does, both sides equal."""
    models = (f"ft1-{first}", f"ft2-{second}")
    common = ("-b", f"base-{base}", "-m", "task_arithmetic", "-o", "out")
    assert_done(call("merge", *models, *common, cwd=place))

    start = base_model()
    taus = [task_vector(fine_tune(start, seed), start) for seed in (1, 2)]
    expected = added(start, {name: taus[0][name] + taus[1][name] for name in taus[0]})
    assert_close(read(place / "out"), SIDES[base](expected))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "linear"])
def test_tied_tensor_counts_once(place: Path, method: str) -> None:
    """Thresholds over the whole model do not see a stored head twice."""
    scope = () if method == "linear" else ("-p", "scope=model", "-p", "density=0.3")
    for side in SIDES:
        models = (f"ft1-{side}", f"ft2-{side}", "-b", f"base-{side}")
        assert_done(call("merge", *models, "-m", method, *scope, "-o", f"out-{side}", cwd=place))

    both, one = read(place / "out-both"), read(place / "out-one")
    assert HEAD not in one
    assert_same(both, with_head(one))


def test_plan_shows_the_tie(place: Path) -> None:
    """The plan names the tie, and counts its entries once."""
    data = {
        side: assert_done(
            call("plan", f"ft1-{side}", f"ft2-{side}", "-b", f"base-{side}", "--json", cwd=place)
        ).json
        for side in SIDES
    }

    assert data["both"]["tensors"]["tied"] == {EMBEDDING: [HEAD]}
    assert data["one"]["tensors"]["tied"] == {}
    assert data["both"]["entries"] == data["one"]["entries"]


@pytest.mark.parametrize("base", SIDES)
def test_untied_fine_tune_is_refused(place: Path, base: str) -> None:
    """A fine-tune whose head went its own way does not fit a tied base."""
    save_folder(place / "untied", fine_tune(base_model(), 3), {"tie_word_embeddings": False})
    before = listing(place)

    ran = call("merge", "ft1-both", "untied", "-b", f"base-{base}", "-m", "ties", cwd=place)

    assert_refused(ran, HEAD, "untied")
    assert listing(place) == before


def test_untied_config_keeps_two_tensors(place: Path) -> None:
    """Without the tie in the config, equal tensors are merged as two."""
    base = base_model()
    save_folder(place / "plain", with_head(base), {"tie_word_embeddings": False})
    save_folder(place / "tuned", fine_tune(base, 1), {"tie_word_embeddings": False})

    assert_done(call("merge", "tuned", "-b", "plain", "-m", "task_arithmetic", cwd=place))

    merged = read(place / "merged")
    assert_close(merged, fine_tune(base, 1))
    assert merged[HEAD].tobytes() != merged[EMBEDDING].tobytes()


def test_shards_of_a_tied_model(place: Path) -> None:
    """Both stored sides of a tie get the same bytes in whatever shard they lie."""
    models = ("ft1-both", "ft2-both", "-b", "base-both", "-m", "ties", "-p", "density=0.5")
    assert_done(call("merge", *models, "-o", "whole", cwd=place))
    assert_done(call("merge", *models, "-o", "parts", "--shard-size", "2kB", cwd=place))

    parts = read(place / "parts")
    assert_same(parts, read(place / "whole"))
    assert parts[HEAD].tobytes() == parts[EMBEDDING].tobytes()
