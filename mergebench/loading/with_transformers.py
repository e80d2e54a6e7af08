"""Models of transformers, opened on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoints.layout import open_checkpoint
from mergebench.loading.report import (
    Loaded,
    NotCheckedError,
    Shape,
    compared,
    first_line,
    need,
    silent,
)

_SAFE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def check_transformers(
    folder: Path, config: Mapping[str, Any], architecture: str | None = None
) -> Loaded:
    """Load a model folder without its values.

    Parameters
    ----------
    folder : Path
    config : mapping
        Its ``config.json``.
    architecture : str, optional
        Name of the class, where the config is not to say it.

    Raises
    ------
    NotCheckedError
        If transformers is not installed or does not know the architecture.
    """
    held = need("transformers", "accelerate")
    import transformers

    with silent(transformers.utils.logging):
        kind = model_class(config, architecture)
        tensors = shapes_of(folder)
        about: dict[str, Any] = {
            "library": "transformers",
            "version": held,
            "architecture": kind.__name__,
        }
        try:
            _, said = kind.from_pretrained(
                str(folder.resolve()),
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_SAFE,
            )
        except Exception as error:
            known = _by_names(kind, folder, tensors)
            named = any(known.get(key) for key in ("missing", "unexpected", "misshapen"))
            return Loaded(**about, **known, errors=() if named else (first_line(error),))
        found: dict[str, Any] = {
            "missing": tuple(sorted(said["missing_keys"])),
            "misshapen": tuple(
                sorted((name, tuple(one), tuple(two)) for name, one, two in said["mismatched_keys"])
            ),
        }
        unstored = {
            *found["missing"],
            *(name for name, _, _ in found["misshapen"]),
        } - tensors.keys()
        if unstored:
            # Of tensors that the library joins or renames, those on the disk are named.
            expected = _by_names(kind, folder, tensors)
            if any(expected.get(key) for key in found):
                found = {key: expected[key] for key in found}
        return Loaded(
            **about,
            **found,
            tensors=len(tensors),
            unexpected=tuple(sorted(said["unexpected_keys"])),
            errors=tuple(map(str, said.get("error_msgs", ()))),
        )


def model_class(config: Mapping[str, Any], architecture: str | None = None) -> Any:
    """The class that a config names.

    Raises
    ------
    NotCheckedError
        If transformers does not have it.
    """
    import transformers

    named = config.get("architectures")
    if architecture is None and isinstance(named, list) and named:
        architecture = str(named[0])
    if architecture is None and config.get("model_type") in transformers.CONFIG_MAPPING:
        return transformers.AutoModel
    kind = getattr(transformers, architecture, None) if architecture else None
    if kind is None or not hasattr(kind, "from_pretrained"):
        own = "auto_map" in config
        raise NotCheckedError(
            f"transformers {transformers.__version__} has no {architecture or 'such model'}",
            fix="the model needs code of its own, which is never run"
            if own
            else "another version of transformers may have it",
        )
    return kind


def shapes_of(folder: Path) -> dict[str, Shape]:
    """Shapes of the stored tensors."""
    opened = open_checkpoint(folder, allow_quantized=True)
    return {name: tensor.shape for name, tensor in opened.tensors.items()}


def empty_model(folder: Path, config: Mapping[str, Any], kind: Any = None) -> Any:
    """A model on the meta device, made from its config alone."""
    import torch
    import transformers

    kind = kind or model_class(config)
    settings = transformers.AutoConfig.from_pretrained(str(folder.resolve()), **_SAFE)
    with torch.device("meta"):
        if hasattr(kind, "from_config"):
            return kind.from_config(settings, trust_remote_code=False)
        return kind(settings)


def _by_names(kind: Any, folder: Path, stored: Mapping[str, Shape]) -> dict[str, Any]:
    """Names and shapes compared where the library gives up at the first that is wrong."""
    try:
        from transformers.core_model_loading import revert_weight_conversion

        model = empty_model(folder, {}, kind)
        values = revert_weight_conversion(model, model.state_dict())
    except Exception:
        # Between releases of the library this may move; its own error is reported all the same.
        return {"tensors": len(stored)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    expected = {
        name: tuple(value.shape)
        for name, value in values.items()
        if name in stored or name not in tied
    }
    return compared(stored, expected)
