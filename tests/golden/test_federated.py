"""Federated averages of LoRA adapters: the mean of updates, not of factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergebench import merge_models
from tests.contract.test_factored import save_lora

MODULE = "model.layers.0.q"


def unit(place: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of e eᵀ in two dimensions."""
    e = np.zeros((2, 1), np.float32)
    e[place] = 1
    return e, e.T.copy()


@pytest.mark.parametrize("preset", ["fedex-lora", "ffa-lora"])
def test_the_mean_of_updates_is_exact(preset: str, tmp_path: Path) -> None:
    """Of e1 e1ᵀ and e2 e2ᵀ half the identity; the mean of factors would be a quarter everywhere."""
    pairs = [
        (save_lora(tmp_path / str(i), {MODULE: unit(i)}, alpha=1.0), weight)
        for i, weight in ((0, 1.0), (1, 1.0))
    ]
    out = merge_models(pairs, method="linear", compat=preset)
    B = out[f"base_model.model.{MODULE}.lora_B.weight"]
    A = out[f"base_model.model.{MODULE}.lora_A.weight"]
    assert (B @ A).tolist() == [[0.5, 0.0], [0.0, 0.5]]
    base = {f"{MODULE}.weight": np.zeros((2, 2), np.float32)}
    shares = [(path, weight) for (path, _), weight in zip(pairs, (3.0, 1.0), strict=True)]
    got = merge_models(shares, base=base, method="linear", compat=preset)
    assert got[f"{MODULE}.weight"].tolist() == [[0.75, 0.0], [0.0, 0.25]]
