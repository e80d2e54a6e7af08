"""Merged models are tried by the libraries that load them, without their values."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.core.errors import MergebenchError
from mergebench.loading import report
from mergebench.loading.check import check_loading
from mergebench.loading.report import Loaded, NotCheckedError, compared, without_inherited
from tests.helpers.files import listing, read, write
from tests.helpers.libraries import (
    bert,
    llama,
    mixtral,
    save_loras,
    save_tuned,
    tied_llama,
    unet,
)
from tests.helpers.running import assert_done, assert_refused, call

BUILDERS: dict[str, Any] = {
    "llama": llama,
    "tied llama": tied_llama,
    "bert": bert,
    "mixtral": mixtral,
    "unet": unet,
}
MERGE = ("merge", "ft1", "ft2", "-b", "base", "-m", "task_arithmetic")
#: One tensor of each model, as it is called on the disk.
ONE = {
    "llama": "model.layers.1.mlp.up_proj.weight",
    "tied llama": "model.layers.1.mlp.up_proj.weight",
    "bert": "encoder.layer.0.output.dense.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w2.weight",
    "unet": "mid_block.resnets.0.conv1.weight",
}


def weights_in(folder: Path) -> Path:
    """The only weights file of a folder."""
    (path,) = folder.glob("*.safetensors")
    return path


def damage(folder: Path, name: str, how: str) -> None:
    """Take a tensor away, add one, or give it another shape, in a folder of one file."""
    path = weights_in(folder)
    arrays = dict(read(path))
    if how == "missing":
        del arrays[name]
    elif how == "unexpected":
        arrays["another.weight"] = arrays[name]
    else:
        arrays[name] = np.concatenate([arrays[name], arrays[name]])
    write(path, arrays, {"format": "pt"})


def names(found: Loaded) -> dict[str, list[str]]:
    """What the report has, by kind, without what is empty."""
    said = {
        "missing": list(found.missing),
        "unexpected": list(found.unexpected),
        "misshapen": [name for name, _, _ in found.misshapen],
        "errors": list(found.errors),
    }
    return {key: value for key, value in said.items() if value}


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("shards", [(), ("--shard-size", "20kB")], ids=["whole", "shards"])
def test_merged_models_fit(tmp_path: Path, kind: str, shards: tuple[str, ...]) -> None:
    """Tied weights and names that the library converts included."""
    save_tuned(tmp_path, BUILDERS[kind])
    assert_done(call(*MERGE, *shards, "-o", "out", cwd=tmp_path))

    found = check_loading(tmp_path / "out")

    assert names(found) == {}
    assert found.library == ("diffusers" if kind == "unet" else "transformers")
    assert found.architecture == type(BUILDERS[kind]()).__name__
    assert found.tensors == len(read(tmp_path / "out"))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("how", ["missing", "unexpected", "misshapen"])
def test_what_does_not_fit_is_named(tmp_path: Path, kind: str, how: str) -> None:
    """By the name on the disk, with both shapes."""
    BUILDERS[kind]().save_pretrained(tmp_path)
    damage(tmp_path, ONE[kind], how)

    found = check_loading(tmp_path)

    name = "another.weight" if how == "unexpected" else ONE[kind]
    assert names(found) == {how: [name]}
    assert found.findings == 1
    if how == "misshapen":
        ((_, stored, expected),) = found.misshapen
        assert stored == (2 * expected[0], *expected[1:])


def test_diffusers_models_are_written_as_diffusers_finds_them(tmp_path: Path) -> None:
    """Its own name for the weights."""
    save_tuned(tmp_path, unet)
    assert_done(call(*MERGE, "-o", "out", "--check", cwd=tmp_path))

    assert "diffusion_pytorch_model.safetensors" in listing(tmp_path / "out")
    assert type(unet()).from_pretrained(tmp_path / "out").config.sample_size == 8


@pytest.mark.parametrize("how", ["missing", "unexpected", "misshapen"])
def test_adapters(tmp_path: Path, how: str) -> None:
    """A merged LoRA fits its base, for which a config is enough."""
    save_tuned(tmp_path, llama)
    save_loras(tmp_path)
    assert_done(call("merge", "lora1", "lora2", "-m", "ties", "-o", "out", cwd=tmp_path))
    weights_in(tmp_path / "base").unlink()

    found = check_loading(tmp_path / "out", tmp_path / "base")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    damage(tmp_path / "out", name, how)
    broken = check_loading(tmp_path / "out", tmp_path / "base")

    assert (names(found), found.tensors) == ({}, 8)
    assert (found.library, found.architecture) == ("peft", "LORA on LlamaForCausalLM")
    assert names(broken) == {how: ["another.weight" if how == "unexpected" else name]}
    with pytest.raises(NotCheckedError, match="the base of the adapter is not here"):
        check_loading(tmp_path / "out", tmp_path / "ft3")


def test_pipelines(tmp_path: Path) -> None:
    """Every model that the index names, whichever library it is of; the others have no weights."""
    unet().save_pretrained(tmp_path / "unet")
    bert().save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "scheduler").mkdir()
    index: dict[str, Any] = {
        "_class_name": "TinyPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "BertModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))

    found = check_loading(tmp_path)

    assert (names(found), found.architecture) == ({}, "TinyPipeline")
    damage(tmp_path / "unet", ONE["unet"], "missing")
    damage(tmp_path / "text_encoder", ONE["bert"], "misshapen")
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert names(check_loading(tmp_path)) == {
        "missing": [f"unet/{ONE['unet']}"],
        "misshapen": [f"text_encoder/{ONE['bert']}"],
        "errors": ["vae: the folder is missing"],
    }
    ran = call("check", tmp_path, cwd=tmp_path)
    assert ran.code == 1
    assert "3 findings" in ran.out.splitlines()[-1]


def test_single_files_take_the_config_of_the_base(tmp_path: Path) -> None:
    """Models and diffusion models; task vectors are loaded by nobody else."""
    save_tuned(tmp_path, unet)
    assert_done(call(*MERGE, "-o", "out.safetensors", cwd=tmp_path))
    assert_done(call(*MERGE, "--as", "delta", "-o", "tau.safetensors", cwd=tmp_path))
    assert_done(call(*MERGE, "--as", "delta", "-o", "tau", cwd=tmp_path))

    assert names(check_loading(tmp_path / "out.safetensors", tmp_path / "base")) == {}
    assert names(check_loading(weights_in(tmp_path / "base"))) == {}
    for name, base, words in (
        ("out.safetensors", None, "has no config.json"),
        ("tau.safetensors", tmp_path / "base", "is a task vector"),
        ("tau", tmp_path / "base", "is a task vector"),
    ):
        with pytest.raises(NotCheckedError, match=words):
            check_loading(tmp_path / name, base)
    with pytest.raises(MergebenchError, match="no such file or folder"):
        check_loading(tmp_path / "nowhere")


@pytest.mark.parametrize("library", ["transformers", "diffusers", "peft"])
def test_missing_library_names_its_extra(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; a merge is refused before it begins."""
    builder = unet if library == "diffusers" else llama
    save_tuned(tmp_path, builder)
    save_loras(tmp_path)
    found = importlib.util.find_spec
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == library else found(name))
    models = ("lora1", "lora2") if library == "peft" else ("ft1", "ft2", "-b", "base")
    extra = {"transformers": "eval"}.get(library, library)
    line = (f"{library} is not installed", f"pip install 'mergebench[{extra}]'")

    refused = call("merge", *models, "-o", "out", "--check", cwd=tmp_path)
    assert_refused(refused, *line)
    assert not (tmp_path / "out").exists()
    assert_done(call("merge", *models, "-o", "out", cwd=tmp_path))
    ran = call("check", "out", cwd=tmp_path)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    for words in line:
        assert words in ran.err


