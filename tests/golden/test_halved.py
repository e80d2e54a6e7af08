"""Half reset, MHR-style and MOS-style averaging, worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench import merge_models
from mergebench.core.errors import ParameterError
from tests.contract.test_factored import save_lora
from tests.golden.test_federated import MODULE, unit
from tests.oracle.test_halved import ATTENTION, FEED_FORWARD, NORMS, OUTSIDE, model, reset_by

from .support import assert_exactly, merged


def parts(names: set[str], block: int) -> list[str]:
    """The reset modules of a block."""
    start = f"model.layers.{block}."
    return sorted(
        n.removeprefix(start).removesuffix(".weight") for n in names if n.startswith(start)
    )


@pytest.mark.parametrize("seed", range(5))
def test_exactly_half_of_every_category(seed: int) -> None:
    """Per block 2 of 4 attention matrices, 1 of 2 norms; 2 of 3 in half of the blocks, or 1."""
    reset = reset_by(model(6), seed)
    found = [parts(reset, block) for block in range(6)]
    assert [sum(p in ATTENTION for p in each) for each in found] == [2] * 6
    assert [sum(p in NORMS for p in each) for each in found] == [1] * 6
    assert sorted(sum(p in FEED_FORWARD for p in each) for each in found) == [1, 1, 1, 2, 2, 2]
    assert reset.isdisjoint(OUTSIDE)
    assert len(reset) == 6 * (4 + 3 + 2) // 2


PINNED = [
    ["input_layernorm", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"],
    [
        "input_layernorm",
        "mlp.down_proj",
        "mlp.gate_proj",
        "self_attn.o_proj",
        "self_attn.v_proj",
    ],
]


def test_the_same_half_on_any_machine() -> None:
    """What seed 0 draws from two blocks, once and for all; seed 1 draws another half."""
    reset = reset_by(model(2), 0)
    assert [parts(reset, block) for block in (0, 1)] == PINNED
    assert reset_by(model(2), 1) != reset
    # Which files or tensors there are besides does not matter.
    assert reset_by([*model(2), "model.extra.weight"], 0) == reset


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        # Fused attention and two feed-forward matrices, as GPT-2 has them, and a mask.
        (
            ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
            [2, 2],
        ),
        # One matrix: in one of two blocks.
        (("attn.qkv.weight",), [0, 1]),
        (("attn.qkv.weight", "attn.bias"), [0, 1]),
        # A bias counts with its weight.
        (("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"), [2, 2]),
        (("attention.self.query.weight", "attention.output.LayerNorm.weight"), None),
    ],
)
def test_other_architectures(names: tuple[str, ...], counts: list[int] | None) -> None:
    """Of n modules ⌊n / 2⌋, and one more in half of the blocks where n is odd."""
    whole = [f"h.{block}.{name}" for block in (0, 1) for name in names]
    reset = reset_by(whole, 3)
    if counts is None:
        # Of each of the two categories one module, in one block.
        assert sorted(name[4:] for name in reset) == sorted(names)
        return
    assert sorted(len([n for n in reset if n.startswith(f"h.{b}.")]) for b in (0, 1)) == counts


def test_nothing_outside_of_blocks_is_reset() -> None:
    """A model without numbered blocks stays as it was fine-tuned, and one block resets its half."""
    assert reset_by(["fc1.weight", "norm.weight", "head.weight"], 0) == set()
    # Of three in the only block, ⌊1 / 2⌋ blocks have one more.
    assert len(reset_by([f"layers.0.mlp.{x}.weight" for x in "abc"], 0)) == 1


def test_an_adapter_stays_an_adapter(tmp_path: Path) -> None:
    """Factors of what is reset become zero, the others keep their bytes."""
    modules = [f"model.layers.{block}.{part}" for block in (0, 1) for part in ATTENTION]
    random = np.random.default_rng(0)
    made = {
        name: (
            random.normal(size=(4, 2)).astype(np.float32),
            random.normal(size=(2, 4)).astype(np.float32),
        )
        for name in modules
    }
    out = merge_models([save_lora(tmp_path / "lora", made, alpha=2.0)], method="hft", seed=7)
    zeros = 0
    for name, (B, A) in made.items():
        got = out[f"base_model.model.{name}.lora_B.weight"]
        zeros += not got.any()
        # Rank 2 is filled with zeros up to what servers take.
        assert not got.any() or got[:, :2].tobytes() == B.tobytes()
        assert not got[:, 2:].any()
        assert out[f"base_model.model.{name}.lora_A.weight"][:2].tobytes() == A.tobytes()
    assert zeros == 4


def test_mos_draws_towards_the_earlier_ones() -> None:
    """0.9 of the new adapter and 0.05 of each of the two before it; the order tells which."""
    one, two, new = [20.0, 0.0], [0.0, 40.0], [10.0, 10.0]
    assert merged("mos", one, two, new) == pytest.approx([10.0, 11.0])
    assert merged("mos", two, one, new) == pytest.approx([10.0, 11.0])
    assert merged("mos", new, two, one) == pytest.approx([18.5, 2.5])
    assert_exactly(merged("mos", one, two, new, m=0.0), new)
    assert_exactly(merged("mos", one, two, new, m=1.0), [10.0, 20.0])
    assert_exactly(merged("mos", new), new)
    assert merged("mos", one, new, weights=(0.0, 1.0)) == pytest.approx([9.0, 9.0])


def test_mos_is_constant_and_exact_for_adapters(tmp_path: Path) -> None:
    """Of e1 e1ᵀ and then e2 e2ᵀ 0.1 and 0.9, every time; factors averaged would add cross terms."""
    paths = [save_lora(tmp_path / str(i), {MODULE: unit(i)}, alpha=1.0) for i in (0, 1)]
    found = []
    for _ in range(2):
        out = merge_models(paths, method="mos")
        B = out[f"base_model.model.{MODULE}.lora_B.weight"]
        A = out[f"base_model.model.{MODULE}.lora_A.weight"]
        found.append(B @ A)
    assert found[0].tobytes() == found[1].tobytes()
    assert found[0] == pytest.approx(np.diag([0.1, 0.9]))
    B, A = [0.1 * unit(0)[k] + 0.9 * unit(1)[k] for k in (0, 1)]
    assert (B @ A)[0, 1] == pytest.approx(0.09)


def test_mhr_averages_updates(tmp_path: Path) -> None:
    """The uniform mean of the updates, half the identity, not a quarter everywhere."""
    paths = [save_lora(tmp_path / str(i), {MODULE: unit(i)}, alpha=1.0) for i in (0, 1)]
    out = merge_models(paths, method="linear", compat="mhr-mu")
    B = out[f"base_model.model.{MODULE}.lora_B.weight"]
    A = out[f"base_model.model.{MODULE}.lora_A.weight"]
    assert (B @ A).tolist() == [[0.5, 0.0], [0.0, 0.5]]
    B, A = ((unit(0)[k] + unit(1)[k]) / 2 for k in (0, 1))
    assert (B @ A).tolist() == [[0.25, 0.25], [0.25, 0.25]]


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("hft", "seed", -1), ("hft", "seed", 2**32), ("mos", "m", 1.5), ("mos", "m", -0.1)],
)
def test_bad_values_are_refused(method: str, name: str, value: Any) -> None:
    """A value outside of what is declared is an error that names it."""
    with pytest.raises(ParameterError, match=f"`{name}` must be"):
        merged(method, [1.0], **{name: value})


def test_half_reset_takes_one_model() -> None:
    """Two models are refused by number."""
    with pytest.raises(ParameterError, match="hft: number of models"):
        merged("hft", [1.0], [2.0])
