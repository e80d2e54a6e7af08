import json
from dataclasses import replace

import pytest
import torch
from digits_demo import experts as cached
from digits_demo.checkpoints import (
    load_adapter,
    load_expert,
    load_model,
    load_state,
    save_adapter,
    save_model,
)
from digits_demo.data import Split, load_splits
from digits_demo.lora import add_lora, apply_factors, factors, target_names
from digits_demo.model import DigitViT, ViTConfig
from digits_demo.settings import Settings, TrainSettings, base_key, expert_key
from digits_demo.train import fine_tune, fine_tune_lora, pretrain
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

SHORT = TrainSettings(epochs=1, lr=1e-2)
SETTINGS = Settings(
    seeds=(0,),
    ranks=(2,),
    vit=ViTConfig(dim=16, depth=2, heads=2),
    pretrain=replace(SHORT, shift=True),
    full=SHORT,
    lora=SHORT,
)


@pytest.fixture(scope="module")
def train():
    whole = load_splits(0)["train"]
    return Split(whole.images[:96], whole.labels[:96])


@pytest.fixture(scope="module")
def base(train):
    return pretrain(SETTINGS, 0, train).state_dict()


@pytest.fixture
def images(train):
    return torch.from_numpy(train.images[:8])


def model_of(state):
    model = DigitViT(SETTINGS.vit)
    model.load_state_dict(state)
    return model


def test_patches_are_cut_row_by_row():
    image = torch.arange(64.0).view(1, 8, 8)
    patches = DigitViT().patchify(image)
    assert patches.shape == (1, 16, 4)
    assert patches[0, 0].tolist() == [0, 1, 8, 9]
    assert patches[0, 1].tolist() == [2, 3, 10, 11]
    assert patches[0, 4].tolist() == [16, 17, 24, 25]
    assert patches[0, 15].tolist() == [54, 55, 62, 63]


def test_a_seed_repeats_the_training_bit_for_bit(train, base):
    again = pretrain(SETTINGS, 0, train).state_dict()
    other = pretrain(SETTINGS, 1, train).state_dict()
    assert all(torch.equal(base[name], again[name]) for name in base)
    assert not torch.equal(base["head.weight"], other["head.weight"])


def test_full_fine_tuning_moves_everything_but_the_head(train, base):
    tuned = fine_tune(base, SETTINGS, 0, "inverted", train).state_dict()
    same = {name for name in base if torch.equal(base[name], tuned[name])}
    assert same == {"head.weight", "head.bias"}


def test_training_lowers_the_loss_on_its_domain(train, base):
    longer = replace(SETTINGS, full=replace(SHORT, epochs=40))
    tuned = fine_tune(base, longer, 0, "inverted", train)
    inverted, labels = torch.from_numpy(1 - train.images), torch.from_numpy(train.labels)
    loss = torch.nn.functional.cross_entropy
    with torch.inference_mode():
        before, after = loss(model_of(base)(inverted), labels), loss(tuned(inverted), labels)
    assert after < 0.6 * before


def test_a_fresh_lora_changes_nothing_and_trains_only_its_factors(base, images):
    model = model_of(base)
    with torch.inference_mode():
        before = model(images)
    add_lora(model, SETTINGS.lora_targets, 2, 4)
    with torch.inference_mode():
        assert torch.equal(model(images), before)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(factors(model))
    assert len(trainable) == 2 * 2 * 4


def test_training_and_applying_lora_factors_agree(train, base, images):
    lora = fine_tune_lora(base, SETTINGS, 0, "rotated", train, 2)
    wrapped = model_of(base)
    add_lora(wrapped, SETTINGS.lora_targets, 2, 4)
    wrapped.load_state_dict(lora, strict=False)
    applied = model_of(apply_factors(base, lora, 2.0))
    with torch.inference_mode():
        torch.testing.assert_close(applied(images), wrapped(images), rtol=0, atol=1e-6)
        assert (applied(images) - model_of(base)(images)).abs().max() > 1e-2


def test_a_saved_model_comes_back_exactly(tmp_path, base, images):
    save_model(tmp_path / "base", base, SETTINGS.vit)
    state = load_state(tmp_path / "base")
    assert state.keys() == base.keys()
    assert all(torch.equal(state[name], base[name]) for name in base)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / "base")(images), model_of(base)(images))
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["model_type"] == "digit_vit"
    assert {name: config[name] for name in SETTINGS.vit.to_dict()} == SETTINGS.vit.to_dict()