def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    """Whatever its config asks for."""
    llama().save_pretrained(tmp_path / "own")
    marker = tmp_path / "marker"
    (tmp_path / "own" / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').close()")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    for change in (
        {"architectures": ["OwnForCausalLM"], "model_type": "own"},
        {"architectures": ["LlamaForCausalLM"]},
    ):
        auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
        changed = {**config, **change, "auto_map": auto}
        (tmp_path / "own" / "config.json").write_text(json.dumps(changed))
        ran = call("check", "own", cwd=tmp_path)
        assert ran.code == (2 if "model_type" in change else 0)
        assert not marker.exists()
    ran = call("check", "own", "--json", cwd=tmp_path)
    assert ran.json["loading"]["architecture"] == "LlamaForCausalLM"
    save_loras(tmp_path)
    assert names(check_loading(tmp_path / "lora1", tmp_path / "own")) == {}
    (tmp_path / "text.txt").write_text("some words")
    assert call("check", "own", "--perplexity", "text.txt", cwd=tmp_path).code == 2
    assert not marker.exists()


def test_unknown_architecture(tmp_path: Path) -> None:
    """It may be one of another version."""
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))

    with pytest.raises(NotCheckedError, match=r"has no NoSuchModel; another version"):
        check_loading(tmp_path)


