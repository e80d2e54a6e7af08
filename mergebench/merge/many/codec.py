"""Results as bytes, for a disk that processes share: plain values and arrays, nothing executed."""

from __future__ import annotations

import json
from typing import Any

import xxhash

from mergebench.compute.cut import Cut
from mergebench.compute.search import Found
from mergebench.merge.at import Reading
from mergebench.merge.many.labour import Merged
from mergebench.merge.notation import Notation
from mergebench.merge.outcome import Outcome

_NOTATION = Notation(
    {each.__name__.lower(): each for each in (Cut, Found, Merged, Outcome, Reading)}
)
_DIGEST = 16


def pack(value: Any) -> bytes:
    """A value and a digest of it; arrays stand behind the JSON.

    Raises
    ------
    TypeError
        For a type that :func:`unpack` would not give back.
    """
    arrays: list[bytes] = []

    def keep(data: bytes) -> int:
        start = sum(map(len, arrays))
        arrays.append(data)
        return start

    head = json.dumps(_NOTATION.encode(value, keep)).encode()
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
    arrays = body[8 + size :]
    return _NOTATION.decode(
        json.loads(bytes(body[8 : 8 + size])), lambda start, size: arrays[start : start + size]
    )
