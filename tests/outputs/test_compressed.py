"""Full models and adapters that methods leave at a low rank, written as adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from mergebench import merge_models
from mergebench.core.errors import MismatchError
from tests.helpers.compare import assert_close
from tests.helpers.files import F32, read, write
from tests.helpers.running import assert_done, call
from tests.helpers.scene import Scene
from tests.helpers.updates import update_of

# transformers deprecates what PEFT calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


def llama() -> nn.Module:
    """A small Llama."""
    config = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**config, **heads, tie_word_embeddings=False))


def bert() -> nn.Module:
    """A small BERT: linear layers and norms with biases, three embeddings."""
    config = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**config, **heads), add_pooling_layer=False)


def tuned(make: Callable[[], nn.Module], folder: Path, count: int = 3) -> list[Path]:
    """A saved base and fine-tunes of it, in which everything has moved."""
    torch.manual_seed(0)
    base = make()
    base.save_pretrained(folder / "base")
    places = []
    for number in range(count):
        other = make()
        other.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        places.append(folder / f"ft{number}")
        other.save_pretrained(places[-1])
    return places


def answer(model: nn.Module) -> torch.Tensor:
    """What a model makes of some tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(20)[None])[0]
    return found


def loaded(make: Callable[[], nn.Module], place: Path) -> nn.Module:
    """A saved model."""
    kwargs = {"add_pooling_layer": False} if make is bert else {}
    model: nn.Module = type(make()).from_pretrained(place, **kwargs)
    return model


