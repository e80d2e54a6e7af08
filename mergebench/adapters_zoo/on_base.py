"""Adapters whose displacement is a function of the base weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import NoReturn

import numpy as np

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions
from mergebench.adapters_zoo.computed import Block, Computed
from mergebench.adapters_zoo.modules import Adapted, wide
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array, Tensor


def needs_base(label: str, key: str, kind: str) -> NoReturn:
    """Refuse to compute a displacement without the base.

    Parameters
    ----------
    label, key, kind : str
        The adapter, one of its tensors, and its family.

    Raises
    ------
    FormatError
        Always.
    """
    raise FormatError(
        f"{label}: {key} belongs to {kind}, whose displacement depends on the base weights",
        fix="give --base with the model that the adapter was trained on",
        lacks="base",
    )


def base_names(
    source: AdapterSource, options: ReadOptions, modules: Mapping[str, Adapted], kind: str
) -> BaseNames:
    """Names of the base's tensors, for modules of a family.

    Raises
    ------
    FormatError
        If no base is given.
    """
    if options.base is None:
        needs_base(source.label, min(each.key for each in modules.values()), kind)
    return BaseNames({name: tensor.shape for name, tensor in options.base.items()})


def weight_of(
    source: AdapterSource, options: ReadOptions, names: BaseNames, module: Adapted
) -> tuple[str, Tensor]:
    """The base weight of a module: its name, and the tensor.

    Raises
    ------
    FormatError, MismatchError
        If no base is given, or no tensor of it, or more than one, has the name.
    """
    if options.base is None:
        needs_base(source.label, module.key, "an adapter")
    wanted = f"{module.name}.weight"
    found = names.flattened(module.name) if module.flat else names.dotted(wanted)
    name = names.unique(source.label, module.key, wanted, found)
    return name, options.base[name]


def blocks_of(tensor: Tensor, *, transposed: bool) -> Block:
    """Blocks of a stored weight as the matrix (out, in · kernel), float64, read when asked."""
    shape = tensor.shape
    width = prod(shape[1:])

    def block(rows: slice, columns: slice) -> Array:
        lines, rest = (columns, rows) if transposed else (rows, columns)
        first, last, _ = lines.indices(shape[0])
        values = tensor.read(first * width, last * width).astype(np.float64)
        part = values.reshape(last - first, width)[:, rest]
        return part.T if transposed else part

    return block


def displaced(
    source: AdapterSource,
    options: ReadOptions,
    names: BaseNames,
    module: Adapted,
    change: Callable[[Block, int, int], Block],
    *,
    flipped: bool = False,
) -> tuple[str, Delta]:
    """The update of a module's weight.

    Parameters
    ----------
    change : callable
        ``(blocks of W, rows, columns) -> blocks of ΔW``.
    flipped : bool, default False
        The adapter says that the weight is stored input × output.

    Raises
    ------
    FormatError, MismatchError
        As :func:`weight_of`; if the weight is no matrix or kernel.
    """
    name, tensor = weight_of(source, options, names, module)
    if len(tensor.shape) < 2:
        raise MismatchError(
            f"{source.label}: {module.key} adapts {name}, which is no matrix",
            got=f"shape {tensor.shape}",
        )
    turned = flipped if options.transposed is None else name in options.transposed
    turned = turned and len(tensor.shape) == 2
    rows, columns = tensor.shape[0], prod(tensor.shape[1:])
    if turned:
        rows, columns = columns, rows
    block = change(blocks_of(tensor, transposed=turned), rows, columns)
    dtype = "F64" if "F64" in (tensor.dtype, wide(source, module)) else "F32"
    return name, Dense(Computed(tensor.shape, block, turned, dtype))


def misfit(source: AdapterSource, module: Adapted, expected: str, got: str) -> MismatchError:
    """The error for a tensor that does not fit the base weight."""
    return MismatchError(
        f"{source.label}: {module.key} does not fit the base weight",
        expected=expected,
        got=got,
        fix="check that --base is the model that the adapter was trained on",
    )
