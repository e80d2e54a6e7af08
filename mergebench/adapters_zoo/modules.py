"""Adapted modules of a file: their tensors by role, and the base tensors they displace."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions
from mergebench.adapters_zoo.dialects import peft
from mergebench.adapters_zoo.lora_settings import Settings, for_module, scale_of
from mergebench.adapters_zoo.resolve import BaseNames, Placement
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import FLOATING, Array, Tensor, size_of


@dataclass(frozen=True, eq=False)
class Adapted:
    """One adapted module.

    Attributes
    ----------
    name : str
        As the adapter spells it: dotted, or flattened with a prefix (``lora_unet_…``).
    keys : mapping of role to tensor name in the file
    flat : bool
        Whether the name is flattened, as Kohya's and LyCORIS' are.
    """

    name: str
    keys: Mapping[str, str]
    flat: bool

    @property
    def key(self) -> str:
        """One of its tensors, for messages."""
        return min(self.keys.values())


def adapted_modules(source: AdapterSource, roles: Collection[str]) -> dict[str, Adapted]:
    """Modules that have a tensor named ``<module>.<role>``, by name.

    Known spellings: ``base_model.model.<module>.<role>[.<adapter>][.weight]`` (PEFT) and
    ``lora_…`` or ``lycoris_<flattened module>.<role>`` (LyCORIS). ``alpha`` is a role of modules
    that have another one.

    Raises
    ------
    FormatError
        If two tensors play one role, or the file holds several adapters.
    """
    form = re.compile(
        rf"(?P<module>.+)\.(?P<role>{'|'.join(sorted(map(re.escape, roles), key=len)[::-1])}|alpha)"
        r"(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
    )
    found: dict[str, dict[str, str]] = {}
    adapters: set[str] = set()
    for key in source.tensors:
        if (match := form.fullmatch(peft.strip(key))) is None:
            continue
        adapters.add(match["adapter"] or "")
        mine = found.setdefault(match["module"], {})
        if (other := mine.get(match["role"])) is not None:
            raise FormatError(f"{source.label}: {other} and {key} are the same tensor")
        mine[match["role"]] = key
    modules = {
        name: Adapted(name, keys, name.startswith(("lora_", "lycoris_")) and "." not in name)
        for name, keys in sorted(found.items())
        if set(keys) != {"alpha"}
    }
    if len(adapters - {""}) > 1:
        raise FormatError(
            f"{source.label}: the file holds several adapters",
            got=", ".join(sorted(adapters)),
            expected="one",
            fix="save them separately",
        )
    return modules


def claimed(modules: Mapping[str, Adapted]) -> frozenset[str]:
    """Every tensor of these modules."""
    return frozenset(key for each in modules.values() for key in each.keys.values())


def matrix(source: AdapterSource, module: Adapted, role: str) -> Array:
    """A stored factor as a matrix (rows, everything else), float64.

    Raises
    ------
    FormatError
        If it is missing, empty, or holds no floating-point numbers.
    """
    return whole(source, module, role).reshape(source.tensors[module.keys[role]].shape[0], -1)


def whole(source: AdapterSource, module: Adapted, role: str) -> Array:
    """A stored factor in its shape, float64.

    Raises
    ------
    FormatError
        If it is missing, empty, a scalar, or holds no floating-point numbers.
    """
    tensor = stored(source, module, role)
    values = tensor.read(0, size_of(tensor.shape)).astype(np.float64)
    return values.reshape(tensor.shape)


def stored(source: AdapterSource, module: Adapted, role: str) -> Tensor:
    """A tensor of a module, unread.

    Raises
    ------
    FormatError
        As :func:`whole`.
    """
    if role not in module.keys:
        raise FormatError(
            f"{source.label}: {module.name} has no {role}", got=", ".join(sorted(module.keys))
        )
    tensor = source.tensors[module.keys[role]]
    if not tensor.shape or 0 in tensor.shape:
        raise FormatError(
            f"{source.label}: {module.keys[role]} is no factor",
            got=f"shape {tensor.shape}",
            expected="a non-empty tensor",
            fix="if it was trained with DeepSpeed ZeRO-3 or FSDP, gather the shards first",
        )
    if tensor.dtype not in FLOATING:
        raise FormatError(
            f"{source.label}: {module.keys[role]} is no factor",
            got=tensor.dtype,
            expected="a floating-point dtype",
        )
    return tensor


def wide(source: AdapterSource, module: Adapted) -> str:
    """Dtype to compute in: F64 where any stored tensor of the module is, else F32."""
    every = (source.tensors[key].dtype for key in module.keys.values())
    return "F64" if "F64" in every else "F32"


def scaling(
    source: AdapterSource,
    module: Adapted,
    rank: int,
    settings: tuple[Settings, ...],
    options: ReadOptions,
) -> float:
    """α / r of a module; LyCORIS files without α have scale 1.

    Raises
    ------
    FormatError, MismatchError, ParameterError
        As :func:`~mergebench.adapters_zoo.lora_settings.scale_of`.
    """
    alpha = None
    if (key := module.keys.get("alpha")) is not None:
        alpha = one_number(source, key)
    if module.flat:
        chosen = options.lora_alpha if alpha is None else alpha
        return 1.0 if chosen is None else chosen / rank
    mine = for_module(settings, module.name)
    return scale_of(
        source.label, module.key, module.name, rank, mine, alpha=alpha,
        fallback=options.lora_alpha,
    )  # fmt: skip


def check_rank(
    source: AdapterSource, module: Adapted, settings: tuple[Settings, ...], rank: int
) -> None:
    """Refuse a tensor of another rank than the config gives its module.

    Raises
    ------
    MismatchError
    """
    mine = for_module(settings, module.name)
    stated = mine.rank_of(source.label, module.name)
    if stated is not None and stated != rank:
        raise MismatchError(
            f"{source.label}: rank of {module.key}",
            expected=f"{stated:g} ({mine.where})",
            got=str(rank),
            fix="the config is of another adapter",
        )


def one_number(source: AdapterSource, key: str) -> float:
    """The entry of a tensor that holds a single finite number other than 0.

    Raises
    ------
    FormatError
        If it does not.
    """
    tensor = source.tensors[key]
    alpha = float(tensor.read(0, 1)[0]) if prod(tensor.shape) == 1 else float("nan")
    if not np.isfinite(alpha) or alpha == 0:
        raise FormatError(
            f"{source.label}: {key} is no α (programs disagree on the meaning of 0)",
            got=f"{alpha} of shape {tensor.shape}",
            expected="one finite number other than 0",
        )
    return alpha


def settle(
    source: AdapterSource,
    options: ReadOptions,
    names: BaseNames | None,
    module: Adapted,
    rows: int,
    columns: int,
    *,
    flipped: bool = False,
) -> tuple[str, Placement]:
    """The base tensor that a module displaces, and how an update (rows, columns) lies in it.

    Parameters
    ----------
    rows, columns : int
        Outputs, and inputs times kernel, of the update.
    flipped : bool, default False
        The adapter says that the weight is stored input × output; counts where shapes leave it
        open.

    Raises
    ------
    MismatchError
        If no tensor of the base, or more than one, has the name, or the shapes do not fit.
    """
    name = f"{module.name}.weight"
    if names is None:
        shape: tuple[int, ...] = (columns, rows) if flipped else (rows, columns)
        return name, Placement(shape, flipped, decisive=False)
    found = names.flattened(module.name) if module.flat else names.dotted(name)
    name = names.unique(source.label, module.key, name, found)
    shape = names.shapes[name]
    upright = len(shape) > 1 and (shape[0], prod(shape[1:])) == (rows, columns)
    turned = len(shape) == 2 and shape == (columns, rows)
    known = None if options.transposed is None else name in options.transposed
    if known is None:
        known = flipped if upright and turned else turned
    if not (turned if known else upright):
        raise MismatchError(
            f"{source.label}: the update of {module.key} does not fit {name}",
            expected=f"shape {shape}",
            got=str((rows, columns)),
            fix="check that --base is the model that the adapter was trained on",
        )
    return name, Placement(shape, known, decisive=not (upright and turned))
