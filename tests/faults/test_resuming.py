"""What an interrupted output leaves, and what the next one takes over."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergebench.checkpoints import disk, locks, open_files, staging
from mergebench.checkpoints.destination import check_destination, staged_bytes
from mergebench.checkpoints.journal import VERSION
from mergebench.checkpoints.together import together
from mergebench.core.errors import MergebenchError, ResourceError
from tests.faults.machine import Machine
from tests.faults.merges import assert_same_state, hidden, state
from tests.faults.outputs import KEY, NAMES, VALUES, fill, opened, write_part, write_rest

PLACES = ("out", "out.safetensors")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where an output goes: a folder of shards, or a file."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder / request.param


@pytest.fixture
def whole(place: Path, tmp_path: Path) -> dict[str, bytes | None]:
    """What an undisturbed run leaves."""
    other = tmp_path / "undisturbed"
    other.mkdir()
    write_rest(other / place.name)
    return state(other)


def name_of(place: Path, end: str) -> Path:
    """A hidden file or folder of an output."""
    return place.with_name(f".{place.name}.mergebench-{end}")


def test_the_next_run_goes_on(place: Path, whole: dict[str, bytes | None]) -> None:
    """It learns what was finished and settled, writes the rest, and leaves nothing else."""
    first = write_part(place)

    assert first.kept
    assert hidden(place.parent) == [
        f".{place.name}.mergebench-{end}" for end in ("journal", "part")
    ]
    second = write_rest(place)
    assert dict(second.finished) == {"a": "digest of a", "b": "digest of b"}
    assert dict(second.settled) == {"value": {"of": [1, 2]}}
    assert not second.restarted
    assert_same_state(place.parent, whole)


def test_a_run_may_be_interrupted_many_times(place: Path, whole: dict[str, bytes | None]) -> None:
    """Each adds to what the others have done."""
    for count, name in enumerate(NAMES):
        assert sorted(write_part(place, [name]).finished) == list(NAMES[:count])

    assert sorted(write_rest(place).finished) == list(NAMES)
    assert_same_state(place.parent, whole)


def test_a_place_is_free_only_for_the_run_that_has_filled_it(place: Path) -> None:
    """A run that was killed after the rename may come again; others are refused."""
    single = bool(place.suffix)
    write_rest(place)
    write_part(other := place.with_name("other" + place.suffix))
    with pytest.raises(MergebenchError, match="exists already"):
        check_destination(place, single_file=single, force=False, key=KEY)
    # The journal of a killed run, as of this output.
    journal = name_of(other, "journal").read_bytes().splitlines(keepends=True)
    head = json.loads(journal[0][9:]) | {"place": place.lstat().st_ino}
    name_of(place, "journal").write_bytes(journal_line(head) + b"".join(journal[1:]))

    check_destination(place, single_file=single, force=False, key=KEY)

    for key in ("another", None):
        with pytest.raises(MergebenchError, match="exists already"):
            check_destination(place, single_file=single, force=False, key=key)
    before, inode = state(place.parent), place.lstat().st_ino
    assert sorted(write_rest(place).finished) == ["a", "b"]
    del before[name_of(place, "journal").name]
    assert state(place.parent) == before
    assert place.lstat().st_ino == inode


def test_finished_tensors_are_not_written_again(place: Path) -> None:
    """Whatever the caller passes."""
    write_part(place, ["a"])

    with opened(place) as output:
        output.write("a", 0, VALUES["c"])
        output.finish("a", "another digest")
        fill(output, ["b", "c"])

    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    data = b"".join(file.read_bytes() for file in files)
    assert data.count(VALUES["a"].tobytes()) == 1


def test_without_a_key_nothing_is_kept(place: Path) -> None:
    """As before there were keys."""
    output = write_part(place, key=None)

    assert not output.kept
    assert state(place.parent) == {}
    assert dict(write_rest(place, key=None).finished) == {}
    assert hidden(place.parent) == []


class CausedError(MergebenchError):
    """As the reader raises it when the system cannot read a file."""

    def __init__(self) -> None:
        super().__init__("cannot be read")
        self.__cause__ = OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (KeyboardInterrupt, True),
        (SystemExit, True),
        (lambda: OSError(errno.ENOSPC, "No space left on device"), True),
        (lambda: ResourceError("full"), True),
        (MemoryError, True),
        (CausedError, True),
        (lambda: MergebenchError("a NaN"), False),
        (lambda: ValueError("a bug"), False),
    ],
)
def test_only_what_may_go_well_next_time_is_kept(
    place: Path, error: Callable[[], BaseException], kept: bool
) -> None:
    """Not so after an error of the inputs or of the program; a note says what to do."""
    raised = error()

    output = write_part(place, error=raised)

    assert output.kept == kept
    assert bool(hidden(place.parent)) == kept
    notes = ["what is done is kept: run the same command again to go on from there"]
    assert getattr(raised, "__notes__", []) == (notes if kept else [])


def test_a_run_that_has_done_nothing_leaves_nothing(place: Path) -> None:
    """Not even the folders made for it."""
    deep = place.parent / "deep" / "er" / place.name
    output = opened(deep)
    with pytest.raises(KeyboardInterrupt), output:
        raise KeyboardInterrupt

    assert not output.kept
    assert state(place.parent) == {}


def test_another_key_starts_over(place: Path, whole: dict[str, bytes | None]) -> None:
    """And says so."""
    write_part(place)

    output = write_rest(place, key="another")

    assert output.restarted
    assert dict(output.finished) == {}
    assert_same_state(place.parent, whole)


def test_an_error_before_work_keeps_what_was_done(place: Path) -> None:
    """Such as a side file that is missing, or a destination that now exists."""
    write_part(place)
    if place.suffix:
        place.write_bytes(b"theirs")
        with pytest.raises(MergebenchError, match="exists already"), opened(place):
            pytest.fail("the output was opened")
        place.unlink()
    else:
        side = {"vocab.txt": place.parent / "gone.txt"}
        with pytest.raises(MergebenchError, match="cannot be copied"), opened(place, side=side):
            pytest.fail("the output was opened")

    assert sorted(write_rest(place).finished) == ["a", "b"]


@pytest.mark.parametrize(
    "damage", ["longer", "shorter", "header", "missing", "link", "other inode", "version", "line"]
)
def test_damaged_work_is_done_again(
    place: Path, whole: dict[str, bytes | None], damage: str
) -> None:
    """A size, a header, a file that is gone or not the one that was written, an unknown journal."""
    write_part(place)
    part, journal = name_of(place, "part"), name_of(place, "journal")
    file = part if place.suffix else part / "model-00002-of-00003.safetensors"
    data = file.read_bytes()
    match damage:
        case "longer":
            file.write_bytes(data + b"\0")
        case "shorter":
            file.write_bytes(data[:-1])
        case "header":
            file.write_bytes(data.replace(b"F32", b"I32", 1))
        case "missing":
            file.unlink()
        case "link":
            file.rename(place.parent / "elsewhere")
            file.symlink_to(place.parent / "elsewhere")
        case "other inode":
            part.rename(place.parent / "elsewhere")
            copy = shutil.copytree if not place.suffix else shutil.copy
            copy(place.parent / "elsewhere", part)
        case "version":
            lines = journal.read_bytes().splitlines(keepends=True)
            head = json.loads(lines[0][9:]) | {"journal": VERSION + 1}
            lines[0] = journal_line(head)
            journal.write_bytes(b"".join(lines))
        case "line":
            journal.write_bytes(b"torn" + journal.read_bytes())

    output = write_rest(place)

    assert dict(output.finished) == {}
    # Where nothing of an earlier run is found, nothing is thrown away.
    gone = damage == "other inode" or (damage in ("missing", "link") and place.suffix)
    assert output.restarted == (not gone)
    for path in place.parent.glob("elsewhere"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_same_state(place.parent, whole)


def journal_line(record: Any) -> bytes:
    """A line as the format has it, made here by hand."""
    text = json.dumps(record).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def test_a_journal_cut_anywhere_costs_what_was_cut(
    place: Path, whole: dict[str, bytes | None]
) -> None:
    """At every byte, also inside the first line; the bytes of the output are the same."""
    seen = set()
    length = 0
    with Machine().running():
        while True:
            write_part(place)
            journal = name_of(place, "journal")
            os.truncate(journal, min(length, size := journal.stat().st_size))

            output = write_rest(place)

            seen.add(tuple(output.finished))
            assert_same_state(place.parent, whole)
            clear(place)
            # A folder has the same journal, and takes longer.
            length += 1 if place.suffix else 11
            if length > size:
                break
    assert seen <= {(), ("a",), ("a", "b")}
    assert len(seen) == 3 or not place.suffix


def test_a_journal_damaged_anywhere_does_no_harm(
    place: Path, whole: dict[str, bytes | None]
) -> None:
    """One bit of any byte."""
    position = 0
    with Machine().running():
        while True:
            write_part(place)
            journal = name_of(place, "journal")
            content = bytearray(journal.read_bytes())
            if position >= len(content):
                break
            content[position] ^= 1
            journal.write_bytes(content)

            output = write_rest(place)

            assert len(output.finished) <= 2
            assert_same_state(place.parent, whole)
            clear(place)
            position += 1 if place.suffix else 11


def clear(place: Path) -> None:
    """Take an output away."""
    shutil.rmtree(place) if place.is_dir() else place.unlink()


def test_files_that_were_staged_and_not_planned_do_not_appear(
    tmp_path: Path,
) -> None:
    """A stale shard, a side file of the last attempt, a folder."""
    place = tmp_path / "out"
    write_part(place, side={"config.json": b"{}", "old/vocab.txt": b"old"})
    (name_of(place, "part") / "model-00009-of-00009.safetensors").write_bytes(b"stale")

    output = write_rest(place)

    assert sorted(output.finished) == ["a", "b"]
    assert sorted(path.name for path in place.rglob("*")) == [
        "config.json",
        *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    ]


def test_leftovers_of_this_output_are_cleaned_and_no_others(place: Path) -> None:
    """Random names of runs that were killed without a lock; other outputs keep theirs."""
    ours = [f".{place.name}.mergebench-{end}" for end in ("0123abcd", "0123abcd-part", "trash")]
    others = [f".{place.name}2.mergebench-0123abcd", f".{place.name}.mergebench-notes", "mine"]
    for name in (*ours, *others):
        (place.parent / name).mkdir()
        (place.parent / name / "model.safetensors").write_bytes(b"left")

    write_rest(place)

    left = sorted(path.name for path in place.parent.iterdir())
    assert left == sorted([place.name, *others])


def test_nothing_is_recorded_after_data_were_lost(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system may forget what it failed to write, and report success the next time."""
    true_flush, calls = disk.flush, []

    def fail_once(fd: int, *, data_only: bool = False) -> None:
        calls.append(data_only)
        if calls.count(True) == 2 and data_only:
            raise OSError(errno.EIO, "Input/output error")
        true_flush(fd, data_only=data_only)

    monkeypatch.setattr(open_files, "flush", fail_once)
    output = opened(place)

    def write_then_finish() -> None:
        with output:
            for name in NAMES:
                output.write(name, 0, VALUES[name])
            for name in NAMES:
                output.finish(name, f"digest of {name}")

    with (
        Machine().running(),
        pytest.raises(MergebenchError, match="cannot be written, got Input/output error"),
    ):
        write_then_finish()
    assert output.kept
    assert sorted(write_rest(place).finished) == ["a"]


