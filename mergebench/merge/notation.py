"""Measured values as plain JSON and back, to the bit; nothing is executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

#: Keeps the bytes of an array; what it answers stands in the JSON, to find them by.
Keep = Callable[[bytes], Any]
#: So many bytes of an array, by what stands in the JSON.
Find = Callable[[Any, int], bytes | memoryview]


def _from_hex(data: Any, _: int) -> bytes:
    return bytes.fromhex(data)


@dataclass(frozen=True)
class Notation:
    """How values are written: Python's own, numbers and arrays of numpy, and some classes.

    Attributes
    ----------
    classes : mapping of tag to dataclass
        Known besides; written as their fields.
    """

    classes: Mapping[str, type[Any]]

    def encode(self, value: Any, keep: Keep = bytes.hex) -> Any:
        """A value as plain JSON; bytes of arrays stand in it in hexadecimal, or are kept beside it.

        Raises
        ------
        TypeError
            For a type that :meth:`decode` would not give back.
        """
        # Exact types: a number of numpy is no Python number, and computes otherwise.
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return {"float": value.hex()}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind is list:
            return [self.encode(each, keep) for each in value]
        if kind is tuple:
            return {"tuple": [self.encode(each, keep) for each in value]}
        if kind is dict:
            pairs = value.items()
            return {"dict": [[self.encode(k, keep), self.encode(v, keep)] for k, v in pairs]}
        for tag, known in self.classes.items():
            if kind is known:
                parts = (getattr(value, each.name) for each in fields(value))
                return {tag: [self.encode(each, keep) for each in parts]}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
            data = keep(np.ascontiguousarray(value).tobytes())
            what = "array" if isinstance(value, np.ndarray) else "number"
            return {what: [value.dtype.str, list(value.shape), data]}
        raise TypeError(f"a {kind.__name__} cannot be kept exactly")

    def decode(self, data: Any, find: Find = _from_hex) -> Any:
        """The value that :meth:`encode` was given.

        Raises
        ------
        ValueError, TypeError
            If it never was.
        """
        if isinstance(data, list):
            return [self.decode(each, find) for each in data]
        if not isinstance(data, dict):
            return data
        ((kind, body),) = data.items()
        match kind:
            case "float":
                return float.fromhex(body)
            case "bytes":
                return bytes.fromhex(body)
            case "tuple":
                return tuple(self.decode(each, find) for each in body)
            case "dict":
                return {self.decode(key, find): self.decode(each, find) for key, each in body}
            case "array" | "number":
                dtype, shape, place = np.dtype(body[0]), tuple(body[1]), body[2]
                count = int(np.prod(shape, dtype=np.int64))
                found = np.frombuffer(find(place, count * dtype.itemsize), dtype)
                array = found.reshape(shape).copy()
                return array if kind == "array" else array[()]
        if kind in self.classes:
            return self.classes[kind](*(self.decode(each, find) for each in body))
        raise ValueError(f"{kind!r} is no kind of value")
