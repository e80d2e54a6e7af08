"""LiNeS and Consensus, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergebench import apply, merge_models
from mergebench.core.errors import ParameterError
from mergebench.merge.ops.lines import lines
from mergebench.recipe.reading import read_recipe, recipe_from_dict
from tests.helpers.running import assert_done, call

from .support import assert_exactly, merged

#: Four blocks, and tensors outside of them.
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
BLOCKS = tuple(f"model.layers.{block}.mlp.weight" for block in range(4))


def model(value: float, names: tuple[str, ...] = (*OUTSIDE, *BLOCKS)) -> dict[str, np.ndarray]:
    """Tensors of one value."""
    return {name: np.full(2, value, np.float32) for name in names}


def factors(*models: dict[str, np.ndarray], **params: Any) -> dict[str, float]:
    """The first entry of every tensor of a merge into zeros."""
    base = {name: np.zeros_like(array) for name, array in models[0].items()}
    options = {"method": "lines", **params}
    found = merge_models(list(models), base=base, **options)
    return {name: float(array[0]) for name, array in found.items()}


def assert_near(got: dict[str, float], blocks: list[float], outside: float) -> None:
    """Factors of the four blocks and of everything else."""
    assert np.allclose([got[name] for name in BLOCKS], blocks, rtol=1e-6)
    assert np.allclose([got[name] for name in OUTSIDE], outside, rtol=1e-6)


def test_four_blocks() -> None:
    """L = 4, α = .25, β = .9 gives .25, .55, .85, 1.15, and α outside: norm and head too."""
    got = factors(model(1.0), alpha="0.25", beta=0.9)
    assert_near(got, [0.25, 0.55, 0.85, 1.15], 0.25)


def test_no_slope_is_task_arithmetic() -> None:
    """β = 0 is α times task arithmetic, and α = 1 then changes nothing."""
    got = factors(model(1.0), model(2.0), alpha="0.5", beta=0)
    assert_near(got, [1.5] * 4, 1.5)
    assert_near(factors(model(1.0), model(2.0), alpha="1", beta=0), [3.0] * 4, 3.0)


def test_single_task() -> None:
    """For one task α = 1 - β, so that the last block moves in full."""
    assert_near(factors(model(1.0), alpha="rest", beta=0.75), [0.25, 0.5, 0.75, 1.0], 0.25)


def test_norms_of_a_sum_give_one_over_n() -> None:
    """‖Σ τ‖ = ‖τ_MTL‖ for a plain sum, so α = 1/N, whatever cancels."""
    got = factors(model(1.0), model(1.0), beta=0.6)
    assert_near(got, [1.0, 1.4, 1.8, 2.2], 1.0)
    got = factors(model(3.0), model(-2.0), model(1.0), model(2.0), beta=0)
    assert_near(got, [1.0] * 4, 1.0)


def test_norms_of_a_mean() -> None:
    """τ_MTL = Στ/N has α = 1: the mean of task vectors."""
    options: dict[str, Any] = {"method": "dare_linear", "density": 1.0, "normalize": True}
    got = factors(model(1.0), model(2.0), then=["lines:beta=0.5"], **options)
    assert_near(got, [1.5, 1.75, 2.0, 2.25], 1.5)


def test_norms_after_ties() -> None:
    """TIES leaves -2 of 1 and -2, so ‖Σ τ‖/‖τ_MTL‖/N = 1/2/2; weights do not enter ‖Σ τ‖."""
    options: dict[str, Any] = {"method": "ties", "density": 1.0, "divisor": "none"}
    got = factors(model(1.0), model(-2.0), then=["lines:beta=0.75"], **options)
    assert_near(got, [-0.5, -1.0, -1.5, -2.0], -0.5)


def test_norms_are_those_of_the_whole_model() -> None:
    """One α for all tensors, from norms laid end to end."""
    one = {**model(0.0), BLOCKS[0]: np.array([4, -1], np.float32)}
    other = {
        **model(0.0),
        BLOCKS[0]: np.array([-4, 1], np.float32),
        BLOCKS[1]: model(3.0)[BLOCKS[1]],
    }
    # Σ τ is 6 in norm; TIES elects + for the tie of ±4 and ±1, so that 4 + 1 + 6 are left.
    options: dict[str, Any] = {"method": "ties", "density": 1.0, "divisor": "none", "tie": "plus"}
    got = factors(one, other, then=["lines:beta=0"], **options)
    assert np.isclose(got[BLOCKS[0]], 4 * 6 / 11 / 2)
    assert np.isclose(got[BLOCKS[1]], 3 * 6 / 11 / 2)


def test_nothing_is_left_to_scale() -> None:
    """Task vectors that cancel have no norms: zero comes out, not NaN."""
    assert_near(factors(model(1.0), model(-1.0)), [0.0] * 4, 0.0)


def test_a_single_block_is_the_last() -> None:
    """L = 1 takes α + β."""
    names = ("model.layers.0.w", "model.norm.weight")
    assert factors(model(1.0, names), alpha="0.25", beta=0.5) == {names[0]: 0.75, names[1]: 0.25}


def test_stacks_count_on_their_own() -> None:
    """Encoder and decoder each begin at α and end at α + β."""
    names = tuple(
        f"{side}.block.{i}.w" for side, n in (("encoder", 3), ("decoder", 2)) for i in range(n)
    )
    got = factors(model(1.0, names), alpha="0.25", beta=0.5)
    assert list(got.values()) == [0.25, 0.5, 0.75, 0.25, 0.75]


def test_blocks_are_found_by_another_pattern() -> None:
    """A pattern of one's own finds blocks where the usual one finds none."""
    names = ("net.unit-0.w", "net.unit-1.w", "net.unit-2.w", "net.end.w")
    plain = factors(model(1.0, names), alpha="0.5", beta=1)
    assert list(plain.values()) == [0.5] * 4
    pattern = r"(?P<stack>net\.unit)-(?P<index>\d+)\."
    got = factors(model(1.0, names), alpha="0.5", beta=1, block_pattern=pattern)
    assert list(got.values()) == [0.5, 1.0, 1.5, 0.5]
    found = apply(lines(1.0, "0.5"), [model(1.0, names)], block_pattern=pattern)[0]
    assert [float(array[0]) for array in found.values()] == [0.5, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(", "no regular expression"),
        (r"layers\.(?P<index>\d+)", "has no group 'stack'"),
        (r"(?P<stack>layers)\.", "has no group 'index'"),
        (r"(?P<stack>nowhere)\.(?P<index>\d+)", "is found in no tensor name"),
        (r"(?P<stack>layers)\.\d\.(?P<index>\w+)", "finds 'mlp' in"),
    ],
)
def test_patterns_that_cannot_be(pattern: str, what: str) -> None:
    """A pattern that is none, has no groups, finds nothing or no number is refused."""
    with pytest.raises(ParameterError, match=what):
        factors(model(1.0), block_pattern=pattern)


