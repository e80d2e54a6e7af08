"""The journal: its bytes, its bounds, and the batches in which it grows."""

from __future__ import annotations

import errno
import json
import os
import threading
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from mergebench.checkpoints import journal as format_
from mergebench.checkpoints import recorder
from mergebench.checkpoints.journal import Head, Journal, read_journal
from mergebench.checkpoints.recorder import Recorder

HEAD = Head("key", 7)
GOLDEN = (
    b'3cc108fb {"journal":1,"key":"key","place":7}\n'
    b'99c419a9 {"settled":{"s":[1,"x"]}}\n'
    b'283a5d9a {"finished":{"t\\u03c4":"digest"}}\n'
)


def line(text: str) -> bytes:
    """A line with a sound checksum."""
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def test_golden_bytes(tmp_path: Path) -> None:
    """A journal of three lines, byte by byte, written and read."""
    path = tmp_path / "journal"
    journal = Journal.start(path, HEAD)
    journal.append({"s": [1, "x"]}, {"tτ": "digest"})
    journal.close()
    journal.close()

    assert path.read_bytes() == GOLDEN
    past = read_journal(path)
    assert past is not None
    assert (past.head, past.settled, past.finished) == (HEAD, {"s": [1, "x"]}, {"tτ": "digest"})
    assert past.length == len(GOLDEN)


def test_a_damaged_end_is_cut_off(tmp_path: Path) -> None:
    """What is appended later follows the sound beginning."""
    path = tmp_path / "journal"
    path.write_bytes(GOLDEN + b"torn" + GOLDEN)
    past = read_journal(path)
    assert past is not None
    # The lines after a damaged one are sound, and count no more.
    assert past.length == len(GOLDEN)

    journal = Journal.resume(path, past)
    journal.append({}, {"u": "2"})
    journal.close()

    assert path.read_bytes() == GOLDEN + line('{"finished":{"u":"2"}}')


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        GOLDEN[:-1].splitlines()[0],
        line("[]"),
        line("{}"),
        line("7"),
        line('{"journal":2,"key":"key","place":7}'),
        line('{"journal":1,"key":7,"place":7}'),
        line('{"journal":1,"key":"key","place":"7"}'),
        line('{"journal":1,"key":"key"}'),
        line('{"journal":'),
        line("[" * 500_000),
        GOLDEN[:8].upper() + GOLDEN[8:],
        b"x" * (1 << 21),
        b"\xff" + GOLDEN,
    ],
    ids=range(15),
)
def test_what_is_no_journal_is_none(tmp_path: Path, content: bytes) -> None:
    """Nor is a missing one, a folder, or a link."""
    path = tmp_path / "journal"
    path.write_bytes(content)

    assert read_journal(path) is None
    assert read_journal(tmp_path / "missing") is None
    assert read_journal(tmp_path) is None
    (tmp_path / "sound").write_bytes(GOLDEN)
    (tmp_path / "link").symlink_to(tmp_path / "sound")
    assert read_journal(tmp_path / "sound") is not None
    assert read_journal(tmp_path / "link") is None


@pytest.mark.parametrize(
    "text",
    ["7", "[]", '{"finished":[]}', '{"finished":{"a":1}}', '{"settled":7}', "{", "[" * 500_000],
)
def test_what_is_no_record_ends_the_journal(tmp_path: Path, text: str) -> None:
    """Even with a sound checksum; unknown kinds of records are passed over."""
    path = tmp_path / "journal"
    path.write_bytes(GOLDEN + line('{"later":1}') + line(text) + line('{"finished":{"a":"1"}}'))

    past = read_journal(path)

    assert past is not None
    assert past.finished == {"tτ": "digest"}
    assert past.length == len(GOLDEN + line('{"later":1}'))


def test_lines_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is spread over lines; an entry that is too long for one is left out."""
    monkeypatch.setattr(format_, "LINE", 100)
    path = tmp_path / "journal"
    journal = Journal.start(path, HEAD)
    finished = {f"tensor{n}": "d" * 20 for n in range(9)}
    journal.append({"long": "x" * 100, "short": 1}, {**finished, "n" * 100: ""})
    journal.close()

    assert all(len(each) <= 100 for each in path.read_bytes().splitlines(keepends=True))
    past = read_journal(path)
    assert past is not None
    assert past.finished == finished
    assert past.settled == {"short": 1}


def test_a_file_too_long_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has a bound too."""
    path = tmp_path / "journal"
    path.write_bytes(GOLDEN)
    monkeypatch.setattr(format_, "FILE", len(GOLDEN) - 1)

    assert read_journal(path) is None


