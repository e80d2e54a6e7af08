"""Files of the base that loaders need beside an output's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.manifest import CARD, MANIFEST, RECIPE
from mergebench.recipe import Recipe
from mergebench.sources import Source

_TORCH = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}


def companions(
    recipe: Recipe,
    form: str,
    reference: Source | None,
    sides: Mapping[str, bytes | Path | None],
) -> dict[str, Path | bytes]:
    """Files of the base that loaders need; its config says the dtype of the output."""
    if form != "model" or reference is None or reference.checkpoint is None:
        return {}
    ours = {MANIFEST, RECIPE, CARD}
    found: dict[str, Path | bytes] = {
        name: path for name, path in reference.checkpoint.sides().items() if name not in ours
    }
    for name, content in sides.items() if reference.checkpoint.folder is not None else ():
        found.pop(name, None)
        if content is not None:
            found[name] = content
    config, changed = reference.checkpoint.config, reference.checkpoint.config_changed
    if config is not None and "config.json" in found and (changed or recipe.dtype != "keep"):
        if recipe.dtype != "keep":
            config = _with_dtype(config, _TORCH[recipe.dtype])
        found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return found


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every dtype it names replaced, those of its parts included."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, Mapping) else value
    return changed


def left_behind(form: str, reference: Source | None) -> tuple[str, ...]:
    """Notes on files of the base that an output goes without."""
    if form != "model" or reference is None or reference.checkpoint is None:
        return ()
    left = reference.checkpoint.left_out
    return tuple(f"{path.name} is not copied to the output" for path in left)
