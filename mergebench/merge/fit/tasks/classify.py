"""Text classification with a transformers model: its own head, or one made of descriptions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import read_bounded
from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.core.plain import parse_json
from mergebench.loading.report import need, silent
from mergebench.merge.fit.find import TASKS, Setting
from mergebench.merge.fit.live import fill
from mergebench.merge.fit.task import UnderTest

if TYPE_CHECKING:
    import torch

_LARGEST = 1 << 30
_TOKENS, _SCALE = 128, 30.0
_OFFLINE = {"local_files_only": True, "trust_remote_code": False}

Row = tuple[str, int]


class Classify:
    """Accuracy and cross-entropy on texts with labels.

    The file is JSON: ``{"prompts": […], "train": [[text, label], …], "val": …, "test": …}`` with
    labels counted from 0. Where there are ``prompts``, one description per class, the head is
    frozen: mean-pooled, normalised embeddings of the descriptions as the *base* sees them, and
    logits are 30 times the cosine (``scale``), as CLIP classifies. Without, the base must have a
    classification head, which is a part of the model. Texts are cut at 128 tokens
    (``max_length``).

    Raises
    ------
    ParameterError
        Without a base.
    FormatError
        If the file is not as said.
    """

    metric = "accuracy"
    lower_is_better = ("loss",)

    def __init__(self, file: Path, setting: Setting) -> None:
        if setting.base is None or not setting.base.is_dir():
            raise ParameterError(
                f"task classify:{file}: needs the folder of the base",
                got=str(setting.base),
                fix="give --base with config and tokenizer",
            )
        need("transformers")
        try:
            raw = read_bounded(file, _LARGEST)
        except OSError as error:
            raise cannot("read", file, error) from None
        self.identity = hashlib.blake2b(raw, digest_size=8).hexdigest()
        self.base, self.setting = setting.base, setting
        self.prompts, self.splits, self.tokens, self.scale = _parsed(raw, str(file))

    def rows(self, split: str) -> list[Row]:
        """Texts and labels, the first ``limit`` of them.

        Raises
        ------
        ParameterError
            If there is no such split.
        """
        if split not in self.splits:
            raise ParameterError(f"no split {split!r}", expected=", ".join(sorted(self.splits)))
        return self.splits[split][: self.setting.limit]

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """Accuracy and loss; see :class:`~mergebench.merge.fit.task.Scorer`."""
        import torch

        module = self._live
        fill(module, model.arrays())
        module.eval()
        right, loss, count = 0, 0.0, 0
        with torch.inference_mode():
            for batch in self.batches(split):
                logits = self.logits(self.forward(module, batch), batch)
                labels = batch["labels"]
                right += int((logits.argmax(1) == labels).sum())
                loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                count += len(labels)
        return {"accuracy": right / count, "loss": loss / count}

    def module(self) -> torch.nn.Module:
        """The base's architecture in float32, with the base's values."""
        import transformers

        kind: Any = transformers.AutoModel
        if not self.prompts:
            kind = transformers.AutoModelForSequenceClassification
        options: dict[str, Any] = {"add_pooling_layer": False} if self._pools else {}
        with silent(transformers.utils.logging):
            made: torch.nn.Module = kind.from_pretrained(
                self.base, dtype="float32", **options, **_OFFLINE
            )
        return made

    def batches(self, split: str) -> Iterator[dict[str, torch.Tensor]]:
        """Tokens of texts of alike lengths, and their labels."""
        return self._batches(self.rows(split))

    def few(self, split: str, shots: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """As :meth:`batches`, of at most ``shots`` texts of each class."""
        order = np.random.default_rng(seed).permutation(len(self.rows(split)))
        taken: dict[int, list[Row]] = {}
        for row in (self.rows(split)[place] for place in order):
            own = taken.setdefault(row[1], [])
            if len(own) < shots:
                own.append(row)
        return self._batches([row for own in taken.values() for row in own])

    def _batches(self, rows: Sequence[Row]) -> Iterator[dict[str, torch.Tensor]]:
        import torch

        rows = sorted(rows, key=lambda row: len(row[0]))
        for start in range(0, len(rows), self.setting.batch):
            some = rows[start : start + self.setting.batch]
            yield {
                **self._tokens([text for text, _ in some]),
                "labels": torch.tensor([label for _, label in some]),
            }

    def forward(self, module: Any, batch: Mapping[str, Any]) -> Any:
        """What the module returns for a batch, whose labels it is not shown."""
        return module(**{key: value for key, value in batch.items() if key != "labels"})

    def logits(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """(examples, classes)."""
        if not self.prompts:
            return outputs.logits  # type: ignore[no-any-return]
        pooled = _pooled(outputs, batch)
        return self.scale * pooled @ self._head.to(pooled).T

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean cross-entropy."""
        import torch

        return torch.nn.functional.cross_entropy(self.logits(outputs, batch), batch["labels"])

    @cached_property
    def _live(self) -> torch.nn.Module:
        return self.module()

    @cached_property
    def _pools(self) -> bool:
        """Whether the architecture has a pooling layer, which a frozen head does without."""
        import inspect

        import transformers

        if not self.prompts:
            return False
        config = transformers.AutoConfig.from_pretrained(self.base, **_OFFLINE)
        kind: Any = transformers.AutoModel._model_mapping[type(config)]
        return "add_pooling_layer" in inspect.signature(kind).parameters

    @cached_property
    def _tokenizer(self) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.base, **_OFFLINE)

    def _tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(
            self._tokenizer(
                texts, truncation=True, max_length=self.tokens, padding=True, return_tensors="pt"
            )
        )

    @cached_property
    def _head(self) -> torch.Tensor:
        import torch

        module = self.module().eval()
        tokens = self._tokens(self.prompts)
        with torch.no_grad():
            return _pooled(module(**tokens), tokens)


