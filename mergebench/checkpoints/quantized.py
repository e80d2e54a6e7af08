"""Checkpoints whose stored numbers are codes, so that adding them would mean nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergebench.core.errors import FormatError
from mergebench.core.tensor import Tensor

# Ordered: the first scheme that matches any tensor is the one named.
_SCHEMES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("GPTQ or AWQ", re.compile(r"(^|\.)(qweight|qzeros|scales|g_idx)$")),
    ("bitsandbytes 4-bit", re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$")),
    ("bitsandbytes 4-bit", re.compile(r"\.quant_state\.")),
    ("bitsandbytes 8-bit", re.compile(r"(^|\.)SCB$")),
    ("compressed-tensors", re.compile(r"(^|\.)weight_packed$")),
    ("scaled fp8 or int8", re.compile(r"(^|\.)weight_scale(_inv|_2)?$")),
    ("scaled fp8", re.compile(r"(^|\.)(scale_weight|scaled_fp8)$")),
)
_INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_FIX = "use the checkpoint it was made from, or dequantize it first"


def refuse_quantized(
    label: str, config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> None:
    """Refuse a quantized checkpoint, naming the scheme.

    Refused are: a ``quantization_config`` (or ``compression_config``) in the config or in a part
    of it; tensors named as GPTQ, AWQ, bitsandbytes, compressed-tensors, MXFP4 or scaled fp8 name
    theirs; integers in a weight of two or more dimensions. Plain fp8 without scales passes.

    Parameters
    ----------
    label : str
        Names the checkpoint in the message.
    config : mapping or None
        ``config.json``.
    tensors : mapping of str to Tensor
        All tensors of the checkpoint; none is read.

    Raises
    ------
    FormatError
    """
    for where, part in _parts(config or {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                raise FormatError(
                    f"{label}: is quantized with {_scheme(part[key])}",
                    got=f"`{where}{key}` in config.json",
                    fix=_FIX,
                )
    for scheme, pattern in _SCHEMES:
        for name in tensors:
            if pattern.search(name):
                raise _named(label, scheme, name)
    for name, tensor in tensors.items():
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in tensors:
            raise _named(label, "MXFP4", name)
        matmul = len(tensor.shape) >= 2 and name.rsplit(".", 1)[-1] == "weight"
        if matmul and tensor.dtype in _INTEGERS:
            raise FormatError(
                f"{label}: holds integers in the weight {name!r}, as quantized models do",
                got=tensor.dtype,
                fix=_FIX,
            )


def _parts(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    nested = [(f"{key}.", part) for key, part in config.items() if isinstance(part, Mapping)]
    return [("", config), *nested]


def _scheme(about: Any) -> str:
    if not isinstance(about, Mapping):
        return "a scheme it does not name"
    if isinstance(method := about.get("quant_method"), str):
        return method
    if about.get("load_in_4bit") or about.get("load_in_8bit"):
        return "bitsandbytes"
    return "a scheme it does not name"


def _named(label: str, scheme: str, name: str) -> FormatError:
    return FormatError(f"{label}: is quantized with {scheme}", got=f"tensor {name!r}", fix=_FIX)
