"""Units, results on a shared disk, and who is alive."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.checkpoints.locks import TakenError, acquire
from mergebench.compute.cut import Cut
from mergebench.compute.search import Found
from mergebench.core.errors import MergebenchError
from mergebench.merge.at import Reading
from mergebench.merge.many import leases
from mergebench.merge.many.board import Board
from mergebench.merge.many.codec import pack, unpack
from mergebench.merge.many.labour import Merged
from mergebench.merge.many.leases import Lease, Watch, beat_of, came, read_beat
from mergebench.merge.many.units import Unit, owners, units_of
from mergebench.merge.outcome import Outcome
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from tests.many.scene import build

numbers = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
values = st.recursive(
    numbers | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.tuples(st.text(max_size=2)), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(values)
def test_values_come_back(value: Any) -> None:
    """With their types."""
    found = unpack(pack(value))

    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.array([np.nan, -0.0, np.inf, 5e-324]),
        np.zeros((0, 3), np.float32),
        np.array(2.5, np.float16),
        np.float64(0.1),
        np.int64(-3),
        np.bool_(True),
        np.array([True, False]),
    ],
)
def test_arrays_come_back(array: Any) -> None:
    """To the bit, whatever their layout; a number of numpy stays one."""
    found = unpack(pack((array, [array])))[1][0]

    assert type(found) is type(array)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


def test_what_statistics_and_units_hold_comes_back() -> None:
    """Classes by name, from a list of our own."""
    outcome = Outcome((None, 0.5), ((Reading("kept", (0, 1), 0.25),), ()), {"ft": 3})
    merged = Merged({"a": outcome}, ({"a": "00"}, {}))
    assert unpack(pack([Cut(0.5, b"\xff", 3), merged])) == [Cut(0.5, b"\xff", 3), merged]
    found = unpack(pack(Found(1, 2, 3, 4, counts=np.arange(3), ends=((0, 9, 1, 0),))))
    assert (found.above, found.ends, found.values) == (1, ((0, 9, 1, 0),), None)
    assert found.counts.tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [{1, 2}, object(), np.array(["text"]), 1j])
def test_other_types_are_refused(value: Any) -> None:
    """They would not come back."""
    with pytest.raises(TypeError, match="cannot be kept exactly"):
        pack([value])


def test_damage_is_seen(tmp_path: Path) -> None:
    """A result that is torn is deleted, and asked for again."""
    board = Board(tmp_path / "board")
    board.put("a", [1, 2])
    board.put("a", [3])
    assert board.get("a") == [1, 2]
    assert board.names() == {"a"}
    whole = (tmp_path / "board" / "a").read_bytes()
    for data in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        (tmp_path / "board" / "a").write_bytes(data)
        with pytest.raises(FileNotFoundError):
            board.get("a")
        assert not board.has("a")


def test_without_links_the_last_result_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on disks that know no second names."""

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    board = Board(tmp_path)
    board.put("a", 1)

    board.put("a", 2)

    assert board.get("a") == 2
    assert board.names() == {"a"}


def test_units_hold_every_tensor_once(tmp_path: Path) -> None:
    """In the order of names, so that results put in a row are in order too."""
    inputs = build(tmp_path)
    refs = tuple(ModelRef(str(inputs / name)) for name in ("ft1", "ft2"))
    plan = make_plan(Recipe(refs, base=str(inputs / "base"), method="ties"))
    for pieces in (1, 3, 256):
        units = units_of(plan, pieces)
        names = [name for unit in units for name in unit.names]
        assert names == sorted(plan.aligned.order, key=str.encode)
        assert [unit.number for unit in units] == list(range(len(units)))
        assert len(units) <= pieces
    # Stored in bfloat16 the inputs are read, once each, and float32 is counted for the output.
    sizes = {name: unit.bytes for unit in units for name in unit.names}
    assert sizes["model.norm.weight"] == 16 * (2 * 3 + 4)
    assert sizes["model.position_ids"] == 8 * 8 * 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 7))
def test_shares_are_even(sizes: list[int], count: int) -> None:
    """No worker has more than its share and one unit."""
    units = [Unit(number, (str(number),), size) for number, size in enumerate(sizes)]

    found = owners(units, count)

    loads = [sum(s for s, o in zip(sizes, found, strict=True) if o == k) for k in range(count)]
    assert max(loads) <= sum(sizes) / count + max(sizes)
    assert found == owners(units, count)


