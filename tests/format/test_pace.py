"""Which files are asked for ahead: by how fast they are read, on a clock of our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergebench.checkpoints import pace
from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.pace import ENOUGH, PIECE, PLACES, to_ask
from mergebench.compute.machine import PAGE

#: Bytes per second from memory.
CACHED = 8e9
SIZE = 10 * PIECE


@dataclass
class Disks:
    """Folders that stand for disks of some bytes per second, and what is done with their files.

    Attributes
    ----------
    folder : Path
    paces : dict of folder's name to bytes per second
    cached : dict of file's name to the share of it that is in memory, from its beginning
    reads, dropped : list of (name, offset, length)
    """

    folder: Path
    paces: dict[str, float]
    cached: dict[str, float] = field(default_factory=dict)
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    dropped: list[tuple[str, int, int]] = field(default_factory=list)
    now: float = 0.0

    def file(self, name: str, size: int = SIZE) -> Handle:
        """A file of zeros, which take no room."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        return Handle(path)


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disks:
    made = Disks(tmp_path, {"fast": 2 * ENOUGH, "slow": ENOUGH / 2})

    def stat(handle: Handle) -> Any:
        return SimpleNamespace(
            st_size=handle.path.stat().st_size, st_dev=list(made.paces).index(disk(handle))
        )

    def read_at(handle: Handle, view: memoryview, offset: int) -> int:
        size = handle.path.stat().st_size
        got = min(len(view), size - offset)
        near = offset + got <= made.cached.get(handle.path.name, 0) * size
        made.now += got / (CACHED if near else made.paces[disk(handle)])
        made.reads.append((handle.path.name, offset, got))
        return got

    def advise(handle: Handle, offset: int, length: int, advice: str) -> None:
        assert advice == "dontneed"
        made.dropped.append((handle.path.name, offset, length))

    monkeypatch.setattr(Handle, "stat", stat)
    monkeypatch.setattr(Handle, "read_at", read_at)
    monkeypatch.setattr(Handle, "advise", advise)
    monkeypatch.setattr(pace, "perf_counter", lambda: made.now)
    return made


def disk(handle: Handle) -> str:
    return handle.path.parent.name


def test_files_of_slow_disks_are_asked_for(disks: Disks) -> None:
    """All of them, for the largest; what is read to see it is let go again."""
    small, large = disks.file("slow/small", SIZE // 2), disks.file("slow/large")
    quick = disks.file("fast/quick")

    assert to_ask([small, quick, large, small]) == {small, large}
    assert {name for name, _, _ in disks.reads} == {"large", "quick"}
    assert disks.dropped == disks.reads
    places = [int((SIZE - PIECE) * share) // PAGE * PAGE for share in PLACES]
    assert [read for read in disks.reads if read[0] == "large"] == [
        ("large", place, PIECE) for place in places
    ]


@pytest.mark.parametrize(("share", "asked"), [(0.0, True), (0.7, True), (1.0, False)])
def test_what_lies_in_memory_says_nothing_of_a_disk(
    disks: Disks, share: float, asked: bool
) -> None:
    """One place that does not is enough; and where all do, nothing needs asking."""
    handle = disks.file("slow/model")
    disks.cached["model"] = share

    assert to_ask([handle]) == ({handle} if asked else set())


def test_short_and_empty_files(disks: Disks) -> None:
    """They are read whole, and do not fail."""
    short, empty = disks.file("slow/short", 10), disks.file("fast/empty", 0)

    assert to_ask([short, empty]) == {short}
    assert set(disks.reads) == {("short", 0, 10), ("empty", 0, 0)}


def test_what_comes_over_a_network_is_asked_for() -> None:
    """Without a look at it."""

    class Elsewhere:
        far = True

        def advise(self, offset: int, length: int, advice: str) -> None:
            raise AssertionError

    elsewhere = Elsewhere()

    assert to_ask([elsewhere]) == {elsewhere}
