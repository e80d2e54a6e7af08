"""Tensors that are looked at once and let go of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from mergebench.checkpoints import page_cache
from mergebench.checkpoints.passing import Passing
from mergebench.core.extents import Extent


@dataclass(eq=False)
class Disk:
    """A store that remembers what it was told."""

    far: bool = False
    told: list[tuple[int, int, str]] = field(default_factory=list)

    def advise(self, offset: int, length: int, advice: str) -> None:
        self.told.append((offset, length, advice))


@dataclass(eq=False)
class Stored:
    disk: Disk
    offset: int
    shape: tuple[int, ...]
    dtype: str = "F32"
    name: str = "weight"

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        yield Extent(self.disk, self.offset + 4 * start, 4 * (stop - start))


def test_neighbours_are_let_go_of_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems keep what they read in one piece, of megabytes even, where only a part is named."""
    monkeypatch.setenv(page_cache.VARIABLE, "1KiB")
    disk, other = Disk(), Disk()
    looked_at = [
        Stored(disk, 5000, (1000,)),
        Stored(other, 100, (250,)),
        Stored(disk, 100, (1000,)),
        Stored(disk, 9000, (0,)),
        Stored(disk, 20000, (10,)),
    ]
    passing = Passing((each, ()) for each in looked_at)

    passing.done(looked_at[0], ())
    first = list(disk.told)
    passing.over()

    assert first == [(5000, 4000, "dontneed")]
    assert disk.told[1:] == [(100, 8900, "dontneed"), (20000, 40, "dontneed")]
    assert other.told == [(100, 1000, "dontneed")]


def test_small_runs_leave_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(page_cache.VARIABLE, "1MiB")
    disk = Disk()
    weight = Stored(disk, 0, (1000,))
    passing = Passing([(weight, ())])

    passing.done(weight, ())
    passing.over()

    assert disk.told == []
