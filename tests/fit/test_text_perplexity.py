"""The built-in task of perplexity: scores in memory and from folders, and a loss to learn from."""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from mergebench.core.errors import ParameterError
from mergebench.loading.perplexity import perplexity
from mergebench.merge.fit.adamerging import SETTINGS as ADAMERGING
from mergebench.merge.fit.atlas import SETTINGS as ATLAS
from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.fit.forward import check, forward_of
from mergebench.merge.fit.mixture import load_mixture
from mergebench.merge.fit.objectives import loss_of
from mergebench.merge.fit.scores import Scores
from mergebench.merge.fit.settings import Settings
from tests.fit.support import make, recipe_of
from tests.helpers.files import read
from tests.helpers.libraries import llama, save_tuned
from tests.helpers.running import Ran, assert_done, assert_refused, call
from tests.safety.test_perplexity import TEXT, save_tokenizer


def test_a_live_model_scores_as_a_folder_does(tmp_path: Path) -> None:
    """One model takes the values of each candidate, and no folder is written for it."""
    save_tuned(tmp_path, llama)
    for name in ("base", "ft1", "ft2"):
        save_tokenizer(tmp_path / name)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "val.txt").write_text(TEXT)
    (texts / "test.txt").write_text(" ".join(reversed(TEXT.split())))
    live = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base"))
    written = parse_task(f"perplexity:{texts}", Setting())
    seen = set()
    for names in (("ft1",), ("ft2",), ("ft1", "ft2")):
        for split in ("val", "test"):
            recipe = recipe_of(*(tmp_path / name for name in names), method="linear")
            with make(recipe, "x") as candidate:
                (found,) = Scores([live]).of(candidate, split)
                assert candidate._place is None
                expected = perplexity(candidate.folder(), texts / f"{split}.txt").perplexity
                (other,) = Scores([written]).of(candidate, split)
            assert found.scores == pytest.approx({"perplexity": expected}, rel=1e-5)
            assert other.scores == {"perplexity": expected}
            assert found.value == pytest.approx(-expected, rel=1e-5)
            seen.add(round(expected, 6))
    assert len(seen) == 6
    with (
        make(recipe_of(tmp_path / "ft1"), "x") as candidate,
        pytest.raises(ParameterError, match="no split 'train'"),
    ):
        live.scorer.score(candidate, "train")


def tuned(folder: Path) -> Path:
    """A base and two fine-tunes with a tokenizer, and texts longer than what the model sees."""
    save_tuned(folder, llama)
    for name in ("base", "ft1", "ft2"):
        save_tokenizer(folder / name)
    texts = folder / "texts"
    texts.mkdir()
    (texts / "train.txt").write_text(" ".join(f"w{(11 * n + n // 7) % 60}" for n in range(75)))
    (texts / "val.txt").write_text(TEXT)
    (texts / "test.txt").write_text(" ".join(reversed(TEXT.split())))
    return texts


def test_every_token_but_the_first_is_learned_once(tmp_path: Path) -> None:
    """In windows of what the model sees (32), of which the last looks back to be as long."""
    texts = tuned(tmp_path)
    task = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base", batch=2)).scorer
    first, last = task.batches("train")

    text = (texts / "train.txt").read_text()
    ids = save_tokenizer(tmp_path / "again")(text, return_tensors="pt").input_ids[0]
    assert first["input_ids"].tolist() == [ids[:32].tolist(), ids[31:63].tolist()]
    assert first["labels"].tolist() == [[-100, *ids[1:32].tolist()], [-100, *ids[32:63].tolist()]]
    assert last["input_ids"].tolist() == [ids[43:].tolist()]
    assert last["labels"].tolist() == [[-100] * 20 + ids[63:].tolist()]
    # No more windows than asked for, nor than 4,096 tokens: 128 windows of 32.
    one = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base", limit=1)).scorer
    assert [len(each["input_ids"]) for each in one.batches("train")] == [1]
    (texts / "long.txt").write_text(" ".join("w1" for _ in range(31 * 130 + 1)))
    many = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base", batch=500)).scorer
    assert [len(each["input_ids"]) for each in many.batches("long")] == [128, 2]


def test_the_limit_holds_for_scores_too(tmp_path: Path) -> None:
    """Of one window of 32 tokens, the loss that is learned from is the logarithm of the score."""
    texts = tuned(tmp_path)
    for base in (tmp_path / "base", None):
        task = parse_task(f"perplexity:{texts}", Setting(base=base, limit=1))
        with make(recipe_of(tmp_path / "ft1"), "x") as candidate:
            (found,) = Scores([task]).of(candidate, "train")
        model = LlamaForCausalLM.from_pretrained(tmp_path / "ft1")
        learned = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base", limit=1)).scorer
        (batch,) = learned.batches("train")
        loss = float(learned.loss(learned.forward(model, batch), batch).detach())
        assert log(found.scores["perplexity"]) == pytest.approx(loss, rel=1e-5)
    whole = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base"))
    assert whole.spec != task.spec


