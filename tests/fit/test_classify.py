"""Text classification: against the library's own forward pass from the merged folder."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from mergebench.core.errors import MergebenchError
from mergebench.merge.fit.adamerging import SETTINGS
from mergebench.merge.fit.atlas import SETTINGS as ATLAS
from mergebench.merge.fit.find import Setting, parse_task
from mergebench.merge.fit.learn import Settings, learn
from mergebench.merge.fit.mixture import load_mixture
from mergebench.merge.fit.scores import Scores
from tests.fit.support import make, recipe_of
from tests.helpers.libraries import SIZES, bert, save_tuned

WORDS = [f"w{number}" for number in range(60)]
PROMPTS = ["w1 w2 w3", "w10 w11", "w20 w21 w22 w23"]


def texts(count: int, classes: int, seed: int) -> list[list[Any]]:
    """Random words of random lengths with random labels."""
    random = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=random))

    return [
        [" ".join(WORDS[draw(60)] for _ in range(1 + draw(12))), draw(classes)]
        for _ in range(count)
    ]


def save_tokenizer(folder: Path) -> None:
    """One token a word, padded with a token of its own."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERTs without a head and with one, and data for both."""
    place = tmp_path_factory.mktemp("classify")
    save_tuned(place, bert)
    save_tuned(
        place / "headed", lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=4))
    )
    for name in ("base", "ft1", "ft2"):
        save_tokenizer(place / name)
        save_tokenizer(place / "headed" / name)
    rows = {"val": texts(20, 3, 1), "test": texts(30, 3, 2)}
    about = {"task": "words", "licence": "none", "prompts": PROMPTS}
    (place / "data.json").write_text(json.dumps({**about, **rows}))
    (place / "headed.json").write_text(json.dumps({"val": texts(25, 4, 3), "max_length": 6}))
    return place


def test_descriptions(scene: Path) -> None:
    """Cosine of means over tokens to what the base makes of the descriptions, times 30."""
    setting = Setting(base=scene / "base", batch=7)
    task = parse_task(f"classify:{scene}/data.json", setting)
    assert task.name == "data"
    recipe = recipe_of(
        scene / "ft1", scene / "ft2", base=str(scene / "base"), method="task_arithmetic"
    )
    with make(recipe, "merge") as candidate:
        (found,) = Scores([task]).of(candidate, "test")
        merged = AutoModel.from_pretrained(candidate.folder()).eval()
        base = AutoModel.from_pretrained(scene / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(scene / "base")

    def embed(model: Any, text: str) -> torch.Tensor:
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        return mean / mean.norm()

    rows = json.loads((scene / "data.json").read_text())["test"]
    with torch.inference_mode():
        head = torch.stack([embed(base, text) for text in PROMPTS])
        logits = torch.stack([30 * head @ embed(merged, text) for text, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    right = float((logits.argmax(1) == labels).float().mean())
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    assert found.scores["accuracy"] == pytest.approx(right, abs=1e-6)
    assert found.scores["loss"] == pytest.approx(loss, rel=1e-4)
    assert found.value == found.scores["accuracy"]


def test_own_head(scene: Path) -> None:
    """Without descriptions the model's own head classifies; texts are cut as told."""
    place = scene / "headed"
    task = parse_task(f"classify:{scene}/headed.json", Setting(base=place / "base", limit=18))
    with make(recipe_of(place / "ft1"), "one") as candidate:
        (found,) = Scores([task]).of(candidate, "val")
    model = BertForSequenceClassification.from_pretrained(place / "ft1").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    rows = json.loads((scene / "headed.json").read_text())["val"][:18]
    options: dict[str, Any] = {"return_tensors": "pt", "truncation": True, "max_length": 6}
    with torch.inference_mode():
        logits = torch.cat([model(**tokenizer(text, **options)).logits for text, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    right = float((logits.argmax(1) == labels).double().mean())
    assert found.scores["accuracy"] == pytest.approx(right, abs=1e-12)
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    assert found.scores["loss"] == pytest.approx(loss, rel=1e-4)


def test_learned_from(scene: Path) -> None:
    """Labels lower the loss that the scorer sees, and entropy falls without them."""
    recipe = recipe_of(
        scene / "ft1",
        scene / "ft2",
        base=str(scene / "base"),
        method="task_arithmetic",
        params={"lam": 1.0},
    )
    task = parse_task(f"classify:{scene}/data.json", Setting(base=scene / "base", batch=10))
    mixture = load_mixture(make(recipe, "x").plan)
    learned = learn(mixture, [task], Settings(epochs=15, rate=0.05), "val")
    assert learned.history[-1] < learned.history[0] - 0.01
    losses = []
    for coefficients in (torch.zeros_like(learned.coefficients), learned.coefficients):
        with make(mixture.recipe(coefficients), "learned") as candidate:
            losses.append(Scores([task]).of(candidate, "val")[0].scores["loss"])
    assert losses[1] < losses[0] - 0.01
    few = replace(SETTINGS["tensor"], steps=40, rate=0.02)
    still = learn(mixture, [task], few, "val")
    assert still.history[-1] < still.history[0]
    # By FixMatch trusted examples of several batches are cut out of them, padding and all.
    surer = learn(mixture, [task], replace(ATLAS["test-time"], rate=0.05, epochs=3), "val")
    assert len(surer.history) == 3


def test_a_few_of_each_class(scene: Path) -> None:
    """As many as asked for where there are, drawn by the seed, each once."""
    task = parse_task(f"classify:{scene}/data.json", Setting(base=scene / "base", batch=4))
    rows = task.scorer.rows("val")
    counts = Counter(label for _, label in rows)
    drawn = []
    for seed in (0, 0, 1):
        batches = list(task.scorer.few("val", 3, seed))
        labels = torch.cat([each["labels"] for each in batches]).tolist()
        assert Counter(labels) == {label: min(3, count) for label, count in counts.items()}
        assert all(len(each["labels"]) <= 4 for each in batches)
        tokens = [each["input_ids"].tolist() for each in batches]
        drawn.append([row for batch in tokens for row in batch])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("[]", "must be a mapping of splits"),
        ("{", "is no JSON"),
        ('{"prompts": ["a"]}', "has no split"),
        ('{"prompts": "a", "val": [["a", 0]]}', "`prompts` must be a list"),
        ('{"prompts": ["a"], "val": [["a", 1]]}', "label 1, expected less than 1"),
        ('{"val": [["a", -1]]}', "a label is a number from 0"),
        ('{"val": [["a", true]]}', "a label is a number from 0"),
        ('{"val": [["a", 0], ["b"]]}', "a row is"),
        ('{"val": [["a", 0]], "max_length": "x"}', "must be numbers"),
    ],
)
def test_data_that_is_none(scene: Path, tmp_path: Path, data: str, words: str) -> None:
    """One line that says what is wrong with it."""
    place = tmp_path / "odd.json"
    place.write_text(data)
    with pytest.raises(MergebenchError, match=words):
        parse_task(f"classify:{place}", Setting(base=scene / "base"))


def test_splits_are_named(scene: Path) -> None:
    """One that is not there is refused with those that are."""
    task = parse_task(f"classify:{scene}/data.json", Setting(base=scene / "base"))
    with (
        make(recipe_of(scene / "ft1"), "one") as candidate,
        pytest.raises(MergebenchError, match="no split 'dev', expected test, val"),
    ):
        Scores([task]).of(candidate, "dev")
