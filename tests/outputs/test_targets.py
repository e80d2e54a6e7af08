"""Adapters written for a program: in its names, within its limits, and read by it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from mergebench.adapters_zoo.adapter import read_adapter
from tests.adapters.diffusion import dotted, fused, kohya, model
from tests.adapters.support import source_of, values_of
from tests.adapters.test_layouts import (
    ADAPTED,
    FUSED,
    NETS,
    assert_weights,
    both,
    flat,
    moved,
    options,
    rooted,
    shapes,
)
from tests.helpers.adapters import factors, product, save_kohya, save_peft
from tests.helpers.compare import assert_close
from tests.helpers.files import BF16, F32, listing, metadata, read, write
from tests.helpers.libraries import llama, save_loras
from tests.helpers.models import base_model, save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.updates import update_of

from .test_diffusion import lora

TASK = ("-m", "task_arithmetic", "--as", "lora")


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """Two LoRAs of ranks 4 and 7 on a bf16 model."""
    save_peft(tmp_path / "a", factors(1, rank=4))
    save_peft(tmp_path / "b", factors(2, rank=7))
    save_folder(tmp_path / "base", base_model(dtype=BF16))
    return tmp_path


@pytest.mark.parametrize("target", [None, "peft", "vllm", "sglang", "lorax"])
def test_plain_adapters(loras: Path, target: str | None) -> None:
    """One padded rank, scale 1, no patterns, an explicit list of modules, safetensors."""
    extra = () if target is None else ("--target", target)
    assert_done(call("merge", "a", "b", *TASK, *extra, "-o", "out", cwd=loras))
    config = json.loads((loras / "out" / "adapter_config.json").read_text())
    one, two = product(factors(1, rank=4), 8 / 4), product(factors(2, rank=7), 8 / 7)
    sum_of = {name: one[name] + two[name] for name in one}

    assert config["r"] == config["lora_alpha"] == 16
    assert config["use_rslora"] is False
    assert config["bias"] == "none"
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert isinstance(config["target_modules"], list)
    assert config["modules_to_save"] is None
    assert {
        tensor.shape[0] for key, tensor in stored(loras / "out").items() if "lora_A" in key
    } == {16}
    assert_close(update_of(loras / "out"), sum_of)


def stored(folder: Path) -> Mapping[str, np.ndarray[Any, Any]]:
    """Tensors of a written adapter."""
    return read(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("target", "dtype"), [("peft", F32), ("vllm", BF16), ("lorax", BF16)])
def test_dtype_for_servers(loras: Path, target: str, dtype: Any) -> None:
    """Servers cast factors to the model's dtype, so they are rounded once, here."""
    assert_done(call("merge", "a", "b", "--base", "base", *TASK, "--target", target, "-o", "out",
                     cwd=loras))  # fmt: skip

    assert {tensor.dtype for tensor in stored(loras / "out").values()} == {dtype}


def test_rank_beyond_a_server(loras: Path) -> None:
    """Where the summed rank is too large, the error names the option that helps."""
    save_peft(loras / "c", factors(3, rank=120))
    line = ("merge", "a", "b", "c", *TASK, "--target", "lorax", "-o", "out")
    assert_refused(call(*line, cwd=loras), "lorax", "at most 128", "131", "--rank 128")
    ran = assert_done(call(*line, "--rank", "20", cwd=loras))

    # The largest module of the small model has rank 16.
    assert json.loads((loras / "out" / "adapter_config.json").read_text())["r"] == 16
    assert "truncated to rank" in ran.out


def test_notes_name_the_option_of_the_server(loras: Path) -> None:
    """What has to be said when serving is said when writing."""
    save_peft(loras / "c", factors(3, rank=20))
    ran = call("merge", "a", "b", "c", *TASK, "--target", "vllm", "-o", "out", cwd=loras)

    assert "--max-lora-rank 32" in assert_done(ran).err


