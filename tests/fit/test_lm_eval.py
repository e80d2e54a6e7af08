"""Tasks of the language model evaluation harness, with a definition of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.merge.fit.candidate import only
from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.fit.scores import Scores
from mergebench.merge.fit.tasks.lm_eval import collected
from tests.fit.support import make, recipe_of

COLOURS = ("red", "blue", "green")
THINGS = ("sky", "grass", "fire", "sea", "leaf", "blood", "moss", "rose")
DEFINITION = """task: colours
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    validation: {folder}/val.jsonl
    test: {folder}/test.jsonl
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "the {{{{thing}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, two fine-tunes of it, and a task with different examples on each split."""
    folder = tmp_path_factory.mktemp("harness")
    words = ["<unk>", "<s>", "</s>", "the", "is", *COLOURS, *THINGS]
    kind = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    plain = Tokenizer(kind)
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, **heads}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20.0 if parameter.ndim > 1 else 1.0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("base", "ft1", "ft2"):
        model.load_state_dict(state)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.0 if name == "base" else 0.15 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    random = np.random.default_rng(0)
    for split, things in (("val", THINGS[:5]), ("test", THINGS)):
        rows = [{"thing": thing, "choices": COLOURS, "label": int(random.integers(3))}
                for thing in things]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(DEFINITION.format(folder=folder))
    return folder


def accuracy(folder: Path, rows: Path, values: Any = None) -> float:
    """By hand: the colour that the model finds likeliest as the next word."""
    model = LlamaForCausalLM.from_pretrained(folder)
    if values is not None:
        model.load_state_dict({k: torch.tensor(v) for k, v in values.items()}, strict=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    choices = [tokenizer.convert_tokens_to_ids(word) for word in COLOURS]
    right = []
    for row in map(json.loads, rows.read_text().splitlines()):
        ids = tokenizer(f"the {row['thing']} is", return_tensors="pt").input_ids
        with torch.no_grad():
            last = model(ids).logits[0, -1]
        right.append(int(last[choices].argmax()) == row["label"])
    return float(np.mean(right))


def test_splits_and_live_models(scene: Path) -> None:
    """Each split has its own examples; in memory and from a folder the scores are the same."""
    spec = f"lm_eval:{scene / 'colours.yaml'}"
    live = parse_task(spec, Setting(base=scene / "base"))
    written = parse_task(spec, Setting())
    merge = recipe_of(scene / "ft1", scene / "ft2", method="linear")
    seen = set()
    for recipe, folder in ((only(str(scene / "ft1")), scene / "ft1"), (merge, None)):
        with make(recipe, "x") as candidate:
            for split in ("val", "test"):
                values = None if folder else candidate.arrays()
                expected = accuracy(folder or scene / "ft1", scene / f"{split}.jsonl", values)
                for task in (live, written):
                    (found,) = Scores([task]).of(candidate, split)
                    by_hand = {"mean": expected, "colours/acc": expected}
                    assert found.scores == pytest.approx(by_hand)
                    assert found.value == pytest.approx(expected)
                seen.add(expected)
    # Different enough that a wrong split or model would show.
    assert len(seen) >= 3


def test_refusals(scene: Path) -> None:
    """Splits that a task does not have, files that are none, names of nothing."""
    task = parse_task(f"lm_eval:{scene / 'colours.yaml'}", Setting(base=scene / "base"))
    with make(only(str(scene / "ft1")), "x") as candidate:
        for split, words in (
            ("train", "task colours has no split 'train', expected val, validation, test"),
            ("dev", "no split 'dev'"),
        ):
            with pytest.raises(ParameterError, match=words):
                task.scorer.score(candidate, split)
    (scene / "no.yaml").write_text("dataset_path: json\n")
    for spec, error, words in (
        ("lm_eval:", ParameterError, "names no task"),
        (f"lm_eval:{scene}/no.yaml", FormatError, "is no task"),
        (f"lm_eval:{scene}/none.yaml", FormatError, "cannot be read as a task"),
    ):
        with pytest.raises(error, match=words):
            parse_task(spec, Setting())


def test_a_definition_is_part_of_what_scores_are_kept_under(scene: Path, tmp_path: Path) -> None:
    """Another definition of the same name is another task."""
    copy = tmp_path / "colours.yaml"
    copy.write_text((scene / "colours.yaml").read_text())
    before = parse_task(f"lm_eval:{copy}", Setting()).spec
    assert parse_task(f"lm_eval:{copy}", Setting()).spec == before
    copy.write_text(copy.read_text() + "num_fewshot: 1\n")
    assert parse_task(f"lm_eval:{copy}", Setting()).spec != before


def test_what_is_collected() -> None:
    """Metrics alone: not what the harness tells of a task besides; the preferred one counts."""
    results = {
        "a": {"alias": "a", "sample_len": 8, "acc,none": 0.25, "acc_stderr,none": 0.1,
              "acc_norm,none": 0.5},
        "b": {"alias": "b", "sample_len": 3, "exact_match,strict": 1.0, "f1,none": 0.0},
    }  # fmt: skip
    assert collected(results) == {
        "mean": 0.75, "a/acc": 0.25, "a/acc_norm": 0.5, "b/exact_match": 1.0, "b/f1": 0.0,
    }  # fmt: skip
    with pytest.raises(MergebenchError, match=r"task c has no known metric.*got perplexity"):
        collected({"c": {"perplexity,none": 3.0}})
