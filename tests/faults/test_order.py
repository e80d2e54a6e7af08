"""The order in which things come to the disk, so that a power cut at any moment does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.machine import Machine
from tests.faults.outputs import NAMES, opened, write_rest

JOURNAL, PART = ".out.mergebench-journal", ".out.mergebench-part"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


def assert_order(calls: list[tuple[str, str]], *expected: tuple[str, str]) -> None:
    """These calls happen in this order, with others between them."""
    place = 0
    for call in expected:
        assert call in calls[place:], f"{call} does not follow {expected[: expected.index(call)]}"
        place = calls.index(call, place) + 1


def test_the_helper_tells_orders_apart() -> None:
    """It fails where a call is missing or comes too early."""
    calls = [("fsync", "a"), ("rename", "b")]
    assert_order(calls, *calls)
    for wrong in (list(reversed(calls)), [*calls, ("fsync", "c")]):
        with pytest.raises(AssertionError, match="does not follow"):
            assert_order(calls, *wrong)


def recorded(place: Path, exchange: bool) -> list[tuple[str, str]]:
    """Every change of the disk that a small output makes, in order."""
    machine = Machine(exchange=exchange)
    with machine.running(), opened(place, force=True) as output:
        for name in NAMES:
            output.write(name, 0, bytes(20))
            output.finish(name, "digest")
        output.add_side("manifest.json", b"late")
    return machine.calls


@pytest.mark.parametrize("exchange", [True, False])
def test_folder(tmp_path: Path, exchange: bool) -> None:
    """Data, journal, side files, staged folder, rename, parent; only then is the old deleted."""
    place = tmp_path / "work" / "out"
    place.parent.mkdir()
    write_rest(place)

    calls = recorded(place, exchange)

    start = calls.index(("fsync", JOURNAL))
    # The first line of the journal names files whose names are on the disk.
    assert_order(
        calls[: start + 2],
        ("fsync", INDEX),
        ("fsync", "config.json"),
        ("fsync", PART),
        ("create", JOURNAL),
        ("write", JOURNAL),
        ("fsync", JOURNAL),
        ("fsync", "work"),
    )
    end = calls.index(("create", "manifest.json"))
    assert calls[start + 2 : end] == [
        call
        for shard in SHARDS
        for call in (
            ("pwrite", shard),
            ("fdatasync", shard),
            ("write", JOURNAL),
            ("fsync", JOURNAL),
        )
    ]
    renames = (
        [("rename", PART)]
        if exchange
        else [("rename", "out"), ("rename", PART), ("rename", ".out.mergebench-old")]
    )
    swap = [
        ("create", "manifest.json"),
        ("side", "manifest.json"),
        ("fsync", "manifest.json"),
        *(("fsync", shard) for shard in SHARDS),
        ("fsync", PART),
        *renames,
        ("fsync", "work"),
    ]
    after = calls[end + len(swap) :]
    assert calls[end : end + len(swap)] == swap
    assert {call for call, _ in after} == {"delete"}
    assert [name for _, name in after[-3:]] == [
        PART if exchange else ".out.mergebench-trash",
        JOURNAL,
        ".out.mergebench-lock",
    ]


def test_file(tmp_path: Path) -> None:
    """The same without a folder; the rename itself deletes what it replaces."""
    place = tmp_path / "work" / "out.safetensors"
    place.parent.mkdir()
    write_rest(place)
    machine = Machine()
    with machine.running():
        write_rest(place, force=True)

    part, journal = (f".out.safetensors.mergebench-{end}" for end in ("part", "journal"))
    tensor = [("pwrite", part), ("fdatasync", part), ("write", journal), ("fsync", journal)]
    start = machine.calls.index(("pwrite", part))
    assert machine.calls[start:] == [
        *(tensor * 3),
        ("fsync", part),
        ("rename", part),
        ("fsync", "work"),
        ("delete", journal),
        ("delete", ".out.safetensors.mergebench-lock"),
    ]


def test_new_parents_are_on_the_disk_before_the_work_begins(tmp_path: Path) -> None:
    """Each after it was made."""
    machine = Machine()
    with machine.running():
        write_rest(tmp_path / "work" / "deep" / "out")

    assert machine.calls[:5] == [
        ("mkdir", "work"),
        ("fsync", tmp_path.name),
        ("mkdir", "deep"),
        ("fsync", "work"),
        ("create", ".out.mergebench-lock"),
    ]
