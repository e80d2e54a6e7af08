"""Sizes as users write them."""

from __future__ import annotations

import re

from mergebench.core.errors import ParameterError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?|\.\d+)\s*(?:([KMGT])(I?))?B?\s*$", re.IGNORECASE | re.ASCII)
_POWER = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` (10⁹), ``5GiB`` (2³⁰), ``1.5 MB`` or ``4096``.

    Raises
    ------
    ParameterError
        If it is no such size, or less than one byte.
    """
    match = _SIZE.match(text)
    size = 0.0
    if match:
        number, unit, binary = match.groups()
        base = 1024 if binary else 1000
        factor = base ** _POWER[unit.upper()] if unit else 1
        size = int(number) * factor if number.isdecimal() else float(number) * factor
    if size < 1 or size >= 2**63:
        raise ParameterError(
            "a size must be a positive number of bytes",
            expected="such as 5GB, 500MB, 2GiB or 1048576",
            got=f"{text!r:.40}",
        )
    return int(size)
