"""Adapters: factors merge as their products do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergebench.core.errors import MergebenchError
from mergebench.merge.chains import is_linear, needs_base, tolerance_of
from mergebench.merge.method import METHODS

from .assertions import assert_close, assert_same_bits
from .promises import assert_factored_is_dense
from .support import (
    F32,
    F64,
    GENERIC,
    Arrays,
    drawn,
    drawn_by_label,
    every_method,
    merge_models,
    taken,
)

#: Weights of the base and the modules that adapters may change.
SHAPES = {"model.layers.0.q.weight": (7, 5), "model.layers.1.q.weight": (7, 5), "norm.weight": (5,)}
MODULES = ("model.layers.0.q", "model.layers.1.q")
#: Values with which something of every task vector is left.
SOMETHING: Mapping[str, Any] = {
    "gamma": 0.25, "t": 0.5, "scale": 1.5, "epsilon": 1e-5, "iqr": 0.5, "clamp": False,
    "k": 0, "ratio": 1.0, "select_topk": 0.5,
}  # fmt: skip
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def save_lora(folder: Path, factors: Factors, alpha: float) -> Path:
    """A PEFT folder with ``lora_A``, ``lora_B`` and its config."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (B, A) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A
        tensors[f"base_model.model.{module}.lora_B.weight"] = B
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(factors.values()))[1].shape[0]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(factors: Factors, alpha: float) -> Arrays:
    """``alpha / r · B A`` under the names of the weights, in float64."""
    return {
        f"{module}.weight": alpha / A.shape[0] * (B.astype(F64) @ A.astype(F64))
        for module, (B, A) in factors.items()
    }


