"""Every change of the disk that a merge makes is the one at which it fails, once.

Whatever comes then, the output is absent or whole (the old one, or the new one), and the same
command ends with the very bytes of a run that nothing disturbed, and with nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from mergebench.checkpoints import page_cache
from mergebench.core.errors import MergebenchError
from tests.faults.conftest import Expected
from tests.faults.machine import Fault, KilledError, Machine
from tests.faults.merges import (
    MERGES,
    assert_each_whole,
    assert_resumable,
    assert_same_state,
    fails,
    hidden,
    state,
)

#: What a run may end with on a machine with each fault.
ENDS: dict[Fault, type[BaseException]] = {
    "kill": KilledError,
    "power": KilledError,
    "interrupt": KeyboardInterrupt,
    "full": MergebenchError,
    "broken": MergebenchError,
}
CASES: dict[Fault, tuple[str, ...]] = {
    "kill": tuple(MERGES),
    "power": ("file", "shards", "sweep", "tasks", "replace"),
    "interrupt": ("file", "sweep", "tasks", "replace"),
    "full": ("file", "shards", "lora", "sweep", "tasks"),
    "broken": ("file", "lora", "replace"),
}


def is_done(place: Path, whole: Mapping[str, bytes | None]) -> bool:
    """Whether all outputs are there, and no work that another run could go on with."""
    works = [name for name in hidden(place) if name.endswith("-part")]
    return not works and set(whole) <= set(state(place))


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, "file") for fault in ENDS] + [("full", "sweep"), ("kill", "tasks")]
)
def test_failing_at_every_step_of_a_large_merge(
    fault: Fault,
    name: str,
    inputs: Path,
    expected: Expected,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One worker computes beside the thread that writes, and lets go of what it has written."""
    monkeypatch.setenv(page_cache.VARIABLE, "1B")
    monkeypatch.setattr(page_cache, "STEP", 1)
    test_failing_at_every_step(fault, name, True, inputs, expected, tmp_path)


@pytest.mark.parametrize(
    ("fault", "name", "exchange"),
    [
        *((fault, name, True) for fault, names in CASES.items() for name in names),
        ("kill", "replace", False),
        ("power", "replace", False),
        ("interrupt", "replace", False),
        ("kill", "renew", False),
    ],
)
def test_failing_at_every_step(
    fault: Fault, name: str, exchange: bool, inputs: Path, expected: Expected, tmp_path: Path
) -> None:
    """Until a run survives; also where the system cannot exchange two folders in one step."""
    merge, whole = MERGES[name], expected(name)
    before = state(merge.prepare(tmp_path / "before", inputs))
    step = 0
    while True:
        step += 1
        place = merge.prepare(tmp_path / str(step), inputs)
        machine = Machine(fault, step, exchange=exchange)

        error = fails(machine, merge, inputs, place)

        if not machine.failed:
            assert error is None
            assert_same_state(place, whole)
            break
        # A full disk does not matter to the process id in the lock, nor an error of a folder.
        assert error is None or isinstance(error, ENDS[fault]), (step, error)
        if fault == "power":
            machine.lose_unsynced(place)
        # Without an exchange there is a moment without output, and the next run brings it back.
        assert_each_whole(place, before, whole, *(({},) if not exchange else ()))
        if fault not in ("kill", "power"):
            assert_resumable(place)
        again = fails(Machine(), merge, inputs, place)
        if not merge.old and is_done(place, whole) and isinstance(again, MergebenchError):
            # The very last steps take away journals and locks, of outputs that are there.
            assert "exists already" in str(again)
        else:
            assert again is None, step
            assert_same_state(place, whole)
        shutil.rmtree(place)
    assert step > 15
