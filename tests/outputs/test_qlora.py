"""Adapters trained on a base in 4 bits, merged onto the bfloat16 base that it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.running import assert_done, assert_refused, call

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
MODULES = ["q_proj", "v_proj", "down_proj"]
#: As transformers writes it into the config of a model that bitsandbytes quantized.
QUANTIZATION = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": None,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def quantize(base: Path, out: Path) -> None:
    """The folder with codes of 4 bits, in bitsandbytes' names; what they decode to is no matter."""
    shutil.copytree(base, out)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        codes = weight.numel() // 2
        stored[name] = torch.zeros((codes, 1), dtype=torch.uint8)
        stored[f"{name}.absmax"] = torch.zeros(-(-codes // 32), dtype=torch.uint8)
        stored[f"{name}.quant_map"] = torch.zeros(16)
        stored[f"{name}.nested_absmax"] = torch.zeros(1)
        stored[f"{name}.nested_quant_map"] = torch.zeros(256)
        stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(90, dtype=torch.uint8)
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZATION}))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` in bfloat16, ``base-4bit``, and an adapter whose config names the latter."""
    folder = tmp_path_factory.mktemp("qlora")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    quantize(folder / "base", folder / "base-4bit")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES))
    for parameter in (p for p in tuned.parameters() if p.requires_grad):
        parameter.data = 0.05 * torch.randn(parameter.shape)
    tuned.save_pretrained(folder / "adapter")
    name_base(folder, str(folder / "base-4bit"))
    return folder


def name_base(folder: Path, name: str, adapter: str = "adapter") -> None:
    """Write the name of a base into the config of an adapter."""
    described = folder / adapter / "adapter_config.json"
    config = json.loads(described.read_text())
    described.write_text(json.dumps({**config, "base_model_name_or_path": name}))


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """The bfloat16 base plus what PEFT adds, in float64."""
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").double()
    return dict(model.merge_and_unload().state_dict())


def test_merged_onto_the_base_in_bfloat16(place: Path) -> None:
    """Every weight is the bfloat16 next to the exact sum, and nothing says 4 bits any more."""
    done = assert_done(
        call("merge", "adapter", "-b", "base", "-m", "task_arithmetic", "-o", "out", cwd=place)
    )
    assert f"adapter names the base {place / 'base-4bit'}, and base is given" in done.err
    assert "6 of its 6 tensors fit" in " ".join(done.err.split())
    exact, got = expected(place), load_file(place / "out" / "model.safetensors")
    assert got.keys() == load_file(place / "base" / "model.safetensors").keys()
    moved = 0
    for name, values in got.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, exact[name].float().bfloat16()), name
        moved += not torch.equal(values, load_file(place / "base" / "model.safetensors")[name])
    assert moved == 2 * len(MODULES)
    assert "quantization_config" not in (place / "out" / "config.json").read_text()
    LlamaForCausalLM.from_pretrained(place / "out")


@pytest.mark.parametrize("base", [["-b", "base-4bit"], ["--as", "model"]])
def test_the_base_in_4_bits_is_refused(place: Path, base: list[str]) -> None:
    """Whether it is given or only named by the adapter: codes cannot be added to."""
    before = sorted(place.iterdir())
    assert_refused(
        call("merge", "adapter", *base, "-m", "task_arithmetic", "-o", "never", cwd=place),
        "base-4bit", "is quantized with bitsandbytes", "use the checkpoint it was made from",
    )  # fmt: skip
    assert sorted(place.iterdir()) == before


def test_as_an_adapter_it_needs_no_base(place: Path) -> None:
    """Merged with another one it stays an adapter, and names the base that both were trained on."""
    shutil.copytree(place / "adapter", place / "second", dirs_exist_ok=True)
    assert_done(call("merge", "adapter", "second", "-m", "linear", "-o", "both", "-f", cwd=place))
    config = json.loads((place / "both" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base-4bit")