def save_delta(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A saved task vector: its entries, and metadata that say what it is."""
    about = json.dumps({"kind": "delta", "version": 1, "base": None, "replaced": []})
    save_file(dict(arrays), path, {"format": "pt", "mergebench": about})
    return path


def regauged(factors: Factors, random: np.random.Generator, padding: int) -> Factors:
    """``(B M, M⁻¹ A)`` in float64, after ``padding`` ranks were added that say nothing.

    Their columns of B are zero and their rows of A are not, so that a method that looked at a
    factor alone would see them. The singular values of M are from 1/2 to 2.
    """
    found = {}
    for module, (B, A) in factors.items():
        rank = A.shape[0] + padding
        U, V = (np.linalg.qr(random.normal(size=(rank, rank)))[0] for _ in "UV")
        M = U * random.uniform(0.5, 2.0, rank) @ V
        wide = np.concatenate([B, np.zeros((B.shape[0], padding))], axis=1)
        tall = np.concatenate([A, random.normal(size=(padding, A.shape[1]))])
        found[module] = (wide @ M, np.linalg.solve(M, tall))
    return found


def weights_of(random: np.random.Generator, count: int) -> list[float]:
    """Weights of some adapters; 1 of a single one, for which a mean refuses any other."""
    several = [1.0, 0.5, 2.0, 1.5] if count > 1 else [1.0]
    return [float(w) for w in random.choice(several, count)]


class Scene:
    """A base and some adapters on it, as files in factors and as files of dense products."""

    def __init__(
        self, folder: Path, random: np.random.Generator, count: int, dtype: Any = F32
    ) -> None:
        self.base = {name: random.normal(size=shape).astype(F32) for name, shape in SHAPES.items()}
        self.factored, self.dense, self.products = [], [], []
        for index in range(count):
            rank, alpha = int(random.integers(1, 4)), float(random.integers(1, 9))
            chosen = MODULES if index == 0 else MODULES[: int(random.integers(1, 3))]
            factors = {
                module: (
                    random.normal(size=(7, rank)).astype(F32),
                    random.normal(size=(rank, 5)).astype(F32),
                )
                for module in chosen
            }
            self.factored.append(save_lora(folder / f"lora{index}", factors, alpha))
            self.products.append(product(factors, alpha))
            narrow = {name: array.astype(dtype) for name, array in self.products[-1].items()}
            self.dense.append(save_delta(folder / f"delta{index}.safetensors", narrow))
        self.weights = weights_of(random, count)

    def merged(self, paths: list[Path], method: str, params: Mapping[str, Any], **how: Any) -> Any:
        """The merge of either form."""
        pairs = list(zip(paths, self.weights, strict=True))
        return merge_models(pairs, method=method, **params, **how)


class Turned:
    """Adapters in float64 on one base, each in two choices of its factors."""

    def __init__(self, folder: Path, random: np.random.Generator, count: int, padding: int) -> None:
        self.base = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
        self.plain, self.turned = [], []
        for index in range(count):
            rank, alpha = int(random.integers(1, 4)), float(random.integers(1, 9))
            chosen = MODULES if index == 0 else MODULES[: int(random.integers(1, 3))]
            factors = {
                module: (random.normal(size=(7, rank)), random.normal(size=(rank, 5)))
                for module in chosen
            }
            other = regauged(factors, random, padding)
            larger = alpha * (rank + padding) / rank
            self.plain.append(save_lora(folder / f"plain{index}", factors, alpha))
            self.turned.append(save_lora(folder / f"turned{index}", other, larger))
        self.weights = weights_of(random, count)


def scene_of(data: st.DataObject, folders: pytest.TempPathFactory, method: str) -> Scene:
    """A scene in a folder of its own, from a drawn seed and a number of adapters.

    Singular vectors magnify the rounding of ΔW by any factor, so where LAPACK is behind a method
    the dense files hold it in float64.
    """
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    count = data.draw(st.integers(1, min(3, taken(method).most or 3)))
    dtype = F64 if tolerance_of(METHODS[method]()) else F32
    return Scene(folders.mktemp("scene"), random, count, dtype)


def looked_at(method: str, base: Arrays) -> dict[str, Any]:
    """The base, for methods that look at it even where no model is written."""
    return {"base": base} if needs_base(METHODS[method]()) else {}


@every_method("factored")
@given(data=st.data())
@GENERIC
def test_lora_task_vectors_merge_as_dense_ones(
    method: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """LoRA files and files of their dense ΔW give the same merged task vector."""
    scene = scene_of(data, tmp_path_factory, method)
    params = drawn(data, method, density=data.draw(st.sampled_from([0.25, 0.5, 1.0])), lam=1.5)
    params |= {name: value for name, value in SOMETHING.items() if name in params}
    how = {"form": "delta", **looked_at(method, scene.base)}
    with drawn_by_label():
        got = scene.merged(scene.factored, method, params, **how)
        assert_factored_is_dense(got, scene.merged(scene.dense, method, params, **how))


@every_method("factored")
@given(data=st.data())
@GENERIC
def test_lora_merges_into_the_base_as_dense(
    method: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """LoRA files merged into a base give what files of their dense ΔW give."""
    scene = scene_of(data, tmp_path_factory, method)
    params = drawn(data, method)
    params |= {name: value for name, value in SOMETHING.items() if name in params}
    with drawn_by_label():
        got = scene.merged(scene.factored, method, params, base=scene.base)
        expected = scene.merged(scene.dense, method, params, base=scene.base)
    assert_factored_is_dense(got, expected)
    assert_same_bits({"norm": got["norm.weight"]}, {"norm": expected["norm.weight"]})


@every_method("factored")
@given(data=st.data())
@GENERIC
def test_lora_comes_out_as_lora(
    method: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Adapters give an adapter: lossless for linear chains, the best of its rank for others."""
    scene = scene_of(data, tmp_path_factory, method)
    params = drawn(data, method)
    base = looked_at(method, scene.base)
    dense = scene.merged(scene.factored, method, params, form="delta", **base)
    out = scene.merged(scene.factored, method, params, form="lora", **base)
    linear = is_linear(METHODS[method](**params))
    for module in MODULES:
        A = out[f"base_model.model.{module}.lora_A.weight"].astype(F64)
        B = out[f"base_model.model.{module}.lora_B.weight"].astype(F64)
        wanted = dense[f"{module}.weight"].astype(F64)
        ranks = [p[f"{module}.weight"] for p in scene.products if f"{module}.weight" in p]
        limit = sum(np.linalg.matrix_rank(each) for each in ranks)
        U, S, Vt = np.linalg.svd(wanted, full_matrices=False)
        kept = len(S) if linear else min(limit, len(S))
        best = (U[:, :kept] * S[:kept]) @ Vt[:kept]
        scale = max(np.abs(wanted).max(), 1e-30)
        lost, least = np.linalg.norm(B @ A - wanted), np.linalg.norm(best - wanted)
        assert lost <= least + 1e-5 * scale * wanted.size, (module, lost, least)


@every_method("gauge")
@given(data=st.data())
@GENERIC
def test_the_gauge_of_the_factors_is_immaterial(
    method: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """(B, A) and (B M, M⁻¹ A), with ranks that say nothing, are one update and merge alike."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    count = data.draw(st.integers(1, min(3, taken(method).most or 3)), label="adapters")
    padding = data.draw(st.integers(0, 2), label="padding")
    scene = Turned(tmp_path_factory.mktemp("gauge"), random, count, padding)
    params = drawn(data, method, density=data.draw(st.sampled_from([0.25, 0.5, 1.0])), lam=1.5)
    params |= {name: value for name, value in SOMETHING.items() if name in params}
    how = {"form": "delta", "method": method, **params, **looked_at(method, scene.base)}
    with drawn_by_label():
        got, expected = (
            merge_models(list(zip(paths, scene.weights, strict=True)), **how)
            for paths in (scene.turned, scene.plain)
        )
    assert any(array.any() for array in expected.values()), "nothing to compare"
    assert_close(got, expected, 1e-9)


@every_method("non-finite")
@pytest.mark.parametrize("form", ["model", "delta"])
def test_nan_in_factors_is_refused(method: str, form: str, tmp_path: Path) -> None:
    """A NaN in a factor is an error that names the adapter, the weight and the number."""
    B, A = np.ones((7, 2), F32), np.ones((2, 5), F32)
    B[3, 1] = np.nan
    spoilt = save_lora(tmp_path / "spoilt", {MODULES[0]: (B, A)}, 2.0)
    base = {name: np.ones(shape, F32) for name, shape in SHAPES.items()}
    with pytest.raises(MergebenchError) as caught:
        merge_models([spoilt], base=base, method=method, form=form)
    # Where whole weights are averaged too, the factor is what is found, not the row it spoils.
    found = "1 NaN and 0 infinite entries of 14"
    assert caught.value.what == f"{spoilt}: tensor {MODULES[0] + '.weight'!r} has {found}"


@every_method("non-finite")
def test_nan_under_an_adapter_is_refused(method: str, tmp_path: Path) -> None:
    """A NaN of the base in a weight that an adapter changes is an error that names the base."""
    sound = save_lora(
        tmp_path / "sound", {MODULES[0]: (np.ones((7, 2), F32), np.ones((2, 5), F32))}, 2.0
    )
    base = {name: np.ones(shape, F32) for name, shape in SHAPES.items()}
    base[f"{MODULES[0]}.weight"][2, 2] = np.nan
    with pytest.raises(MergebenchError, match=r"has 1 NaN and 0 infinite entries of 35"):
        merge_models([sound], base=base, method=method)


@every_method("files")
def test_an_adapter_beside_arrays_is_read_as_beside_files(method: str, tmp_path: Path) -> None:
    """An adapter that needs its base's names and an option merges with arrays in memory too."""
    B, A = np.ones((7, 2), F32), np.full((2, 5), 0.5, F32)
    tensors = {"lora_unet_model_layers_0_q.lora_up.weight": B}
    tensors["lora_unet_model_layers_0_q.lora_down.weight"] = A
    adapter = tmp_path / "kohya.safetensors"
    save_file(tensors, adapter)
    base = {f"unet.{name}": np.ones(shape, F32) for name, shape in SHAPES.items()}
    tuned = {name: array + F32.type(0.25) for name, array in base.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    options: dict[str, Any] = {"base": base, "method": method, "lora_alpha": 4.0}
    last = -min(2, taken(method).most or 2)
    expected = merge_models([tmp_path / "tuned.safetensors", adapter][last:], **options)
    assert_same_bits(merge_models([tuned, adapter][last:], **options), expected)