def test_the_gradient_of_coefficients_is_that_of_a_loss_by_hand(tmp_path: Path) -> None:
    """-log p of every token, by softmax and indices, through θ0 + Σ c τ of a tiny LLaMA."""
    texts = tuned(tmp_path)
    task = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base", batch=8))
    recipe = recipe_of(tmp_path / "ft1", tmp_path / "ft2", base=str(tmp_path / "base"),
                       method="task_arithmetic", params={"lam": 1.0})  # fmt: skip
    mixture = load_mixture(make(recipe, "mixture").plan, torch.float32)
    at = torch.linspace(-0.4, 0.6, 2 * mixture.columns).reshape(2, -1)
    forward = forward_of(mixture.plan, [task], Settings(), "train", "cpu")
    with torch.no_grad():
        for name, value in mixture.each_value(at):
            forward.parameters[name].copy_(value).requires_grad_(True)
    loss = loss_of(forward, Settings(), None).of(0, 0, 0.0, torch.Generator())
    torch.autograd.backward(loss)
    found = mixture.gradient({n: p.grad for n, p in forward.parameters.items()})

    ids = next(iter(task.scorer.batches("train")))["input_ids"]
    text = torch.cat([ids[0], ids[1, 1:], ids[2, 20:]])
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    learned = at.clone().requires_grad_(True)
    states = [LlamaForCausalLM.from_pretrained(model.label).state_dict()
              for model in mixture.plan.models]  # fmt: skip
    start, values = model.state_dict(), {}
    for column, name in enumerate(mixture.names):
        values[name] = start[name] + sum(
            learned[row, column] * (states[row][name] - start[name]) for row in range(2)
        )
    total, count = torch.zeros(()), 0
    for first, fresh, stop in ((0, 1, 32), (31, 32, 63), (43, 63, 75)):
        seen = text[first:stop]
        scores = torch.func.functional_call(model, values, (seen[None],)).logits[0]
        chances = scores.exp() / scores.exp().sum(-1, keepdim=True)
        for place in range(fresh, stop):
            total = total - chances[place - first - 1, text[place]].log()
            count += 1
    assert count == len(text) - 1 == 74
    (total / count).backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()) / count, rel=1e-5)
    assert learned.grad is not None
    torch.testing.assert_close(found, learned.grad, rtol=1e-3, atol=1e-5)


def test_a_text_has_no_labels_to_do_without(tmp_path: Path) -> None:
    """Entropy and FixMatch say what to do instead; so do those that need the base."""
    texts = tuned(tmp_path)
    task = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base"))
    for settings in (ADAMERGING["tensor"], ATLAS["test-time"]):
        with pytest.raises(ParameterError, match="takes no labels but the text itself"):
            check(task, settings)
    check(task, ATLAS["addition"])
    without = parse_task(f"perplexity:{texts}", Setting()).scorer
    with pytest.raises(ParameterError, match="needs the folder of the base"):
        without.module()
    with pytest.raises(ParameterError, match="needs the folder of the base"):
        next(iter(without.batches("val")))
    with pytest.raises(ParameterError, match="no split 'dev'"):
        next(iter(task.scorer.batches("dev")))


def test_fits_and_statistics_of_texts_alone(tmp_path: Path) -> None:
    """Coefficients, soups, Fisher and Gram matrices by the command line, and what they merge to."""
    texts = tuned(tmp_path)
    common = ("ft1", "ft2", "-b", "base", "--task", "perplexity:texts")

    def run(*args: str) -> Ran:
        return call(*args, cwd=tmp_path, env={"XDG_CACHE_HOME": str(tmp_path / "cache")})

    atlas = ("fit", "atlas", *common, "--learn-on", "train", "--rate", "0.05", "--epochs", "8")
    made = assert_done(run(*atlas, "-o", "a.yaml", "--json")).json
    assert made["history"][-1] < made["history"][0]
    assert_done(run("run", "a.yaml", "-o", "out-a"))
    again = perplexity(tmp_path / "out-a", texts / "test.txt").perplexity
    assert made["test"][0]["scores"]["perplexity"] == pytest.approx(again, rel=1e-4)
    soup = ("fit", "soup", *common, "--kind", "learned", "--select", "train", "--epochs", "3")
    assert_done(run(*soup, "-o", "s.yaml"))
    refused = run("fit", "adamerging", *common, "-o", "x.yaml")
    assert_refused(refused, "takes no labels but the text itself")
    collect = ("fit", "statistics", "ft1", "ft2", "-b", "base", "--split", "train",
               "--task", "one=perplexity:texts", "--task", "two=perplexity:texts")  # fmt: skip
    assert_refused(run(*collect, "--kind", "fisher", "-o", "f"), "logits", "--labels true")
    assert_done(run(*collect, "--kind", "fisher", "--labels", "true", "-o", "f"))
    assert_done(run(*collect, "--kind", "gram", "-o", "g"))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "ft2")
    squares, inputs = [], []
    task = parse_task(f"perplexity:{texts}", Setting(base=tmp_path / "base")).scorer
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for batch in task.batches("train"):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            # transformers' own loss, which shifts labels itself.
            (slope,) = torch.autograd.grad(
                model(ids[None], labels=labels[None]).loss, [model.lm_head.weight]
            )
            squares.append(slope**2)
    hook.remove()
    stacked = torch.cat(inputs).detach().double()
    for folder, wanted in (
        ("f", torch.stack(squares).mean(0)),
        ("g", stacked.T @ stacked / len(stacked)),
    ):
        held = read(tmp_path / folder / "ft2.safetensors")["lm_head.weight"]
        np.testing.assert_allclose(held, wanted.numpy(), rtol=1e-4, atol=1e-7)
    for method, folder in (("fisher", "f"), ("regmean", "g")):
        files = [f"{folder}/{name}.safetensors" for name in ("ft1", "ft2")]
        given = [part for each in files for part in ("--statistics", each)]
        assert_done(run("merge", "ft1", "ft2", "-m", method, *given, "-o", f"out-{method}"))