@pytest.mark.parametrize("alpha", ["nonsense", "nan", "inf", ""])
def test_alpha_is_a_number_or_a_word(alpha: str) -> None:
    """Anything else is refused, naming the parameter."""
    with pytest.raises(ParameterError, match="lines: `alpha`"):
        factors(model(1.0), alpha=alpha)


def test_numbers_keep_factors_of_adapters() -> None:
    """With a number for α the op is linear, so that a LoRA stays one; norms are not."""
    assert lines(0.5, "0.25").linear
    assert lines(0.5, "rest").linear
    assert not lines(0.5, "norms").linear


TASKS = ([4.0, 0.0, 1.0, 2.0, 0.0], [0.0, 3.0, 1.0, -2.0, 0.0])


@pytest.mark.parametrize(
    ("k", "expected"),
    [(0, [4, 3, 2, 0, 0]), (1, [4, 3, 2, 0, 0]), (2, [0, 0, 2, 0, 0]), (3, [0, 0, 0, 0, 0])],
)
def test_consensus_of_two(k: int, expected: list[float]) -> None:
    """τ is [4, 3, 2, 0, 0]; the first and second entry serve one task, the third both."""
    assert_exactly(merged("consensus_ta", *TASKS, k=k, mask_lam=0.5, lam=1.0), expected)


@pytest.mark.parametrize(
    ("mask_lam", "expected"), [(0.5, [3, 3, 2]), (1.0, [3, 3, 0]), (2.5, [0, 0, 0])]
)
def test_masks_shrink_as_their_lambda_grows(mask_lam: float, expected: list[float]) -> None:
    """Magnitudes of 2, 1 and 1 against a rest of 1, 2 and 1, times λ_t: equality is too little."""
    got = merged("consensus_ta", [2, 1, 1], [1, 2, 1], k=1, mask_lam=mask_lam, lam=1.0)
    assert_exactly(got, expected)


def test_consensus_of_one_is_its_support() -> None:
    """Of one task the rest is zero, so that its own entries are used; λ scales what stays."""
    assert_exactly(merged("consensus_ta", [1, 0, -2], k=1, lam=0.5), [0.5, 0, -1])
    assert_exactly(merged("consensus_ta", [1, 0, -2], k=0, lam=1.0), [1, 0, -2])


def test_consensus_follows_any_method() -> None:
    """After TIES, the merged entry is what task vectors are compared with."""
    got = merged(
        "ties", *TASKS, density=1.0, divisor="none", tie="zero", then=["consensus:k=2,mask_lam=0.5"]
    )
    assert_exactly(got, [0, 0, 2, 0, 0])


def test_a_pattern_is_part_of_the_recipe(tmp_path: Path) -> None:
    """The command line writes the pattern into the recipe, which reads back to an equal one."""
    names = ("net.unit-0.w", "net.unit-1.w")
    for place, table in (("base", model(0.0, names)), ("tuned", model(1.0, names))):
        save_file(table, tmp_path / f"{place}.safetensors")
    pattern = r"(?P<stack>net\.unit)-(?P<index>\d+)\."
    done = call(
        "merge", "tuned.safetensors", "--base", "base.safetensors", "-m", "lines",
        "-p", "alpha=0.5", "-p", "beta=1", "--block-pattern", pattern, "-o", "merged", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert_done(done)
    got = load_file(tmp_path / "merged" / "model.safetensors")
    assert [float(array[0]) for array in got.values()] == [0.5, 1.5]
    recipe = read_recipe(tmp_path / "merged" / "mergebench_recipe.yaml")
    assert recipe.block_pattern == pattern
    assert recipe_from_dict(recipe.to_dict()) == recipe
    selected = merge_models(
        [model(1.0, names)], base=model(0.0, names), method="task_arithmetic",
        include=["block=1"], block_pattern=pattern,
    )  # fmt: skip
    assert [float(array[0]) for array in selected.values()] == [0.0, 1.0]
