"""Decompositions against torch, intruders against PEFT and power laws against WeightWatcher."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.numpy import load_file

from mergebench.compute.decomposition import decompose, decompose_product, singular_values
from mergebench.compute.intruders import intruders
from mergebench.spectral.measures import power_law
from tests.helpers.adapters import save_peft
from tests.helpers.files import write
from tests.helpers.running import assert_done, call
from tests.parity.record_weightwatcher import RECORDED
from tests.parity.spectra import eigenvalues

SHAPES = [(24, 24), (40, 17), (17, 40), (1, 9), (9, 1), (64, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_decompositions_are_those_of_torch(shape: tuple[int, int]) -> None:
    """Singular values, and vectors up to their signs."""
    matrix = np.random.default_rng(sum(shape)).standard_normal(shape)
    U, S, Vh = (each.numpy() for each in torch.linalg.svd(torch.from_numpy(matrix), False))

    found = decompose(matrix, np.float64)

    np.testing.assert_allclose(found.S, S, rtol=1e-12)
    np.testing.assert_allclose(singular_values(matrix), S, rtol=1e-12)
    np.testing.assert_allclose(abs((found.U * U).sum(axis=0)), 1.0, atol=1e-9)
    np.testing.assert_allclose(abs((found.Vt * Vh).sum(axis=1)), 1.0, atol=1e-9)
    np.testing.assert_allclose((found.U * found.S) @ found.Vt, matrix, atol=1e-12)
    assert (found.U[abs(found.U).argmax(axis=0), np.arange(len(S))] > 0).all()
    assert decompose(matrix).U.dtype == np.float32


@pytest.mark.parametrize(("rows", "columns", "rank"), [(30, 20, 4), (5, 40, 5), (6, 6, 1)])
def test_products_are_decomposed_like_their_matrix(rows: int, columns: int, rank: int) -> None:
    """Two thin QR decompositions give what torch makes of the whole product."""
    random = np.random.default_rng(rank)
    left, right = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
    S = torch.linalg.svdvals(torch.from_numpy(left @ right)).numpy()

    found = decompose_product(left, right)

    assert len(found.S) == min(rank, rows, columns)
    assert found.rank == rank
    np.testing.assert_allclose(found.S, S[: len(found.S)], rtol=1e-12)
    np.testing.assert_allclose((found.U * found.S) @ found.Vt, left @ right, atol=1e-12)


class Layers(torch.nn.Module):
    """Three linear layers of different shapes."""

    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for weight in weights:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = torch.from_numpy(weight).float()
            self.layers.append(layer)

    def forward(self, x: Any) -> Any:
        return x


def peft_counts(
    weights: list[np.ndarray], factors: list[tuple[Any, Any]], **params: Any
) -> list[int]:
    """How many intruders PEFT finds in each layer."""
    rank = factors[0][0].shape[1]
    names = [f"layers.{number}" for number in range(len(weights))]
    model = get_peft_model(
        Layers(weights), LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    )
    for name, module in model.named_modules():
        for number, (B, A) in enumerate(factors):
            if name.endswith(f"layers.{number}"):
                module.lora_B["default"].weight.data = torch.from_numpy(B).float()
                module.lora_A["default"].weight.data = torch.from_numpy(A).float()
    said: list[str] = []
    reduce_intruder_dimension(model, logging_sink=said.append, **params)
    counts = []
    for number in range(len(weights)):
        (line,) = [text for text in said if re.search(rf"layers\.{number}: ", text)]
        found = re.search(r"Intruders: (\d+)", line)
        counts.append(int(found[1]) if found else 0)
    return counts


@pytest.mark.parametrize("epsilon", [0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_counts_are_those_of_peft(epsilon: float, k: int) -> None:
    """Adapters that plant directions of different sizes, over matrices of full rank."""
    random = np.random.default_rng(5)
    shapes = [(48, 32), (32, 48), (40, 40)]
    weights = [random.standard_normal(shape) for shape in shapes]
    factors = [
        (2.0 * random.standard_normal((n, 3)), random.standard_normal((3, m)) / m**0.5)
        for n, m in shapes
    ]

    ours = [
        intruders(
            weight.astype(np.float32),
            factors=(B.astype(np.float32), A.astype(np.float32)),
            k=k,
            epsilons=(epsilon,),
        ).count(epsilon)
        for weight, (B, A) in zip(weights, factors, strict=True)
    ]

    assert ours == peft_counts(weights, factors, top_k=k, threshold_epsilon=epsilon)
    if epsilon == 0.5 and k == 10:
        assert sum(ours) > 0


@pytest.mark.parametrize("lam", [0.75, 0.2])
def test_repaired_adapters_are_those_of_peft(lam: float, tmp_path: Path) -> None:
    """All intruders scaled, and the update truncated to the rank that it had."""
    random = np.random.default_rng(5)
    shapes = [(48, 32), (32, 48), (40, 40)]
    weights = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    factors = {
        f"layers.{number}": (
            2 * random.standard_normal((n, 3)).astype(np.float32),
            (random.standard_normal((3, m)) / m**0.5).astype(np.float32),
        )
        for number, (n, m) in enumerate(shapes)
    }
    save_peft(tmp_path / "lora", factors, alpha=3.0)
    names = [f"layers.{number}.weight" for number in range(3)]
    write(tmp_path / "base.safetensors", dict(zip(names, weights, strict=True)))
    words = ("--lam", lam, "--top", "all", "--rank", 3, "-o", "out", "--json")
    ran = call("edit", "deintrude", "lora", "-b", "base.safetensors", *words, cwd=tmp_path)
    assert assert_done(ran).json["outputs"][0]["totals"]["scaled"] > 3

    config = LoraConfig(r=3, lora_alpha=3, target_modules=list(factors))
    model = get_peft_model(Layers(weights), config)
    for name, module in model.named_modules():
        for key, (B, A) in factors.items():
            if name.endswith(key):
                module.lora_B["default"].weight.data = torch.from_numpy(B)
                module.lora_A["default"].weight.data = torch.from_numpy(A)
    reduce_intruder_dimension(model, mitigation_lambda=lam, logging_sink=lambda text: None)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, module in model.named_modules():
        for key, (B, A) in factors.items():
            if not name.endswith(key):
                continue
            theirs = module.get_delta_weight("intruder_reduced").detach().numpy()
            down, up = (ours[f"base_model.model.{key}.lora_{side}.weight"] for side in "AB")
            np.testing.assert_allclose(up @ down, theirs, atol=1e-4)
            assert abs(theirs - B @ A).max() > 0.1


def test_where_peft_differs() -> None:
    """PEFT compares with directions that a base of low rank does not have, whatever LAPACK put.

    The base has the directions e1 and e2 of eight; the update adds e3. PEFT's vectors of singular
    value 0 happen to hold e3, so it sees nothing new; here only directions of the base count.
    """
    base = np.diag([3.0, 2.0, 0, 0, 0, 0, 0, 0])
    B, A = np.zeros((8, 1)), np.zeros((1, 8))
    B[2, 0], A[0, 2] = 5.0, 1.0

    assert intruders(base, factors=(B, A), k=1).count(0.5) == 1
    assert peft_counts([base], [(B, A)], top_k=1) == [0]


@pytest.mark.parametrize("name", sorted(eigenvalues()))
def test_power_laws_are_those_of_weightwatcher(name: str) -> None:
    """Exponent, distance, standard error and beginning of the tail, as recorded."""
    theirs = json.loads(RECORDED.read_text())

    found = power_law(eigenvalues()[name])

    assert found is not None
    assert set(theirs) == set(eigenvalues())
    got = {"alpha": found.alpha, "D": found.distance, "sigma": found.error, "xmin": found.smallest}
    assert got == pytest.approx(theirs[name], rel=1e-9)
