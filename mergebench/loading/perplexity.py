"""Perplexity of a causal language model on a text, with transformers on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergebench.checkpoints.documents import read_object
from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.loading.report import NotCheckedError, need, silent

if TYPE_CHECKING:
    import torch

_LONGEST = 2048
_SAFE = {"local_files_only": True, "trust_remote_code": False}

#: ``(what is being done, tokens done, tokens in all)``.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of every token but the first.

    Attributes
    ----------
    path : str
    perplexity : float
    tokens : int
        Tokens that were predicted.
    context, stride : int
        Most tokens that a window sees, and how far it moves.
    """

    path: str
    perplexity: float
    tokens: int
    context: int
    stride: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def perplexity(
    path: Path,
    text: Path,
    *,
    base: Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    most: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity with a sliding window: each token is predicted once, from up to ``context``.

    The whole model is held in float32: 4 bytes for each parameter.

    Parameters
    ----------
    path : Path
        A model folder with its tokenizer, or the folder of an adapter.
    text : Path
        UTF-8.
    base : Path, optional
        Of an adapter.
    context : int, optional
        At most what the model can see; that or 2048 by default, whichever is less.
    stride : int, optional
        Half of the context by default.
    most : int, optional
        Tokens of the text that are looked at, the first ones; all by default.
    progress : callable, optional

    Raises
    ------
    NotCheckedError
        If transformers is not installed, or this is no causal language model.
    MergebenchError
        If the text cannot be read or is too short.
    """
    need("transformers")
    words = read_words(text)
    model, tokenizer = opened(path, base)
    return measure(
        model, tokenizer, words, str(path), str(text),
        context=context, stride=stride, most=most, progress=progress,
    )  # fmt: skip


def measure(
    model: Any,
    tokenizer: Any,
    words: str,
    label: str,
    source: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    most: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a model that is open already; see :func:`perplexity`.

    Raises
    ------
    MergebenchError
        If the text is too short.
    """
    import torch

    ids = tokens_of(tokenizer, words, source)[:most]
    sees = context_of(model.config)
    context = sees if context is None else context
    stride = max(context // 2, 1) if stride is None else stride
    if not 2 <= context <= sees or not 1 <= stride < context:
        raise ParameterError(
            f"{label}: context {context}, stride {stride}",
            expected=f"a context of 2 to {sees} tokens and a smaller stride",
        )
    total, done = 0.0, 0
    with torch.inference_mode():
        for start, fresh, stop in windows(len(ids), context, stride):
            logits = model(ids[None, start:stop]).logits[0, :-1].double()
            # The first prediction of a window that starts late was made by the one before.
            first = fresh - start - 1
            losses = torch.nn.functional.cross_entropy(
                logits[first:], ids[fresh:stop], reduction="sum"
            )
            total += float(losses)
            done += stop - fresh
            if progress is not None:
                progress("predicting", done, len(ids) - 1)
    mean = total / done
    value = exp(mean) if mean < 700 else float("inf")
    return Perplexity(label, value, done, context, stride)


def tokens_of(tokenizer: Any, words: str, source: str) -> torch.Tensor:
    """Ids of all tokens of a text, (tokens,).

    Raises
    ------
    MergebenchError
        If there are less than two.
    """
    import transformers

    with silent(transformers.utils.logging):
        ids: torch.Tensor = tokenizer(words, return_tensors="pt", truncation=False).input_ids[0]
    if len(ids) < 2:
        raise MergebenchError(f"{source}: is too short", expected="at least 2 tokens",
                              got=str(len(ids)))  # fmt: skip
    return ids


def read_words(text: Path) -> str:
    """A text file in UTF-8.

    Raises
    ------
    MergebenchError
        If it cannot be read.
    """
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MergebenchError(f"{text}: cannot be read as text", got=str(error)) from None


def windows(count: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """``(first token seen, first token predicted, end)`` of every window over a text."""
    found = []
    fresh, start = 1, 0
    while fresh < count:
        stop = min(start + context, count)
        found.append((start, fresh, stop))
        fresh, start = stop, start + stride
    return found


def opened(path: Path, base: Path | None = None) -> tuple[Any, Any]:
    """A causal language model in float32, and its tokenizer.

    Raises
    ------
    NotCheckedError
        As :func:`perplexity`.
    """
    import transformers

    with silent(transformers.utils.logging):
        return _open(path, base)


def _open(path: Path, base: Path | None) -> tuple[Any, Any]:
    import torch
    import transformers

    adapter = (path / "adapter_config.json").is_file()
    if adapter:
        need("peft")
        named = read_object(path / "adapter_config.json").get("base_model_name_or_path")
        base = base or (Path(named).expanduser() if isinstance(named, str) and named else None)
    folder = base if adapter else path
    if folder is None or not (folder / "config.json").is_file():
        raise NotCheckedError(
            f"{path}: perplexity needs the folder of a model" + (" under it" if adapter else ""),
            fix="add --base" if adapter else "give a folder with config.json and a tokenizer",
        )
    config = read_object(folder / "config.json")
    named = (config.get("architectures") or [""])[0]
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if named != known.get(str(config.get("model_type"))):
        raise NotCheckedError(f"{path}: {named or 'the model'} predicts no next token")
    place = str(folder.resolve())
    try:
        tokenizer = tokenizer_of(folder)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, **_SAFE
        )
    except (OSError, ValueError) as error:
        raise NotCheckedError(
            f"{path}: cannot be opened by transformers", got=str(error).splitlines()[0]
        ) from None
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(path.resolve()))
    model.eval()
    return model, tokenizer


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model's folder, without the model."""
    import transformers

    with silent(transformers.utils.logging):
        return transformers.AutoTokenizer.from_pretrained(str(folder.resolve()), **_SAFE)


def context_of(config: Any) -> int:
    """Most tokens that a model sees at once, and 2048 at most."""
    seen = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions"))
    found = [each for each in seen if isinstance(each, int) and each > 1]
    return min([*found, _LONGEST])