@pytest.mark.parametrize("make", [llama, bert])
def test_full_models_are_compressed_to_adapters(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """PEFT opens them and answers as the compressed models do, and mergebench reads them back."""
    models, base = tuned(make, tmp_path), tmp_path / "base"
    common: dict[str, Any] = {"base": base, "method": "tsv_compress"}
    whole = merge_models(models, out=tmp_path / "whole", **common)
    lora = merge_models(models, out=tmp_path / "lora", form="lora", **common)
    for one, other in zip(whole, lora, strict=True):
        config = json.loads((other.path / "adapter_config.json").read_text())
        # A third of 16, filled with zeros up to what servers take.
        assert config["r"] == 8
        assert config["bias"] == ("lora_only" if make is bert else "none")
        wanted = answer(loaded(make, one.path))
        got = answer(PeftModel.from_pretrained(loaded(make, base), other.path))
        assert (got - wanted).abs().max() < 1e-5
        assert (got - answer(loaded(make, base))).abs().max() > 1e-2
        assert max(other.residuals.values()) < 1e-6
        again = merge_models([other.path], base=base, method="task_arithmetic")
        assert_close(again, read(one.path), 1e-6)
    with pytest.raises(MismatchError, match="the merged update is not a LoRA"):
        merge_models(models, base=base, method="emr", form="lora", out=tmp_path / "emr")


def test_tied_embeddings_have_no_adapter(tmp_path: Path) -> None:
    """One factor pair would move only one of the two; leaving them at the base is a way."""

    def tied() -> nn.Module:
        config = llama().config
        config.tie_word_embeddings = True
        return LlamaForCausalLM(config)

    models, base = tuned(tied, tmp_path, 2), tmp_path / "base"
    how: dict[str, Any] = {"base": base, "method": "tsv_compress", "form": "lora"}
    with pytest.raises(MismatchError, match=r"embed_tokens\.weight: tied to the head.*--exclude"):
        merge_models(models, out=tmp_path / "out", **how)
    exclude = ["model.embed_tokens.weight"]
    written = merge_models(models, out=tmp_path / "out", exclude=exclude, **how)
    assert [each.path.name for each in written] == ["ft0", "ft1"]


@pytest.mark.parametrize("kernels", ["vector", "matrix"])
def test_kernels_become_adapters_as_matrices(kernels: str, tmp_path: Path) -> None:
    """Or they are written in full, as vectors are; with the module's bias in both cases."""
    random = np.random.default_rng(4)
    shapes = {
        "vision.patch_embedding.weight": (6, 3, 2, 2),
        "vision.patch_embedding.bias": (6,),
        "vision.proj.weight": (6, 8),
        "vision.norm.weight": (8,),
    }
    tables = [
        {name: random.standard_normal(shape).astype(F32) for name, shape in shapes.items()}
        for _ in range(3)
    ]
    for number, table in enumerate(tables):
        write(tmp_path / f"{number}.safetensors", table)
    base, *models = (tmp_path / f"{number}.safetensors" for number in range(3))
    how = {"base": base, "method": "tsv_compress", "kernels": kernels}
    how |= {"allow_base_mismatch": True}
    whole = merge_models(models, **how)
    written = merge_models(models, form="lora", out=tmp_path / "lora", **how)
    for one, other in zip(whole, written, strict=True):
        held = read(other.path)
        prefix = "base_model.model.vision.patch_embedding"
        factored = kernels == "matrix"
        assert (f"{prefix}.lora_A.weight" in held) == factored
        assert (f"{prefix}.base_layer.bias" in held) == factored
        assert (f"{prefix}.weight" in held) == (f"{prefix}.bias" in held) == (not factored)
        again = merge_models([other.path], base=base, method="task_arithmetic")
        assert_close(again, one, 1e-6)


def test_adapters_are_compressed_to_adapters(scene: Scene) -> None:
    """LoRAs in, LoRAs out, one for each, of the rank asked for."""
    ran = call(
        *("merge", "lora1", "lora2", "-m", "tsv_compress", "-p", "share=0.25", "-o", "out"),
        cwd=scene.path,
    )
    assert_done(ran)
    for number, update in enumerate(scene.updates, start=1):
        found = update_of(scene.path / "out" / f"lora{number}")
        for name, array in update.items():
            U, S, Vt = np.linalg.svd(array, full_matrices=False)
            kept = max(min(array.shape) // 4, 1)
            wanted = (U[:, :kept] * S[:kept]) @ Vt[:kept]
            assert np.abs(found[name] - wanted).max() <= 1e-5 * np.abs(array).max()


def test_twins_in_two_steps(tmp_path: Path) -> None:
    """A shared expert, exclusive ones as adapters on it, and their recombination by weights."""
    models, base = tuned(llama, tmp_path), tmp_path / "base"
    shared = tmp_path / "shared"
    merge_models(models, base=base, method="task_arithmetic", lam=0.3, out=shared)
    experts = merge_models(
        models, base=shared, method="tsv_compress", share="0.25", form="lora",
        out=tmp_path / "experts",
    )  # fmt: skip
    twins = merge_models(
        models, base=base, method="twin_merging", lam=0.3, density=0.25, out=tmp_path / "twins"
    )
    for expert, whole in zip(experts, twins, strict=True):
        config = json.loads((expert.path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(shared)
        got = answer(PeftModel.from_pretrained(loaded(llama, shared), expert.path))
        assert (got - answer(loaded(llama, whole.path))).abs().max() < 1e-5
    weights = (0.7, 0.2, 0.1)
    mixed = merge_models(
        [(each.path, weight) for each, weight in zip(experts, weights, strict=True)],
        base=shared,
        method="task_arithmetic",
    )
    wanted = merge_models(
        list(zip(models, weights, strict=True)),
        base=base,
        method="twin_merging",
        lam=0.3,
        density=0.25,
        experts="combined",
    )
    matrices = [name for name, array in wanted.items() if array.ndim == 2]
    assert_close({n: mixed[n] for n in matrices}, {n: wanted[n] for n in matrices}, 1e-6)


@pytest.mark.parametrize("form", ["lora", "delta"])
def test_what_is_left_out_is_not_stored(form: str, scene: Scene) -> None:
    """An update says nothing of tensors that stay at the base."""
    out = scene.path / "out"
    how = ("-m", "tsv_compress", "--as", form, "--exclude", "class=embedding", "--task", "ft1")
    assert_done(call("merge", "ft1", "ft2", "-b", "base", *how, "-o", out, cwd=scene.path))
    (file,) = out.glob("*.safetensors")
    names = set(load_file(file))
    assert any("layers.0" in name for name in names)
    assert not any("embed" in name for name in names)
    plain = ("merge", "out", "-b", "base", "-m", "task_arithmetic", "-o", "model")
    assert_done(call(*plain, cwd=scene.path))
    embeddings = [name for name in scene.base if "embed" in name]
    got = read(scene.path / "model")
    assert embeddings
    for name in embeddings:
        np.testing.assert_array_equal(got[name], scene.base[name])
