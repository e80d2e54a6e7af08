"""Adapters of PEFT, put on a base that has no values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoints.containers import open_weights
from mergebench.checkpoints.documents import read_object
from mergebench.loading.report import Loaded, NotCheckedError, Shape, first_line, need, silent
from mergebench.loading.with_transformers import empty_model, model_class

#: The class that PEFT builds for each kind of task.
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def check_peft(folder: Path, base: Path | None) -> Loaded:
    """Compare an adapter with what PEFT expects on its base.

    Parameters
    ----------
    folder : Path
        With ``adapter_config.json``.
    base : Path or None
        A folder with a ``config.json``; what the adapter names if ``None``.

    Raises
    ------
    NotCheckedError
        If PEFT or the base is missing.
    """
    held = need("peft", "transformers", "accelerate")
    import peft
    import transformers

    described = read_object(folder / "adapter_config.json")
    under = _base(described, base)
    with silent(transformers.utils.logging):
        config = read_object(under / "config.json")
        task = _TASKS.get(str(described.get("task_type")))
        kind = getattr(transformers, task) if task is not None else model_class(config)
        about: dict[str, Any] = {
            "library": "peft",
            "version": held,
            "architecture": f"{described.get('peft_type')} on {kind.__name__}",
        }
        stored = _stored(folder)
        try:
            settings = peft.PeftConfig.from_pretrained(str(folder.resolve()))
            adapted = peft.get_peft_model(
                empty_model(under, config, kind), settings, low_cpu_mem_usage=True
            )
            least, most = (
                {
                    name: tuple(value.shape)
                    for name, value in peft.get_peft_model_state_dict(
                        adapted, save_embedding_layers=embeddings
                    ).items()
                }
                for embeddings in (False, True)
            )
        except Exception as error:
            return Loaded(**about, tensors=len(stored), errors=(first_line(error),))
    return Loaded(
        **about,
        tensors=len(stored),
        missing=tuple(sorted(least.keys() - stored.keys())),
        unexpected=tuple(sorted(stored.keys() - most.keys())),
        misshapen=tuple(
            (name, stored[name], most[name])
            for name in sorted(stored.keys() & most.keys())
            if stored[name] != most[name]
        ),
    )


def _base(described: Mapping[str, Any], base: Path | None) -> Path:
    if base is None:
        named = described.get("base_model_name_or_path")
        base = Path(named).expanduser() if isinstance(named, str) and named else None
    if base is not None and base.is_file():
        base = base.parent
    if base is None or not (base / "config.json").is_file():
        raise NotCheckedError(
            "the base of the adapter is not here, so nothing says which modules it has",
            got=str(base) if base is not None else "",
            fix="give --base with a folder that holds its config.json",
        )
    return base


def _stored(folder: Path) -> dict[str, Shape]:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        file = folder / "adapter_model.bin"
    return {name: tensor.shape for name, tensor in open_weights(file).tensors.items()}
