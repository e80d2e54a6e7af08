"""Orthogonal adaptation after training, and what is reported of it, against their equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergebench import apply
from mergebench.core.site import make_sites
from mergebench.merge.at import At
from mergebench.merge.op import OPS
from tests.oracle import orthogonal
from tests.oracle.test_spectral import (
    CASES,
    KERNELS,
    SHAPES,
    Arrays,
    assert_close,
    is_matrix,
    merged,
    shares,
    task_vectors,
)

PROJECTED: dict[str, Callable[..., list[torch.Tensor]]] = {
    "sequential": orthogonal.sequential,
    "joint": orthogonal.joint,
}
ENERGY = st.sampled_from([1.0, 1.0, 0.9, 0.5])


def matrices(taus: Sequence[Arrays], weights: Sequence[float], name: str) -> list[torch.Tensor]:
    """The weighted task vectors of one tensor as matrices."""
    shape = SHAPES[name]
    return [
        w * torch.tensor(tau[name], dtype=torch.float64).reshape(shape[0], -1)
        for w, tau in zip(weights, taus, strict=True)
    ]


@pytest.mark.parametrize("variant", PROJECTED)
@given(data=st.data())
@CASES
def test_projected_sums(variant: str, data: st.DataObject) -> None:
    """Projected task vectors add up; what is no matrix adds up as it is."""
    taus = data.draw(task_vectors())
    weights, kernels = shares(data, len(taus)), data.draw(KERNELS)
    energy = data.draw(ENERGY)
    params = {"variant": variant, "claim": energy, "kernels": kernels}
    got = merged(taus, weights, "orthogonal", **params)
    wanted = {}
    for name, shape in SHAPES.items():
        arrays = [w * tau[name] for w, tau in zip(weights, taus, strict=True)]
        total = sum(arrays, np.zeros(shape))
        if is_matrix(shape, kernels) and len(taus) > 1:
            made = PROJECTED[variant](matrices(taus, weights, name), energy)
            total = sum(made, torch.zeros_like(made[0])).reshape(shape).numpy()
        wanted[name] = np.asarray(total)
    assert_close(got, wanted, 1e-6)


@given(data=st.data())
@CASES
def test_projection_ends_crosstalk_and_is_idempotent(data: st.DataObject) -> None:
    """Row spaces projected in turn are orthogonal, lose nothing more, and never gain."""
    taus = data.draw(task_vectors(least=2))
    once = apply(OPS["project_rows"](), taus)
    again = apply(OPS["project_rows"](), once)
    for before, after, twice in zip(taus, once, again, strict=True):
        assert_close(twice, after, 1e-9)
        for name in SHAPES:
            assert np.linalg.norm(after[name]) <= np.linalg.norm(before[name]) * (1 + 1e-12)
    ones = (1.0,) * len(taus)
    for name in ("a.weight", "b.weight", "conv.weight", "wide.weight"):
        for one, other in combinations(matrices(once, ones, name), 2):
            assert orthogonal.crosstalk(one, other) < 1e-9


def reported(name: str, taus: Sequence[Arrays], tensor: str, **params: Any) -> dict[Any, float]:
    """What an op reports of one tensor, by words and models."""
    op = OPS[name](**params)
    site = make_sites(SHAPES)[tensor]
    at = At(site, 0, site.size, (1.0,) * len(taus))
    stack = np.stack([np.asarray(tau[tensor]).reshape(-1) for tau in taus])
    assert op.spec.report is not None
    readings = op.spec.report(stack, op.apply(stack, at), at, **dict(op.params))
    return {(one.what, *one.models): one.value for one in readings}


@given(data=st.data())
@CASES
def test_crosstalk_reports(data: st.DataObject) -> None:
    """Crosstalk, overlap, smallest angle and cosine of every pair are those of projectors."""
    taus = data.draw(task_vectors(least=2))
    name = data.draw(st.sampled_from(["a.weight", "b.weight", "conv.weight", "wide.weight"]))
    got = reported("crosstalk", taus, name)
    each = matrices(taus, (1.0,) * len(taus), name)
    wanted = {}
    for i, j in combinations(range(len(taus)), 2):
        one, other = each[i], each[j]
        length = float(one.norm() * other.norm())
        wanted["crosstalk", i, j] = orthogonal.crosstalk(one, other)
        wanted["overlap of row spaces", i, j] = orthogonal.overlap(one, other)
        wanted["smallest angle", i, j] = orthogonal.smallest_angle(one, other)
        wanted["cosine", i, j] = float((one * other).sum()) / length if length else 0.0
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        # A cosine near 1 settles its angle to the root of a rounding.
        assert got[key] == pytest.approx(value, abs=1e-4 if key[0] == "smallest angle" else 1e-9)


@pytest.mark.parametrize("variant", PROJECTED)
@given(data=st.data())
@CASES
def test_projection_reports(variant: str, data: st.DataObject) -> None:
    """Retained energy of every model and crosstalk of every pair, before and after."""
    taus = data.draw(task_vectors(least=2))
    name = data.draw(st.sampled_from(["a.weight", "b.weight", "conv.weight", "wide.weight"]))
    energy = data.draw(ENERGY)
    got = reported("project_rows", taus, name, variant=variant, claim=energy)
    old = matrices(taus, (1.0,) * len(taus), name)
    new = PROJECTED[variant](old, energy)
    wanted: dict[Any, float] = {}
    for i, (before, after) in enumerate(zip(old, new, strict=True)):
        length = float(before.square().sum())
        wanted["retained energy", i] = float(after.square().sum()) / length if length else 1.0
    for i, j in combinations(range(len(taus)), 2):
        wanted["crosstalk before", i, j] = orthogonal.crosstalk(old[i], old[j])
        # Between nothing and something there is none, whatever rounding has left.
        gone = min(wanted["retained energy", i], wanted["retained energy", j]) < 1e-12
        wanted["crosstalk after", i, j] = 0.0 if gone else orthogonal.crosstalk(new[i], new[j])
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, abs=1e-6)
    assert all(value <= 1 for value in got.values())


@pytest.mark.parametrize("op", ["crosstalk", "project_rows"])
@pytest.mark.parametrize("tensor", ["c.bias", "d.scale", "e.weight"])
def test_nothing_is_reported_of_what_is_no_matrix(op: str, tensor: str) -> None:
    """Vectors, scalars and empty matrices have no row spaces."""
    taus = [{name: np.ones(shape) for name, shape in SHAPES.items()}] * 2
    assert reported(op, taus, tensor) == {}
    assert reported(op, taus, "conv.weight", kernels="vector") == {}
