"""transformers opens merged folders, and they compute what the merged weights compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from mergebench import merge_models
from tests.helpers.files import listing
from tests.helpers.running import assert_done, call

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def llama(seed: int, **config: Any) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **config)).eval()


def tied_llama(seed: int) -> LlamaForCausalLM:
    """One whose head is its embedding."""
    return llama(seed, tie_word_embeddings=True)


def bert(seed: int) -> BertModel:
    """A small BERT with random weights."""
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZES)).eval()


BUILDERS: dict[str, Callable[[int], Any]] = {
    "llama": llama,
    "tied-llama": tied_llama,
    "bert": bert,
}
INPUT = torch.arange(24).reshape(2, 12)


def save_all(folder: Path, build: Callable[[int], Any], dtype: torch.dtype) -> list[Any]:
    """A base and two fine-tunes, saved by transformers, the first fine-tune in shards."""
    base = build(0).to(dtype)
    models = [base]
    for seed in (1, 2):
        tuned = build(seed).to(dtype)
        with torch.no_grad():
            for mine, start in zip(tuned.parameters(), base.parameters(), strict=True):
                mine.copy_(start + 0.1 * mine)
        models.append(tuned)
    for name, model in zip(("base", "ft1", "ft2"), models, strict=True):
        size = "20KB" if name == "ft1" else "1GB"
        model.save_pretrained(folder / name, max_shard_size=size)
    return models


def assert_loads(folder: Path, kind: type[Any], dtype: torch.dtype) -> Any:
    """The folder opens in transformers without a missing or unexpected tensor."""
    model, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("method", "params"),
    [("ties", {"density": 0.5}), ("linear", {}), ("breadcrumbs", {"lam": 0.7})],
    ids=["ties", "linear", "breadcrumbs"],
)
def test_merged_folder_computes_the_merge(
    tmp_path: Path, kind: str, dtype: torch.dtype, method: str, params: dict[str, Any]
) -> None:
    """A sharded merge opens and gives the outputs of the state dicts merged in memory."""
    base, *tuned = save_all(tmp_path, BUILDERS[kind], dtype)
    given = [part for name, value in params.items() for part in ("-p", f"{name}={value}")]
    ran = call(
        *("merge", "ft1", "ft2", "-b", "base", "-m", method, *given),
        *("-o", "out", "--shard-size", "20kB"),
        cwd=tmp_path,
    )
    assert_done(ran)

    merged = assert_loads(tmp_path / "out", type(base), dtype)
    states = [dict(model.named_parameters()) for model in (base, *tuned)]
    expected = merge_models(states[1:], base=states[0], method=method, **params)
    again = assert_loads(tmp_path / "base", type(base), dtype)
    with torch.no_grad():
        start = again(INPUT)[0]
        again.load_state_dict(expected, strict=False)
        outputs = merged(INPUT)[0], again(INPUT)[0]
    assert len([name for name in listing(tmp_path / "out") if name.endswith(".safetensors")]) > 1
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], start)


def test_generation_settings_come_along(tmp_path: Path) -> None:
    """The generation config that transformers saved is read back from the merged folder."""
    base, *_ = save_all(tmp_path, llama, torch.float32)
    base.generation_config.max_length = 17
    base.generation_config.do_sample = True
    base.save_pretrained(tmp_path / "base")
    assert_done(call("merge", "ft1", "ft2", "-b", "base", "-o", "out", cwd=tmp_path))

    merged = assert_loads(tmp_path / "out", LlamaForCausalLM, torch.float32)
    assert merged.generation_config.max_length == 17
    assert merged.generation_config.do_sample is True


def test_dtype_asked_for_is_the_dtype_loaded(tmp_path: Path) -> None:
    """A merge stored in bfloat16 opens in bfloat16 where the config decides."""
    save_all(tmp_path, llama, torch.float32)
    common = ("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "--dtype", "bf16", "-o", "out")
    assert_done(call(*common, cwd=tmp_path))

    merged = assert_loads(tmp_path / "out", LlamaForCausalLM, "auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