@pytest.mark.parametrize("target", ["vllm", "sglang", "lorax"])
def test_what_servers_refuse(target: str, tmp_path: Path) -> None:
    """Convolutions and heads are refused before anything is written."""
    name = "base_model.model.conv"
    arrays = {
        f"{name}.lora_A.weight": np.ones((2, 3, 3, 3), np.float32),
        f"{name}.lora_B.weight": np.ones((4, 2, 1, 1), np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"]}
    write(tmp_path / "conv" / "adapter_model.safetensors", arrays)
    (tmp_path / "conv" / "adapter_config.json").write_text(json.dumps(config))
    line = ("merge", "conv", *TASK, "-o", "out", "--target")
    assert_refused(call(*line, target, cwd=tmp_path), target, "convolutions")
    assert not (tmp_path / "out").exists()
    assert_done(call(*line, "peft", cwd=tmp_path))


@pytest.mark.parametrize("target", ["vllm", "sglang", "lorax"])
def test_heads_for_servers(target: str, tmp_path: Path) -> None:
    """A classification head is read by vLLM, and by no other."""
    name = "base_model.model.q"
    arrays = {
        f"{name}.lora_A.weight": np.ones((2, 3), np.float32),
        f"{name}.lora_B.weight": np.ones((4, 2), np.float32),
        "base_model.model.score.weight": np.ones((2, 4), np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["score"]}
    write(tmp_path / "a" / "adapter_model.safetensors", arrays)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    ran = call("merge", "a", *TASK, "-o", "out", "--target", target, cwd=tmp_path)
    if target == "vllm":
        assert_done(ran)
    else:
        assert_refused(ran, "modules_to_save")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "vlm", "--as", "lora"), "did you mean 'vllm'"),
        (("--energy", "1.5", "--as", "lora"), "at most 1"),
        (("--energy", "0", "--as", "lora"), "above 0"),
        (("--rank", "4", "--as", "delta"), "rank: is for adapters"),
    ],
)
def test_wrong_options(loras: Path, words: tuple[str, ...], message: str) -> None:
    """Options outside of their bounds, or for another output."""
    assert_refused(call("merge", "a", "b", *words, "-o", "out", cwd=loras), message)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_merge"])
