"""Which bytes have been written."""

from __future__ import annotations

import threading


class Spans:
    """Byte ranges by tensor name; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[str, list[list[int]]] = {}

    def add(self, name: str, start: int, stop: int) -> None:
        """Note bytes ``start:stop`` of a tensor, in any order, also again."""
        with self._lock:
            spans = self._spans.setdefault(name, [])
            if spans and spans[-1][1] == start:
                spans[-1][1] = stop
            else:
                spans.append([start, stop])

    def first_gap(self, name: str, size: int) -> tuple[int, int] | None:
        """The first range of a tensor of ``size`` bytes that is missing."""
        position = 0
        with self._lock:
            spans = sorted(self._spans.get(name, []))
        for start, stop in spans:
            if start > position:
                return position, start
            position = max(position, stop)
        return None if position >= size else (position, size)