def _pooled(outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Normalised means over the tokens of each text."""
    import torch

    states = outputs.last_hidden_state
    there = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return torch.nn.functional.normalize((states * there).sum(1) / there.sum(1), dim=-1)


def _parsed(raw: bytes, where: str) -> tuple[list[str], dict[str, list[Row]], int, float]:
    try:
        data = parse_json(raw.decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{where}: is no JSON", got=str(error)) from None
    if not isinstance(data, dict):
        raise FormatError(f"{where}: must be a mapping of splits", got=type(data).__name__)
    prompts = data.get("prompts", [])
    if not isinstance(prompts, list) or not all(isinstance(each, str) for each in prompts):
        raise FormatError(f"{where}: `prompts` must be a list of texts")
    splits = {}
    for split, rows in data.items():
        # What else such files say of themselves, a licence or a source, is no split.
        if split != "prompts" and isinstance(rows, list) and rows and isinstance(rows[0], list):
            splits[split] = [_row(row, len(prompts), f"{where}: {split}") for row in rows]
    if not splits:
        raise FormatError(f"{where}: has no split such as val and test")
    tokens, scale = data.get("max_length", _TOKENS), data.get("scale", _SCALE)
    if not isinstance(tokens, int) or tokens < 1 or not isinstance(scale, (int, float)):
        raise MergebenchError(f"{where}: `max_length` and `scale` must be numbers")
    return prompts, splits, tokens, float(scale)


def _row(row: Any, classes: int, where: str) -> Row:
    if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
        raise FormatError(f"{where}: a row is [text, label]", got=repr(row)[:100])
    label = row[1]
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise FormatError(f"{where}: a label is a number from 0", got=repr(label)[:100])
    if classes and label >= classes:
        raise FormatError(f"{where}: label {label}", expected=f"less than {classes}, the prompts")
    return row[0], label


TASKS.add("classify", lambda text, setting: Classify(Path(text).expanduser(), setting))
