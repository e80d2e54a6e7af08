"""The comparisons fail when they should."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.compare import assert_close, assert_files, assert_same
from tests.helpers.files import BF16, F32, read, write
from tests.helpers.forked import forked
from tests.helpers.running import Ran, assert_done, assert_refused, python
from tests.memory.measure import MIB, Measured, assert_within, measure

ONE = {"w": np.array([1.0, -0.0], F32)}


@pytest.mark.parametrize(
    "other",
    [
        {},
        {**ONE, "v": ONE["w"]},
        {"w": np.array([1.0, 0.0], F32)},
        {"w": np.array([[1.0, -0.0]], F32)},
        {"w": np.array([1.0, -0.0], BF16)},
    ],
)
def test_assert_same_sees_any_difference(other: dict[str, Any]) -> None:
    """Names, bytes, shapes and dtypes all count."""
    assert_same(ONE, ONE)
    with pytest.raises(AssertionError):
        assert_same(other, ONE)


@pytest.mark.parametrize(
    "other",
    [{}, {"w": [1.0, 0.1]}, {"w": [[1.0, 0.0]]}, {"w": [1.0, np.nan]}, {"v": [1.0, 0.0]}],
)
def test_assert_close_sees_what_is_too_far(other: dict[str, Any]) -> None:
    """Names, shapes and values beyond the tolerance fail; what is within passes."""
    assert_close({"w": [1.0 + 5e-7, 0.0]}, ONE)
    with pytest.raises(AssertionError):
        assert_close(other, ONE)


def test_assert_files_sees_names_and_bytes() -> None:
    """A file more, a file less or another byte fails."""
    assert_files({"a": b"1"}, {"a": b"1"})
    for other in ({}, {"a": b"2"}, {"a": b"1", "b": b""}):
        with pytest.raises(AssertionError):
            assert_files(other, {"a": b"1"})


@pytest.mark.parametrize(
    "ran",
    [
        Ran(0, "", "error: no such thing\n"),
        Ran(2, "", "error: no such thing\nerror: twice\n"),
        Ran(2, "", "Error: no such thing\n"),
        Ran(2, "", "error: something else\n"),
        Ran(2, "result", "error: no such thing\n"),
        Ran(2, "", ""),
    ],
)
def test_assert_refused_wants_one_line(ran: Ran) -> None:
    """Another code, more lines, other words or output beside the error fail."""
    assert_refused(Ran(2, "", "error: no such thing\n"), "such")
    with pytest.raises(AssertionError):
        assert_refused(ran, "such")


def test_assert_done_wants_code_zero() -> None:
    """Findings are not done."""
    assert assert_done(Ran(0, "", "")).code == 0
    with pytest.raises(AssertionError):
        assert_done(Ran(1, "", ""))


def test_assert_within_wants_success_and_room() -> None:
    """A failed command, a peak above the limit, and a watcher that saw nothing fail."""
    assert_within(Measured(Ran(0, "", ""), MIB), MIB)
    for measured in (
        Measured(Ran(0, "", ""), MIB + 1),
        Measured(Ran(2, "", ""), 1),
        Measured(Ran(0, "", ""), 0),
    ):
        with pytest.raises(AssertionError):
            assert_within(measured, MIB)


def test_measure_sees_what_is_held_for_a_moment(tmp_path: Path) -> None:
    """An array that lives for a twentieth of a second is in the peak."""
    plugin = (
        "import time, numpy, mergebench.cli.looking as looking\n"
        "def hold(*args):\n"
        "    held = numpy.ones(16 << 20)\n"
        "    time.sleep(0.05)\n"
        "    raise SystemExit(0)\n"
        "looking._open = hold\n"
    )
    write(tmp_path / "w.safetensors", ONE)

    idle = measure(["inspect", "w.safetensors"], tmp_path)
    holding = measure(["inspect", "w.safetensors"], tmp_path, before=plugin)

    assert 128 * MIB <= holding.peak <= 160 * MIB
    assert idle.peak < 32 * MIB


def test_files_are_read_as_written(tmp_path: Path) -> None:
    """Reading gives back dtypes, shapes and bytes."""
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.array(1.5, BF16), **ONE}

    assert_same(read(write(tmp_path / "f.safetensors", arrays)), arrays)


def test_forked_processes_are_processes_of_their_own(tmp_path: Path) -> None:
    """Each has its arguments, folder, environment, output and code, and leaves nothing behind."""
    run = forked("import json; json.mark = 'ready'")
    code = """
import atexit, json, os, sys
print(json.mark, sys.argv[1], os.getcwd(), os.environ.get("OWN"), sys.stdin.read() == "")
print("beside", file=sys.stderr)
json.mark = "changed"
atexit.register(print, "at the end")
sys.exit(int(sys.argv[1]))
"""
    for number, own in ((3, {"OWN": "here"}), (0, {})):
        said = f"ready {number} {tmp_path} {own.get('OWN')} True\nat the end\n"
        expected = Ran(number, said, "beside\n")
        assert run(code, number, cwd=tmp_path, env=own) == expected
        assert python(
            "import json; json.mark = 'ready'\n" + code, number, cwd=tmp_path, env=own
        ) == (expected)
    broken = run("raise ValueError('odd')", cwd=tmp_path)
    assert broken.code == 1
    assert broken.err.endswith("ValueError: odd\n")
    assert run("import os; os.abort()", cwd=tmp_path).code == -signal.SIGABRT
