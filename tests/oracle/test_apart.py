"""Every method with one result per task against its equations in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mergebench import merge_models
from tests.oracle import apart, methods

#: Derandomized: results hold where sums, singular values and similarities are apart.
CASES = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
SHAPES = {
    "m.layers.1.attn.q.weight": (6, 9),
    "m.layers.1.attn.k.weight": (7, 4),
    "m.layers.0.mlp.up.weight": (3, 20),
    "m.layers.0.mlp.bias": (5,),
    "m.layers.0.norm.weight": (8,),
    "m.layers.10.conv.weight": (4, 3, 2, 2),
    "m.embed.weight": (9, 2),
    "scale": (),
    "m.empty.weight": (0, 3),
}
PARTS = {
    "m.layers.1.attn": ["m.layers.1.attn.q.weight", "m.layers.1.attn.k.weight"],
    "m.layers.0.mlp": ["m.layers.0.mlp.up.weight", "m.layers.0.mlp.bias"],
    "m.layers.0.norm": ["m.layers.0.norm.weight"],
    "m.layers.10.conv": ["m.layers.10.conv.weight"],
    "m.embed": ["m.embed.weight"],
    "scale": ["scale"],
}
LAYERS = {
    "m.layers.0": [*PARTS["m.layers.0.mlp"], *PARTS["m.layers.0.norm"]],
    "m.layers.1": PARTS["m.layers.1.attn"],
    "m.layers.10": PARTS["m.layers.10.conv"],
    "m.embed": ["m.embed.weight"],
    "scale": ["scale"],
}
BLOCKS = {
    "part": PARTS,
    "layer": LAYERS,
    "tensor": {name: [name] for name in SHAPES if name != "m.empty.weight"},
}
KERNELS = st.sampled_from(["vector", "matrix"])
Arrays = dict[str, np.ndarray]


#: Without what makes similarities equal: single entries and zeros.
GENERIC = ("plain", "near", "against")


@st.composite
def task_vectors(
    draw: st.DrawFn, kinds: Sequence[str] = (*GENERIC, "sparse", "zero")
) -> list[Arrays]:
    """One to five; some with zeros, some tasks that point the same or the opposite way."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    found: list[Arrays] = []
    for _ in range(draw(st.integers(1, 5))):
        tau = {name: np.asarray(random.normal(size=shape)) for name, shape in SHAPES.items()}
        kind = draw(st.sampled_from(kinds))
        if kind == "sparse":
            tau = {n: array * (random.random(array.shape) < 0.4) for n, array in tau.items()}
        if kind in ("near", "against") and found:
            way = 1.5 if kind == "near" else -1.0
            tau = {n: way * found[0][n] + 0.1 * array for n, array in tau.items()}
        if kind == "zero":
            tau = {n: np.asarray(array * (n != "m.embed.weight")) for n, array in tau.items()}
        found.append({n: np.asarray(array) for n, array in tau.items()})
    return found


def generic() -> st.SearchStrategy[list[Arrays]]:
    """Task vectors whose similarities differ."""
    return task_vectors(GENERIC)


def weights_of(data: st.DataObject, count: int) -> list[float]:
    """A weight per task."""
    each = st.sampled_from([1.0, 0.5, 2.0, -0.75])
    return data.draw(st.lists(each, min_size=count, max_size=count), label="weights")


def weighted(taus: Sequence[Arrays], weights: Sequence[float]) -> list[Arrays]:
    """Every task vector times its weight."""
    return [
        {name: np.asarray(weight * array) for name, array in tau.items()}
        for weight, tau in zip(weights, taus, strict=True)
    ]


def merged(taus: Sequence[Arrays], weights: Sequence[float], method: str, **params: Any) -> Any:
    """The results of a merge into a base of zeros."""
    base = {name: np.zeros_like(array) for name, array in taus[0].items()}
    return merge_models(list(zip(taus, weights, strict=True)), base=base, method=method, **params)


def assert_each(
    got: Sequence[Mapping[str, np.ndarray]],
    wanted: Sequence[Mapping[str, np.ndarray]],
    within: float = 1e-12,
) -> None:
    """Every tensor of every result within a share of the largest entry."""
    assert len(got) == len(wanted)
    for place, (one, exact) in enumerate(zip(got, wanted, strict=True)):
        assert set(one) == set(exact)
        for name, array in exact.items():
            assert one[name].dtype == np.float64
            assert one[name].shape == array.shape, name
            error = np.abs(one[name] - array).max(initial=0.0)
            bound = within * np.abs(array).max(initial=0.0) + 1e-14
            assert error <= bound, (place, name, error, array)


@pytest.mark.parametrize("over", ["entries", "tensors"])
@given(data=st.data())
@CASES
def test_emr(over: str, data: st.DataObject) -> None:
    """One elected vector, masks, and scales over entries or tensors."""
    taus = data.draw(task_vectors())
    weights, lam = weights_of(data, len(taus)), data.draw(st.sampled_from([1.0, 0.7, -2.0]))
    wanted = weighted(apart.emr(weighted(taus, weights), over), [lam] * len(taus))
    assert_each(merged(taus, weights, "emr", over=over, lam=lam), wanted)


