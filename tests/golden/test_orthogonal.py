"""Orthogonal adaptation after training, worked by hand."""

from __future__ import annotations

from math import cos, pi, sqrt
from typing import Any

import numpy as np
import pytest

from mergebench import apply, merge_models
from mergebench.compute.crosstalk import crosstalk
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS

from .support import assert_exactly, merged

E1, E2 = [[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]
BOTH = [[1.0, 1.0], [0.0, 0.0]]
ZERO = [[0.0, 0.0], [0.0, 0.0]]


def near(expected: Any) -> Any:
    """Equal to the last digits of float32."""
    return pytest.approx(np.array(expected), abs=1e-6)


@pytest.mark.parametrize("variant", ["sequential", "joint"])
def test_disjoint_row_spaces_add_up(variant: str) -> None:
    """What is orthogonal already is not touched: the plain sum."""
    assert np.array(merged("orthogonal", E1, E2, variant=variant)) == near(BOTH)
    assert np.array(merged("orthogonal", E1, E2, variant=variant, lam=0.6)) == near(
        [[0.6, 0.6], [0, 0]]
    )


def test_the_first_stays_whole() -> None:
    """(1, 0) before (1, 1): the second keeps (0, 1). The other way round, (1/2, -1/2) is kept."""
    assert np.array(merged("orthogonal", E1, BOTH)) == near([[1, 1], [0, 0]])
    assert np.array(merged("orthogonal", BOTH, E1)) == near([[1.5, 0.5], [0, 0]])


def test_a_third_gives_way_to_both() -> None:
    """(1, 0, 0), (1, 1, 0), (1, 1, 2): what is left of the third is (0, 0, 2)."""
    rows = [[[1.0, 0.0, 0.0]], [[1.0, 1.0, 0.0]], [[1.0, 1.0, 2.0]]]
    assert np.array(merged("orthogonal", *rows)) == near([[1, 1, 2]])
    assert np.array(merged("orthogonal", *rows[::-1])) == near(
        # (1, 1, 2) whole, (1, 1, 0) - (1, 1, 2) / 3, and of (1, 0, 0) what is orthogonal to both.
        [[1 + 2 / 3 + 1 / 2, 1 + 2 / 3 - 1 / 2, 2 - 2 / 3]]
    )


def test_roundings_claim_no_direction() -> None:
    """What is negligible in a model as a whole is so too in what projection leaves of it."""
    first = [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    second = [[1.0, 0.0, 0.0], [0.0, 1e-3, 0.0], [0.0, 0.0, 1e-8]]
    third = [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    got = np.array(merged("orthogonal", first, second, third))
    assert got == near([[1, 0, 1], [0, 1e-3, 0], [0, 0, 0]])


def test_joint_projection_turns_both_alike() -> None:
    """Directions 60° apart become those 15° outside of them: cos² 15° of each is kept."""
    one, other = [[1.0, 0.0]], [[0.5, sqrt(3) / 2]]
    kept = cos(pi / 12)
    inward = cos(5 * pi / 12)
    expected = [[kept * (kept + inward), kept * (kept - inward)]]
    for models in ((one, other), (other, one)):
        assert np.array(merged("orthogonal", *models, variant="joint")) == near(expected)
    assert expected[0] == pytest.approx([1.1830127, 0.6830127])


def test_equal_models() -> None:
    """Twice the same: the first has it all, or each has its half."""
    assert np.array(merged("orthogonal", BOTH, BOTH)) == near(BOTH)
    assert np.array(merged("orthogonal", BOTH, BOTH, variant="joint")) == near(BOTH)


def test_opposite_models() -> None:
    """Opposites claim one direction: the first keeps it, or both halves cancel."""
    negative = [[-1.0, -1.0], [0.0, 0.0]]
    assert np.array(merged("orthogonal", BOTH, negative)) == near(BOTH)
    assert np.array(merged("orthogonal", BOTH, negative, variant="joint")) == near(ZERO)


@pytest.mark.parametrize("variant", ["sequential", "joint"])
def test_nothing_claims_nothing(variant: str) -> None:
    """A model that changes nothing, or has weight 0, takes no direction from the others."""
    assert np.array(merged("orthogonal", ZERO, BOTH, variant=variant)) == near(BOTH)
    assert_exactly(merged("orthogonal", ZERO, ZERO, variant=variant), ZERO)
    got = merged("orthogonal", BOTH, E1, weights=(0.0, 1.0), variant=variant)
    assert np.array(got) == near(E1)
    assert_exactly(merged("orthogonal", BOTH, variant=variant), BOTH)


def test_full_rank_leaves_nothing_to_the_second() -> None:
    """An update of full rank claims every direction; half of its energy claims one."""
    full, other = [[3.0, 0.0], [0.0, 1.0]], [[0.0, 5.0], [7.0, 0.0]]
    assert np.array(merged("orthogonal", full, other)) == near(full)
    # 9 of 10 in (1, 0): the other keeps what it does to (0, 1).
    assert np.array(merged("orthogonal", full, other, claim=0.9)) == near([[3, 5], [0, 1]])
    # Jointly both are shared out evenly, which is the mean.
    mean = [[1.5, 2.5], [3.5, 0.5]]
    assert np.array(merged("orthogonal", full, other, variant="joint")) == near(mean)


def test_vectors_and_kernels_add_up() -> None:
    """What has no row space is added; kernels are matrices unless they are taken as vectors."""
    assert_exactly(merged("orthogonal", [1.0, 2.0], [3.0, 4.0]), [4.0, 6.0])
    kernel = [[[[1.0]], [[2.0]]]]
    assert np.array(merged("orthogonal", kernel, kernel)) == near(kernel)
    assert_exactly(merged("orthogonal", kernel, kernel, kernels="vector"), [[[[2.0]], [[4.0]]]])


def test_sizes_far_apart() -> None:
    """A tiny update beside a huge one keeps its own direction, and loses the other's."""
    tiny, huge = [[1e-12, 1e-12]], [[1e12, 0.0]]
    taus = [{"w": np.array(each)} for each in (huge, tiny)]
    one, other = apply(OPS["project_rows"](), taus)
    assert one["w"].tolist() == huge
    assert other["w"].tolist() == [[0.0, 1e-12]]


def test_places_say_who_comes_first() -> None:
    """On arrays the order is that given, unless places say otherwise; these must be places."""
    taus = [{"w": np.array(each)} for each in (E1, BOTH)]
    chain = METHODS["orthogonal"]()
    assert apply(chain, taus)["w"] == near([[1, 1], [0, 0]])
    assert apply(chain, taus, places=(1, 0))["w"] == near([[1.5, 0.5], [0, 0]])
    for places in ((0,), (0, 0), (1, 2)):
        with pytest.raises(MismatchError, match="places of models, expected 0 to 1, each once"):
            apply(chain, taus, places=places)


@pytest.mark.parametrize(
    ("name", "value"), [("variant", "both"), ("claim", 0.0), ("claim", 1.5), ("kernels", "rows")]
)
def test_bad_values_are_refused(name: str, value: Any) -> None:
    """A value outside of what is declared is an error that names it."""
    with pytest.raises(ParameterError, match=f"`{name}` must be"):
        merged("orthogonal", E1, E2, **{name: value})


def test_a_full_model_needs_its_base() -> None:
    """Weights are not projected against each other."""
    with pytest.raises(MismatchError, match="add --base"):
        merge_models([{"w": np.eye(2)}, {"w": np.eye(2)}], method="orthogonal")


def test_tall_matrices_take_no_square_of_their_height() -> None:
    """An embedding's crosstalk fits the memory of its factors: 40000² numbers would be 12 GB."""
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 40_000, 4))
    got = crosstalk(one, other)
    # ‖X Yᵀ‖² = ⟨XᵀX, YᵀY⟩, precise enough where row spaces are not orthogonal.
    whole = np.sqrt(np.sum((one.T @ one) * (other.T @ other)))
    assert got == pytest.approx(whole / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-12)
    left, right = np.zeros_like(one), np.zeros_like(one)
    left[:, :2], right[:, 2:] = one[:, :2], other[:, 2:]
    assert crosstalk(left, right) < 1e-15
    base = {"embed.weight": np.zeros((40_000, 4))}
    models = [{"embed.weight": each} for each in (one, other)]
    merge_models(models, base=base, method="orthogonal", claim=0.5, memory="64MiB")
