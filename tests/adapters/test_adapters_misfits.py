"""Bases of other sizes: refused from headers, before a tensor is computed or a file written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions, read_adapter
from mergebench.adapters_zoo.peft_bridge import Bridge
from mergebench.core.errors import MismatchError
from mergebench.core.tensor import Array, ArrayTensor
from tests.helpers.running import assert_refused, call

from . import test_adapters_families as own
from . import test_adapters_through_peft as through
from .support import load_folder, source_of

pytestmark = own.pytestmark + through.pytestmark


@pytest.fixture(autouse=True)
def _nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that PEFT's layers had to be built for would come too late."""

    def late(self: Bridge, index: int) -> Any:
        raise AssertionError("a displacement was computed")

    monkeypatch.setattr(Bridge, "change", late)


def smaller(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Other sizes in which no adapter of the cases fits; kernels stay."""
    return (2, 3, *shape[2:]) if len(shape) > 1 else (3,)


def on(base: dict[str, Array]) -> ReadOptions:
    """A base, its values too."""
    tensors = {name: ArrayTensor(array) for name, array in base.items()}
    return ReadOptions(base_shapes={n: a.shape for n, a in base.items()}, base=tensors)


def made(family: str, name: str, folder: Path) -> tuple[AdapterSource, dict[str, Array]]:
    """An adapter of a family as PEFT saves it, and its base."""
    if family == "own":
        source, base, _ = own.trained(own.Net(), own.CASES[name], folder)
        return source, base
    torch.manual_seed(0)
    double = name.split(maxsplit=1)[0] not in through.SINGLE
    base, _ = through.trained(through.Net(), through.CASES[name](), folder, double=double)
    return load_folder(folder), base


CASES = [*(("own", name) for name in own.CASES), *(("through", name) for name in through.CASES)]


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{a} {b}" for a, b in CASES])
def test_a_base_of_other_sizes(family: str, name: str, tmp_path: Path) -> None:
    """Every family refuses it, by a tensor's name, when it is opened."""
    source, base = made(family, name, tmp_path)
    read_adapter(source, on(base))
    other = {key: np.ones(smaller(array.shape), array.dtype) for key, array in base.items()}
    with pytest.raises(MismatchError) as caught:
        read_adapter(source, on(other))
    modules = {key.removesuffix(".weight").removesuffix(".bias") for key in base}
    assert any(module in caught.value.what for module in modules), caught.value.what


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        ("delora", {"blocks.0.up.weight": (12, 9)}, "(1 of 5 modules do not fit)"),
        ("delora", {"odd.weight": (3, 7), "blocks.0.up.weight": (9, 8)}, "(2 of 5 modules"),
        ("adamss", {"odd.weight": (9, 8)}, "odd.adamss_newB does not fit odd.weight"),
        ("glora vectors", {"odd.weight": (9, 8)}, ""),
        ("glora vectors", {"blocks.0.up.weight": (13, 8)}, "blocks.0.up.glora_A.X"),
        ("road 4", {"blocks.0.up.weight": (13, 8)}, "expected shape (26) on a weight of (13, 8)"),
        ("gralora", {"blocks.0.up.weight": (13, 8)}, "expected shape (*, *, 13/2)"),
        ("gralora", {"blocks.0.up.weight": (14, 8)}, "expected shape (*, *, 7)"),
        ("fourierft", {"blocks.0.up.weight": (4, 7)}, "expected shape (28)"),
        ("hira", {"conv.weight": (6, 4, 3, 1)}, "expected shape (*, 4, 3, 1)"),
        ("hira", {"embed.weight": (12, 8)}, "expected shape (*, 12)"),
    ],
)
def test_which_do_not_fit(
    name: str, shapes: dict[str, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    """The first module is named, the others are counted; sizes that say nothing are let through."""
    source, base = made("through", name, tmp_path)
    other = {**base, **{key: np.ones(shape) for key, shape in shapes.items()}}
    if not words:
        read_adapter(source, on(other))
        return
    with pytest.raises(MismatchError, match=re.escape(words)):
        read_adapter(source, on(other))


def lora(layers: int, width: int) -> dict[str, Array]:
    """Factors of rank 2 for one module of each layer."""
    return {
        f"base_model.model.layers.{layer}.q.lora_{side}.weight": np.ones(shape, np.float32)
        for layer in range(layers)
        for side, shape in (("A", (2, width)), ("B", (3, 2)))
    }


@pytest.mark.parametrize(
    ("widths", "words"),
    [
        ([5, 4, 5], "(2 of 3 modules do not fit), expected shape (3, 5)"),
        ([4, 4, 5], "layers.2.q.weight (1 of 3 modules do not fit)"),
        ([4], "fits no tensor of the base (2 of 3 modules do not fit)"),
    ],
)
def test_how_many_layers_of_a_lora_fit(widths: list[int], words: str) -> None:
    """Another width and fewer layers: how much of the adapter is affected is told."""
    source = source_of(lora(3, 4), {"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    base = {f"layers.{i}.q.weight": np.ones((3, width)) for i, width in enumerate(widths)}
    with pytest.raises(MismatchError, match=re.escape(words)):
        read_adapter(source, on(base))


@pytest.mark.parametrize("name", ["fourierft", "hira", "osf"])
def test_nothing_is_written(name: str, tmp_path: Path) -> None:
    """The command ends with one line, and leaves no output."""
    _, base = made("through", name, tmp_path / "adapter")
    other = {key: np.ones(smaller(a.shape), np.float32) for key, a in base.items()}
    save_file(other, tmp_path / "base.safetensors")
    assert_refused(
        call(
            "merge", "adapter", "--base", "base.safetensors", "-m", "task_arithmetic",
            "-o", "out.safetensors", cwd=tmp_path,
        ),
        "does not fit",
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base.safetensors"]
