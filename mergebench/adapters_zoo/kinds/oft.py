"""OFT: the inputs of a weight rotated by a block-diagonal orthogonal matrix."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.lora_settings import for_module, read_settings
from mergebench.adapters_zoo.modules import Adapted, adapted_modules, claimed, matrix
from mergebench.adapters_zoo.on_base import base_names, displaced, misfit
from mergebench.core.delta import Delta
from mergebench.core.errors import FormatError
from mergebench.core.tensor import Array

_LINEAR, _EMBEDDING = "oft_R", "oft_embedding_R"
_ROLES = (_LINEAR, _EMBEDDING)


def _detect(source: AdapterSource) -> frozenset[str]:
    return claimed(adapted_modules(source, _ROLES))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    modules = adapted_modules(source, _ROLES)
    names = base_names(source, options, modules, "OFT")
    settings = read_settings(source)
    deltas: dict[str, Delta] = {}
    for module in modules.values():
        rotations = _rotations(source, module)
        flipped = for_module(settings, module.name).fan_in_fan_out
        change = partial(_rotated, source, module, rotations)
        name, delta = displaced(source, options, names, module, change, flipped=flipped)
        put(source.label, deltas, name, module.key, delta)
    return deltas


def _rotations(source: AdapterSource, module: Adapted) -> Array:
    """The blocks R, shape (blocks, size, size), from their upper triangles.

    A row of a linear weight is turned by R from the left, a row of an embedding from the right:
    for these the blocks are the transposes.
    """
    config: Any = source.config
    if config is None:
        raise FormatError(
            f"{source.label}: how the rotation of {module.name} is made stands in the config",
            fix="keep adapter_config.json beside the file",
        )
    if config.get("coft"):
        raise FormatError(
            f"{source.label}: constrained OFT (coft) projects while it merges; not supported"
        )
    if len(module.keys) > 1:
        raise FormatError(
            f"{source.label}: {module.name} is rotated twice", got=", ".join(module.keys.values())
        )
    (role,) = module.keys
    upper = matrix(source, module, role)
    size = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
    if size * (size - 1) // 2 != upper.shape[1]:
        raise FormatError(
            f"{source.label}: {module.key} is no upper triangle", got=f"{upper.shape[1]} entries"
        )
    skew = np.zeros((upper.shape[0], size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = upper
    skew -= skew.transpose(0, 2, 1)
    if role == _EMBEDDING:
        # Cayley's transform of -Q is the transpose of that of Q, and so is the series.
        skew = -skew
    one = np.eye(size)
    if not config.get("use_cayley_neumann", True):
        # (I - Q)(I + Q)⁻¹
        return np.asarray(
            np.linalg.solve(
                (one + skew).transpose(0, 2, 1), (one - skew).transpose(0, 2, 1)
            ).transpose(0, 2, 1)
        )
    terms = config.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int) or isinstance(terms, bool) or not 1 <= terms <= 1000:
        raise FormatError(
            f"{source.label}: num_cayley_neumann_terms", got=repr(terms), expected="1 to 1000"
        )
    # I + 2Q + 2Q² + … + Qⁿ⁻¹, as PEFT sums the series: 3 terms are the same as 4 there.
    count = max(terms, 4) if terms > 2 else terms
    total, power = np.tile(one, (len(skew), 1, 1)), skew
    for term in range(1, count):
        total = total + power * (1.0 if term == count - 1 and count > 2 else 2.0)
        power = power @ skew
    return total


def _rotated(
    source: AdapterSource, module: Adapted, blocks: Array, weight: Block, rows: int, columns: int
) -> Block:
    count, size = blocks.shape[0], blocks.shape[1]
    shared = count == 1 and bool((source.config or {}).get("block_share"))
    if (columns % size if shared else columns - count * size) != 0:
        raise misfit(source, module, f"{columns} inputs", f"{count} blocks of {size}")

    def block(row: slice, column: slice) -> Array:
        first, last, _ = column.indices(columns)
        low, high = first // size, -(-last // size)
        part = weight(row, slice(low * size, high * size))
        lines = part.reshape(part.shape[0], high - low, size)
        turns = blocks[[0] * (high - low)] if shared else blocks[low:high]
        turned = np.einsum("obi,bji->obj", lines, turns).reshape(part.shape)
        return np.asarray((turned - part)[:, first - low * size : last - low * size])

    return block


KINDS.add(
    "oft",
    Kind(
        name="oft",
        formula="ΔW = W Rᵀ - W (embedding: W R - W), R block-diagonal, from a skew-symmetric Q "
        "(Cayley)",
        detect=_detect,
        read=_read,
        notes="OFT, arXiv:2306.07280, and its Cayley-Neumann form, arXiv:2506.19847. Needs the "
        "base and the config.",
        peft_types=frozenset({"OFT"}),
    ),
)
