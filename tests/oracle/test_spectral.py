"""Every spectral method and op against its equations in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mergebench import apply, merge_models
from mergebench.merge.op import OPS
from tests.oracle import spectral

# Derandomized: results hold where singular values and coordinates are apart.
CASES = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
SHAPES = {
    "b.weight": (6, 9),
    "a.weight": (7, 4),
    "wide.weight": (3, 40),
    "tall.weight": (33, 2),
    "row.weight": (1, 8),
    "column.weight": (5, 1),
    "conv.weight": (4, 3, 2, 2),
    "c.bias": (7,),
    "d.scale": (),
    "e.weight": (0, 3),
}
Arrays = dict[str, np.ndarray]
Merge = Callable[..., torch.Tensor]


def is_matrix(shape: tuple[int, ...], kernels: str) -> bool:
    """What spectral methods work on."""
    return 0 not in shape and (len(shape) == 2 or (len(shape) > 2 and kernels == "matrix"))


@st.composite
def task_vectors(draw: st.DrawFn, least: int = 1, dtype: Any = np.float64) -> list[Arrays]:
    """Random task vectors; some of low rank, some with one row space, some zero in one model."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(least, 4))
    kind = draw(st.sampled_from(["full", "low", "shared"]))
    shared = {
        name: random.normal(size=(2, prod(shape[1:])))
        for name, shape in SHAPES.items()
        if len(shape) > 1
    }
    found = []
    for _ in range(count):
        each = {}
        for name, shape in SHAPES.items():
            array = random.normal(size=shape)
            if kind != "full" and len(shape) > 1 and array.size:
                size = int(random.integers(1, 3))
                flat = array.reshape(shape[0], -1)
                right = random.normal(size=(size, flat.shape[1]))
                right = right if kind == "low" else shared[name][:size]
                array = (random.normal(size=(shape[0], size)) @ right).reshape(shape)
            each[name] = np.asarray(array * random.choice([0.1, 1.0, 3.0]), dtype)
        found.append(each)
    if count > 1 and draw(st.booleans()):
        found[0]["a.weight"] = np.zeros_like(found[0]["a.weight"])
    return found


def expected(
    taus: Sequence[Mapping[str, np.ndarray]],
    weights: Sequence[float],
    kernels: str,
    merge: Callable[[list[torch.Tensor]], torch.Tensor],
) -> Arrays:
    """``merge`` on the weighted matrices, the mean of everything else."""
    found = {}
    for name, shape in SHAPES.items():
        arrays = [
            w * torch.tensor(tau[name], dtype=torch.float64)
            for w, tau in zip(weights, taus, strict=True)
        ]
        if is_matrix(shape, kernels):
            merged = merge([array.reshape(shape[0], -1) for array in arrays]).reshape(shape)
        else:
            merged = sum(arrays, torch.zeros(shape, dtype=torch.float64)) / len(arrays)
        found[name] = merged.numpy()
    return found


def assert_close(
    got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], to: float
) -> None:
    """Every tensor within ``to`` of its largest entry."""
    assert set(got) == set(wanted)
    for name, exact in wanted.items():
        assert got[name].shape == exact.shape, name
        error = np.abs(got[name].astype(np.float64) - exact).max(initial=0.0)
        assert error <= to * np.abs(exact).max(initial=0.0) + 1e-300, (name, error, exact)


def merged(taus: list[Arrays], weights: Sequence[float], method: str, **params: Any) -> Any:
    """The merge into a base of zeros."""
    base = {name: np.zeros_like(array) for name, array in taus[0].items()}
    return merge_models(list(zip(taus, weights, strict=True)), base=base, method=method, **params)


def shares(data: st.DataObject, count: int) -> list[float]:
    """A weight per model."""
    each = st.sampled_from([1.0, 0.5, 2.0, -0.75])
    return data.draw(st.lists(each, min_size=count, max_size=count), label="weights")


KERNELS = st.sampled_from(["vector", "matrix"])
OVER = st.sampled_from(["rank", "full"])


@pytest.mark.parametrize(("keep", "orthogonalize"), list(product(["share", "all"], [True, False])))
@given(data=st.data())
@CASES
def test_tsv_merge(keep: str, orthogonalize: bool, data: st.DataObject) -> None:
    """Leading triplets with and without orthogonal vectors, for every share."""
    taus = data.draw(task_vectors())
    weights, kernels, over = shares(data, len(taus)), data.draw(KERNELS), data.draw(OVER)
    params = {"keep": keep, "orthogonalize": orthogonalize, "over": over}
    got = merged(taus, weights, "tsv_merge", kernels=kernels, **params)
    wanted = expected(taus, weights, kernels, lambda ms: spectral.tsv_merge(ms, **params))
    assert_close(got, wanted, 1e-6)


