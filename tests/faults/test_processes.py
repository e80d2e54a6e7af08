"""Real processes that are really killed, and what the command line says about it."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mergebench.checkpoints import descriptors
from tests.faults.conftest import Expected
from tests.faults.merges import build_inputs, hidden, state
from tests.helpers.files import BF16, read, tree, write
from tests.helpers.running import (
    assert_done,
    assert_refused,
    call,
    clean_environment,
    command,
    kill,
    started,
)

# The command, slowed down so that it can be met at any step: it writes a tensor, and waits for a
# line on its standard input before the next. What is finished is recorded without delay.
SLOW = """
import sys
from mergebench.checkpoints import writer
true_write, true_finish = writer.Output.write, writer.Output.finish
def finish(self, name, digest):
    true_finish(self, name, digest)
    self._recorder.flush()
writer.Output.finish = finish
def write(self, name, byte_start, data):
    true_write(self, name, byte_start, data)
    print("written", flush=True)
    sys.stdin.readline()
writer.Output.write = write
from mergebench.cli.main import main
main()
"""
MERGE = ("merge", "ft1", "ft2", "-b", "base", "-m", "ties")
GOES_ON = "what is done is kept: run the same command again to go on from there"


def resuming(done: int) -> str:
    """The note of a run that goes on."""
    counted = f"{done} of 4 tensors and 2 measurements"
    return f"note: resuming an interrupted run: {counted} are done already\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with inputs, where the command runs."""
    return build_inputs(tmp_path)


def let_write(process: subprocess.Popen[str], count: int) -> None:
    """Let it write so many pieces; it stands still after the last."""
    assert process.stdin is not None
    assert process.stdout is not None
    for number in range(count):
        if number:
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline() == "written\n"


@pytest.mark.parametrize(("out", "count"), [("out", 2), ("out", 4), ("out.safetensors", 3)])
def test_a_killed_merge_goes_on(place: Path, out: str, count: int) -> None:
    """SIGKILL after some tensors; the plain command ends with the bytes of one that was let be."""
    with started(SLOW, *MERGE, "-o", out, cwd=place) as process:
        let_write(process, count)
        kill(process)
    assert not (place / out).exists()
    (place / "whole").mkdir()

    ran = assert_done(command(*MERGE, "-o", out, cwd=place))

    # The last tensor was written, and the process died before it was noted.
    assert ran.err == resuming(count - 1)
    assert hidden(place) == []
    assert_done(call(*MERGE, "-o", f"whole/{out}", cwd=place))
    made = tree(place / out) if (place / out).is_dir() else {"": (place / out).read_bytes()}
    whole = place / "whole" / out
    assert made == (tree(whole) if whole.is_dir() else {"": whole.read_bytes()})


def test_a_merge_killed_many_times_ends_well(place: Path) -> None:
    """Each run adds one tensor."""
    for _ in range(3):
        with started(SLOW, *MERGE, "-o", "out", cwd=place) as process:
            let_write(process, 2)

    ran = assert_done(call(*MERGE, "-o", "out", cwd=place))

    assert ran.err == resuming(3)
    assert hidden(place) == []
    assert len(read(place / "out")) == 4


def test_two_runs_exclude_each_other(place: Path) -> None:
    """The second is refused, naming the first, until the first has been killed."""
    with started(SLOW, *MERGE, "-o", "out", cwd=place) as process:
        let_write(process, 1)
        before = state(place)

        refused = call(*MERGE, "-o", "out", cwd=place)

        assert_refused(refused, "out: is being written by another run", f"process {process.pid}")
        assert state(place) == before
        # Another output is no concern of the first.
        assert_done(call(*MERGE, "-o", "other", cwd=place))
        process.kill()
        process.wait(60)
        assert_done(call(*MERGE, "-o", "out", cwd=place))

    assert hidden(place) == []
    one, two = ((place / name / "model.safetensors").read_bytes() for name in ("out", "other"))
    assert one == two


@pytest.mark.parametrize("options", [(), ("--quiet",), ("--workers", "3")])
def test_ctrl_c_says_what_to_do(place: Path, options: tuple[str, ...]) -> None:
    """Exit 130 and one line; the same command goes on."""
    with started(SLOW, *MERGE, "-o", "out", *options, cwd=place) as process:
        let_write(process, 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (130, "", f"error: interrupted; {GOES_ON}\n")
    assert hidden(place) == [".out.mergebench-journal", ".out.mergebench-part"]
    ran = assert_done(call(*MERGE, "-o", "out", *options, cwd=place))
    assert ran.err == ("" if "--quiet" in options else resuming(1))
    assert hidden(place) == []


def test_a_full_disk_says_what_to_do(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed, and that nothing is lost."""
    true_write, calls = descriptors._PWRITE, []

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(true_write(fd, data, offset))

    with monkeypatch.context() as patched:
        patched.setattr(descriptors, "_PWRITE", refuse)
        ran = call(*MERGE, "-o", "out", cwd=place)

    assert_refused(ran, "out: not enough space on the disk", "free some space", f"; {GOES_ON}")
    again = assert_done(call(*MERGE, "-o", "out", cwd=place))
    assert again.err == resuming(2)


def test_a_changed_plan_is_told(place: Path) -> None:
    """It starts over, and --quiet says nothing."""
    for quiet, words in (((), "starting over"), (("--quiet",), "")):
        with started(SLOW, *MERGE, "-o", "out", cwd=place) as process:
            let_write(process, 3)
        ran = assert_done(call(*MERGE, "-p", "density=0.9", "-o", "out", *quiet, cwd=place))
        assert words in ran.err
        assert bool(ran.err) == bool(words)
        for path in (place / "out").iterdir():
            path.unlink()
        (place / "out").rmdir()


def test_a_forced_run_that_is_killed_keeps_the_old_output(place: Path, expected: Expected) -> None:
    """And the same command replaces it."""
    old = write(place / "out" / "model.safetensors", {"w": read(place / "base")["norm.weight"]})
    before = old.read_bytes()
    with started(SLOW, *MERGE, "-o", "out", "--force", cwd=place) as process:
        let_write(process, 3)
    assert old.read_bytes() == before

    ran = assert_done(call(*MERGE, "-o", "out", "--force", cwd=place))

    assert "resuming" in ran.err
    assert hidden(place) == []
    assert read(place / "out")["norm.weight"].dtype == BF16
    assert sorted(read(place / "out")) == sorted(read(place / "base"))


def test_json_of_a_resumed_run(place: Path) -> None:
    """Results on standard output, the note beside them, digests of all tensors."""
    with started(SLOW, *MERGE, "-o", "out", cwd=place) as process:
        let_write(process, 3)

    ran = assert_done(call(*MERGE, "-o", "out", "--json", cwd=place))

    whole = assert_done(call(*MERGE, "-o", "whole", "--json", cwd=place))
    assert ran.json["outputs"][0]["digests"] == whole.json["outputs"][0]["digests"]
    assert len(whole.json["outputs"][0]["digests"]) == 4
    assert "resuming" in ran.err


def test_nothing_is_left_of_a_merge_that_was_interrupted_at_once(place: Path) -> None:
    """Before anything was measured there is nothing to go on from."""
    before = state(place)
    code = SLOW.replace("true_write(self, name, byte_start, data)", "raise KeyboardInterrupt")
    linear = ("merge", "ft1", "ft2", "-b", "base", "-m", "linear", "-o", "deep/out")

    done = subprocess.run(
        [sys.executable, "-c", code, *linear],
        cwd=place, env=clean_environment(), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip

    assert done.returncode == 130
    assert done.stderr == "error: interrupted; nothing was written\n"
    assert state(place) == before
