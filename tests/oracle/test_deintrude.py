"""What is taken out of updates, beside two full decompositions in float64."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergebench import apply, merge_models
from mergebench.compute.decomposition import decompose, leading_triplets
from mergebench.compute.removal import removal
from mergebench.merge.op import OPS

from .removed import removed

F32 = np.float32


def trained(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A bulk below singular values that fall, as in trained matrices."""
    U, S, Vt = np.linalg.svd(random.standard_normal(shape), full_matrices=False)
    return (U * (S * (1 + 3 * np.exp(-np.arange(len(S)) / 6)))) @ Vt


def updates(random: np.random.Generator, shape: tuple[int, int], size: float) -> np.ndarray:
    """Three new directions of falling size."""
    left = np.linalg.qr(random.standard_normal((shape[0], 3)))[0]
    right = np.linalg.qr(random.standard_normal((shape[1], 3)))[0]
    return (left * (size * np.array([1.0, 0.8, 0.6]))) @ right.T


@pytest.mark.parametrize("shape", [(20, 20), (12, 40), (40, 12), (1, 9), (9, 1)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("top", [1, 2, None])
@pytest.mark.parametrize("k", [1, 4, 0])
def test_small_matrices(shape: tuple[int, int], side: Any, top: int | None, k: int) -> None:
    """Every entry, σ and cosine, at several thresholds and λ."""
    scaled = 0
    for seed in range(3):
        random = np.random.default_rng(seed)
        base, update = random.standard_normal(shape), 4 * random.standard_normal(shape)
        for epsilon, lam in ((0.3, 0.0), (0.6, 0.7), (0.9, 1.5)):
            wanted, directions = removed(
                base, update, lam=lam, top=top, k=k or min(shape), epsilon=epsilon, side=side
            )
            got = removal(base, update, lam=lam, top=top, k=k, epsilon=epsilon, side=side)
            np.testing.assert_allclose(update + got.left @ got.right, wanted, atol=1e-10)
            found = [(each.index, each.sigma, each.cosine) for each in got.directions]
            assert [each[0] for each in found] == [each[0] for each in directions]
            np.testing.assert_allclose(
                np.array(found).ravel(), np.array(directions).ravel(), atol=1e-6
            )
            length = np.linalg.norm(update)
            assert got.kept == pytest.approx(np.linalg.norm(wanted) / length)
            assert got.removed == pytest.approx(np.linalg.norm(wanted - update) / length)
            tuned = np.linalg.norm(base + update) ** 2
            assert got.energy == pytest.approx(1 - np.linalg.norm(base + wanted) ** 2 / tuned)
            scaled += len(found)
            for control in ("removed", "norm"):
                same = removal(base, update, lam=lam, top=top, k=k, epsilon=epsilon, side=side,
                               control=control)  # fmt: skip
                assert (same.left.size, same.directions) == (0, got.directions)
                share = 1 - got.removed if control == "removed" else got.kept
                assert same.scale == pytest.approx(max(share, 0.0))
                left = np.linalg.norm(base + same.scale * update) ** 2
                assert same.energy == pytest.approx(1 - left / tuned)
    assert scaled > (0 if min(shape) > 1 else -1)


@cache
def pair(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A large matrix and its update."""
    random = np.random.default_rng(2)
    return trained(random, shape), updates(random, shape, 900.0)


@pytest.mark.parametrize(
    ("shape", "grow"),
    [((560, 560), 1.0), ((520, 1300), 1.0), ((1300, 520), 1.0), ((560, 560), 1e20)],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_bounds_find_the_same(shape: tuple[int, int], side: Any, grow: float) -> None:
    """Directions that bounds have settled are as exact as decomposed ones, whatever the unit."""
    base, update = ((grow * each).astype(F32) for each in pair(shape))

    got = removal(base, update, lam=0.2, top=None, k=6, side=side)
    wanted, directions = removed(
        base.astype(np.float64), (base + update).astype(np.float64) - base, lam=0.2, top=None, k=6,
        side=side,
    )  # fmt: skip

    assert len(directions) == 3
    assert [each.index for each in got.directions] == [each[0] for each in directions]
    assert {each.status for each in got.directions} == {"certified"}
    for each, (_, sigma, cosine) in zip(got.directions, directions, strict=True):
        assert each.sigma == pytest.approx(sigma, rel=1e-9)
        assert each.cosine - 1e-6 <= cosine <= each.bound + 1e-6
    error = np.linalg.norm(update.astype(np.float64) + got.left @ got.right - wanted)
    assert error <= 1e-6 * np.linalg.norm(update.astype(np.float64))


def test_refined_triplets() -> None:
    """From vectors that are a little off to float64, of either side; from others, nothing."""
    random = np.random.default_rng(3)
    for shape in ((60, 90), (90, 60)):
        matrix = trained(random, shape)
        exact = decompose(matrix, np.float64)
        known = exact.U if shape[0] < shape[1] else exact.Vt.T
        near = known[:, :20] + 1e-4 * random.standard_normal((60, 20))
        found = leading_triplets(matrix, near, 5)
        assert found is not None
        np.testing.assert_allclose(found.S, exact.S[:5], rtol=1e-12)
        np.testing.assert_allclose(found.U, exact.U[:, :5], atol=1e-9)
        np.testing.assert_allclose(found.Vt, exact.Vt[:5], atol=1e-9)
        assert leading_triplets(matrix, near[:, ::-1], 5) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_of_gpt2_is_turned(transposed: bool, tmp_path: Path) -> None:
    """An intruder of the output side is looked for on the output side, however it is stored."""
    random = np.random.default_rng(5)
    base, update = random.standard_normal((9, 6)), 6 * random.standard_normal((9, 6))
    name = "h.0.attn.c_attn.weight" if transposed else "h.0.attn.q.weight"

    def stored(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.T) if transposed else array

    for folder, array in (("base", base), ("ft", base + update)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
        save_file({name: stored(array)}, tmp_path / folder / "model.safetensors")
    wanted, directions = removed(base, update, lam=0.3, top=None, epsilon=0.7)
    assert 0 < len(directions) < 6
    got = merge_models(
        [tmp_path / "ft"],
        base=tmp_path / "base",
        method="deintrude",
        lam=0.3,
        top="all",
        epsilon=0.7,
    )
    np.testing.assert_allclose(got[name] - stored(base), stored(wanted), atol=1e-10)


def test_kernels_and_what_is_no_matrix() -> None:
    """Kernels are output × rest; embeddings and heads stay unless every matrix is asked for."""
    random = np.random.default_rng(6)
    shapes = {"blocks.0.conv.weight": (8, 3, 2, 2), "embed_tokens.weight": (11, 6),
              "lm_head.weight": (11, 6), "blocks.0.norm.weight": (6,), "gate": ()}  # fmt: skip
    base = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    update = {name: 6 * random.standard_normal(shape) for name, shape in shapes.items()}
    for kinds, looked in (("linear", 1), ("every", 3)):
        op = OPS["deintrude"](lam=0.1, top="all", epsilon=0.8, kinds=kinds)
        (got,) = apply(op, [update], base=base)
        changed = 0
        for name, shape in shapes.items():
            wanted = update[name]
            if len(shape) > 1 and (kinds == "every" or "conv" in name):
                flat = (each[name].reshape(shape[0], -1) for each in (base, update))
                wanted = removed(*flat, lam=0.1, top=None, epsilon=0.8)[0].reshape(shape)
                changed += 1
                assert abs(wanted - update[name]).max() > 1
            np.testing.assert_allclose(got[name], wanted, atol=1e-10)
        assert changed == looked


def test_each_model_by_itself() -> None:
    """Before models are combined every one is repaired against the same base."""
    random = np.random.default_rng(7)
    base = random.standard_normal((7, 7))
    several = [5 * random.standard_normal((7, 7)) for _ in range(3)]
    op = OPS["deintrude"](lam=0.1, epsilon=0.8)
    got = apply(op, [{"a.weight": each} for each in several], base={"a.weight": base})
    for each, update in zip(got, several, strict=True):
        wanted, directions = removed(base, update, lam=0.1, top=1, epsilon=0.8)
        assert len(directions) == 1
        np.testing.assert_allclose(each["a.weight"], wanted, atol=1e-10)


def test_equal_singular_values_are_scaled_together() -> None:
    """All of a plane may be removed, whatever its vectors are."""
    base = np.diag([3.0, 2.0, 1.0, 0, 0, 0])
    update = np.zeros((6, 6))
    update[4, 4] = update[5, 5] = 9.0
    got = removal(base, update, lam=0.0, top=None, epsilon=0.5)
    assert len(got.directions) == 2
    np.testing.assert_allclose(update + got.left @ got.right, np.zeros((6, 6)), atol=1e-12)
