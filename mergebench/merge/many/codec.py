"""Results as bytes, for a disk that processes share: plain values and arrays, nothing executed."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
import xxhash

from mergebench.compute.select import Cut, Found
from mergebench.merge.at import Reading
from mergebench.merge.many.labour import Merged
from mergebench.merge.outcome import Outcome

_CLASSES: dict[str, type[Any]] = {
    each.__name__: each for each in (Cut, Found, Merged, Outcome, Reading)
}
_DIGEST = 16


def pack(value: Any) -> bytes:
    """A value and a digest of it.

    Raises
    ------
    TypeError
        For a type that :func:`unpack` would not give back.
    """
    arrays: list[bytes] = []
    head = json.dumps(_encode(value, arrays)).encode()
    body = b"".join((len(head).to_bytes(8, "little"), head, *arrays))
    return xxhash.xxh3_128_digest(body) + body


def unpack(data: bytes) -> Any:
    """The value that :func:`pack` was given.

    Raises
    ------
    ValueError
        If these are not its bytes, or not all of them.
    """
    body = memoryview(data)[_DIGEST:]
    if xxhash.xxh3_128_digest(body) != data[:_DIGEST]:
        raise ValueError("damaged")
    size = int.from_bytes(body[:8], "little")
    return _decode(json.loads(bytes(body[8 : 8 + size])), body[8 + size :])


def _encode(value: Any, arrays: list[bytes]) -> Any:
    # Exact types: a number of numpy is no Python number, and computes otherwise.
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"float": value.hex()}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is list:
        return [_encode(each, arrays) for each in value]
    if kind is tuple:
        return {"tuple": [_encode(each, arrays) for each in value]}
    if kind is dict:
        return {"dict": [[_encode(k, arrays), _encode(v, arrays)] for k, v in value.items()]}
    if _CLASSES.get(kind.__name__) is kind:
        parts = [_encode(getattr(value, each.name), arrays) for each in fields(value)]
        return {"object": [kind.__name__, parts]}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        array = np.ascontiguousarray(value)
        start = sum(map(len, arrays))
        arrays.append(array.tobytes())
        what = "array" if isinstance(value, np.ndarray) else "number"
        return {what: [value.dtype.str, list(value.shape), start]}
    raise TypeError(f"a {kind.__name__} cannot be left for another process")


def _decode(data: Any, rest: memoryview) -> Any:
    if isinstance(data, list):
        return [_decode(each, rest) for each in data]
    if not isinstance(data, dict):
        return data
    ((kind, body),) = data.items()
    match kind:
        case "float":
            return float.fromhex(body)
        case "bytes":
            return bytes.fromhex(body)
        case "tuple":
            return tuple(_decode(each, rest) for each in body)
        case "dict":
            return {_decode(key, rest): _decode(each, rest) for key, each in body}
        case "object":
            return _CLASSES[body[0]](*(_decode(each, rest) for each in body[1]))
        case "array" | "number":
            dtype, shape, start = np.dtype(body[0]), tuple(body[1]), body[2]
            count = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(rest, dtype, count, start) if count else np.empty(0, dtype)
            array = array.reshape(shape).copy()
            return array if kind == "array" else array[()]
    raise ValueError(f"{kind!r} is no kind of value")
