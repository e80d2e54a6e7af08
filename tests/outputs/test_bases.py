"""Adapters trained on slices of a shared basis add up without crosstalk, through the command."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from transformers import GPT2Config, GPT2LMHeadModel

from mergebench.compute.basis import basis_columns, drawn_columns, slot_columns
from mergebench.core.site import key_of
from tests.helpers.files import F64, Array, tree
from tests.helpers.libraries import llama
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.updates import update_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of widths 32 and 48, and three adapters trained on slots 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(folder / "base")
    for slot in range(3):
        words = ("make-basis", folder / "base", "--rank", 4, "--slot", slot, "-o", f"start{slot}")
        assert_done(call(*words, cwd=folder))
        train(base, folder / f"start{slot}", folder / f"lora{slot}", seed=slot)
    return folder


def train(base: Any, start: Path, out: Path, seed: int) -> None:
    """As the documentation says: open with PEFT, freeze the down-projections, train, save."""
    torch.manual_seed(seed)
    model = PeftModel.from_pretrained(copy.deepcopy(base), start, is_trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    tokens = torch.randint(0, 64, (4, 8))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.save_pretrained(out)


def down(folder: Path) -> dict[str, Array]:
    """Down-projections by module, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {n.removesuffix(DOWN): a.astype(F64) for n, a in tensors.items() if n.endswith(DOWN)}


def reported(folder: Path, *words: str) -> dict[str, list[float]]:
    """What `crosstalk` says of every pair and module."""
    rows = assert_done(call("crosstalk", *words, "--json", cwd=folder)).json["rows"]
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["what"], []).append(row["value"])
    return found


def test_training_leaves_the_slices_alone(place: Path) -> None:
    """Every linear weight has its slice of the basis of its width, before and after training."""
    for slot in range(3):
        before, after = down(place / f"start{slot}"), down(place / f"lora{slot}")
        assert len(before) == 14
        assert set(before) == set(after)
        for module, array in before.items():
            width = 48 if "down_proj" in module else 32
            exact = basis_columns(width, 0, slot_columns(4, slot)).T
            assert np.abs(array - exact).max() < 1e-7
            assert array.tobytes() == after[module].tobytes()


