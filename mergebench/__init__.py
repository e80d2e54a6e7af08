"""A workbench for task arithmetic: merge, inspect and ship fine-tuned models and adapters.

Everything here is loaded when it is first used, so that ``import mergebench`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergebench.core.errors import MergebenchError
    from mergebench.core.task_vector import TaskVector
    from mergebench.merge.api import merge_models
    from mergebench.merge.apply import apply
    from mergebench.merge.chains import chain
    from mergebench.merge.method import METHODS as methods  # noqa: N811
    from mergebench.merge.op import OPS as ops  # noqa: N811
    from mergebench.recipe import Recipe
    from mergebench.ship.compress import compress
    from mergebench.ship.decompress import decompress
    from mergebench.sources.opening import load

_HOMES = {
    "MergebenchError": ("mergebench.core.errors", "MergebenchError"),
    "Recipe": ("mergebench.recipe", "Recipe"),
    "TaskVector": ("mergebench.core.task_vector", "TaskVector"),
    "apply": ("mergebench.merge.apply", "apply"),
    "chain": ("mergebench.merge.chains", "chain"),
    "compress": ("mergebench.ship.compress", "compress"),
    "decompress": ("mergebench.ship.decompress", "decompress"),
    "load": ("mergebench.sources.opening", "load"),
    "merge_models": ("mergebench.merge.api", "merge_models"),
    "methods": ("mergebench.merge.method", "METHODS"),
    "ops": ("mergebench.merge.op", "OPS"),
}

__all__ = [
    "MergebenchError",
    "Recipe",
    "TaskVector",
    "apply",
    "chain",
    "compress",
    "decompress",
    "load",
    "merge_models",
    "methods",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mergebench' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