@given(data=st.data())
@CASES
def test_iso_c(data: st.DataObject) -> None:
    """All singular values of the sum at their mean, none made up."""
    taus = data.draw(task_vectors())
    weights, kernels, over = shares(data, len(taus)), data.draw(KERNELS), data.draw(OVER)
    got = merged(taus, weights, "iso_c", kernels=kernels, over=over, lam=1.5)
    wanted = expected(taus, weights, kernels, lambda ms: 1.5 * spectral.iso_c(ms, over))
    wanted = {
        name: array if is_matrix(SHAPES[name], kernels) else 1.5 * array
        for name, array in wanted.items()
    }
    assert_close(got, wanted, 1e-6)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
@given(data=st.data())
@CASES
def test_iso_cts(common: float, data: st.DataObject) -> None:
    """Common and task directions, counted as the authors' code counts them."""
    taus = data.draw(task_vectors())
    weights, kernels, over = shares(data, len(taus)), data.draw(KERNELS), data.draw(OVER)
    got = merged(taus, weights, "iso_cts", kernels=kernels, over=over, common=common)
    wanted = expected(taus, weights, kernels, lambda ms: spectral.iso_cts(ms, common, over))
    assert_close(got, wanted, 1e-6)


@given(data=st.data())
@CASES
def test_cart(data: st.DataObject) -> None:
    """The mean and the leading differences to it."""
    taus = data.draw(task_vectors())
    weights, kernels, over = shares(data, len(taus)), data.draw(KERNELS), data.draw(OVER)
    params: dict[str, Any] = {"share": data.draw(st.sampled_from([0.08, 0.5, 1.0])), "over": over}
    params["lam"] = data.draw(st.sampled_from([1.0, 0.3, 0.0]))
    got = merged(taus, weights, "cart", kernels=kernels, **params)
    wanted = expected(taus, weights, kernels, lambda ms: spectral.cart(ms, **params))
    assert_close(got, wanted, 1e-7)


@given(data=st.data())
@CASES
def test_star(data: st.DataObject) -> None:
    """The fewest singular values that reach the share, scaled to the nuclear norm."""
    taus = data.draw(task_vectors())
    weights, kernels = shares(data, len(taus)), data.draw(KERNELS)
    share = data.draw(st.sampled_from([0.1, 0.4, 0.9, 1.0]))
    got = merged(taus, weights, "star", kernels=kernels, share=share)

    def mean(matrices: list[torch.Tensor]) -> torch.Tensor:
        cut = [spectral.star(matrix, share) for matrix in matrices]
        return sum(cut, torch.zeros_like(cut[0])) / len(cut)

    assert_close(got, expected(taus, weights, kernels, mean), 1e-7)


@pytest.mark.parametrize("method", ["knots_ties", "core_ties"])
@given(data=st.data())
@CASES
def test_ties_in_a_shared_basis(method: str, data: st.DataObject) -> None:
    """Coordinates in the shared basis, trimmed, elected and combined."""
    taus = data.draw(task_vectors(least=2))
    weights, kernels = shares(data, len(taus)), data.draw(KERNELS)
    params: dict[str, Any] = {"density": data.draw(st.sampled_from([0.2, 0.5, 1.0]))}
    params["divisor"] = data.draw(st.sampled_from(["count", "none"]))
    merge: Merge = getattr(spectral, method)
    got = merged(taus, weights, method, kernels=kernels, **params)
    wanted = expected(taus, weights, kernels, lambda ms: ms[0])
    for name, shape in SHAPES.items():
        if is_matrix(shape, kernels):
            plain = [torch.tensor(tau[name]).reshape(shape[0], -1) for tau in taus]
            wanted[name] = merge(plain, weights, **params).reshape(shape).numpy()
    assert_close(got, wanted, 1e-6)


@pytest.mark.parametrize("before", ["task_arithmetic", "ties", "tsv_merge"])
@given(data=st.data())
@CASES
def test_svc_after_any_method(before: str, data: st.DataObject) -> None:
    """Calibration of what a method gave, against the task vectors that it got."""
    taus = data.draw(task_vectors())
    weights = shares(data, len(taus))
    alpha = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    plain = merged(taus, weights, before)
    got = merged(taus, weights, before, then=[f"svc:alpha={alpha},kernels=matrix"])
    for name, shape in SHAPES.items():
        if is_matrix(shape, "matrix"):
            own = [torch.tensor(tau[name]).reshape(shape[0], -1) for tau in taus]
            result = torch.tensor(plain[name]).reshape(shape[0], -1)
            plain[name] = spectral.svc(result, own, alpha).reshape(shape).numpy()
    assert_close(got, plain, 1e-6)


@given(data=st.data())
@CASES
def test_truncate(data: st.DataObject) -> None:
    """The leading singular triplets of each matrix; rank 0 leaves nothing."""
    taus = data.draw(task_vectors())
    size = data.draw(st.integers(0, 5))
    for tau, got in zip(taus, apply(OPS["truncate"](size), taus), strict=True):
        wanted = dict(tau)
        for name, shape in SHAPES.items():
            if is_matrix(shape, "matrix"):
                matrix = torch.tensor(tau[name]).reshape(shape[0], -1)
                wanted[name] = spectral.truncate(matrix, size).reshape(shape).numpy()
        assert_close(got, wanted, 1e-9)


