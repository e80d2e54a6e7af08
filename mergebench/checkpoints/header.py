"""The JSON header of a safetensors file, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mergebench.core.errors import FormatError, did_you_mean
from mergebench.core.tensor import DTYPES

#: Largest header in bytes; the limit of the safetensors library.
MAX_HEADER = 100_000_000
#: Dtypes that the format knows and mergebench cannot read.
UNREADABLE = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_AGAIN = "download or copy it again, or ask its author for a sound file"
_LIMIT = 2**63
_DIGITS = len(str(2**64))
# numpy and torch hold no more.
_MAX_DIMENSIONS = 64


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; ``start`` and ``stop`` are bytes of the data part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_strict(text: str) -> Any:
    """JSON as strict as the safetensors library reads it, and without repeated keys.

    Raises
    ------
    ValueError
        For repeated keys, NaN and infinities, ``-0``, numbers beyond 64 bits, unpaired
        surrogates, nesting deeper than the interpreter allows.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"the key {key!r} twice")
                seen.add(key)
        return found

    def integer(digits: str) -> int:
        # The library holds sizes in 64 bits, and takes -0 for a floating number.
        if digits == "-0" or len(digits) > _DIGITS:
            raise ValueError(f"the number {digits[:24]}")
        return int(digits)

    def constant(name: str) -> Any:
        raise ValueError(f"the number {name}")

    try:
        parsed = json.loads(
            text, object_pairs_hook=unique, parse_int=integer, parse_constant=constant
        )
        if "\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("too many nested brackets") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    return parsed


def parse_header(
    raw: bytes, path: str, available: int
) -> tuple[Mapping[str, str], tuple[Entry, ...]]:
    """Metadata and tensors of a header, in the order of their bytes.

    Parameters
    ----------
    raw : bytes
        The header without its 8 length bytes.
    path : str
        Named in messages.
    available : int
        Bytes of the file after the header; the tensors must cover them exactly.

    Raises
    ------
    FormatError
        For anything that contradicts the format.
    """
    try:
        parsed = parse_strict(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad(
            path,
            "the header is not UTF-8",
            got=f"byte {raw[error.start]:#04x} at byte {8 + error.start}",
        ) from None
    except ValueError as error:
        raise _bad(path, "the header is not sound JSON", got=str(error)) from None
    if not isinstance(parsed, dict):
        raise _bad(path, "the header is not a JSON object", got=type(parsed).__name__)
    metadata = parsed.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "`__metadata__` does not map text to text", got=f"{metadata!r:.80}")
    entries = [_entry(path, name, fields) for name, fields in parsed.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_cover(path, entries, available)
    return metadata, tuple(entries)


def _entry(path: str, name: str, fields: Any) -> Entry:
    where = f"tensor {name!r}"
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        got = ", ".join(sorted(fields)) if isinstance(fields, dict) else f"{fields!r:.80}"
        raise _bad(
            path,
            f"{where} is not described by the fields of the format",
            expected="data_offsets, dtype, shape",
            got=got or "none",
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and dtype in UNREADABLE:
            raise FormatError(
                f"{path}: {where} has dtype {dtype}, which mergebench cannot read",
                expected="one of " + ", ".join(DTYPES),
                fix="use the checkpoint as it was before quantization",
            )
        hint = did_you_mean(dtype[:40], DTYPES) if isinstance(dtype, str) else _AGAIN
        raise FormatError(f"{path}: {where} has an unknown dtype", got=f"{dtype!r:.40}", fix=hint)
    if not _are_sizes(shape):
        raise _bad(
            path,
            f"{where} has no valid shape",
            expected="a list of integers >= 0",
            got=f"{shape!r:.80}",
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(
            path,
            f"{where} has no valid data_offsets",
            expected="[start, stop], integers with 0 <= start <= stop",
            got=f"{offsets!r:.80}",
        )
    item = DTYPES[dtype].itemsize
    # Counted without the zeros too: numpy multiplies the other extents of an empty array.
    if len(shape) > _MAX_DIMENSIONS or item * prod(max(n, 1) for n in shape) >= _LIMIT:
        raise _bad(path, f"{where} is larger than any array can be", got=f"shape {shape!r:.80}")
    length = item * prod(shape)
    start, stop = offsets
    if stop - start != length:
        raise _bad(
            path,
            f"{where} has data_offsets that do not fit its shape",
            expected=f"{length} bytes for {dtype} {shape!r:.80}",
            got=f"{stop - start}",
        )
    return Entry(name, dtype, tuple(shape), start, stop)


def _are_sizes(value: Any) -> bool:
    # A bool is an int to Python and not to the format.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: str, entries: list[Entry], available: int) -> None:
    position = 0
    previous: str | None = None
    for entry in entries:
        if entry.start < position:
            raise _bad(
                path,
                f"tensors {previous!r} and {entry.name!r} share bytes",
                expected=f"{entry.name!r} to start at byte {position} of the data",
                got=f"{entry.start}",
            )
        if entry.start > position:
            after = "before the first tensor" if previous is None else f"after {previous!r}"
            raise _bad(
                path,
                f"{entry.start - position} bytes {after} belong to no tensor",
                expected=f"{entry.name!r} to start at byte {position} of the data",
                got=f"{entry.start}",
            )
        position, previous = entry.stop, entry.name
    if position > available:
        raise _bad(
            path,
            f"the file is truncated: tensor {previous!r} ends after it",
            expected=f"{position} bytes of data",
            got=f"{available}",
        )
    if position < available:
        raise _bad(
            path,
            f"{available - position} bytes at the end belong to no tensor",
            expected=f"{position} bytes of data",
            got=f"{available}",
        )


def _bad(path: str, what: str, *, got: str = "", expected: str = "") -> FormatError:
    return FormatError(f"{path}: {what}", got=got, expected=expected, fix=_AGAIN)