def test_what_the_inputs_have_too_is_noted(tmp_path: Path) -> None:
    """A merge is not blamed for it; what it has lost itself is a finding."""
    save_tuned(tmp_path, bert)
    for name in ("base", "ft1", "ft2"):
        damage(tmp_path / name, ONE["bert"], "unexpected")
        damage(tmp_path / name, "pooler.dense.bias", "missing")

    ran = call(*MERGE, "-o", "out", "--check", cwd=tmp_path)
    damage(tmp_path / "out", "pooler.dense.weight", "missing")
    after = call("check", "out", "--json", cwd=tmp_path)

    assert (ran.code, ran.out.splitlines()[-1].startswith("out: fits; ")) == (0, True)
    assert "1 missing as in base: pooler.dense.bias" in ran.err
    assert "1 unexpected as in base: another.weight" in ran.err
    assert after.code == 1
    assert after.json["loading"]["missing"] == ["pooler.dense.weight"]
    alone = check_loading(tmp_path / "out")
    assert names(alone)["missing"] == ["pooler.dense.bias", "pooler.dense.weight"]


def test_inherited_only_if_every_input_has_it() -> None:
    """One that is whole shows what should be there."""
    found = Loaded("peft", "1", "X", missing=("a", "b"), unexpected=("c",))
    one = Loaded("peft", "1", "X", missing=("a",), unexpected=("c",))
    two = Loaded("peft", "1", "X", missing=("a", "b"))

    left = without_inherited(found, [("one", one), ("two", two)])

    assert (left.missing, left.unexpected) == (("b",), ("c",))
    assert left.notes == ("1 missing as in one, two: a",)
    assert without_inherited(found, []) == found
    assert compared({"a": (1,), "c": (2,)}, {"b": (1,), "c": (3,)}) == {
        "tensors": 2,
        "missing": ("b",),
        "unexpected": ("a",),
        "misshapen": (("c", (2,), (3,)),),
    }


def test_merge_and_check_in_one_command(tmp_path: Path) -> None:
    """Every output of a sweep; findings give exit code 1, and the merge stays."""
    save_tuned(tmp_path, tied_llama)
    sweep = (*MERGE, "-p", "lam=0.5,1", "-o", "out", "--check")

    ran = assert_done(call(*sweep, "--json", cwd=tmp_path))
    assert [each["path"] for each in ran.json["checks"]] == ["out/lam=0.5", "out/lam=1"]
    assert [each["findings"] for each in ran.json["checks"]] == [0, 0]
    for name in ("base", "ft1", "ft2"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["intermediate_size"] = 40
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "out")
    ran = call(*MERGE, "-o", "out", "--check", cwd=tmp_path)
    assert ran.code == 1
    assert "misshapen: model.layers.0.mlp.up_proj.weight: [48, 32], expected [40, 32]" in ran.out
    assert "model.safetensors" in listing(tmp_path / "out")


def test_libraries_keep_their_settings(tmp_path: Path) -> None:
    """What is silenced for the check speaks again after it."""
    from diffusers.utils import logging as two
    from transformers.utils import logging as one

    unet().save_pretrained(tmp_path)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in (one, two)]
    check_loading(tmp_path)

    after = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in (one, two)]
    assert before == after