@given(data=st.data())
@CASES
def test_tall_masks(data: st.DataObject) -> None:
    """Weights enter what is masked, and not what it is compared with."""
    taus = data.draw(task_vectors())
    weights, mask_lam = weights_of(data, len(taus)), data.draw(st.sampled_from([0.0, 0.2, 0.6, 3]))
    got = merged(taus, weights, "tall_masks", mask_lam=mask_lam, lam=0.5)
    found = apart.tall_masks(taus, weights, mask_lam)
    assert_each(got, weighted(found, [0.5] * len(taus)))


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 0.5, 1.0])
@given(data=st.data())
@CASES
def test_tsv_compress(share: float | None, data: st.DataObject) -> None:
    """Leading singular triplets of every task, for every share."""
    taus = data.draw(task_vectors())
    weights, kernels = weights_of(data, len(taus)), data.draw(KERNELS)
    asked = "tasks" if share is None else str(share)
    got = merged(taus, weights, "tsv_compress", share=asked, kernels=kernels)
    assert_each(got, apart.tsv_compress(weighted(taus, weights), share, kernels), 1e-9)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
@given(data=st.data())
@CASES
def test_twin_merging(density: float, data: st.DataObject) -> None:
    """A shared part and what is left at a low rank; combined by weights that sum to one."""
    taus = data.draw(task_vectors())
    weights, kernels = weights_of(data, len(taus)), data.draw(KERNELS)
    how = {"density": density, "lam": 0.3, "kernels": kernels}
    got = merged(taus, weights, "twin_merging", **how)
    assert_each(got, apart.twin(weighted(taus, weights), **how), 1e-8)
    if (total := sum(weights)) != 0:
        one = merged(taus, weights, "twin_merging", experts="combined", **how)
        twins = apart.twin(taus, **how)
        wanted = {
            name: np.asarray(
                sum(w / total * twin[name] for w, twin in zip(weights, twins, strict=True))
            )
            for name in SHAPES
        }
        largest = {n: max(np.abs(twin[n]).max(initial=0) for twin in twins) for n in SHAPES}
        for name, array in wanted.items():
            most = sum(map(abs, weights)) / abs(total)
            assert np.all(np.abs(one[name] - array) <= 1e-8 * most * (largest[name] + 1e-6)), name


@pytest.mark.parametrize("linkage", ["complete", "average", "single"])
@pytest.mark.parametrize("blocks", ["part", "layer", "tensor"])
@given(data=st.data())
@CASES
def test_flexmerge(blocks: str, linkage: str, data: st.DataObject) -> None:
    """Groups by similarity over all blocks, down to a size; shared by either merger."""
    taus = [{**tau, "scale": tau["m.layers.0.norm.weight"][:3]} for tau in data.draw(generic())]
    weights = weights_of(data, len(taus))
    merger, lam = data.draw(st.sampled_from(["average", "ties"])), 0.7
    size = data.draw(st.sampled_from([1.0, 1.3, 2.0, 2.7, 3.5, 5.0]))
    density = data.draw(st.sampled_from([1.0, 0.5, 0.1]))
    scaled = weighted(taus, weights)
    masks = methods.ties_mask(
        {name: [tau[name] for tau in scaled] for name in SHAPES}, density, "model", "exact"
    )
    names = sorted(SHAPES, key=str.encode)
    trimmed = [
        apart.like(np.where(mask, apart.flat(tau, names), 0.0), {name: tau[name] for name in names})
        for mask, tau in zip(masks, scaled, strict=True)
    ]
    how = {"size": size, "merger": merger, "lam": lam, "linkage": linkage}
    got = merged(taus, weights, "flexmerge", blocks=blocks, density=density, **how)
    assert_each(got, apart.flexmerge(scaled, trimmed, BLOCKS[blocks], **how))


@given(data=st.data())
@CASES
def test_flexmerge_takes_no_more_than_its_size(data: st.DataObject) -> None:
    """Counting what differs between the results, and it ends within a block of the size."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = data.draw(st.integers(2, 6))
    taus = [{n: np.asarray(random.normal(size=s)) for n, s in SHAPES.items()} for _ in range(count)]
    size = data.draw(st.integers(4, 4 * count)) / 4
    found = merged(taus, [1.0] * count, "flexmerge", size=size)
    one = sum(tau.size for tau in taus[0].values())
    stored = 0
    for names in PARTS.values():
        kinds = {b"".join(each[name].tobytes() for name in names) for each in found}
        stored += len(kinds) * sum(taus[0][name].size for name in names)
    largest = max(sum(taus[0][name].size for name in names) for names in PARTS.values())
    assert stored <= size * one
    assert stored > size * one - largest or stored == count * one


def test_errors_fall_with_the_rank() -> None:
    """Of Twin-Merging and of TSV-Compress, monotonically, to nothing (Eckart-Young)."""
    random = np.random.default_rng(3)
    taus = [{"w": random.normal(size=(10, 12))} for _ in range(3)]
    for method, name in (("twin_merging", "density"), ("tsv_compress", "share")):
        errors = []
        for share in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            value = share if name == "density" else str(share)
            found = merged(taus, [1.0] * 3, method, **{name: value})
            errors.append(
                sum(
                    float(np.linalg.norm(f["w"] - t["w"])) for f, t in zip(found, taus, strict=True)
                )
            )
        assert all(before > after for before, after in pairwise(errors))
        assert errors[-1] <= 1e-12
