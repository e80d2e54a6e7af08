"""The contracts of chains on arrays in memory: ``(method, case, parameters, …)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mergebench.merge.chains import tolerance_of
from mergebench.merge.method import METHODS

from .assertions import assert_close, assert_same_values, assert_within_ulps
from .promises import Params
from .support import F32, Arrays, Case, apply


def in_torch(tables: Sequence[Arrays]) -> list[dict[str, torch.Tensor]]:
    """Copies as torch tensors."""
    return [{name: torch.tensor(array) for name, array in each.items()} for each in tables]


def assert_torch_agrees(method: str, case: Case, params: Params) -> None:
    """The chain on torch tensors within one ulp of the chain on numpy arrays, or its tolerance."""
    chain = METHODS[method](**params)
    plain = apply(chain, case.task_vectors, case.weights, base=case.base)
    (base,) = in_torch([case.base])
    got = apply(chain, in_torch(case.task_vectors), case.weights, base=base)
    assert set(got) == set(plain)
    if tolerance := tolerance_of(chain):
        assert_close({name: tensor.numpy() for name, tensor in got.items()}, plain, tolerance)
        return
    for name, expected in plain.items():
        assert_within_ulps(got[name].numpy(), expected)


def assert_gradients(method: str, case: Case, params: Params, seed: int) -> None:
    """The derivative along a random direction is that of finite differences, in float64."""
    chain = METHODS[method](**params)
    random = np.random.default_rng(seed)
    inputs = in_torch(case.task_vectors)
    (base,) = in_torch([case.base])
    for each in inputs:
        for tensor in each.values():
            tensor.requires_grad_()
    ways, heights = (
        [{n: torch.tensor(random.normal(size=t.shape)) for n, t in each.items()} for each in inputs]
        for _ in range(2)
    )

    def loss(step: float) -> torch.Tensor:
        moved = [
            {n: tensor + step * way[n] for n, tensor in each.items()}
            for each, way in zip(inputs, ways, strict=True)
        ]
        out = apply(chain, moved, case.weights, base=base)
        return torch.stack([(heights[0][n.partition("@")[0]] * out[n]).sum() for n in out]).sum()

    loss(0.0).backward()
    slope = sum(
        float((tensor.grad * way[n]).sum())
        for each, way in zip(inputs, ways, strict=True)
        for n, tensor in each.items()
    )
    step = 1e-7
    with torch.no_grad():
        measured = float(loss(step) - loss(-step)) / (2 * step)
    assert abs(slope - measured) <= 1e-5 * (1 + abs(measured)), (slope, measured)


def assert_homogeneous(method: str, case: Case, params: Params, power: int) -> None:
    """2^power times the task vectors give exactly 2^power times the merged one."""
    chain, factor = METHODS[method](**params), 2.0**power
    plain = apply(chain, case.task_vectors, case.weights)

    def scaled(arrays: Mapping[str, np.ndarray]) -> Arrays:
        return {name: np.asarray(array * F32.type(factor)) for name, array in arrays.items()}

    moved = apply(chain, [scaled(tau) for tau in case.task_vectors], case.weights)
    assert_same_values(moved, scaled(plain))