def test_an_append_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line is taken back, and later lines follow the sound ones."""
    path = tmp_path / "journal"
    journal = Journal.start(path, HEAD)
    start = path.read_bytes()
    true_write = os.write

    def torn(fd: int, data: bytes) -> int:
        if len(data) > 10:
            return true_write(fd, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", torn)
        with pytest.raises(OSError, match="No space"):
            journal.append({}, {"a": "12345"})

    assert path.read_bytes() == start
    journal.append({}, {"b": "1"})
    journal.close()
    assert path.read_bytes() == start + line('{"finished":{"b":"1"}}')


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system may write less than it is given."""
    true_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: true_write(fd, data[:3]))
    journal = Journal.start(tmp_path / "journal", HEAD)
    journal.append({"s": [1, "x"]}, {"tτ": "digest"})
    journal.close()

    assert (tmp_path / "journal").read_bytes() == GOLDEN


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """Stands in for a journal and for the data files, and keeps the order of events."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def append(self, settled: dict[str, Any], finished: dict[str, str]) -> None:
        self.events.append(("journal", sorted(settled), sorted(finished)))

    def close(self) -> None:
        self.events.append("closed")

    def sync(self, files: Collection[str]) -> None:
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.events.append(("data", sorted(files)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of the recorder."""
    found = Clock()
    monkeypatch.setattr(recorder, "monotonic", found)
    return found


def recording(watched: Watched) -> Recorder:
    """A recorder that writes to what is watched."""
    journal: Any = watched
    return Recorder(journal, watched.sync)


def settle_down(made: Recorder) -> None:
    """Wait for a batch that has begun."""
    assert made._running is not None
    made._running.result(60)


def test_batches_are_written_once_old_enough_and_data_come_first(clock: Clock) -> None:
    """Nothing within the first second; then one batch of all that is pending."""
    watched = Watched()
    made = recording(watched)
    made.settle("s", 1)
    made.finish("a", "1", "file1", 10)
    made.finish("b", "2", "file2", 10)
    made.poll()
    assert watched.events == []
    clock.now += recorder.SECONDS

    made.poll()

    settle_down(made)
    assert watched.events == [("data", ["file1", "file2"]), ("journal", ["s"], ["a", "b"])]
    made.settle("t", 2)
    made.flush()
    made.close()
    # Measurements alone need no data.
    assert watched.events[2:] == [("journal", ["t"], []), "closed"]


def test_batches_are_written_once_large_enough(clock: Clock) -> None:
    """Without waiting for the clock."""
    watched = Watched()
    made = recording(watched)
    made.finish("a", "1", "file", recorder.BYTES - 1)
    assert watched.events == []

    made.finish("b", "2", "file", 1)

    settle_down(made)
    assert watched.events == [("data", ["file"]), ("journal", [], ["a", "b"])]
    made.close()
    assert clock.now == 100.0


def test_nobody_waits_for_a_batch_that_is_on_its_way(clock: Clock) -> None:
    """What comes meanwhile goes with the next one."""
    watched = Watched()
    made = recording(watched)
    watched.gate.clear()
    clock.now += 2
    made.finish("a", "1", "file", 1)
    clock.now += 2
    made.finish("b", "2", "file", 1)
    made.finish("c", "3", "file", 1)
    assert watched.events == []
    watched.gate.set()

    made.flush()

    assert [event for event in watched.events if event[0] == "journal"] == [
        ("journal", [], ["a"]),
        ("journal", [], ["b", "c"]),
    ]
    made.close()


def test_after_an_error_nothing_is_recorded(clock: Clock) -> None:
    """It shows at the next call; a system that has failed once may lie the next time."""
    watched = Watched()
    made = recording(watched)
    watched.error = OSError(errno.EIO, "Input/output error")
    clock.now += 2
    made.finish("a", "1", "file", 1)
    assert made._running is not None
    assert isinstance(made._running.exception(60), OSError)

    with pytest.raises(OSError, match="Input/output"):
        made.finish("b", "2", "file", 1)

    assert made.broken
    assert watched.events == []
    made.close()


def test_the_longest_line_can_hold_a_million_bytes() -> None:
    """So that names of any sensible length fit."""
    assert format_.LINE == 1 << 20
    assert json.loads(GOLDEN.splitlines()[0][9:])["journal"] == format_.VERSION
