"""VeRA: shared random factors, scaled by learned vectors."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import adapted_modules, claimed, settle, whole
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, LowRank
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import FLOATING, Array, ArrayTensor, size_of

_ROLES = ("vera_lambda_b", "vera_lambda_d")
_SHARED = ("base_model.vera_A", "base_model.vera_B")


def _detect(source: AdapterSource) -> frozenset[str]:
    shared = {key for key in source.tensors if key.startswith(_SHARED)}
    if not shared and (source.config or {}).get("peft_type") == "VERA":
        # Drawn again from the seed in the config: kind vera_drawn.
        return frozenset()
    return claimed(adapted_modules(source, _ROLES)) | shared


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    settings = read_settings(source)
    down, up = (_shared(source, name) for name in _SHARED)
    deltas: dict[str, Delta] = {}
    for module in adapted_modules(source, _ROLES).values():
        b, d = (whole(source, module, role).reshape(-1) for role in _ROLES)
        flipped = for_module(settings, module.name).fan_in_fan_out
        columns = _inputs(source, names, module.name, b.size, down.shape[1], flipped)
        if b.size > up.shape[0] or not d.size == down.shape[0] == up.shape[1]:
            raise MismatchError(
                f"{source.label}: the vectors of {module.name} do not fit the shared factors",
                got=f"{b.size} and {d.size}",
                expected=f"at most {up.shape[0]}, and {down.shape[0]}",
            )
        name, place = settle(source, options, names, module, b.size, columns, flipped=flipped)
        left = ArrayTensor(b[:, None] * up[: b.size] * d)
        right = ArrayTensor(np.ascontiguousarray(down[:, :columns]))
        delta = LowRank(left, right, 1.0, place.shape, place.transposed)
        put(source.label, deltas, name, module.key, delta)
    return deltas


def _inputs(
    source: AdapterSource,
    names: BaseNames | None,
    module: str,
    rows: int,
    most: int,
    flipped: bool,
) -> int:
    """Width of the module, which only the base tells: the shared factor fits the widest one."""
    if names is None:
        raise FormatError(
            f"{source.label}: the width of {module} is not in the file",
            fix="give --base with the model that the adapter was trained on",
            lacks="base",
        )
    wanted = f"{module}.weight"
    shape = names.shapes[names.unique(source.label, wanted, wanted, names.dotted(wanted))]
    if len(shape) != 2:
        raise MismatchError(f"{source.label}: {wanted} is no matrix", got=f"shape {shape}")
    turned = flipped if shape[0] == shape[1] else shape[1] == rows and shape[0] != rows
    width = shape[0] if turned else shape[1]
    if width > most:
        raise MismatchError(
            f"{source.label}: the shared factor is too narrow for {wanted}",
            got=str(most),
            expected=f"at least {width}",
        )
    return width


def _shared(source: AdapterSource, name: str) -> Array:
    keys = [key for key in source.tensors if key.startswith(name)]
    if len(keys) != 1:
        raise FormatError(
            f"{source.label}: {name} is not stored, only the seed it came from"
            if not keys
            else f"{source.label}: {name} is stored {len(keys)} times",
            fix="save the adapter with save_projection=True" if not keys else "",
        )
    tensor = source.tensors[keys[0]]
    if tensor.dtype not in FLOATING:
        raise FormatError(
            f"{source.label}: {keys[0]} is no factor",
            got=tensor.dtype,
            expected="a floating-point dtype",
        )
    if len(tensor.shape) != 2:
        raise FormatError(f"{source.label}: {keys[0]} is no factor", got=f"shape {tensor.shape}")
    return tensor.read(0, size_of(tensor.shape)).astype(np.float64).reshape(tensor.shape)


KINDS.add(
    "vera",
    Kind(
        name="vera",
        formula="ΔW = diag(b) B diag(d) A, A and B shared by all modules",
        detect=_detect,
        read=_read,
        notes="VeRA, arXiv:2310.11454. The shared factors must be stored; needs the base's shapes.",
        peft_types=frozenset({"VERA"}),
    ),
)
