"""One run at a time: the lock of an output."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mergebench.checkpoints.locks import Lock, acquire
from mergebench.core.errors import MergebenchError
from tests.faults.outputs import fill, opened, write_rest
from tests.helpers.running import Ran, kill, python, started

HOLD = """
import sys, time
from pathlib import Path
from mergebench.checkpoints.locks import acquire
lock = acquire(Path(sys.argv[1]), Path("out"))
print("locked", flush=True)
time.sleep(600)
"""
# Whoever holds the lock is alone: it makes a file that must not exist, and takes it away.
RACE = """
import sys
from pathlib import Path
from mergebench.checkpoints.locks import acquire
from mergebench.core.errors import MergebenchError
path, alone = Path(sys.argv[1]), Path(sys.argv[2])
won = 0
while won < 300:
    try:
        lock = acquire(path, Path("out"))
    except MergebenchError:
        continue
    alone.touch(exist_ok=False)
    alone.unlink()
    lock.release()
    won += 1
"""


def held(path: Path) -> Lock:
    """The lock, which must be free."""
    lock = acquire(path, Path("out"))
    assert lock is not None
    return lock


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    """By number of process, within one process too; afterwards the file is gone."""
    path = tmp_path / "lock"
    lock = held(path)

    with pytest.raises(MergebenchError) as caught:
        acquire(path, Path("out"))

    assert str(caught.value) == (
        f"out: is being written by another run, got process {os.getpid()}; "
        "wait for its end, or choose another name"
    )
    lock.release()
    lock.release()
    assert not path.exists()
    held(path).release()


def test_a_lock_whose_owner_has_not_signed_yet(tmp_path: Path) -> None:
    """The message does without its number."""
    path = tmp_path / "lock"
    lock = held(path)
    path.write_bytes(b"")

    with pytest.raises(MergebenchError, match="got a process that has just started"):
        acquire(path, Path("out"))

    lock.release()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    """The file stays, and is no lock."""
    path = tmp_path / "lock"
    with started(HOLD, path, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(MergebenchError, match=f"got process {process.pid};"):
            acquire(path, Path("out"))
        kill(process)

    assert path.exists()
    held(path).release()
    assert not path.exists()


def test_a_lock_that_was_replaced_is_left_alone(tmp_path: Path) -> None:
    """Somebody has deleted the file; the next run has made its own."""
    path = tmp_path / "lock"
    first = held(path)
    path.unlink()
    second = held(path)

    first.release()

    with pytest.raises(MergebenchError, match="another run"):
        acquire(path, Path("out"))
    second.release()
    assert not path.exists()


def test_many_runs_exclude_each_other(tmp_path: Path) -> None:
    """Although the file comes and goes."""
    arguments = (tmp_path / "lock", tmp_path / "alone")
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(python, RACE, *arguments, cwd=tmp_path) for _ in range(3)]

    assert [run.result() for run in runs] == [Ran(0, "", "")] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    """The file behind it would be emptied."""
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")

    with pytest.raises(MergebenchError, match="cannot be made"):
        acquire(tmp_path / "lock", Path("out"))
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("key", ["k", None])
def test_an_output_is_written_by_one_run_at_a_time(tmp_path: Path, key: str | None) -> None:
    """The one that comes second changes nothing."""
    place = tmp_path / "out"
    with opened(place, key) as output:
        fill(output, ["a"])
        before = sorted(path.name for path in tmp_path.rglob("*"))
        with pytest.raises(MergebenchError, match="being written by another run"), opened(place):
            pytest.fail("the output was opened twice")
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
        fill(output, ["b", "c"])

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write_rest(place, force=True)