@given(data=st.data())
@CASES
def test_wudi(data: st.DataObject) -> None:
    """Adam as torch does it, and the minimum in closed form."""
    taus = data.draw(task_vectors())
    weights, kernels = shares(data, len(taus)), data.draw(KERNELS)
    rate, steps = data.draw(st.sampled_from([1e-5, 1e-2])), data.draw(st.sampled_from([1, 30]))
    got = merged(taus, weights, "wudi", kernels=kernels, steps=steps, rate=rate)
    wanted = expected(taus, weights, kernels, lambda ms: spectral.wudi_steps(ms, steps, rate))
    assert_close(got, wanted, 1e-7)
    got = merged(taus, weights, "wudi", kernels=kernels, solver="exact")
    assert_close(got, expected(taus, weights, kernels, spectral.wudi_exact), 1e-6)


def test_wudi_converges_to_its_closed_form() -> None:
    """A long descent ends where the closed form says, and nothing near it has a lower loss."""
    random = np.random.default_rng(6)
    taus = [{"w": random.normal(size=(3, 5))} for _ in range(3)]
    exact = merged(taus, (1.0,) * 3, "wudi", solver="exact")
    ended = merged(taus, (1.0,) * 3, "wudi", steps=20000, rate=2e-3)
    assert_close(ended, exact, 1e-4)
    matrices = [torch.tensor(tau["w"]) for tau in taus]
    least = float(spectral.wudi_loss(torch.tensor(exact["w"]), matrices))
    for _ in range(20):
        near = torch.tensor(exact["w"] + 1e-3 * random.normal(size=(3, 5)))
        assert float(spectral.wudi_loss(near, matrices)) >= least


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("wudi", {}),
        ("wudi", {"solver": "exact"}),
        ("tsv_merge", {}),
        ("iso_c", {}),
        ("iso_cts", {"common": 0.5}),
        ("cart", {"share": 0.5}),
        ("star", {}),
        ("knots_ties", {"density": 0.5}),
        ("core_ties", {"density": 0.5}),
    ],
)
def test_float32_in_is_float64_within(method: str, params: dict[str, Any]) -> None:
    """float32 models are decomposed in float64: the result is that of float64, but for rounding."""
    random = np.random.default_rng(5)
    taus = [
        {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(3)
    ]
    wide = [{name: array.astype(np.float64) for name, array in tau.items()} for tau in taus]
    got = merged(taus, (1.0,) * 3, method, **params)
    assert {array.dtype for array in got.values()} == {np.dtype(np.float32)}
    exact = merged(wide, (1.0,) * 3, method, **params)
    # Of a chain of several ops every one rounds to float32.
    assert_close(got, exact, 4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("method", ["tsv_merge", "iso_c", "iso_cts", "cart", "star", "core_ties"])
@given(data=st.data())
@CASES
def test_signs_of_singular_vectors_are_immaterial(method: str, data: st.DataObject) -> None:
    """Reflections and permutations of rows and columns pass through, whatever LAPACK's signs."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    taus = [{"w": random.normal(size=(6, 5))} for _ in range(3)]
    rows, columns = (
        np.eye(size)[random.permutation(size)] * random.choice([-1.0, 1.0], size) for size in (6, 5)
    )
    turned = [{"w": rows @ tau["w"] @ columns} for tau in taus]
    params = {"density": 0.5} if method == "core_ties" else {}
    plain = merged(taus, (1.0,) * 3, method, **params)
    got = merged(turned, (1.0,) * 3, method, **params)
    assert_close(got, {"w": rows @ plain["w"] @ columns}, 1e-7)


def test_left_and_right_are_told_apart() -> None:
    """In weights stored input × output the left singular vectors are those of the output side."""
    from mergebench.core.site import make_sites
    from mergebench.merge.at import At

    random = np.random.default_rng(0)
    for name, params in (
        ("svc", {}),
        ("knots", {"density": 0.4}),
        ("subspaces", {"common": 0.4}),
    ):
        op = OPS[name](**params)
        stack = random.normal(size=(3, 6, 4))
        plain = make_sites({"w": (6, 4)})["w"]
        flipped = make_sites({"w": (4, 6)}, transposed=["w"])["w"]
        first = stack if op.spec.reduces else stack.sum(axis=0, keepdims=True)

        def run(site: Any, arrays: np.ndarray, models: np.ndarray) -> np.ndarray:
            at = At(site, 0, 24, (1.0,) * 3, models=models.reshape(3, -1))
            out = op.apply(arrays.reshape(len(arrays), -1), at)  # noqa: B023
            return np.asarray(out).reshape(site.shape)

        upright = run(plain, first, stack)
        turned = run(flipped, first.transpose(0, 2, 1), stack.transpose(0, 2, 1))
        assert np.allclose(turned.T, upright, rtol=0, atol=1e-12), name
        # Taking the wrong side would show.
        swapped = make_sites({"w": (4, 6)})["w"]
        other = run(swapped, first.transpose(0, 2, 1), stack.transpose(0, 2, 1))
        assert not np.allclose(other.T, upright, rtol=0, atol=1e-3), name
