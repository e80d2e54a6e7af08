"""A sentence encoder and the frozen head that every task has on it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn


def load_encoder(source: str | Path) -> nn.Module:
    """Load a folder or a Hub id in float32, without the pooling layer that no head here uses."""
    config = transformers.AutoConfig.from_pretrained(source)
    kind: Any = transformers.AutoModel._model_mapping[type(config)]
    options = {}
    if "add_pooling_layer" in inspect.signature(kind).parameters:
        options["add_pooling_layer"] = False
    before = transformers.utils.logging.get_verbosity()
    # What a checkpoint has beside the encoder, heads and pooling layers, is not news.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model: nn.Module = transformers.AutoModel.from_pretrained(
            source, dtype="float32", **options
        )
    finally:
        transformers.utils.logging.set_verbosity(before)
    return model.eval()


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of a folder or a Hub id."""
    return transformers.AutoTokenizer.from_pretrained(source)


def tokens_of(tokenizer: Any, texts: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Token ids and masks, padded to the longest text."""
    return dict(
        tokenizer(
            list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
        )
    )


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Normalised means over the tokens of each text: (texts, width)."""
    states = model(**tokens).last_hidden_state
    there = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize((states * there).sum(1) / there.sum(1), dim=-1)


def frozen_head(base: nn.Module, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """The base's embeddings of the descriptions of the classes: (classes, width)."""
    with torch.no_grad():
        return embed(base, tokens_of(tokenizer, prompts, length))
