"""Spectral methods on matrices whose singular values can be read off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergebench import merge_models

from .support import merged

E1, E2, E3 = np.eye(3)


def assert_near(got: Any, expected: Any) -> None:
    """Within 1e-6 of each entry, of the same shape."""
    assert np.shape(got) == np.shape(expected)
    assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= 1e-6, (got, expected)


def test_tsv_adds_up_what_does_not_interfere() -> None:
    """2 e1 e1ᵀ and 3 e2 e3ᵀ share no direction: their sum, exactly."""
    one, other = 2 * np.outer(E1, E1), 3 * np.outer(E2, E3)
    for over in ("rank", "full"):
        assert_near(merged("tsv_merge", one, other, over=over), one + other)


def test_tsv_shares_equal_directions() -> None:
    """Two equal tasks of rank 1 and σ = 2 give σ = 2 in place, and nothing anywhere else."""
    tau = 2 * np.outer(E1, E2)
    assert_near(merged("tsv_merge", tau, tau), tau)
    assert_near(merged("tsv_merge", tau, tau, keep="all"), tau)
    assert_near(merged("tsv_merge", tau, tau, orthogonalize=False), 2 * tau)


def test_tsv_of_one_is_that_one() -> None:
    """A single task keeps all of its singular values."""
    tau = np.arange(12.0).reshape(3, 4)
    assert_near(merged("tsv_merge", tau), tau)


def test_tsv_keeps_the_leading_share_of_each() -> None:
    """Of diag(3, 1) and an orthogonal twin each keeps ⌊2 / 2⌋ = 1: σ = 1 goes."""
    one = np.diag([3.0, 1.0])
    other = np.array([[0.0, 1.0], [5.0, 0.0]])
    assert_near(merged("tsv_merge", np.diag([3.0, 1.0]), np.diag([1.0, 5.0])), np.diag([3.0, 5.0]))
    # e1 e1ᵀ and e2 e1ᵀ have one right vector between them: of each 1/√2 remains.
    assert_near(merged("tsv_merge", one, other), [[3 / 2**0.5, 0.0], [5 / 2**0.5, 0.0]])


def test_tsv_of_a_row_keeps_one_triplet() -> None:
    """A matrix of one row has one direction for two tasks; neither is dropped."""
    assert_near(merged("tsv_merge", [[3.0, 0.0]], [[0.0, 4.0]]), [[1.5 * 2**0.5, 2 * 2**0.5]])


def test_iso_c_levels_singular_values() -> None:
    """diag(4, 2) becomes diag(3, 3), whether one task has it all or two have parts."""
    assert_near(merged("iso_c", np.diag([4.0, 2.0])), np.diag([3.0, 3.0]))
    got = merged("iso_c", np.diag([4.0, 0.0]), np.diag([0.0, 2.0]), lam=1.5)
    assert_near(got, np.diag([4.5, 4.5]))


def test_iso_c_leaves_null_directions_alone() -> None:
    """Of rank 1 the mean is that of one singular value, or a third over the whole side."""
    tau = 6 * np.outer(E1, E3)
    assert_near(merged("iso_c", tau), tau)
    assert_near(merged("iso_c", tau, over="full"), tau / 3)


def test_iso_c_keeps_the_nuclear_norm() -> None:
    """The nuclear norm stays, and the Frobenius norm does not rise."""
    random = np.random.default_rng(2)
    for shape in ((5, 3), (1, 7), (4, 4)):
        tau = random.normal(size=shape)
        got = np.asarray(merged("iso_c", tau))
        assert np.linalg.norm(got, "nuc") == pytest.approx(np.linalg.norm(tau, "nuc"), rel=1e-6)
        assert np.linalg.norm(got) <= np.linalg.norm(tau) * (1 + 1e-6)


@pytest.mark.parametrize(("tasks", "common"), [(8, 616), (14, 614), (20, 608)])
def test_iso_cts_counts_common_directions(tasks: int, common: int) -> None:
    """Of r = 768 with k = 614: r - round((r - k) / N) N."""
    from mergebench.merge.ops.subspaces import shares

    found, each = shares(768, 0.8, tasks)
    assert found == common
    assert found + each * tasks == 768


def test_iso_cts_gives_tasks_their_own_directions() -> None:
    """Two common directions, 6 and 5, and one of each task, 2 and 1: all at their mean 3.5."""
    one, other = np.diag([3.0, 2.5, 2.0, 0.0]), np.diag([3.0, 2.5, 0.0, 1.0])
    assert_near(merged("iso_cts", one, other, common=0.5), 3.5 * np.eye(4))
    assert_near(merged("iso_cts", one, other, common=1.0), np.diag([3.5] * 4))


def test_svc_undoes_piling_up() -> None:
    """Two copies of diag(2, 1), summed, come back to diag(2, 1)."""
    tau = np.diag([2.0, 1.0])
    assert_near(merged("task_arithmetic", tau, tau, then=["svc"]), tau)


def test_svc_lets_opposed_values_grow_to_its_floor() -> None:
    """diag(2, 1) and diag(2, -1/2) with α = 0.1: s = 2, 2 and 0.5, 0.1, so diag(2, 5/3)."""
    vectors = np.diag([2.0, 1.0]), np.diag([2.0, -0.5])
    got = merged("task_arithmetic", *vectors, then=["svc:alpha=0.1"])
    assert_near(got, np.diag([2.0, 5.0 / 3.0]))
    # 1 / N = 0.5 by default: 0.5 · 2 / (0.5 + 0.5). With 1: 0.5 · 2 / (1 + 1).
    assert_near(merged("task_arithmetic", *vectors, then=["svc"]), np.diag([2.0, 1.0]))
    assert_near(merged("task_arithmetic", *vectors, then=["svc:alpha=1"]), np.diag([2.0, 0.5]))


def test_svc_leaves_out_tasks_without_a_say() -> None:
    """Where one task has nothing along a direction, the other alone calibrates it."""
    one, other = np.diag([2.0, 0.0]), np.diag([0.0, 3.0])
    got = merged("task_arithmetic", one, other, lam=2.0, then=["svc"])
    assert_near(got, one + other)


def test_cart_adds_leading_differences() -> None:
    """The mean, and of every difference to it the leading part."""
    one, other, third = np.diag([3.0, 0.0]), np.diag([0.0, 3.0]), np.zeros((2, 2))
    mean = np.eye(2)
    assert_near(merged("cart", one, other, third, lam=0.0), mean)
    assert_near(merged("cart", one, other, third, share=1.0, lam=0.7), mean)
    # diag(2, -1), diag(-1, 2) and diag(-1, -1): of the first two the 2 stays.
    assert_near(merged("cart", one, other, share=0.5, lam=1.0), np.diag([1.5, 1.5]))


def test_star_restores_the_nuclear_norm() -> None:
    """Of 4, 3, 2, 1 two reach more than 40 % of 10 (one is exactly 40 %, and enough)."""
    tau = np.diag([4.0, 3.0, 2.0, 1.0])
    assert_near(merged("star", tau), np.diag([10.0, 0.0, 0.0, 0.0]))
    assert_near(merged("star", tau, share=0.5), np.diag([40 / 7, 30 / 7, 0.0, 0.0]))
    assert_near(merged("star", tau, share=1.0), tau)


@pytest.mark.parametrize("method", ["knots_ties", "core_ties"])
def test_shared_bases_keep_what_does_not_meet(method: str) -> None:
    """Tasks with column and row spaces of their own lose nothing when nothing is trimmed."""
    one, other = 2 * np.outer(E1, E2), 5 * np.outer(E3, E1)
    assert_near(merged(method, one, other, density=1.0), one + other)
    assert_near(merged(method, one, one, density=1.0), one)
    assert_near(merged(method, one, one, density=1.0, divisor="none"), 2 * one)
    assert_near(merged(method, one, -one, density=1.0), 0 * one)


@pytest.mark.parametrize("seed", range(8))
def test_equal_coordinates_are_trimmed_alike(seed: int) -> None:
    """Of coordinates 7, 7, 3 and 3, -3, 0 the first 3 stays beside the sevens, whatever rounds."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.normal(size=(4, 4)))[0]
    rows = np.array([[7.0, 7.0, 3.0], [3.0, -3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    noise = 1e-12 * random.normal(size=(4, 3))
    models = [{"w": turn @ rows}, {"w": turn @ rows * 0.5 + noise}]
    base = {"w": np.zeros((4, 3))}
    got = merge_models(models, base=base, method="knots_ties", density=0.5)["w"]
    kept = np.where(np.arange(4)[:, None] == 0, rows, 0.0)
    assert_near(got, turn @ kept * 0.75)


def test_knots_dare_ties_without_chance() -> None:
    """At density 1 nothing is dropped; at any, zero and opposite updates leave nothing."""
    one, other = 2 * np.outer(E1, E2), 5 * np.outer(E2, E1)
    for density in (0.3, 1.0):
        got = merged("knots_dare_ties", 0 * one, 0 * one, density=density)
        assert np.array_equal(got, 0 * one)
    got = merged("knots_dare_ties", one, other, density=1.0)
    assert np.allclose(got, one + other, atol=1e-6)
    assert np.allclose(merged("knots_dare_ties", one, -one, density=1.0), 0, atol=1e-6)
    assert np.allclose(merged("knots_dare_ties", one, density=1.0), one)


def test_knots_dare_ties_rescales() -> None:
    """Of an update of rank 1 each coordinate is gone or twice as large, by the seed alone."""
    row = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    seen = set()
    for seed in range(6):
        got = np.asarray(merged("knots_dare_ties", row, density=0.5, seed=seed)) / row
        assert np.allclose(got * (got - 2.0), 0, atol=1e-5)
        seen.add(tuple(np.round(got[0])))
        again = np.asarray(merged("knots_dare_ties", row, density=0.5, seed=seed)) / row
        assert np.array_equal(again, got)
    assert len(seen) > 3


def test_truncation_after_a_merge() -> None:
    """``--then truncate:rank=1`` keeps the larger singular value."""
    got = merged("task_arithmetic", np.diag([2.0, 1.0]), then=["truncate:rank=1"])
    assert_near(got, np.diag([2.0, 0.0]))


def test_wudi_minimises_interference() -> None:
    """[1, 0] and [1, 1] give [1, 1] without any loss; tasks of other rows are added."""
    assert_near(merged("wudi", [[1.0, 0.0]], [[1.0, 1.0]], solver="exact"), [[1.0, 1.0]])
    one, other = 2 * np.outer(E1, E2), 5 * np.outer(E3, E1)
    assert_near(merged("wudi", one, other, solver="exact"), one + other)
    assert_near(merged("wudi", one, other), one + other)
    assert_near(merged("wudi", one, one, solver="exact"), one)
    # One step of Adam moves an entry by the rate, against its slope: [2, 1] towards [1, 1].
    got = merged("wudi", [[1.0, 0.0]], [[1.0, 1.0]], steps=1, rate=0.25)
    assert_near(got, [[1.75, 0.75]])


METHODS = ["wudi", "tsv_merge", "iso_c", "iso_cts", "cart", "star", "knots_ties", "core_ties"]


@pytest.mark.parametrize("method", METHODS)
def test_vectors_are_averaged(method: str) -> None:
    """What is no matrix is averaged; kernels too, unless they are taken as matrices."""
    assert_near(merged(method, [3.0, 0.0], [1.0, 5.0]), [2.0, 2.5])
    kernels = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 2)).astype(np.float32)
    assert_near(merged(method, *kernels), kernels.mean(axis=0))
    flat = [kernel.reshape(3, 8) for kernel in kernels]
    got = np.asarray(merged(method, *kernels, kernels="matrix"))
    assert_near(got.reshape(3, 8), merged(method, *flat))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 4), (1, 5), (5, 1), (2, 50)])
def test_nothing_merges_to_nothing(method: str, shape: tuple[int, int]) -> None:
    """Task vectors of zero leave the base, and a zero beside others harms none."""
    zero = np.zeros(shape)
    assert_near(merged(method, zero, zero), zero)
    tau = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    assert np.isfinite(merged(method, zero, tau)).all()
    assert_near(merged("task_arithmetic", zero, zero, then=["svc", "truncate:rank=1"]), zero)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "wudi"])
def test_matrices_of_any_scale(method: str) -> None:
    """Numbers near the ends of float32 are decomposed as those around 1 are."""
    random = np.random.default_rng(4)
    vectors = [random.normal(size=(3, 4)).astype(np.float32) for _ in range(2)]
    plain = merged(method, *vectors)
    for scale in (2.0**100, 2.0**-100):
        tables = [{"w": vector * np.float32(scale)} for vector in vectors]
        base = {"w": np.zeros((3, 4), np.float32)}
        assert_near(merge_models(tables, base=base, method=method)["w"] / scale, plain)
