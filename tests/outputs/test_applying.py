"""Adapters into a bfloat16 base and out again: in float32, rounded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.running import assert_done, assert_refused, call

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
Weights = dict[str, torch.Tensor]
RANKS = {"one": 4, "two": 8, "three": 2}
MODULES = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA in bfloat16 and three adapters, saved by their libraries."""
    folder = tmp_path_factory.mktemp("applying")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    for name, rank in RANKS.items():
        settings = peft.LoraConfig(
            r=rank, lora_alpha=8, target_modules=MODULES, use_rslora=name == "two"
        )
        model = peft.get_peft_model(base_of(folder), settings)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data = 0.05 * torch.randn(parameter.shape)
        model.save_pretrained(folder / name)
    return folder


def base_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """The base once more."""
    return LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)


def stored(folder: Path) -> Weights:
    """What a model folder holds."""
    return load_file(folder / "model.safetensors")


def exact_sum(folder: Path) -> Weights:
    """The base plus what PEFT adds for each adapter alone, all in float64."""
    total = {name: each.double() for name, each in stored(folder / "base").items()}
    for name in RANKS:
        base = base_of(folder, torch.float64)
        before = {key: each.clone() for key, each in base.state_dict().items()}
        model = peft.PeftModel.from_pretrained(base, folder / name).double()
        after = model.merge_and_unload().state_dict()
        for key in total:
            total[key] += after[key] - before[key]
    return total


def spacing(values: torch.Tensor) -> torch.Tensor:
    """From each number to the next bfloat16 of its size."""
    return 2.0 ** (torch.floor(torch.log2(values.abs().clamp_min(2.0**-126))) - 7)


def test_several_at_once_are_rounded_once(place: Path) -> None:
    """As near to the exact sum as bfloat16 allows, and nearer than PEFT's merge one by one."""
    command = ("merge", *RANKS, "-b", "base", "-m", "task_arithmetic", "-o", "all", "-f")
    assert_done(call(*command, cwd=place))
    exact, ours = exact_sum(place), stored(place / "all")
    model = base_of(place)
    for name in RANKS:
        model = peft.PeftModel.from_pretrained(model, place / name).merge_and_unload()
    theirs = model.state_dict()
    base = stored(place / "base")

    def error(got: Weights) -> float:
        off = sum(float(((got[key].double() - each) ** 2).sum()) for key, each in exact.items())
        moved = sum(float(((base[k].double() - e) ** 2).sum()) for k, e in exact.items())
        return float(np.sqrt(off / moved))

    nearest = {key: each.to(torch.bfloat16) for key, each in exact.items()}
    for key, each in exact.items():
        # Sums in float32 may fall to the other side of a midpoint.
        slack = 0.5 * spacing(each) + 2.0**-22 * each.abs().max()
        assert ((ours[key].double() - each).abs() <= slack).all(), key
    assert error(ours) <= 1.0001 * error(nearest)
    assert error(theirs) > 1.2 * error(ours)


def test_subtracting_gives_the_base_back(place: Path) -> None:
    """A weight of -1 takes an adapter out of a model; what is left are two roundings."""
    for dtype, digits in (("keep", 8), ("f32", 24)):
        into = ("--dtype", dtype, "-f")
        assert_done(call("merge", "base+one", "-o", "applied", *into, cwd=place))
        back = ("merge", "one:-1", "-b", "applied", "-m", "task_arithmetic", "-o", "back")
        assert_done(call(*back, *into, cwd=place))
        base, held = stored(place / "base"), stored(place / "applied")
        for name, each in stored(place / "back").items():
            step = 2.0 ** (8 - digits) * (spacing(held[name].double()) + spacing(base[name]))
            off = (each.double() - base[name].double()).abs()
            assert (off <= 0.51 * step).all(), name
            moved = (held[name].double() - base[name].double()).abs().max()
            assert moved > 0.01 or not name.removesuffix(".weight").endswith(tuple(MODULES))


def test_what_is_added_and_subtracted_at_once_is_gone(place: Path) -> None:
    """Nothing is rounded in between, so that the base's bytes come out."""
    command = ("merge", "one", "two", "one:-1", "two:-1", "-b", "base", "-m", "task_arithmetic")
    assert_done(call(*command, "-o", "none", "-f", cwd=place))
    for name, each in stored(place / "none").items():
        assert torch.equal(each, stored(place / "base")[name]), name


def test_a_share_that_a_mean_divides_out(place: Path) -> None:
    """It once added what was to be subtracted."""
    ran = call("merge", "base+one:-1", "-o", "wrong", cwd=place)
    assert_refused(ran, "mergebench merge one:-1 --base base -m task_arithmetic")
    assert not (place / "wrong").exists()


@pytest.mark.parametrize("weight", ["2", "-1"])
def test_a_weight_that_changes_nothing(place: Path, weight: str) -> None:
    """Is noted, with what would scale or subtract."""
    ran = assert_done(call("merge", f"base:{weight}", "-o", "same", "-f", cwd=place))
    assert "changes nothing in a mean; to scale or subtract" in ran.err
    for name, each in stored(place / "same").items():
        assert torch.equal(each, stored(place / "base")[name]), name


def test_a_negated_adapter(place: Path) -> None:
    """A minus is kept in the factors that are written."""
    assert_done(call("merge", "one:-1", "-m", "task_arithmetic", "-o", "minus", "-f", cwd=place))
    assert_done(call("merge", "one", "minus", "-b", "base", "-m", "task_arithmetic", "-o", "none",
                     "-f", cwd=place))  # fmt: skip
    for name, each in stored(place / "none").items():
        assert torch.equal(each, stored(place / "base")[name]), name