def test_a_large_unit_stands_against_many_small_ones() -> None:
    """Bytes count, not units."""
    units = [Unit(number, (str(number),), size) for number, size in enumerate([1] * 8 + [8])]

    assert owners(units, 2) == (1,) * 8 + (0,)


@contextmanager
def elsewhere(beat: Path, of: int = 2) -> Iterator[None]:
    """A worker on another machine, of which there is nothing but its file."""
    about = {"of": of, "host": f"not-{platform.node()}", "process": 7, "beat": 1}
    beat.write_text(json.dumps(about))
    yield


def test_a_worker_elsewhere_lives_as_long_as_it_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks of other machines do not matter: what counts is change."""
    now = 100.0
    monkeypatch.setattr(leases, "monotonic", lambda: now)
    watch, beat = Watch(lease=10), beat_of(tmp_path, 1)
    assert watch.state(beat) == "absent"
    with elsewhere(beat):
        assert watch.state(beat) == "alive"
        now = 109.0
        assert watch.state(beat) == "alive"
        beat.write_text(beat.read_text().replace('"beat": 1', '"beat": 2'))
        assert watch.state(beat) == "alive"
        now = 118.0
        assert watch.state(beat) == "alive"
        now = 120.0
        assert watch.state(beat) == "dead"
        beat.write_text(beat.read_text().replace('"beat": 2', '"beat": 3'))
        assert watch.state(beat) == "alive"


def test_a_worker_here_lives_as_long_as_its_lock(tmp_path: Path) -> None:
    """Without any waiting."""
    watch, beat = Watch(lease=1000), beat_of(tmp_path, 1)
    with Lease(tmp_path, 1, 2, watch):
        assert watch.state(beat) == "alive"
        about = read_beat(beat)
        assert about is not None
        assert about["process"] == os.getpid()
        assert not came(tmp_path, 2)
    assert watch.state(beat) == "dead"
    beat_of(tmp_path, 0).touch()
    assert came(tmp_path, 2)


def test_it_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others see the file change."""
    monkeypatch.setattr(leases, "BEAT", 0.01)
    with Lease(tmp_path, 0, 1, Watch()):
        beats = {(read_beat(beat_of(tmp_path, 0)) or {}).get("beat") for _ in range(20_000)}
    assert len(beats) > 1


def test_a_place_elsewhere_is_taken_only_after_its_lease(tmp_path: Path) -> None:
    """And not while it beats."""
    beat = beat_of(tmp_path, 0)
    with elsewhere(beat), Lease(tmp_path, 0, 2, Watch(lease=0.05)):
        assert (read_beat(beat) or {})["host"] == platform.node()

    class Beating(Watch):
        def state(self, beat: Path) -> Any:
            beat.write_text(beat.read_text().replace('"beat": 1', '"beat": 2'))
            return "alive"

    with (
        elsewhere(beat),
        pytest.raises(MergebenchError, match=r"that worker is at work already, got process 7 on"),
        Lease(tmp_path, 0, 2, Beating()),
    ):
        raise AssertionError


def test_dead_workers_of_another_number_are_forgotten(tmp_path: Path) -> None:
    """Nobody waits for them."""
    beat_of(tmp_path, 4).write_text(json.dumps({"of": 5, "host": platform.node(), "beat": 1}))
    with Lease(tmp_path, 0, 2, Watch()):
        assert not beat_of(tmp_path, 4).exists()


def test_many_hold_a_shared_lock_and_nobody_alone(tmp_path: Path) -> None:
    """Until the last of them lets go."""
    path = tmp_path / "lock"
    one, two = (acquire(path, tmp_path / "out", shared=True) for _ in range(2))
    assert one is not None
    assert two is not None
    for lock in (one, two):
        with pytest.raises(TakenError, match=f"process {os.getpid()}"):
            acquire(path, tmp_path / "out")
        lock.release()
    alone = acquire(path, tmp_path / "out")
    assert alone is not None
    with pytest.raises(TakenError):
        acquire(path, tmp_path / "out", shared=True)
    alone.release()
    assert list(tmp_path.iterdir()) == []
