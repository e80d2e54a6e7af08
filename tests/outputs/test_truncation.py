"""Nonlinear merges of adapters: the best low-rank update, with its residual said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.adapters import factors, save_peft
from tests.helpers.compare import assert_close
from tests.helpers.files import F64, read
from tests.helpers.running import assert_done, call
from tests.helpers.updates import update_of

METHODS = [
    ("-m", "ties", "-p", "density=0.5"),
    ("-m", "ties", "-p", "scope=tensor", "--then", "scale:lam=-2"),
    ("-m", "breadcrumbs"),
    ("-m", "task_arithmetic", "--then", "trim:density=0.3,scope=row"),
]


def best(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The nearest matrix of a rank (Eckart and Young), and its relative distance."""
    U, S, V = np.linalg.svd(matrix, full_matrices=False)
    distance = np.sqrt((S[rank:] ** 2).sum() / (S**2).sum())
    return (U[:, :rank] * S[:rank]) @ V[:rank], float(distance)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two adapters of different rank."""
    save_peft(tmp_path / "a", factors(1, rank=3), alpha=6.0)
    save_peft(tmp_path / "b", factors(2, rank=2), alpha=1.0)
    return tmp_path


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_truncation_is_the_best_one(place: Path, method: tuple[str, ...]) -> None:
    """The merged adapter is the optimal one of the summed rank, its residual exact."""
    models = ("merge", "a:0.7", "b", *method)
    ran = assert_done(call(*models, "-o", "out", "--json", cwd=place))
    assert_done(call(*models, "--as", "delta", "-o", "dense.safetensors", cwd=place))

    dense = {n: a.astype(F64) for n, a in read(place / "dense.safetensors").items()}
    wanted = {name: best(matrix, 5) for name, matrix in dense.items()}
    residuals = ran.json["outputs"][0]["residuals"]
    assert residuals == {name: pytest.approx(lost, rel=1e-4) for name, (_, lost) in wanted.items()}
    merged = update_of(place / "out")
    assert_close(merged, {name: matrix for name, (matrix, _) in wanted.items()}, 1e-5)
    for name, matrix in dense.items():
        lost = np.linalg.norm(matrix - merged[name]) / np.linalg.norm(matrix)
        assert lost == pytest.approx(residuals[name], rel=1e-4)


def test_residual_in_words(place: Path) -> None:
    """The summary gives the overall and the worst residual, the module, and the way out."""
    common = ("merge", "a", "b", "-m", "ties")
    residuals = call(*common, "-o", "o", "--json", cwd=place).json["outputs"][0]["residuals"]
    ran = assert_done(call(*common, "-o", "out", cwd=place))

    name = max(residuals, key=residuals.get)
    overall = np.sqrt(np.mean(np.square(list(residuals.values()))))
    assert f"truncated to rank 5: relative residual {overall:.3g} over 4 modules" in ran.out
    assert f"worst {residuals[name]:.3g} ({name}); --as delta loses nothing" in ran.out


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_linear_merges_lose_nothing(place: Path, method: str) -> None:
    """Concatenated factors reproduce the sum, and no residual is reported."""
    models = ("merge", "a", "b:-0.5", "-m", method)
    ran = assert_done(call(*models, "-o", "out", "--json", cwd=place))
    assert_done(call(*models, "--as", "delta", "-o", "dense.safetensors", cwd=place))

    assert ran.json["outputs"][0]["residuals"] == {}
    assert_close(update_of(place / "out"), read(place / "dense.safetensors"))


def test_rank_is_no_larger_than_the_matrix(tmp_path: Path) -> None:
    """Where the summed rank reaches the full one, nothing is truncated away."""
    for name, seed in (("a", 1), ("b", 2)):
        save_peft(tmp_path / name, factors(seed, rank=12))
    models = ("merge", "a", "b", "-m", "ties")
    ran = assert_done(call(*models, "-o", "out", "--json", cwd=tmp_path))
    assert_done(call(*models, "--as", "delta", "-o", "dense.safetensors", cwd=tmp_path))

    assert max(ran.json["outputs"][0]["residuals"].values()) < 1e-6
    assert_close(update_of(tmp_path / "out"), read(tmp_path / "dense.safetensors"), 1e-5)
