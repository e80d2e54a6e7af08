"""Perplexity of a causal language model on a local text file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mergebench.core.errors import ParameterError
from mergebench.loading.perplexity import measure, opened, perplexity
from mergebench.loading.report import need
from mergebench.merge.fit.find import TASKS, Setting
from mergebench.merge.fit.live import fill
from mergebench.merge.fit.task import UnderTest


class TextPerplexity:
    """``{"perplexity": …}`` of texts, one file per split.

    ``perplexity:DIR`` has ``DIR/val.txt`` and ``DIR/test.txt``; of a single file, every split is
    the whole file. With a base, one model in memory takes the values of every candidate; without,
    each is written to a folder.

    Raises
    ------
    ParameterError
        If there is no such file or folder.
    """

    metric = "perplexity"
    lower_is_better = ("perplexity",)

    def __init__(self, place: Path, setting: Setting) -> None:
        files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
        if not files or not all(each.is_file() for each in files):
            raise ParameterError(f"task perplexity:{place}: has no text", fix="give a .txt file")
        self.place, self.base = place, setting.base
        digest = hashlib.blake2b(digest_size=8)
        for each in files:
            digest.update(each.read_bytes())
        self.identity = digest.hexdigest()

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """See :class:`~mergebench.merge.fit.task.Scorer`."""
        text = self.place / f"{split}.txt" if self.place.is_dir() else self.place
        if not text.is_file():
            raise ParameterError(f"no split {split!r}: {text} is not there")
        if self.base is None or not (self.base / "config.json").is_file():
            return {"perplexity": perplexity(model.folder(), text).perplexity}
        need("transformers")
        module, tokenizer = self._live
        fill(module, model.arrays())
        words = text.read_text(encoding="utf-8")
        found = measure(module, tokenizer, words, model.label, str(text))
        return {"perplexity": found.perplexity}

    @cached_property
    def _live(self) -> tuple[Any, Any]:
        assert self.base is not None
        return opened(self.base)


TASKS.add("perplexity", lambda text, setting: TextPerplexity(Path(text).expanduser(), setting))
