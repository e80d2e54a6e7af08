"""Perplexity of causal language models, against the loss that transformers computes."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from warnings import catch_warnings, simplefilter

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mergebench.core.errors import MergebenchError
from mergebench.loading.perplexity import perplexity, windows
from mergebench.loading.report import NotCheckedError
from tests.helpers.libraries import bert, llama, save_loras, save_tuned
from tests.helpers.running import assert_done, assert_refused, call

WORDS = [f"w{number}" for number in range(60)]
TEXT = " ".join(WORDS[(7 * number + number // 9) % 60] for number in range(50))


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *WORDS])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, fine-tunes and adapters with a tokenizer, a merge, and a text."""
    save_tuned(tmp_path, llama)
    save_loras(tmp_path)
    for name in ("base", "ft1", "ft2"):
        save_tokenizer(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    assert_done(call("merge", "ft1", "ft2", "-b", "base", "-o", "out", cwd=tmp_path))
    return tmp_path


def expected(model: LlamaForCausalLM, ids: torch.Tensor, context: int, stride: int) -> float:
    """Token by token, each from the tokens that its window shows."""
    total = 0.0
    for token in range(1, len(ids)):
        step = 0
        while min(step * stride + context, len(ids)) <= token:
            step += 1
        seen = ids[step * stride : token][None]
        with torch.inference_mode():
            logits = model(seen).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, -1)[ids[token]])
    return exp(total / (len(ids) - 1))


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (8, 3), (20, 19), (2, 1)])
def test_every_token_is_predicted_once(models: Path, context: int, stride: int) -> None:
    """From the tokens of its window."""
    found = perplexity(models / "out", models / "text.txt", context=context, stride=stride)

    model = LlamaForCausalLM.from_pretrained(models / "out").eval()
    ids = save_tokenizer(models / "again")(TEXT, return_tensors="pt").input_ids[0]
    assert found.perplexity == pytest.approx(expected(model, ids, context, stride), rel=1e-5)
    assert (found.tokens, found.context, found.stride) == (49, context, stride)


def test_a_text_that_is_seen_at_once(models: Path) -> None:
    """Has the loss that transformers gives."""
    (models / "short.txt").write_text(" ".join(WORDS[:20]))

    found = perplexity(models / "out", models / "short.txt")

    model = LlamaForCausalLM.from_pretrained(models / "out").eval()
    ids = torch.arange(1, 21)[None]
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    assert found.perplexity == pytest.approx(exp(loss), rel=1e-5)
    assert (found.tokens, found.context, found.stride) == (19, 32, 16)


@pytest.mark.parametrize("count", [2, 3, 9, 10, 31])
def test_windows_cover_every_token(count: int) -> None:
    """Without a gap or an overlap of what is predicted, and each within the context."""
    for context in range(2, 9):
        for stride in range(1, context):
            found = windows(count, context, stride)
            predicted = [token for _, fresh, stop in found for token in range(fresh, stop)]
            assert predicted == list(range(1, count))
            assert all(start < fresh and stop - start <= context for start, fresh, stop in found)


def test_adapters_are_put_on_their_base(models: Path) -> None:
    """With PEFT, and the base's tokenizer."""
    found = perplexity(models / "lora1", models / "text.txt", base=models / "base", context=32)

    base = LlamaForCausalLM.from_pretrained(models / "base")
    with catch_warnings():
        simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(base, models / "lora1").eval()
    ids = save_tokenizer(models / "again")(TEXT, return_tensors="pt").input_ids[0]
    assert found.perplexity == pytest.approx(expected(model, ids, 32, 16), rel=1e-5)


def test_command(models: Path) -> None:
    """Of the merge, or of base and inputs too; tokens, context and stride are stated."""
    common = ("check", "out", "--perplexity", "text.txt", "--context", "16")

    one = assert_done(call(*common, cwd=models))
    every = assert_done(call(*common, "--perplexity-all", "--stride", "4", "--json", cwd=models))

    (line,) = [line for line in one.out.splitlines() if "perplexity" in line]
    value = perplexity(Path(models / "out"), models / "text.txt", context=16).perplexity
    assert line == f"out: perplexity {value:.4g} of 49 tokens (context 16, stride 8)"
    rows = every.json["perplexity"]
    assert sorted(each["path"] for each in rows) == ["base", "ft1", "ft2", "out"]
    assert rows[0]["path"] == "out"
    assert len({each["perplexity"] for each in rows}) == 4
    assert {(each["tokens"], each["context"], each["stride"]) for each in rows} == {(49, 16, 4)}


def test_what_cannot_be_measured(models: Path) -> None:
    """Says why and what to do."""
    bert().save_pretrained(models / "bert")
    save_tokenizer(models / "bert")
    (models / "empty.txt").write_text("w1")
    llama().save_pretrained(models / "mute")
    config = json.loads((models / "lora1" / "adapter_config.json").read_text())
    assert not config["base_model_name_or_path"]
    for name, text, words in (
        ("bert", "text.txt", "BertModel predicts no next token"),
        ("mute", "text.txt", "cannot be opened by transformers"),
        ("lora1", "text.txt", "add --base"),
    ):
        with pytest.raises(NotCheckedError, match=words):
            perplexity(models / name, models / text)
    for text, words in (("empty.txt", "is too short"), ("nowhere", "cannot be read as text")):
        with pytest.raises(MergebenchError, match=words):
            perplexity(models / "out", models / text)
    for context, stride in ((33, 1), (8, 8)):
        with pytest.raises(MergebenchError, match="a context of 2 to 32 tokens"):
            perplexity(models / "out", models / "text.txt", context=context, stride=stride)
    refused = call("check", "out", "--stride", "4", cwd=models)
    assert_refused(refused, "need --perplexity FILE")
