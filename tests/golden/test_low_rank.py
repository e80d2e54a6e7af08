"""Numbers about low-rank forms that are known by hand: Kronecker products, PiSSA, truncation."""

from __future__ import annotations

import json
from pathlib import Path
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file

import mergebench
from mergebench.core.delta import tile

F32 = np.float32


def update(place: Path) -> np.ndarray:
    """The only displacement of an adapter, in float64 and two dimensions."""
    source = mergebench.load(place)
    (delta,) = source.values()
    size = int(np.prod(delta.shape))
    return np.asarray(tile(delta, 0, size, np.dtype(np.float64))).reshape(delta.shape)


def test_kronecker_products_have_rank_one_rearranged(tmp_path: Path) -> None:
    """2×3 ⊗ 4×2: one singular value ‖A‖‖B‖ by Van Loan's order of entries, 4 of the matrix itself.

    A bare reshape to the rearranged shape has full rank 6: the order of entries is what counts.
    """
    random = np.random.default_rng(5)
    left, right = (random.standard_normal(shape).astype(F32) for shape in ((2, 3), (4, 2)))
    names = ("base_model.model.lin.lokr_w1", "base_model.model.lin.lokr_w2")
    save_file(dict(zip(names, (left, right), strict=True)), tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LOKR", "r": 4, "alpha": 4, "target_modules": ["lin"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    whole = update(tmp_path)

    assert whole.shape == (8, 6)
    rearranged = whole.reshape(2, 4, 3, 2).transpose(0, 2, 1, 3).reshape(6, 8)
    values = np.linalg.svd(rearranged, compute_uv=False)
    assert abs(values[0] - np.linalg.norm(left) * np.linalg.norm(right)) < 1e-6
    assert values[1] < 1e-6
    assert np.linalg.matrix_rank(whole, tol=1e-5) == 4
    assert np.linalg.matrix_rank(whole.reshape(6, 8), tol=1e-5) == 6


def test_pissa_is_a_difference_from_its_beginning(tmp_path: Path) -> None:
    """W_res + s·B·A = W before training; after it, the converted adapter is what was added to W."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("lin", torch.nn.Linear(12, 10, bias=False))
    before = model.lin.weight.detach().clone()
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["lin"], init_lora_weights="pissa", lora_dropout=0.0
    )
    peft_model = get_peft_model(model, config)
    layer = peft_model.base_model.model.lin
    start = (
        layer.base_layer.weight + 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    )
    torch.testing.assert_close(start, before, rtol=1e-5, atol=1e-6)
    peft_model.peft_config["default"].init_lora_weights = True
    peft_model.save_pretrained(tmp_path / "start")
    peft_model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        layer.lora_B.default.weight.add_(0.1 * torch.randn(10, 3))
        layer.lora_A.default.weight.add_(0.1 * torch.randn(3, 12))
    with catch_warnings():
        # That PiSSA adapters do not mix with others, which the conversion is about to mend.
        simplefilter("ignore")
        peft_model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    after = (
        layer.base_layer.weight + 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    )

    found = update(tmp_path / "converted")

    np.testing.assert_allclose(found, (after - before).detach().numpy(), rtol=1e-4, atol=1e-5)
