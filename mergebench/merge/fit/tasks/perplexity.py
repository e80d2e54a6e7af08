"""Perplexity of a causal language model on local text files, and its loss to learn from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mergebench.checkpoints.documents import read_object
from mergebench.core.errors import ParameterError
from mergebench.loading.perplexity import (
    context_of,
    measure,
    opened,
    perplexity,
    read_words,
    tokenizer_of,
    tokens_of,
    windows,
)
from mergebench.loading.report import need
from mergebench.merge.fit.find import TASKS, Setting
from mergebench.merge.fit.live import fill
from mergebench.merge.fit.task import UnderTest

if TYPE_CHECKING:
    import torch

#: Tokens of a window that is learned from, and most tokens of a batch: a vocabulary of 128,000
#: takes half a megabyte for each.
WINDOW, _TOKENS = 512, 4096
#: Of labels that do not count; torch's own.
_IGNORED = -100


class TextPerplexity:
    """``{"perplexity": …}`` of texts, one file per split.

    ``perplexity:DIR`` has ``DIR/val.txt`` and ``DIR/test.txt``; of a single file, every split is
    the whole file. With a base, one model in memory takes the values of every candidate; without,
    each is written to a folder.

    To be learned from, a text is cut into windows of 512 tokens, or as many as the model sees, each
    of which begins with the last token of the one before, so that every token but the first is
    predicted once; ``limit`` counts windows, and scores are of the same tokens. A batch has at most
    4,096 tokens, however many windows are asked for.

    There are no ``logits``, so that fits without labels (the entropy of predictions, FixMatch)
    refuse the task: a text needs no labels to be learned from by its loss, and the distributions
    of least entropy are those of a model that repeats itself.

    Raises
    ------
    ParameterError
        If there is no such file or folder.
    """

    metric = "perplexity"
    lower_is_better = ("perplexity",)
    instead = (
        "learn from its loss, which takes no labels but the text itself: `fit atlas`, "
        "`fit soup --kind learned`, or `fit statistics --labels true`"
    )

    def __init__(self, place: Path, setting: Setting) -> None:
        files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
        if not files or not all(each.is_file() for each in files):
            raise ParameterError(f"task perplexity:{place}: has no text", fix="give a .txt file")
        self.place, self.base, self.setting = place, setting.base, setting
        digest = hashlib.blake2b(digest_size=8)
        for each in files:
            digest.update(each.read_bytes())
        # Scores of earlier releases were of whole texts, whatever the limit.
        windows_said = "" if setting.limit is None else f" of {setting.limit} windows"
        self.identity = digest.hexdigest() + windows_said

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """See :class:`~mergebench.merge.fit.task.Scorer`."""
        text = self._text(split)
        if self.base is None or not (self.base / "config.json").is_file():
            folder = model.folder()
            most = None if self.setting.limit is None else self._most(folder)
            return {"perplexity": perplexity(folder, text, most=most).perplexity}
        need("transformers")
        module, tokenizer = self._live
        fill(module, model.arrays())
        most = None if self.setting.limit is None else self._most(self.base)
        found = measure(module, tokenizer, read_words(text), model.label, str(text), most=most)
        return {"perplexity": found.perplexity}

    def module(self) -> torch.nn.Module:
        """The base's architecture in float32, with the base's values.

        Raises
        ------
        ParameterError
            Without the folder of a base.
        """
        module: torch.nn.Module = opened(self._folder())[0]
        return module

    def batches(self, split: str) -> Iterator[dict[str, torch.Tensor]]:
        """Windows of tokens (windows, tokens), and as ``labels`` those to be predicted, else -100.

        Raises
        ------
        ParameterError
            Without the folder of a base, or such a split.
        """
        import torch

        text, folder = self._text(split), self._folder()
        ids = tokens_of(self._tokenizer, read_words(text), str(text))
        long = self._window(folder)
        rows = []
        for _, fresh, stop in windows(len(ids), long, long - 1)[: self.setting.limit]:
            # The last window is as long as the others; what was predicted already is context.
            start = max(stop - long, 0)
            labels = ids[start:stop].clone()
            labels[: fresh - start] = _IGNORED
            rows.append((ids[start:stop], labels))
        size = max(min(self.setting.batch, _TOKENS // long), 1)
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            yield {
                "input_ids": torch.stack([each for each, _ in some]),
                "labels": torch.stack([each for _, each in some]),
            }

    def forward(self, module: Any, batch: Mapping[str, Any]) -> Any:
        """What the module returns for a batch, whose labels it is not shown."""
        return module(input_ids=batch["input_ids"], use_cache=False)

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean negative log-likelihood of the tokens that are predicted."""
        import torch

        return torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1).float(),
            batch["labels"][:, 1:].flatten(),
            ignore_index=_IGNORED,
        )

    def _text(self, split: str) -> Path:
        text = self.place / f"{split}.txt" if self.place.is_dir() else self.place
        if not text.is_file():
            raise ParameterError(f"no split {split!r}: {text} is not there")
        return text

    def _folder(self) -> Path:
        if self.base is None or not (self.base / "config.json").is_file():
            raise ParameterError(
                f"task perplexity:{self.place}: learning needs the folder of the base",
                got=str(self.base),
                fix="give --base with config and tokenizer",
            )
        need("transformers")
        return self.base

    def _window(self, folder: Path) -> int:
        config = SimpleNamespace(**read_object(folder / "config.json"))
        return min(WINDOW, context_of(config))

    def _most(self, folder: Path) -> int:
        """Tokens of as many windows as there are at most."""
        assert self.setting.limit is not None
        return self.setting.limit * (self._window(folder) - 1) + 1

    @cached_property
    def _live(self) -> tuple[Any, Any]:
        assert self.base is not None
        return opened(self.base)

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self._folder())


TASKS.add("perplexity", lambda text, setting: TextPerplexity(Path(text).expanduser(), setting))
