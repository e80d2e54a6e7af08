"""Thresholds on magnitudes that say what becomes of ties."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """A threshold on magnitudes with its tie rule.

    An entry stays if ``|x| > value``, or if ``|x| == value`` and its place is not after
    ``(name, index)``.
    """

    value: float
    name: bytes = b""
    index: int = -1

    def ties_until(self, name: str, start: int, stop: int) -> int:
        """How many of the entries ``start:stop`` of a tensor stand at or before the cut."""
        here = name.encode()
        if here != self.name:
            return stop - start if here < self.name else 0
        return min(max(self.index + 1 - start, 0), stop - start)


#: Keeps everything, and nothing.
ALL, NONE = Cut(-1.0), Cut(float("inf"))
#: Sorts after every tensor name, so that all ties stand before the cut.
LAST = b"\xff" * 8