def test_long_names_have_hidden_places_of_their_own(tmp_path: Path) -> None:
    """Two outputs whose names differ at the end alone."""
    one, two = (tmp_path / ("日" * 70 + end) for end in ("1", "2"))
    write_part(one, ["a"])
    write_part(two, ["a", "b"])

    assert sorted(write_rest(one).finished) == ["a"]
    assert sorted(write_rest(two).finished) == ["a", "b"]
    assert hidden(tmp_path) == []


def test_finish_wants_all_bytes(place: Path) -> None:
    """A tensor that is unknown or has a gap is a mistake of the caller."""
    with pytest.raises(ValueError, match="not open"):
        opened(place).finish("a", "")
    with opened(place) as output:
        output.write("a", 0, VALUES["a"][:2])
        with pytest.raises(ValueError, match="'a': bytes 8:20 were never written"):
            output.finish("a", "")
        with pytest.raises(ValueError, match="no tensor of this output"):
            output.finish("d", "")
        fill(output)


def test_the_space_of_what_is_staged_is_not_asked_for_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that the output has nearly filled has room for the rest of it."""
    write_part(place)
    usage = type(shutil.disk_usage(place.parent))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(1000, 999, 1))

    assert staged_bytes(place, single_file=bool(place.suffix)) >= 60
    assert staged_bytes(place.with_name("other"), single_file=False) == 0
    assert sorted(write_rest(place).finished) == ["a", "b"]


def test_a_disk_without_inodes_is_written_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There nobody could tell whose work is found, so none is kept."""
    monkeypatch.setattr(staging, "inode", lambda path: 0 if path.exists() else -1)

    assert not write_part(place).kept
    assert state(place.parent) == {}
    write_rest(place)
    assert hidden(place.parent) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_written_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Under a name of its own for every run, and without resuming."""

    def refuse(fd: int, shared: bool) -> bool:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(locks, "_lock", refuse)
    with opened(place, force=True) as one, opened(place, force=True) as two:
        names = hidden(place.parent)
        fill(one)
        fill(two)

    assert len(names) == 2
    assert hidden(place.parent) == []
    assert not write_part(place, force=True).kept


def test_two_outputs_appear_once_both_are_complete(tmp_path: Path) -> None:
    """An error of the second leaves the first hidden."""
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")

    def forget_one() -> None:
        with together([one, two]):
            fill(one)
            fill(two, ["a", "b"])

    with pytest.raises(RuntimeError, match="'c': bytes 0:20 were never written"):
        forget_one()
    assert state(tmp_path) == {}
    with together([one := opened(tmp_path / "one"), two := opened(tmp_path / "two")]):
        fill(one)
        fill(two)
        assert not (tmp_path / "one").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
