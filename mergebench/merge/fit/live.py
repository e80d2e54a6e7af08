"""One module in memory that takes the values of any candidate, so that none is written to disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mergebench.core.errors import MismatchError

if TYPE_CHECKING:
    import torch


def names_in(module: torch.nn.Module, known: Iterable[str]) -> dict[str, str]:
    """Name in a module -> name of the tensor in a checkpoint.

    Checkpoints of a model with a head have a prefix that the bare model lacks, and the other way
    round. Tied tensors go by any of their names.

    Raises
    ------
    MismatchError
        If the checkpoint has nothing for a tensor of the module.
    """
    held = set(known)
    prefix = getattr(module, "base_model_prefix", "")
    found: dict[str, str] = {}
    at: dict[int, str] = {}
    missing = []
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        options = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
        match = next((option for option in options if option in held), None)
        if match is None:
            missing.append((name, tensor))
            continue
        found[name] = match
        at[id(tensor)] = match
    for name, tensor in missing:
        if id(tensor) not in at:
            raise MismatchError(
                f"the checkpoint has no tensor for {name!r} of {type(module).__name__}",
                fix="score folders instead, with a command that loads {path}",
            )
        found[name] = at[id(tensor)]
    return found


def fill(module: torch.nn.Module, values: Mapping[str, Any]) -> None:
    """Copy values, numpy arrays by the checkpoint's names, into the tensors of a module.

    Raises
    ------
    MismatchError
        As :func:`names_in`, and for another shape.
    """
    import torch

    from mergebench.merge.api import to_torch

    tensors = module.state_dict(keep_vars=True)
    wanted = names_in(module, values)
    arrays = to_torch({name: values[name] for name in set(wanted.values())})
    with torch.no_grad():
        for name, tensor in tensors.items():
            value = arrays[wanted[name]]
            if value.shape != tensor.shape:
                raise MismatchError(
                    f"{name}: shape {list(value.shape)}", expected=str(list(tensor.shape))
                )
            tensor.copy_(value)