def test_a_fresh_slice_changes_nothing(place: Path) -> None:
    """Up-projections begin with zero, and the adapter is one that is ready for training."""
    assert all(not array.any() for array in update_of(place / "start0").values())
    config = json.loads((place / "start0" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 4, False)
    assert all(array.any() for array in update_of(place / "lora0").values())


def test_disjoint_slots_have_no_crosstalk(place: Path) -> None:
    """Crosstalk and overlap below 1e-6, all angles right; of an adapter with itself 1 overlap."""
    found = reported(place, "lora0", "lora1", "lora2")
    assert len(found["crosstalk"]) == 3 * 14
    assert max(found["crosstalk"]) < 1e-6
    assert max(found["overlap of row spaces"]) < 1e-6
    assert min(found["smallest angle"]) > 89.9999
    torch.manual_seed(0)
    train(llama(), place / "start0", place / "rival", seed=9)
    rival = reported(place, "lora0", "rival")
    assert min(rival["overlap of row spaces"]) > 1 - 1e-6


def test_their_sum_is_each_of_them_on_its_inputs(place: Path) -> None:
    """Summed in factors, for x in the slice of one adapter the update is that adapter's alone."""
    words = ("merge", "lora0", "lora1", "lora2", "-m", "task_arithmetic", "-o", "sum", "--force")
    ran = assert_done(call(*words, cwd=place))
    assert "truncated" not in ran.out
    config = json.loads((place / "sum" / "adapter_config.json").read_text())
    # Three of rank 4, filled with zeros up to what servers take.
    assert config["r"] == 16
    merged = update_of(place / "sum")
    singles = [update_of(place / f"lora{slot}") for slot in range(3)]
    assert set(merged) == set(singles[0])
    for name, total in merged.items():
        assert np.abs(total - sum(each[name] for each in singles)).max() < 1e-6
        for slot, single in enumerate(singles):
            inputs = down(place / f"lora{slot}")[f"base_model.model.{name.removesuffix('.weight')}"]
            largest = np.abs(single[name]).max()
            assert np.abs((total - single[name]) @ inputs.T).max() < 1e-6 * largest


def test_projection_finds_nothing_to_do(place: Path) -> None:
    """Projected sums of such adapters are plain sums: all energy is retained."""
    words = ("merge", "lora0", "lora1", "lora2", "-m", "orthogonal", "-o", "apart", "--force")
    for variant in ("sequential", "joint"):
        ran = assert_done(call(*words, "-p", f"variant={variant}", "--json", cwd=place))
        (output,) = ran.json["outputs"]
        kept = [r["value"] for r in output["readings"] if r["what"] == "retained energy"]
        assert len(kept) == 3 * 14
        assert min(kept) > 1 - 1e-6


def test_bases_of_a_model_and_of_its_widths_are_the_same(place: Path) -> None:
    """A file of slices holds what an adapter holds, and a whole basis all slots."""
    slices = ("--width", 32, "--width", 48, "--rank", 4, "--slot", 1, "-o", "slices.safetensors")
    assert_done(call("make-basis", *slices, cwd=place))
    assert_done(call("make-basis", "base", "--rank", 4, "-o", "whole.safetensors", cwd=place))
    cut, whole = (load_file(place / f"{name}.safetensors") for name in ("slices", "whole"))
    adapter = load_file(place / "start1" / "adapter_model.safetensors")
    for width, module in ((32, "self_attn.q_proj"), (48, "mlp.down_proj")):
        name = f"base_model.model.model.layers.1.{module}{DOWN}"
        assert cut[f"basis.{width}"].tobytes() == adapter[name].tobytes()
        assert whole[f"basis.{width}"].shape == (width, width)
        assert whole[f"basis.{width}"][4:8].tobytes() == adapter[name].tobytes()


def test_metadata_say_what_it_is(place: Path) -> None:
    """Seed, rank and slot stand in the file, so that others can take another slot."""
    for name, wanted in (("start1/adapter_model", 1), ("start2/adapter_model", 2)):
        with safe_open(place / f"{name}.safetensors", "np") as file:
            about = json.loads(file.metadata()["mergebench_basis"])
        assert about == {"version": 1, "rank": 4, "seed": 0, "slot": wanted, "draw": None}


def test_random_draws_may_collide(place: Path) -> None:
    """By name, whoever draws; what two names share shows as overlap."""
    for name in ("ann", "bob"):
        words = ("--width", 32, "--rank", 8, "--draw", name, "-o", f"{name}.safetensors")
        ran = assert_done(call("make-basis", *words, cwd=place))
        assert "two draws share 2.00 directions on average, none with probability 0.070" in ran.out
    ann, bob = (load_file(place / f"{n}.safetensors")["basis.32"] for n in ("ann", "bob"))
    columns = [drawn_columns(32, 8, 0, key_of(name)) for name in ("ann", "bob")]
    shared = len(set(columns[0]) & set(columns[1]))
    assert np.sum((ann @ bob.T) ** 2) == pytest.approx(shared, abs=1e-5)
    assert np.abs(ann - basis_columns(32, 0, columns[0]).T).max() < 1e-7


def test_gpt2_and_chosen_layers(tmp_path: Path) -> None:
    """Weights stored input × output have their inputs first; selectors choose layers."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    )
    model.save_pretrained(tmp_path / "gpt2")
    words = ("make-basis", "gpt2", "--rank", 2, "--slot", 3, "--exclude", "block=1", "-o", "out")
    data = assert_done(call(*words, "--json", cwd=tmp_path)).json
    assert [(each["width"], each["modules"]) for each in data["widths"]] == [(16, 3), (64, 1)]
    shapes = {name: array.shape for name, array in down(tmp_path / "out").items()}
    assert {name.split("h.0.")[1]: shape for name, shape in shapes.items()} == {
        "attn.c_attn": (2, 16),
        "attn.c_proj": (2, 16),
        "mlp.c_fc": (2, 16),
        "mlp.c_proj": (2, 64),
    }
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"]
    opened = PeftModel.from_pretrained(model, tmp_path / "out", is_trainable=True)
    first = opened.base_model.model.transformer.h[0].attn.c_attn.lora_A["default"].weight
    exact = basis_columns(16, 0, slot_columns(2, 3)).T
    assert np.abs(first.detach().numpy() - exact).max() < 1e-7


@pytest.mark.parametrize(("dtype", "near"), [("f64", 1e-13), ("bf16", 0.02), ("f16", 0.002)])
def test_dtypes(dtype: str, near: float, tmp_path: Path) -> None:
    """Other precisions are roundings of the same numbers; half precision costs orthogonality."""
    words = ("--width", 64, "--rank", 8, "--slot", 0, "--dtype", dtype, "-o", "b.safetensors")
    assert_done(call("make-basis", *words, cwd=tmp_path))
    rows = load_torch(tmp_path / "b.safetensors")["basis.64"].double().numpy()
    assert np.abs(rows @ rows.T - np.eye(8)).max() < near
    assert np.abs(rows - basis_columns(64, 0, range(8)).T).max() < near


REFUSED: dict[tuple[Any, ...], str] = {
    ("base", "--rank", 4, "--slot", 8, "-o", "x"): "width 32, expected 0 to 7, got 8",
    ("base", "--rank", 4, "--slot", -1, "-o", "x"): "expected 0 to 7, got -1",
    ("base", "--rank", 33, "--slot", 0, "-o", "x"): "rank 33 exceeds width 32",
    ("base", "--rank", 17, "--slot", 0, "-o", "x"): "exceeds a side of",
    ("base", "--rank", 0, "--slot", 0, "-o", "x"): "`rank`, expected 1 to",
    ("base", "--seed", -1, "--slot", 0, "-o", "x"): "`seed`, expected 0 to 4294967295",
    ("base", "--seed", 2**32, "--slot", 0, "-o", "x"): "`seed`",
    ("base", "--rank", 4, "-o", "x"): "give a model and --slot",
    ("--width", 32, "--rank", 4, "--slot", 0, "-o", "x"): "an adapter is for a model",
    ("base", "--width", 32, "--slot", 0, "-o", "x"): "one of them",
    ("-o", "x.safetensors"): "needs a model or widths",
    ("base", "--slot", 0, "--draw", "ann", "-o", "x"): "give one of them",
    ("base", "--rank", 4, "--slot", 0, "--include", "class=norm", "-o", "x"): "no linear weight",
    ("base", "--rank", 4, "--slot", 0, "--exclude", "proj", "-o", "x"): "all excluded",
    ("--width", 32, "--include", "q", "-o", "x.safetensors"): "give the model",
    ("--width", 0, "-o", "x.safetensors"): "`width`, expected 1 to",
    ("--width", 2**20 + 1, "-o", "x.safetensors"): "`width`",
    ("--width", 32, "--dtype", "f8", "-o", "x.safetensors"): "--dtype: 'f8'",
    ("lora0", "--slot", 0, "-o", "x"): "adapters are trained on a checkpoint",
    ("nowhere", "--slot", 0, "-o", "x"): "no such file",
    ("base", "--rank", 4, "--slot", 0, "-o", "start0"): "exists already",
}


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(map(str, words)))
def test_what_cannot_be_is_refused(words: tuple[Any, ...], place: Path) -> None:
    """One line, exit code 2, nothing written."""
    before = tree(place)
    assert_refused(call("make-basis", *words, cwd=place), REFUSED[words])
    assert tree(place) == before


def test_blocks_of_columns_are_one_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide bases are made a few columns at a time, which changes no bit."""
    words = ("make-basis", "--width", 32, "--width", 7, "--rank", 5, "-o")
    assert_done(call(*words, "whole.safetensors", cwd=tmp_path))
    monkeypatch.setattr("mergebench.compute.basis._HELD", 100)
    assert_done(call(*words, "blocks.safetensors", cwd=tmp_path))
    whole, blocks = ((tmp_path / f"{name}.safetensors") for name in ("whole", "blocks"))
    assert blocks.read_bytes() == whole.read_bytes()


def test_force_replaces(tmp_path: Path) -> None:
    """An adapter or a file is replaced when asked."""
    save_file(
        {"model.layers.0.q_proj.weight": np.zeros((4, 8), np.float32)}, tmp_path / "m.safetensors"
    )
    for slot in (0, 1):
        words = ("m.safetensors", "--rank", 2, "--slot", slot, "-o", "out", "--force")
        assert_done(call("make-basis", *words, cwd=tmp_path))
    (rows,) = down(tmp_path / "out").values()
    assert np.abs(rows - basis_columns(8, 0, (2, 3)).T).max() < 1e-7
