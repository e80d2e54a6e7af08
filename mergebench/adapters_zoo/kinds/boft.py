"""BOFT: the inputs of a weight rotated by a butterfly of orthogonal blocks, its rows scaled."""

from __future__ import annotations

from functools import partial

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, claimed, whole
from mergebench.adapters_zoo.on_base import base_names, displaced, misfit
from mergebench.core.delta import Delta
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Array

_ROLES = ("boft_R", "boft_s")


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    modules = adapted_modules(source, _ROLES)
    names = base_names(source, options, modules, "BOFT")
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in modules.values():
        rotations = _rotations(source, module)
        scales = whole(source, module, "boft_s").reshape(-1)
        flipped = for_module(settings, module.name).fan_in_fan_out
        change = partial(_turned, source, module, rotations, scales)
        name, delta = displaced(source, options, names, module, change, flipped=flipped)
        put(source.label, deltas, name, module.key, delta)
    return deltas


def _rotations(source: AdapterSource, module: Adapted) -> Array:
    """Orthogonal blocks, shape (factors, blocks, size, size), by Cayley's transform."""
    stored = whole(source, module, "boft_R")
    if stored.ndim != 4 or stored.shape[2] != stored.shape[3]:
        raise FormatError(
            f"{source.label}: {module.keys['boft_R']} holds no square blocks",
            got=f"shape {stored.shape}",
            expected="(factors, blocks, size, size)",
        )
    skew = (stored - stored.swapaxes(-1, -2)) / 2
    one = np.eye(stored.shape[-1])
    # (I - Q)(I + Q)⁻¹; the transposes turn the division to the right side.
    right, left = (one + skew).swapaxes(-1, -2), (one - skew).swapaxes(-1, -2)
    return np.asarray(np.linalg.solve(right, left).swapaxes(-1, -2))


def _orders(factors: int, blocks: int, size: int) -> list[Array]:
    """For each factor, the inputs in the order in which its blocks take them."""
    columns = np.arange(blocks * size)
    if factors == 1:
        return [columns]
    orders = []
    for factor in range(factors):
        # Halves of blocks change places within groups of 2, 4, 8 … halves: even ones first.
        group = columns.reshape(blocks >> factor, -1, size // 2)
        evens_first = np.concatenate((group[:, 0::2], group[:, 1::2]), axis=1)
        orders.append(evens_first.reshape(-1))
    return orders


def _turned(
    source: AdapterSource,
    module: Adapted,
    rotations: Array,
    scales: Array,
    weight: Block,
    rows: int,
    columns: int,
) -> Block:
    factors, blocks, size = rotations.shape[:3]
    groups = blocks % (1 << (factors - 1)) == 0 and size % 2 == 0
    if blocks * size != columns or scales.size != rows or not (factors == 1 or groups):
        raise misfit(
            source,
            module,
            f"{columns} inputs and {rows} outputs",
            f"{factors} × {blocks} blocks of {size}, and {scales.size} scales",
        )
    orders = _orders(factors, blocks, size)

    def block(row: slice, column: slice) -> Array:
        part = weight(row, slice(0, columns))
        turned = part
        for order, turns in zip(orders, rotations, strict=True):
            inner = np.empty_like(turned)
            inner[:, order] = turned
            lines = inner.reshape(-1, blocks, size)
            turned = np.einsum("obi,bji->obj", lines, turns).reshape(part.shape)[:, order]
        return np.asarray((turned * scales[row, None] - part)[:, column])

    return block


KINDS.add(
    "boft",
    Kind(
        name="boft",
        formula="ΔW = s ∘ (R Wᵀ)ᵀ - W, R a product of permuted block-diagonal rotations (Cayley)",
        detect=_detect,
        read=_read,
        notes="BOFT, arXiv:2311.06243. Linear and convolution. Needs the base.",
        peft_types=frozenset({"BOFT"}),
    ),
)
