"""AdaLoRA: low-rank factors with learned singular values between them."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, claimed, matrix, settle
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, LowRank
from mergebench.core.errors import FormatError, MismatchError, ParameterError
from mergebench.core.tensor import ArrayTensor

_ROLES = ("lora_A", "lora_B", "lora_E")


def _detect(source: AdapterSource) -> frozenset[str]:
    modules = adapted_modules(source, _ROLES)
    return claimed({name: each for name, each in modules.items() if "lora_E" in each.keys})


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in adapted_modules(source, _ROLES).values():
        b, a, e = (matrix(source, module, role) for role in ("lora_B", "lora_A", "lora_E"))
        if not b.shape[1] == a.shape[0] == e.size:
            raise MismatchError(
                f"{source.label}: the factors of {module.name} do not fit each other",
                got=f"ranks {b.shape[1]}, {a.shape[0]} and {e.size}",
            )
        flipped = for_module(settings, module.name).fan_in_fan_out
        name, place = settle(
            source, options, names, module, b.shape[0], a.shape[1], flipped=flipped
        )
        # Into B, so that A keeps the digits it was stored with.
        left = np.asarray(b * (e.reshape(-1) * _scale(source, module, options)))
        delta = LowRank(ArrayTensor(left), ArrayTensor(a), 1.0, place.shape, place.transposed)
        put(source.label, deltas, name, module.key, delta)
    return deltas


def _scale(source: AdapterSource, module: Adapted, options: ReadOptions) -> float:
    """α over the rank at which training began, which PEFT keeps when it prunes ranks."""
    config = source.config or {}
    alpha, rank = config.get("lora_alpha", options.lora_alpha), config.get("init_r")
    if alpha is None or rank is None:
        raise ParameterError(
            f"{source.label}: the scale of {module.name} is α / init_r, and no config states both",
            fix="keep adapter_config.json beside the file",
        )
    numbers = all(isinstance(each, int | float) and abs(each) < 1e30 for each in (alpha, rank))
    if not numbers or rank <= 0:
        raise FormatError(
            f"{source.label}: lora_alpha and init_r must be numbers, init_r above 0",
            got=f"{alpha!r}, {rank!r}",
        )
    return float((alpha if alpha > 0 else rank) / (rank + 1e-5))


KINDS.add(
    "adalora",
    Kind(
        name="adalora",
        formula="ΔW = α / (r₀ + 1e-5) · B (A ∘ E)",
        detect=_detect,
        read=_read,
        notes="AdaLoRA, arXiv:2303.10512; r₀ is init_r, as in PEFT.",
        peft_types=frozenset({"ADALORA"}),
    ),
)
