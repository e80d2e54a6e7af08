"""Outputs that go straight to the disk: the same bytes, whatever a file system can do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergebench.checkpoints import descriptors, direct
from mergebench.checkpoints.writer import Output
from mergebench.compute.machine import PAGE
from mergebench.compute.spare import Spare
from mergebench.core.errors import ResourceError
from mergebench.core.tensor import Array
from tests.memory.residency import on_disk, resident

from .helpers import plan_arrays, random_array

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no such way")
MIB = 1 << 20
#: Beginnings in the file that are at no page's.
ARRAYS = {
    "a": random_array("BF16", (1000, 1777), 1),
    "b": random_array("F32", (777, 1111), 2),
    "c": random_array("U8", (5,), 3),
    "d": random_array("BF16", (MIB,), 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with on_disk(tmp_path) as found:
        yield found


def placed(data: bytes, offset: int) -> Array:
    """Bytes that lie to a page of memory as they are to lie to one of a file."""
    room = Spare(0).take(len(data) + PAGE)[offset % PAGE :][: len(data)]
    room[:] = np.frombuffer(data, np.uint8)
    return room


def save(
    path: Path, *, step: int = 300_000, congruent: bool = True, past: bool = True, **options: Any
) -> None:
    """Write in pieces, from several threads and backwards."""
    layout = plan_arrays(ARRAYS)
    with Output(path, layout, single_file=True, direct=past, **options) as output:

        def write(piece: tuple[str, int]) -> None:
            name, at = piece
            data = ARRAYS[name].tobytes()[at : at + step]
            offset = layout.places[name].offset + at
            output.write(name, at, placed(data, offset if congruent else offset + 8))

        pieces = [(name, at) for name in ARRAYS for at in range(0, ARRAYS[name].nbytes, step)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, reversed(pieces)))
        for name in ARRAYS:
            output.finish(name, "0" * 32)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("cached") / "model.safetensors"
    save(path, past=False)
    return path.read_bytes()


def test_whole_pages_go_past_the_cache(folder: Path, expected: bytes) -> None:
    save(folder / "cached.safetensors", past=False)
    save(folder / "past.safetensors", step=MIB)

    assert (folder / "past.safetensors").read_bytes() == expected
    save(folder / "again.safetensors", step=MIB)
    # Two pages of every piece, and pieces that are small.
    assert resident(folder / "again.safetensors") < len(expected) // 20
    assert resident(folder / "cached.safetensors") > len(expected) // 2


def test_what_is_kept_in_the_cache_all_the_same_is_let_go_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems may open such files, and write to them as to any other."""
    monkeypatch.setattr(direct, "_FLAG", os.O_NOATIME)
    save(folder / "out.safetensors", step=MIB, lean=True)
    assert resident(folder / "out.safetensors") < MIB


def test_what_was_finished_stays(folder: Path, expected: bytes) -> None:
    """A run is interrupted, and another one writes the rest."""
    layout, path = plan_arrays(ARRAYS), folder / "out.safetensors"
    written: list[str] = []

    def run(names: list[str], *, ends: bool) -> None:
        with Output(path, layout, single_file=True, direct=True, key="k") as output:
            for name in set(names) - set(output.finished):
                data = ARRAYS[name].tobytes()
                output.write(name, 0, placed(data, layout.places[name].offset))
                output.finish(name, "0" * 32)
                written.append(name)
            if not ends:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["a", "d"], ends=False)
    assert not path.exists()
    run(list(ARRAYS), ends=True)
    assert {*written[:2]} == {"a", "d"}
    assert {*written[2:]} == {"b", "c"}
    assert path.read_bytes() == expected


def test_what_lies_otherwise_in_memory_goes_through_it(folder: Path, expected: bytes) -> None:
    save(folder / "out.safetensors", step=MIB, congruent=False)
    assert resident(folder / "out.safetensors") > len(expected) // 2
    assert (folder / "out.safetensors").read_bytes() == expected


@given(step=st.integers(20_000, 3 * MIB), congruent=st.booleans())
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_pieces_of_any_size(folder: Path, expected: bytes, step: int, congruent: bool) -> None:
    path = folder / "out.safetensors"
    path.unlink(missing_ok=True)
    save(path, step=step, congruent=congruent)
    assert path.read_bytes() == expected


def refusing(real: Callable[..., Any], flag: int, number: int) -> Callable[..., Any]:
    def opened(path: Any, flags: int, *rest: Any, **options: Any) -> Any:
        if flags & flag:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *rest, **options)

    return opened


def straight(real: Callable[..., int], answer: Callable[..., int]) -> Callable[..., int]:
    """A call that answers otherwise for files that are open past the cache."""
    import fcntl

    def write(fd: int, view: memoryview, offset: int) -> int:
        past = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        return answer(fd, view, offset) if past else real(fd, view, offset)

    return write


def test_file_systems_that_cannot_open_so(
    folder: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct.os, "open", refusing(os.open, os.O_DIRECT, errno.EINVAL))
    save(folder / "out.safetensors")
    assert (folder / "out.safetensors").read_bytes() == expected


def test_systems_that_know_no_such_way(
    folder: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_FLAG", 0)
    save(folder / "out.safetensors")
    assert resident(folder / "out.safetensors") > len(expected) // 2
    assert (folder / "out.safetensors").read_bytes() == expected


def test_file_systems_that_refuse_to_write_so(
    folder: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some open such files, and refuse some or all of what is written to them."""
    tried = []

    def refuse(fd: int, view: memoryview, offset: int) -> int:
        tried.append(offset)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(descriptors, "_PWRITE", straight(os.pwrite, refuse))
    save(folder / "out.safetensors")
    assert (folder / "out.safetensors").read_bytes() == expected
    # Each thread may have been on its way.
    assert 1 <= len(tried) <= 4


def test_a_part_may_be_written(
    folder: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(fd: int, view: memoryview, offset: int) -> int:
        return os.pwrite(fd, view[: max(len(view) // 2 // PAGE * PAGE, PAGE)], offset)

    monkeypatch.setattr(descriptors, "_PWRITE", straight(os.pwrite, part))
    save(folder / "out.safetensors")
    assert (folder / "out.safetensors").read_bytes() == expected


def test_a_full_disk_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, view: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(descriptors, "_PWRITE", straight(os.pwrite, full))
    with pytest.raises(ResourceError, match="not enough space on the disk"):
        save(folder / "out.safetensors")
    assert list(folder.iterdir()) == []
