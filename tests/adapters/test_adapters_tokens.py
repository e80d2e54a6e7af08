"""Trained token rows, alone and in a LoRA, with tied and untied heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mergebench
from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions, read_adapter
from mergebench.core.delta import Difference, LowRank, Replacement
from mergebench.core.errors import FormatError, MergebenchError, MismatchError
from mergebench.core.tensor import Array, ArrayTensor

from .support import assert_close, assert_same_update, load_folder, values_of
from .test_adapters_families import trained
from .test_adapters_peft import randomised, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Net(nn.Module):
    """An embedding, a head and a layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lin = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)


CASES: dict[str, peft.PeftConfig] = {
    "alone": peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[4, 2, 10]),
    "two modules": peft.TrainableTokensConfig(
        target_modules=["embed", "head"], token_indices=[0, 10]
    ),
    "lora": peft.LoraConfig(
        r=2, target_modules=["lin"], trainable_token_indices={"embed": [5, 1], "head": [0, 7, 9]}
    ),
    "dora": peft.LoraConfig(
        r=2, target_modules=["lin"], use_dora=True, trainable_token_indices={"embed": [3]}
    ),
}


def on(base: dict[str, Array], **more: Any) -> ReadOptions:
    """A base in memory."""
    tensors = {name: ArrayTensor(array) for name, array in base.items()}
    shapes = {name: array.shape for name, array in base.items()}
    return ReadOptions(base_shapes=shapes, base=tensors, **more)


@pytest.mark.parametrize("case", CASES)
def test_reads_what_peft_merges(case: str, tmp_path: Path) -> None:
    """The listed rows are the stored ones, and no other row moves."""
    source, base, merged = trained(Net(), CASES[case], tmp_path)
    deltas = read_adapter(source, on(base))

    assert_same_update(deltas, base, merged)
    assert isinstance(deltas["embed.weight"], Difference)
    if case == "lora":
        assert isinstance(deltas["lin.weight"], LowRank)


def tiny(*, tied: bool) -> LlamaForCausalLM:
    """A small model; its embedding and head are one tensor or two."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(model: LlamaForCausalLM, folder: Path, **entries: Any) -> dict[str, Array]:
    """Save an adapter with trained rows; the state of the model that PEFT merges."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **entries)
    wrapped = randomised(peft.get_peft_model(model, config), seed=6)
    wrapped.save_pretrained(folder)
    return state_of(wrapped.merge_and_unload())


