"""LoKr: a Kronecker product, either side full or low-rank, in PEFT's and in LyCORIS' names."""

from __future__ import annotations

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block, Computed
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import (
    Adapted,
    adapted_modules,
    claimed,
    scaling,
    settle,
    whole,
    wide,
)
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array

_ROLES = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    settings = read_settings(source, alpha="alpha")
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    deltas: dict[str, Delta] = {}
    for module in adapted_modules(source, _ROLES).values():
        (left, left_rank), (right, right_rank) = (_side(source, module, n) for n in (1, 2))
        scale = _scale(source, module, left_rank, right_rank, options)
        rows, columns = left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
        flipped = for_module(settings, module.name).fan_in_fan_out
        kernel = right.shape[2]
        name, place = settle(
            source, options, names, module, rows, columns * kernel, flipped=flipped
        )
        if kernel > 1 and len(place.shape) == 2:
            raise MismatchError(
                f"{source.label}: {module.name} is a convolution, whose shape only a base tells",
                fix="give --base",
                lacks="base",
            )
        values = Computed(
            place.shape, _kronecker(left[:, :, 0], right, scale), place.transposed,
            wide(source, module),
        )  # fmt: skip
        put(source.label, deltas, name, module.key, Dense(values))
    return deltas


def _side(source: AdapterSource, module: Adapted, number: int) -> tuple[Array, int | None]:
    """One factor of the Kronecker product as (rows, columns, kernel), and its rank if factored."""
    name = f"lokr_w{number}"
    if name in module.keys:
        full = whole(source, module, name)
        if full.ndim < 2:
            raise FormatError(
                f"{source.label}: {module.keys[name]} is no factor", got=f"shape {full.shape}"
            )
        return full.reshape(*full.shape[:2], -1), None
    left, right = whole(source, module, f"{name}_a"), whole(source, module, f"{name}_b")
    if f"lokr_t{number}" in module.keys:
        # A Tucker core (r, r, *kernel), with factors (r, out) and (r, in).
        core = whole(source, module, f"lokr_t{number}")
        core = core.reshape(*core.shape[:2], -1)
        _check(source, module, (left.shape[0], right.shape[0]), core.shape[:2])
        return np.einsum("ijk,ip,jq->pqk", core, left, right), right.shape[0]
    left, flat = left.reshape(left.shape[0], -1), right.reshape(right.shape[0], -1)
    _check(source, module, left.shape[1:], flat.shape[:1])
    product = left @ flat
    inputs = right.shape[1] if right.ndim > 1 else 1
    return product.reshape(left.shape[0], inputs, -1), right.shape[0]


def _check(
    source: AdapterSource, module: Adapted, one: tuple[int, ...], two: tuple[int, ...]
) -> None:
    if one != two:
        raise MismatchError(
            f"{source.label}: the factors of {module.name} do not fit each other",
            got=f"ranks {one} and {two}",
        )


def _scale(
    source: AdapterSource,
    module: Adapted,
    left: int | None,
    right: int | None,
    options: ReadOptions,
) -> float:
    """α/r; LyCORIS leaves two full factors unscaled, and PEFT scales them by its config's r."""
    settings = read_settings(source, alpha="alpha")
    rank = right if right is not None else left
    if rank is not None:
        return scaling(source, module, rank, settings, options)
    if module.flat:
        return 1.0
    mine = for_module(settings, module.name)
    stated = mine.rank_of(source.label, module.name)
    if stated is None:
        raise FormatError(
            f"{source.label}: {module.name} has two full factors, and no config states r and α",
            fix="keep adapter_config.json beside the file",
        )
    return scaling(source, module, int(stated), settings, options)


def _kronecker(left: Array, right: Array, scale: float) -> Block:
    height, width, kernel = right.shape
    columns_of = left.shape[1] * width * kernel

    def block(rows: slice, columns: slice) -> Array:
        row = np.arange(rows.start, rows.stop)
        column = np.arange(*columns.indices(columns_of))
        pixel, column = column % kernel, column // kernel
        outer = left[np.ix_(row // height, column // width)]
        inner = right[(row % height)[:, None], (column % width)[None, :], pixel[None, :]]
        return np.asarray(outer * inner * scale)

    return block


KINDS.add(
    "lokr",
    Kind(
        name="lokr",
        formula="ΔW = (α/r) · W₁ ⊗ W₂, each side full or a product",
        detect=_detect,
        read=_read,
        notes="LoKr (KronA, arXiv:2212.10650; LyCORIS, arXiv:2309.14859). Two full sides: scale 1 "
        "in LyCORIS' names, α/r of the config in PEFT's, as these programs apply them.",
        peft_types=frozenset({"LOKR"}),
    ),
)
