"""A shelf on a machine that fails at any change: what is listed is whole, always."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mergebench.core.errors import MergebenchError
from mergebench.ship.shelf import entries, entry
from mergebench.ship.shelf_care import collect, damage, export, objects
from mergebench.ship.shelf_changes import take_off
from mergebench.ship.shelving import add
from tests.faults.machine import Fault, KilledError, Machine
from tests.helpers.adapters import factors, save_peft
from tests.helpers.files import tree


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and another one to replace the first, of which all have tensors in common."""
    place = tmp_path_factory.mktemp("loras")
    made = factors(1, 4)
    for name, factor in (("one", 1.0), ("two", 2.0), ("new", 3.0)):
        save_peft(place / name, made, 8.0)
        config = place / name / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "note": factor}))
    return place


def whole(shelf: Path, out: Path) -> dict[str, dict[str, bytes]]:
    """Every entry's files, brought out of the shelf."""
    assert [found for each in entries(shelf) for found in damage(each)] == []
    found = {}
    for each in entries(shelf):
        export(each, out / each.name, force=True)
        found[each.name] = tree(out / each.name)
    return found


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "first": lambda shelf, loras: add(shelf, str(loras / "one")),
    "add": lambda shelf, loras: add(shelf, str(loras / "two")),
    "replace": lambda shelf, loras: add(shelf, str(loras / "new"), "one", force=True),
    "remove": lambda shelf, loras: take_off(shelf, "one"),
    "collect": lambda shelf, loras: collect(shelf),
}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("fault", ["kill", "power", "interrupt", "full", "broken"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_failing_at_every_step(
    change: str, fault: Fault, exchange: bool, loras: Path, tmp_path: Path
) -> None:
    """Every entry is the old one or the new one; the next run ends as if nothing had been."""
    start, goal = tmp_path / "start", tmp_path / "goal"
    if change != "first":
        add(start, str(loras / "one"))
    if change == "collect":
        add(start, str(loras / "two"), "gone")
        take_off(start, "gone")
        (start / "objects" / "00").mkdir(exist_ok=True)
        (start / "objects" / "00" / ("0" * 62)).write_bytes(b"nothing refers to this")
    start.mkdir(exist_ok=True)
    shutil.copytree(start, goal)
    CHANGES[change](goal, loras)
    outs = tmp_path / "outs"
    before, after = whole(start, outs), whole(goal, outs)
    step = 0
    while True:
        step += 1
        place = tmp_path / "run"
        shutil.copytree(start, place)
        machine = Machine(fault, step, exchange=exchange)
        try:
            with machine.running():
                CHANGES[change](place, loras)
            failed = False
        except (KilledError, KeyboardInterrupt, MergebenchError, OSError):
            failed = True
        if fault == "power":
            machine.lose_unsynced(place)
        now = whole(place, outs)
        if not machine.failed:
            assert now == after
            assert not failed
            break
        # Where two folders cannot be exchanged, there is a moment without either.
        between = [{k: v for k, v in before.items() if k != "one"}] if not exchange else []
        assert now in [before, after, *between]
        if now in between and now not in (before, after):
            collect(place)
            assert whole(place, outs) == before
        if not (change == "remove" and now == after):
            force = {"first": "one", "add": "two"}.get(change)
            if force is not None and now == after:
                assert entry(place, force)
            else:
                CHANGES[change](place, loras)
        collect(place)
        assert whole(place, outs) == after
        used = {piece.digest for each in entries(place) for piece in each.pieces}
        there = {each.parent.name + each.name for each in objects(place)}
        assert there == used
        hidden = [each for each in place.rglob(".*") if each.name != ".lock"]
        assert hidden == []
        shutil.rmtree(place)
    assert step > 1