@pytest.mark.parametrize("stored_twice", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_heads(tied: bool, stored_twice: bool, tmp_path: Path) -> None:
    """A tied head moves with the embedding, however it is stored, and an untied one stays."""
    model = tiny(tied=tied)
    model.save_pretrained(tmp_path / "base")
    if stored_twice and tied:
        state = load_file(tmp_path / "base" / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    expected = adapted(model, tmp_path / "adapter", trainable_token_indices=[2, 12, 7])
    assert np.array_equal(expected["lm_head.weight"], expected["model.embed_tokens.weight"]) == tied

    mergebench.merge_models(
        [str(tmp_path / "adapter")], base=str(tmp_path / "base"), method="task_arithmetic",
        out=str(tmp_path / "out"),
    )  # fmt: skip
    loaded = state_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    for name, array in expected.items():
        assert_close(loaded[name], array, 1e-6)


def test_tied_rows_listed_for_the_head(tmp_path: Path) -> None:
    """PEFT saves the rows of a tied head once, under the embedding's name."""
    model = tiny(tied=True)
    base = state_of(model)
    listed = {"embed_tokens": [1, 5], "lm_head": [1, 5]}
    expected = adapted(model, tmp_path, trainable_token_indices=listed)
    source = load_folder(tmp_path)
    assert not any("lm_head" in key for key in source.tensors)
    del base["lm_head.weight"]
    deltas = read_adapter(source, on(base))
    assert_same_update(deltas, base, {name: expected[name] for name in base})


def test_resized_vocabulary(tmp_path: Path) -> None:
    """An embedding saved whole is used whole; the base's own, if the user says so."""
    model = tiny(tied=False)
    small = state_of(model)
    model.resize_token_embeddings(16)
    large = state_of(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[2, 15])
    wrapped = randomised(peft.get_peft_model(model, config), seed=7)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    expected = state_of(wrapped.merge_and_unload())["model.embed_tokens.weight"]
    source = load_folder(tmp_path)
    copies = {
        key: each for key, each in source.tensors.items() if not key.endswith("lm_head.weight")
    }
    source = replace(source, tensors=copies)
    assert any("base_layer" in key for key in copies)

    deltas = read_adapter(source, on(small))
    assert isinstance(deltas["model.embed_tokens.weight"], Replacement)
    assert_close(values_of(deltas["model.embed_tokens.weight"]), expected, 0)
    options = on(large, ignore_saved_base=True)
    delta = read_adapter(source, options)["model.embed_tokens.weight"]
    assert_close(values_of(delta), expected - large["model.embed_tokens.weight"], 1e-6)
    with pytest.raises(MismatchError, match=r"trains token 15.*below 13.*got 15"):
        read_adapter(source, on(small, ignore_saved_base=True))


ROWS = "base_model.model.embed.trainable_tokens_delta"


def lone(config: dict[str, Any] | None, rows: Array, **more: Array) -> AdapterSource:
    """Trained rows of an embedding, and nothing else."""
    arrays = {ROWS: rows, **more}
    return AdapterSource("toy", {k: ArrayTensor(a) for k, a in arrays.items()}, config, {})


@pytest.mark.parametrize(
    ("entries", "error", "pattern"),
    [
        (None, FormatError, "which tokens' stands in the config.*no config"),
        ({}, FormatError, "which tokens' stands in the config"),
        ({"token_indices": {"other": [1, 2]}}, FormatError, "which tokens' stands in the config"),
        ({"token_indices": "12"}, FormatError, "which tokens"),
        ({"token_indices": [1, 1]}, FormatError, r"different numbers.*got \[1, 1\]"),
        ({"token_indices": [1, -2]}, FormatError, r"different numbers.*got \[1, -2\]"),
        ({"token_indices": [1, True]}, FormatError, "different numbers"),
        ({"token_indices": [1, 2.0]}, FormatError, "different numbers"),
        ({"token_indices": [1, 2, 3]}, MismatchError, "rows of 3 tokens.*config is of another"),
        ({"token_indices": [1, 11]}, MismatchError, "trains token 11.*below 11"),
    ],
)
def test_refusals(
    entries: dict[str, Any] | None, error: type[MergebenchError], pattern: str
) -> None:
    """Configs that do not say which rows, or not rows that there are."""
    config = None if entries is None else {"peft_type": "TRAINABLE_TOKENS", **entries}
    base = {"embed.weight": np.zeros((11, 4))}
    with pytest.raises(error, match=pattern) as caught:
        read_adapter(lone(config, np.ones((2, 4))), on(base))
    assert type(caught.value) is error


def test_needs_the_base_and_fits_it() -> None:
    """Rows are no difference without the rows that they replace."""
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 1]}
    with pytest.raises(FormatError, match=r"depends on the base weights.*--base"):
        read_adapter(lone(config, np.ones((2, 4))))
    with pytest.raises(MismatchError, match=r"does not fit embed\.weight.*rows of \(5,\)"):
        read_adapter(lone(config, np.ones((2, 4))), on({"embed.weight": np.zeros((11, 5))}))
    other = {"base_model.model.lin.strange": np.ones(2)}
    with pytest.raises(FormatError, match=r"lin\.strange"):
        read_adapter(
            lone(config, np.ones((2, 4)), **other), on({"embed.weight": np.zeros((11, 4))})
        )


def test_rows_of_another_dtype() -> None:
    """Rows with more digits than the base keep them."""
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 1]}
    rows = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
    base = {"embed.weight": np.full((5, 2), 2, np.float16)}
    deltas = read_adapter(lone(config, rows), on(base))
    expected = np.zeros((5, 2))
    expected[[3, 1]] = rows.astype(np.float64) - 2
    assert_close(values_of(deltas["embed.weight"]), expected, 1e-7)
