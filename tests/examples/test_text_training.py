"""The base, the frozen head and the experts of the text example."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from text_demo.encoder import embed, frozen_head, load_encoder, load_tokenizer, tokens_of
from text_demo.experts import Base, Expert
from text_demo.settings import Settings, TrainSettings, cache_key

from mergebench.merge.fit.find import Setting, parse_task
from tests.examples.text_support import sample, tiny_bert

SETTINGS = Settings(
    max_length=16, rank=4, full=TrainSettings(lr=3e-3, epochs=15), lora=TrainSettings(3e-2, 15)
)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The tasks, a base as BERT is published, and an expert of each kind on the first."""
    work = tmp_path_factory.mktemp("text")
    tasks = sample(work / "files")
    base = Base(str(tiny_bert(work / "bert", tasks, prefixed=True)))
    made = {kind: Expert(base, tasks[0], kind) for kind in ("full", "lora")}
    for expert in made.values():
        assert expert.make(SETTINGS, work)
    return work, tasks, base, made


def accuracy(model, base, task, split="train"):
    tokenizer = load_tokenizer(base)
    head = frozen_head(load_encoder(base), tokenizer, task.prompts, 16)
    texts, labels = zip(*task.splits[split], strict=True)
    with torch.no_grad():
        logits = embed(model, tokens_of(tokenizer, texts, 16)) @ head.T
    return float((logits.argmax(1) == torch.tensor(labels)).double().mean())


def test_the_base_keeps_the_encoder_alone(scene):
    work, _, base, _ = scene
    kept = load_file(base.folder(work) / "model.safetensors")
    whole = load_file(Path(base.source) / "model.safetensors")
    assert not any(name.startswith(("cls", "pooler", "bert")) for name in kept)
    for name, values in kept.items():
        np.testing.assert_array_equal(values, whole[f"bert.{name}"])


def test_the_head_and_the_loss_are_those_of_the_task_that_compare_scores(scene):
    work, tasks, base, _ = scene
    folder = base.folder(work)
    for task in tasks:
        file = work / f"{task.name}.json"
        file.write_text(task.to_json(16, 30.0), encoding="utf-8")
        scorer = parse_task(f"classify:{file}", Setting(folder, batch=1000)).scorer
        (batch,) = scorer.batches("val")
        module = scorer.module()
        with torch.no_grad():
            found = scorer.logits(scorer.forward(module, batch), batch)
        rows = sorted(task.splits["val"], key=lambda row: len(row[0]))
        tokenizer, model = load_tokenizer(folder), load_encoder(folder)
        head = frozen_head(model, tokenizer, task.prompts, 16)
        with torch.no_grad():
            mine = embed(model, tokens_of(tokenizer, [text for text, _ in rows], 16))
        torch.testing.assert_close(found, 30.0 * mine @ head.T, rtol=0, atol=2e-5)
        assert batch["labels"].tolist() == [label for _, label in rows]


# PEFT asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_experts_learn_their_task(scene):
    work, tasks, base, made = scene
    folder = base.folder(work)
    before = accuracy(load_encoder(folder), folder, tasks[0])
    assert before < 0.6
    full = load_encoder(made["full"].folder(SETTINGS, work))
    assert accuracy(full, folder, tasks[0]) > 0.85
    import peft

    lora = peft.PeftModel.from_pretrained(
        load_encoder(folder), made["lora"].folder(SETTINGS, work)
    ).eval()
    assert accuracy(lora, folder, tasks[0]) > 0.85


def test_full_fine_tunes_leave_the_embeddings_and_move_all_else(scene):
    work, _, base, made = scene
    before = load_file(base.folder(work) / "model.safetensors")
    after = load_file(made["full"].folder(SETTINGS, work) / "model.safetensors")
    assert before.keys() == after.keys()
    kept = {name for name in before if np.array_equal(before[name], after[name])}
    # What a key's bias adds is the same for all tokens, so that softmax takes it out again.
    still = {name for name in before if name.endswith("key.bias")}
    assert kept - still == {name for name in before if name.startswith("embeddings.")} - still


def test_a_cached_model_is_not_trained_again(scene):
    work, _, base, made = scene
    for expert in made.values():
        assert not expert.make(SETTINGS, work)
    full, lora = (made[kind].folder(SETTINGS, work) for kind in ("full", "lora"))
    assert (lora / "adapter_config.json").is_file()
    other = replace(SETTINGS, rank=8)
    assert made["full"].folder(other, work) == full
    assert made["lora"].folder(other, work) != lora
    assert made["full"].folder(replace(SETTINGS, seed=1), work) != full
    assert Base("org/name").key == Base("org/name").key != Base("org/other").key
    (Path(base.source) / "more.txt").write_text("changed")
    assert Base(base.source).folder(work) != full.parent.parent / "base"


def test_training_code_is_a_part_of_the_key(monkeypatch, tmp_path):
    from text_demo import settings

    before = cache_key({"a": 1})
    assert cache_key({"a": 1}) == before != cache_key({"a": 2})
    for name in ("encoder.py", "train.py"):
        (tmp_path / name).write_text("other")
    monkeypatch.setattr(settings, "__file__", str(tmp_path / "settings.py"))
    assert cache_key({"a": 1}) != before
