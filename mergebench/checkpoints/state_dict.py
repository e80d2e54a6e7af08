"""The state dict inside what ``torch.save`` was given, and its tensors as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergebench.checkpoints.torch_files import dtype_of
from mergebench.core.errors import FormatError
from mergebench.core.site import kind_of
from mergebench.core.tensor import DTYPES, Array

#: Keys under which trainers keep the weights.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_FIX = "save the model's state_dict() alone"
_SHOWN = 8


def find_state_dict(path: Path, found: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Names and tensors, and notes on what was unwrapped and left out.

    Parameters
    ----------
    path : Path
        Names the file in messages.
    found : object
        A mapping of names to torch tensors, or one that holds such a mapping under one of
        :data:`WRAPPERS`. One level is unwrapped.

    Raises
    ------
    FormatError
        If there is no such mapping or more than one, or a name is not text.
    """
    if not isinstance(found, Mapping):
        raise FormatError(
            f"{path}: does not hold a state dict",
            expected="names mapped to tensors",
            got=f"a {type(found).__name__}",
            fix=_FIX,
        )
    state: Mapping[Any, Any] = found
    notes: list[str] = []
    nested = [key for key in WRAPPERS if _tensors(found.get(key))]
    beside = [str(key) for key, tensor in _tensors(found).items() if tensor.dim() > 1]
    if len(nested) + bool(beside) > 1:
        raise FormatError(
            f"{path}: holds more than one state dict",
            got=some([*nested, *beside]),
            fix="save the one that is meant in a file of its own",
        )
    if nested:
        state = found[nested[0]]
        notes.append(f"{path.name}: the weights are those under {nested[0]!r}")
    tensors = _tensors(state)
    if not tensors:
        raise FormatError(
            f"{path}: holds no tensors by name",
            expected="a state dict, alone or under one of " + ", ".join(WRAPPERS),
            got=some([str(key) for key in found]),
            fix=_FIX,
        )
    if wrong := [key for key in tensors if not isinstance(key, str)]:
        raise FormatError(
            f"{path}: a tensor is named by a {type(wrong[0]).__name__}",
            expected="text",
            got=repr(wrong[0])[:80],
            fix=_FIX,
        )
    outside = {key: value for key, value in found.items() if state is not value}
    rest = {**(outside if nested else {}), **{k: v for k, v in state.items() if k not in tensors}}
    if rest:
        notes.append(f"{path.name}: left out " + some([_described(k, v) for k, v in rest.items()]))
    return tensors, tuple(notes)


def _tensors(value: Any) -> dict[Any, Any]:
    import torch

    if not isinstance(value, Mapping):
        return {}
    return {key: each for key, each in value.items() if isinstance(each, torch.Tensor)}


def _described(key: Any, value: Any) -> str:
    count = _count(value)
    return f"{key} ({count} tensor{'s' * (count > 1)})" if count else str(key)


def _count(value: Any) -> int:
    import torch

    count, seen, left = 0, set(), [value]
    # A pickle may hold a list that holds itself, or one that lies deeper than calls can go.
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            count += 1
        elif isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            left.extend(each.values() if isinstance(each, Mapping) else each)
    return count


def find_aliases(state: Mapping[str, Any]) -> dict[str, str]:
    """Names whose tensor is that of another name: one memory, offset, shape, strides and dtype.

    The other name is the first of the file that is no head, so that a head is the alias of its
    embedding, as in a checkpoint that stores only one of them.
    """
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            groups.setdefault(place, []).append(name)
    aliases = {}
    for names in groups.values():
        shape = tuple(state[names[0]].shape)
        first = next((name for name in names if kind_of(name, shape) != "head"), names[0])
        aliases.update({name: first for name in names if name != first})
    return aliases


def as_array(where: str, name: str, tensor: Any) -> tuple[str, Array]:
    """Our dtype, and the tensor's memory as an array of that dtype with its strides.

    Parameters
    ----------
    where, name : str
        File and tensor, for messages.
    tensor : torch.Tensor
        Dense, on the CPU.

    Raises
    ------
    FormatError
        For a quantized, sparse, nested or data-less tensor, and for dtypes that safetensors
        cannot hold.
    """
    import torch

    kind = next(
        (
            what
            for what, is_it in (
                ("quantized", tensor.is_quantized),
                ("nested", tensor.is_nested),
                (f"of layout {tensor.layout}", tensor.layout is not torch.strided),
                ("without data", tensor.device.type != "cpu"),
            )
            if is_it
        ),
        None,
    )
    if kind is not None:
        raise FormatError(
            f"{where}: tensor {name!r} is {kind}",
            expected="a dense tensor",
            fix="convert it to a dense tensor of a floating dtype, or leave it out of the file",
        )
    dtype = dtype_of(where, name, tensor.dtype)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = tensor.detach().resolve_conj().resolve_neg()
    # torch hands numpy neither bfloat16 nor float8; bits of the same width it does.
    return dtype, plain.view(bits[plain.element_size()]).numpy().view(DTYPES[dtype])


def some(names: list[str], shown: int = _SHOWN) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more or "nothing"