def test_peft_reads_the_saved_adapter_and_finds_the_same_update(tmp_path, train, base, images):
    lora = fine_tune_lora(base, SETTINGS, 0, "mirrored", train, 2)
    folder = tmp_path / "adapter"
    save_adapter(folder, lora, 2, 4, SETTINGS.lora_targets, "base")
    theirs = PeftModel.from_pretrained(model_of(base), folder)
    ours = apply_factors(base, lora, 2.0)
    names = target_names(model_of(base), SETTINGS.lora_targets)
    assert len(names) == 8
    for name in names:
        layer = theirs.base_model.model.get_submodule(name)
        delta = layer.get_delta_weight("default").detach()
        update = ours[f"{name}.weight"] - base[f"{name}.weight"]
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(delta, update, rtol=0, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), model_of(ours)(images), rtol=0, atol=1e-5)


def test_peft_writes_the_same_tensors_under_the_same_names(tmp_path, train, base):
    lora = fine_tune_lora(base, SETTINGS, 0, "mirrored", train, 2)
    save_model(tmp_path / "base", base, SETTINGS.vit)
    named = str(tmp_path / "base")
    save_adapter(tmp_path / "ours", lora, 2, 4, SETTINGS.lora_targets, named)
    PeftModel.from_pretrained(model_of(base), tmp_path / "ours").save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / k / "adapter_model.safetensors") for k in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [
        json.loads((tmp_path / k / "adapter_config.json").read_text()) for k in ("ours", "peft")
    ]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == {name: configs[1][name] for name in configs[0]}
    assert configs[0]["base_model_name_or_path"] == named


def test_a_saved_adapter_comes_back_exactly_and_applies_to_its_base(tmp_path, train, base):
    lora = fine_tune_lora(base, SETTINGS, 0, "noisy", train, 2)
    save_model(tmp_path / "base", base, SETTINGS.vit)
    save_adapter(tmp_path / "noisy", lora, 2, 6, SETTINGS.lora_targets, "base")
    read, scaling = load_adapter(tmp_path / "noisy")
    assert scaling == 3.0
    assert read.keys() == lora.keys()
    assert all(torch.equal(read[name], lora[name]) for name in lora)
    expert = load_expert(tmp_path / "noisy", tmp_path / "base").state_dict()
    expected = apply_factors(base, lora, 3.0)
    assert all(torch.equal(expert[name], expected[name]) for name in expected)


def test_a_trained_model_is_reused_and_an_unfinished_one_is_not(tmp_path, monkeypatch, train):
    monkeypatch.setattr(cached, "load_splits", lambda _seed: {"train": train})
    expert = cached.Expert(0)
    folder = expert.folder(SETTINGS, tmp_path)
    folder.with_name(f"{folder.name}.partial").mkdir(parents=True)
    assert cached.make(expert, SETTINGS, tmp_path)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert not cached.make(expert, SETTINGS, tmp_path)
    assert weights.stat().st_mtime_ns == written
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for rank in (None, 2):
        assert cached.make(cached.Expert(0, "rotated", rank), SETTINGS, tmp_path)
    assert len(list(folder.parent.iterdir())) == 3


def test_the_cache_key_follows_what_the_weights_depend_on():
    longer = replace(SETTINGS, pretrain=replace(SHORT, epochs=2))
    keys = {
        base_key(SETTINGS, 0),
        base_key(SETTINGS, 1),
        base_key(longer, 0),
        expert_key(SETTINGS, 0, "rotated", None),
        expert_key(longer, 0, "rotated", None),
        expert_key(SETTINGS, 0, "mirrored", None),
        expert_key(SETTINGS, 0, "rotated", 2),
        expert_key(SETTINGS, 0, "rotated", 4),
        expert_key(replace(SETTINGS, lora_alpha_per_rank=1), 0, "rotated", 4),
    }
    assert len(keys) == 9
    assert base_key(SETTINGS, 0) == base_key(replace(SETTINGS, sum_grid=("0.5",)), 0)
