"""BOFT, and MiSS in all its forms and under its old name, against PEFT's own layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.boft import layer as boft
from torch import nn

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions, read_adapter
from mergebench.core.delta import LowRank
from mergebench.core.errors import FormatError, MergebenchError, MismatchError
from mergebench.core.tensor import Array, ArrayTensor

from .support import assert_same_update, load_folder
from .test_adapters_families import trained

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Net(nn.Module):
    """Layers whose sizes allow blocks of 2 and of 4, none of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 12)
        self.down = nn.Linear(8, 24, bias=False)
        self.conv = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(8, 5, 1)


@pytest.fixture(autouse=True)
def _no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would try to compile one for CUDA."""
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: None)


CASES: dict[str, peft.PeftConfig] = {
    "boft": peft.BOFTConfig(target_modules=["up", "down", "conv", "point"], boft_block_size=4),
    "boft odd blocks": peft.BOFTConfig(target_modules=["conv"], boft_block_size=3),
    "boft by number": peft.BOFTConfig(
        target_modules=["up", "down"], boft_block_size=0, boft_block_num=2
    ),
    "miss random start": peft.MissConfig(target_modules=["up", "down"], r=4, init_weights=False),
    "bat": peft.MissConfig(target_modules=["up", "down"], r=4, init_weights="bat"),
    "mini": peft.MissConfig(target_modules=["up", "down"], r=3, mini_r=6, init_weights="mini"),
}


def options_of(base: dict[str, Array]) -> ReadOptions:
    """A base in memory."""
    tensors = {key: ArrayTensor(array) for key, array in base.items()}
    shapes = {key: array.shape for key, array in base.items()}
    return ReadOptions(base_shapes=shapes, base=tensors)


@pytest.mark.parametrize("name", CASES)
def test_reads_what_peft_merges(name: str, tmp_path: Path) -> None:
    """Base plus our displacement is the model that PEFT merges, tensor by tensor."""
    source, base, merged = trained(Net(), CASES[name], tmp_path)
    deltas = read_adapter(source, options_of(base))

    assert_same_update(deltas, base, merged)


@pytest.mark.parametrize("factor", [2, 3])
def test_butterflies(factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several factors, for which PEFT has an extension that a CPU cannot compile."""

    class Diagonal:
        """What the extension computes."""

        @staticmethod
        def apply(blocks: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft, "FastBlockDiag", Diagonal)
    config = peft.BOFTConfig(
        target_modules=["up", "down"], boft_block_size=2, boft_n_butterfly_factor=factor
    )
    source, base, merged = trained(Net(), config, tmp_path)
    assert source.tensors["base_model.model.up.boft_R"].shape[0] == factor
    assert_same_update(read_adapter(source, options_of(base)), base, merged)


def as_bone(folder: Path) -> AdapterSource:
    """An adapter as PEFT saved it when MiSS was called Bone."""
    source = load_folder(folder)
    tensors = {key.replace("miss_", "bone_"): each for key, each in source.tensors.items()}
    config: dict[str, Any] = {**(source.config or {}), "peft_type": "BONE"}
    for entry in ("mini_r", "miss_dropout"):
        config.pop(entry)
    return replace(source, tensors=tensors, config=json.loads(json.dumps(config)))


@pytest.mark.parametrize("start", [True, "bat"])
def test_bone(start: bool | str, tmp_path: Path) -> None:
    """The old name means the same; without `bat` the rank stays exact."""
    config = peft.MissConfig(target_modules=["up", "down"], r=4, init_weights=start)
    _, base, merged = trained(Net(), config, tmp_path)
    deltas = read_adapter(as_bone(tmp_path), options_of(base))

    assert_same_update(deltas, base, merged)
    assert all(isinstance(delta, LowRank) and delta.rank == 4 for delta in deltas.values()) == (
        start is True
    )


@pytest.mark.parametrize(
    ("name", "change", "error", "pattern"),
    [
        ("boft", {"base": None}, FormatError, r"boft_R.* BOFT, whose .*--base"),
        ("bat", {"base": None}, FormatError, r"miss_block.* MiSS \(bat\), whose .*--base"),
        ("boft", {"blocks": (1, 3, 4, 4)}, MismatchError, r"boft_R does not fit .*16 inputs"),
        ("boft", {"blocks": (2, 1, 16, 16)}, MismatchError, r"boft_R does not fit"),
        ("boft", {"blocks": (4, 4, 4)}, FormatError, r"boft_R holds no square blocks"),
        ("bat", {"blocks": (3, 4, 2)}, FormatError, r"miss_block holds no square blocks"),
        ("bat", {"blocks": (2, 4, 4)}, MismatchError, r"miss_block does not fit .*2 blocks of 4"),
        ("bat", {"start": "new"}, FormatError, r"init_weights of MiSS.*got 'new'"),
    ],
)
def test_refusals(
    name: str,
    change: dict[str, Any],
    error: type[MergebenchError],
    pattern: str,
    tmp_path: Path,
) -> None:
    """What does not fit, or cannot be computed, is named."""
    source, base, _ = trained(Net(), CASES[name], tmp_path)
    options = options_of(base) if "base" not in change else ReadOptions()
    tensors, config = dict(source.tensors), dict(source.config or {})
    if shape := change.get("blocks"):
        key = next(key for key in tensors if "up." in key and ("_R" in key or "block" in key))
        tensors[key] = ArrayTensor(np.ones(shape))
    config["init_weights"] = change.get("start", config["init_weights"])
    with pytest.raises(error, match=pattern):
        read_adapter(replace(source, tensors=tensors, config=config), options)