@pytest.mark.parametrize("rank", [3, 20])
def test_rank(loras: Path, method: str, rank: int) -> None:
    """The best update of that rank; a concatenation that is small enough loses nothing."""
    line = ("merge", "a", "b", "-m", method)
    assert_done(call(*line, "--as", "delta", "-o", "whole.safetensors", cwd=loras))
    ran = call(*line, "--as", "lora", "--rank", rank, "-o", "out", "--json", cwd=loras)
    residuals = json.loads(assert_done(ran).out)["outputs"][0]["residuals"]
    whole, got = read(loras / "whole.safetensors"), update_of(loras / "out")
    for name, update in whole.items():
        U, S, Vt = np.linalg.svd(update.astype(np.float64), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        lost = np.linalg.norm(S[rank:]) / np.linalg.norm(S)
        assert np.abs(got[name] - best).max() <= 3e-6 * np.abs(update).max()
        if rank == 3:
            assert residuals[name] == pytest.approx(lost, rel=1e-3)
    if rank == 20 and method == "task_arithmetic":
        assert residuals == {}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_merge"])
def test_energy(loras: Path, method: str) -> None:
    """Each module has the least rank that keeps the share, Kohya's files no more than that."""
    line = ("merge", "a", "b", "-m", method)
    assert_done(call(*line, "--as", "delta", "-o", "whole.safetensors", cwd=loras))
    ran = call(*line, "--as", "lora", "--energy", "0.9", "--target", "kohya", "-o",
               "out.safetensors", "--json", cwd=loras)  # fmt: skip
    said = json.loads(assert_done(ran).out)["outputs"][0]
    written = read(loras / "out.safetensors")
    ranks = set()
    for name, update in read(loras / "whole.safetensors").items():
        S = np.linalg.svd(update.astype(np.float64), compute_uv=False)
        kept = np.cumsum(S**2) / (S**2).sum()
        rank = int(np.argmax(kept >= 0.9)) + 1
        ranks.add(rank)
        flat_name = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        assert written[f"{flat_name}.lora_down.weight"].shape[0] == rank
        assert written[f"{flat_name}.alpha"] == rank
        assert said["ranks"][name] == rank
        assert said["residuals"][name] == pytest.approx(np.sqrt(1 - kept[rank - 1]), rel=1e-3)
    assert ranks


def test_energy_loads_in_peft(tmp_path: Path) -> None:
    """PEFT reads what was truncated, and adds what we say it adds."""
    llama().save_pretrained(tmp_path / "base")
    save_loras(tmp_path)
    line = ("merge", "lora1", "lora2", *TASK, "--energy", "0.8", "--target", "vllm", "-o", "out")
    assert_done(call(*line, cwd=tmp_path))
    net = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with catch_warnings():
        # PEFT asks transformers for what the latter calls by another name now.
        simplefilter("ignore", FutureWarning)
        adapted = peft.PeftModel.from_pretrained(net, str(tmp_path / "out"))
    expected = update_of(tmp_path / "out")
    found = {}
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            with torch.no_grad():
                found[f"{name}.weight"] = module.get_delta_weight("default").double().numpy()

    assert_close(found, expected, 1e-6)
    assert set(found) == set(expected)


@pytest.mark.parametrize("target", ["kohya", "diffusers"])
@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("name", NETS)
def test_read_by_diffusers(name: str, layout: str, target: str, tmp_path: Path) -> None:
    """Two LoRAs merged over a base in either layout, read by diffusers and by us."""
    own, original = both(name)
    if layout == "file":
        base = write(tmp_path / "base.safetensors", rooted(name, original))
    else:
        base = tmp_path / ("transformer" if name == "flux" else "unet")
        model(name).save_pretrained(base)
    pair = [lora(name, seed) for seed in (1, 2)]
    if (name, layout, target) == ("flux", "folder", "kohya"):
        # Of blocks whose names begin with lora_transformer_, diffusers reads the attention alone.
        pair = [{k: v for k, v in one.items() if "_attn_" in k} for one in pair]
    for index, one in enumerate(pair):
        write(tmp_path / f"lora{index}.safetensors", one)
    assert_done(
        call("merge", "lora0.safetensors", "lora1.safetensors:0.5", "--base", base, *TASK,
             "--target", target, "-o", "out", cwd=tmp_path)
    )  # fmt: skip
    assert "pytorch_lora_weights.safetensors" in listing(tmp_path / "out")
    got = read(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    one, two = (fused(name, each) for each in pair)
    expected = {key: one[key] + 0.5 * (two[key] - own[key]) for key in own}

    assert_weights(fused(name, got), expected)
    for place in (own, rooted(name, original)):
        first, second = (moved(place, each) for each in pair)
        both_of = {key: first[key] + 0.5 * (second[key] - place[key]) for key in place}
        assert_weights(moved(place, got), both_of)


@pytest.mark.parametrize("target", ["kohya", "diffusers"])
def test_fused_weights_of_flux(target: str, tmp_path: Path) -> None:
    """Query, key and value of a single file are written together or apart, as the names have it."""
    own, original = both("flux")
    base = write(tmp_path / "base.safetensors", original)
    given = kohya(shapes(original, {flat(module): module for module in FUSED}))
    module = "final_layer.adaLN_modulation.1"
    given |= kohya(shapes(original, {flat(module): module}))
    write(tmp_path / "lora.safetensors", given)
    assert_done(call("merge", "lora.safetensors", "--base", base, *TASK, "--target", target,
                     "-o", "out.safetensors", cwd=tmp_path))  # fmt: skip
    got = read(tmp_path / "out.safetensors")

    assert any("to_k" in key for key in got) == (target == "diffusers")
    assert_weights(moved(own, got), moved(own, given))
    assert_weights(moved(original, got), moved(original, given))
    if target == "kohya":
        del given[f"{flat(module)}.alpha"], got[f"{flat(module)}.alpha"]
        got = {key: value for key, value in got.items() if "adaLN" not in key}
        given = {key: value for key, value in given.items() if "adaLN" not in key}
    assert_weights(fused("flux", got), moved(own, given))


def test_dialects_in_a_circle(tmp_path: Path) -> None:
    """Kohya → diffusers → Kohya → PEFT's folder of one model: the update stays."""
    own, _ = both("sd15")
    model("sd15").save_pretrained(tmp_path / "unet")
    given = lora("sd15", 3)
    write(tmp_path / "0.safetensors", given)
    expected = moved(own, given)
    for step, target in enumerate(("diffusers", "kohya", "diffusers", "peft")):
        out = f"{step + 1}.safetensors"
        ran = call("merge", f"{step}.safetensors", "--base", "unet", *TASK, "--target", target,
                   "-o", out, cwd=tmp_path)  # fmt: skip
        assert_done(ran)
        got = read(tmp_path / out)
        source = source_of(got, None, metadata(tmp_path / out))
        deltas = read_adapter(source, options(own))
        changed = {key: own[key] + values_of(delta) for key, delta in deltas.items()}
        assert_weights({**own, **changed}, expected)


def test_without_a_base(tmp_path: Path) -> None:
    """Two LoRAs in diffusers' names give one of the kind; Kohya's cannot become another's."""
    own, _ = both("sd15")
    named = {flat(one): one for one in ADAPTED["sd15"]}
    full = {key: f"unet.{one}" for key, one in named.items()}
    for index in range(2):
        stored = dotted(kohya(shapes(own, named), index), full, old=bool(index))
        write(tmp_path / f"{index}.safetensors", stored)
    line = ("merge", "0.safetensors", "1.safetensors", *TASK, "-o")
    assert_done(call(*line, "same.safetensors", cwd=tmp_path))
    assert_done(call(*line, "kohya.safetensors", "--target", "kohya", cwd=tmp_path))
    given = [read(tmp_path / f"{index}.safetensors") for index in range(2)]
    moves = [moved(own, each) for each in given]
    expected = {key: moves[0][key] + moves[1][key] - own[key] for key in own}

    assert set(read(tmp_path / "same.safetensors")) == {
        f"{module}.lora_{side}.weight" for module in full.values() for side in "AB"
    }
    for name in ("same", "kohya"):
        assert_weights(moved(own, read(tmp_path / f"{name}.safetensors")), expected)
    save_kohya(tmp_path / "flat.safetensors", factors(1))
    ran = call("merge", "flat.safetensors", *TASK, "--target", "vllm", "-o", "x", cwd=tmp_path)
    assert_refused(ran, "flattened", "--base")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, {"vllm": "yes", "sglang": "--max-lora-rank 4 or more", "lorax": "yes"}),
        ({"use_rslora": True}, {"vllm": "yes", "sglang": "use_rslora is ignored", "lorax": "yes"}),
        (
            {"alpha_pattern": {"q_proj": 8}},
            {"vllm": "yes", "sglang": "alpha_pattern is ignored", "lorax": "yes"},
        ),
        ({"target_modules": "all-linear"}, {"vllm": "yes", "sglang": "must be a list"}),
    ],
)
def test_inspect(config: dict[str, Any], words: dict[str, str], tmp_path: Path) -> None:
    """Kind, dialect, ranks, alphas, scales, norms, and what each server says."""
    made = factors(1, rank=4)
    save_peft(tmp_path / "a", made, **config)
    data = json.loads(assert_done(call("inspect", "a", "--json", "-t", cwd=tmp_path)).out)
    update = data["update"]
    scale = 8 / 2 if config.get("use_rslora") else 8 / 4
    norms = {name: np.linalg.norm(each) for name, each in product(made, scale).items()}

    assert update["adapter"] == "lora"
    assert update["dialect"] == "PEFT"
    assert update["ranks"] == {"4": len(made)}
    assert update["alphas"] == [8.0]
    assert update["scales"] == [scale]
    assert update["norm"] == pytest.approx(np.sqrt(sum(n * n for n in norms.values())), rel=1e-5)
    for row in data["tensor_list"]:
        assert float(row["norm"]) == pytest.approx(norms[row["tensor"]], rel=1e-3)
        assert row["alpha"] == "8"
    for server, said in words.items():
        assert said in update["servers"][server]
    assert "dialect" in assert_done(call("inspect", "a", cwd=tmp_path)).out


def test_inspect_kohya(tmp_path: Path) -> None:
    """No server takes another program's file."""
    save_kohya(tmp_path / "a.safetensors", factors(1, rank=4), alpha=2.0)
    data = json.loads(assert_done(call("inspect", "a.safetensors", "--json", cwd=tmp_path)).out)

    assert data["update"]["dialect"] == "Kohya"
    assert data["update"]["alphas"] == [2.0]
    assert all("PEFT's folders" in said for said in data["update"]["servers"].values())
