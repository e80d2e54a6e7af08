"""Merges that go on: what they do not do again, and what they say."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.core.errors import MergebenchError
from mergebench.merge.engine import execute
from mergebench.merge.outcome import Written
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from tests.faults.conftest import Expected
from tests.faults.machine import KilledError, Machine
from tests.faults.merges import (
    MERGES,
    Merge,
    assert_same_state,
    build_inputs,
    fails,
    hidden,
    state,
)
from tests.helpers.files import read, write


def kill_after(
    count: int, call: str, merge: Merge, inputs: Path, place: Path
) -> list[tuple[str, str]]:
    """Kill a run after it has done something a number of times; everything it has done."""
    trial = Machine()
    assert fails(trial, merge, inputs, merge.prepare(place.with_name("trial"), inputs)) is None
    kinds = [kind for kind, _ in trial.calls if kind not in ("fsync", "fdatasync")]
    steps = [step for step, kind in enumerate(kinds, 1) if kind == call]
    machine = Machine("kill", steps[count])
    assert isinstance(fails(machine, merge, inputs, place), KilledError)
    return machine.calls


def written(merge: Merge, inputs: Path, place: Path, **options: Any) -> list[Written]:
    """Run a merge; what it reports."""
    recipe = replace(merge.recipe(inputs), out=str(place / merge.out))
    return execute(make_plan(recipe, **options), force=bool(merge.old))


@pytest.mark.parametrize("name", list(MERGES))
def test_what_is_done_is_not_done_again(name: str, inputs: Path, tmp_path: Path) -> None:
    """Over both runs every tensor is written once, but for the one in the making."""
    merge = MERGES[name]
    place = merge.prepare(tmp_path / "place", inputs)
    first = kill_after(2, "pwrite", merge, inputs, place)
    again = Machine()
    with again.running():
        merge.run(inputs, place)

    whole = Machine()
    assert fails(whole, merge, inputs, merge.prepare(tmp_path / "whole", inputs)) is None
    count = sum(kind == "pwrite" for kind, _ in whole.calls)
    done = sum(kind == "pwrite" for kind, _ in (*first, *again.calls))
    assert count < done + 1 <= count + 2 + (name == "lora")


@pytest.mark.parametrize("step", [4, 5])
def test_digests_in_a_header_do_not_stop_a_run_from_going_on(
    step: int, inputs: Path, expected: Expected, tmp_path: Path
) -> None:
    """Killed while the header of a single file gets its digests, or right after."""
    merge = MERGES["file"]
    place = merge.prepare(tmp_path / "place", inputs)
    machine = Machine("kill", _nth(merge, inputs, tmp_path / "trial", "pwrite", step))
    assert isinstance(fails(machine, merge, inputs, place), KilledError)
    assert hidden(place)
    notes: list[str] = []

    merge.run(inputs, place, notes)

    (note,) = notes
    assert note.startswith("resuming an interrupted run: 4 of 4 tensors")
    assert_same_state(place, expected("file"))


def _nth(merge: Merge, inputs: Path, place: Path, call: str, count: int) -> int:
    """The step at which a call comes for the (count + 1)th time, or the step after the last."""
    trial = Machine()
    assert fails(trial, merge, inputs, merge.prepare(place, inputs)) is None
    kinds = [kind for kind, _ in trial.calls if kind not in ("fsync", "fdatasync")]
    steps = [step for step, kind in enumerate(kinds, 1) if kind == call]
    return steps[count] if count < len(steps) else steps[-1] + 1


def test_what_was_measured_is_not_measured_again(inputs: Path, tmp_path: Path) -> None:
    """Thresholds and signs of the whole model cost passes over all inputs."""
    merge = MERGES["file"]
    place = merge.prepare(tmp_path / "place", inputs)
    kill_after(0, "pwrite", merge, inputs, place)

    reads = []
    for where in (place, merge.prepare(tmp_path / "fresh", inputs)):
        machine = Machine(reads=True)
        with machine.running():
            merge.run(inputs, where)
        reads.append(machine.count)

    # Two passes of three, each over three tensors of three inputs, and a sample of one tensor.
    assert reads[1] - reads[0] == 2 * 3 * 3 + 3


@pytest.mark.parametrize("name", ["file", "tensor scope", "sweep", "tasks", "lora"])
def test_threads_and_memory_may_change(
    name: str, inputs: Path, expected: Expected, tmp_path: Path
) -> None:
    """They are no part of the plan."""
    merge = MERGES[name]
    place = merge.prepare(tmp_path / "place", inputs)
    kill_after(1, "pwrite", merge, inputs, place)

    written(merge, inputs, place, workers=3, memory=100 << 20)

    assert_same_state(place, expected(name))


#: A merge whose op reports on every tensor.
PROJECTED = Merge(
    lambda inputs: Recipe(
        (ModelRef(str(inputs / "lora1")), ModelRef(str(inputs / "lora2"))), method="orthogonal"
    ),
    "out",
)


@pytest.mark.parametrize("name", ["lora", "sweep", "tasks", "projected"])
@pytest.mark.parametrize("count", range(4))
def test_the_report_is_that_of_an_undisturbed_run(
    name: str, count: int, inputs: Path, tmp_path: Path
) -> None:
    """Residuals of truncated adapters, what ops report, and digests included."""
    merge = PROJECTED if name == "projected" else MERGES[name]
    whole = written(merge, inputs, merge.prepare(tmp_path / "whole", inputs), workers=1)
    place = merge.prepare(tmp_path / "place", inputs)
    kill_after(count, "pwrite", merge, inputs, place)

    again = written(merge, inputs, place, workers=1)

    assert [facts(one) for one in again] == [facts(one) for one in whole]
    assert all(bool(one.residuals) == (name == "lora") for one in again)
    assert all(len(one.readings) == 2 * (name == "projected") for one in again)


def facts(one: Written) -> Any:
    """All but the place, in order."""
    measured = list(one.residuals.items()), dict(one.readings)
    return one.label, one.bytes, measured, list(one.digests.items())


@pytest.mark.parametrize(("name", "measured"), [("file", 2), ("parts", 4)])
def test_a_resumed_run_says_how_much_was_done(
    inputs: Path, tmp_path: Path, name: str, measured: int
) -> None:
    """And a fresh one says nothing. Each part has measurements of its own."""
    merge = MERGES[name]
    place = merge.prepare(tmp_path / "place", inputs)
    kill_after(2, "pwrite", merge, inputs, place)
    notes: list[str] = []

    merge.run(inputs, place, notes)

    assert notes == [
        f"resuming an interrupted run: 2 of 4 tensors and {measured} measurements are done already"
    ]
    fresh: list[str] = []
    merge.run(inputs, merge.prepare(tmp_path / "fresh", inputs), fresh)
    assert fresh == []


@pytest.mark.parametrize("name", ["file", "shards", "lora"])
def test_a_changed_plan_starts_over_and_says_so(name: str, inputs: Path, tmp_path: Path) -> None:
    """Another parameter; the bytes are those of the new plan alone."""
    merge = MERGES[name]

    def recipe(folder: Path) -> Any:
        return replace(merge.recipe(folder), params={"density": 0.7})

    other = Merge(recipe, merge.out)
    whole = other.prepare(tmp_path / "whole", inputs)
    other.run(inputs, whole)
    place = merge.prepare(tmp_path / "place", inputs)
    kill_after(2, "pwrite", merge, inputs, place)
    notes: list[str] = []

    other.run(inputs, place, notes)

    said = "an interrupted run had other inputs, parameters or another version, or its files are"
    assert notes == [f"{place / merge.out}: {said} damaged; starting over"]
    assert_same_state(place, state(whole))


def test_a_changed_input_starts_over(tmp_path: Path) -> None:
    """Half of each would be the model of nobody."""
    inputs = build_inputs(tmp_path / "inputs")
    merge = MERGES["file"]
    place = merge.prepare(tmp_path / "place", inputs)
    kill_after(2, "pwrite", merge, inputs, place)
    path = inputs / "ft1" / "model.safetensors"
    tensors = read(path)
    write(path, {**tensors, "norm.weight": tensors["norm.weight"] * 2}, {"format": "pt"})
    notes: list[str] = []

    merge.run(inputs, place, notes)

    assert len(notes) == 1
    assert "starting over" in notes[0]
    whole = merge.prepare(tmp_path / "whole", inputs)
    merge.run(inputs, whole)
    assert_same_state(place, state(whole))


def test_one_of_two_outputs_may_have_been_lost(
    inputs: Path, expected: Expected, tmp_path: Path
) -> None:
    """Then both are gone through, and what the other has is not written again."""
    merge = MERGES["sweep"]
    place = merge.prepare(tmp_path / "place", inputs)
    kill_after(5, "pwrite", merge, inputs, place)
    shutil.rmtree(place / "deep/out/.lam=0.5.mergebench-part")
    notes: list[str] = []

    machine = Machine()
    with machine.running():
        merge.run(inputs, place, notes)

    assert_same_state(place, expected("sweep"))
    assert notes == [
        "resuming an interrupted run: 0 of 4 tensors and 2 measurements are done already"
    ]
    assert sum(kind == "pwrite" for kind, _ in machine.calls) < 8


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_error_of_an_input_leaves_nothing(tmp_path: Path, value: float) -> None:
    """Nothing to resume: the input must change."""
    inputs = build_inputs(tmp_path / "inputs")
    path = inputs / "ft1" / "model.safetensors"
    tensors = {name: array.copy() for name, array in read(path).items()}
    tensors["norm.weight"][0] = value
    write(path, tensors, {"format": "pt"})
    place = tmp_path / "place"
    place.mkdir()

    with pytest.raises(MergebenchError, match=r"'norm\.weight' has"):
        MERGES["tensor scope"].run(inputs, place)

    assert state(place) == {}


@pytest.mark.parametrize("name", ["file", "lora"])
def test_an_error_at_every_read(
    name: str, inputs: Path, expected: Expected, tmp_path: Path
) -> None:
    """The disk of the inputs fails once; nothing is shown, and the next run ends as it should."""
    merge = MERGES[name]
    step = kept = 0
    while True:
        step += 1
        place = merge.prepare(tmp_path / str(step), inputs)
        machine = Machine("broken", step, reads=True)

        error = fails(machine, merge, inputs, place)

        if not machine.failed:
            break
        assert isinstance(error, MergebenchError)
        assert "cannot be read" in str(error)
        left: Mapping[str, Any] = state(place)
        assert len(left) in (0, len(hidden(place))) or name == "lora"
        kept += bool(left)
        with Machine().running():
            merge.run(inputs, place)
        assert_same_state(place, expected(name))
    assert step > 40
    assert kept > 3


def test_stale_shards_never_remain(inputs: Path, expected: Expected, tmp_path: Path) -> None:
    """An output of many shards, then one of fewer, interrupted and resumed, in the same place."""
    shards = MERGES["shards"]
    place = shards.prepare(tmp_path / "place", inputs)
    shards.run(inputs, place)
    fewer = Merge(MERGES["replace"].recipe, "out", {"config.json": b"{}"})
    machine = Machine("kill", 25)
    assert isinstance(fails(machine, fewer, inputs, place), KilledError)
    assert_visible(place, expected("shards"))

    fewer.run(inputs, place)

    assert_same_state(place, expected("replace"))


def assert_visible(place: Path, expected: Mapping[str, bytes | None]) -> None:
    """Hidden files aside, exactly these."""
    seen = {name: data for name, data in state(place).items() if "/." not in f"/{name}"}
    assert seen == dict(expected)


def test_an_old_output_of_the_same_form_is_not_taken_for_the_new_one(
    inputs: Path, expected: Expected, tmp_path: Path
) -> None:
    """Its headers are those of the plan, and its values are not."""
    merge = MERGES["renew"]
    place = merge.prepare(tmp_path / "place", inputs)
    kill_after(3, "pwrite", merge, inputs, place)
    shutil.rmtree(place / ".out.mergebench-part")

    merge.run(inputs, place)

    assert_same_state(place, expected("renew"))


def test_what_was_to_be_replaced_comes_back(
    inputs: Path, expected: Expected, tmp_path: Path
) -> None:
    """Killed between the two renames of a system without exchange; the next run has no --force."""
    forced, plain = MERGES["replace"], Merge(MERGES["replace"].recipe, "out")
    place = forced.prepare(tmp_path / "place", inputs)
    before = state(place)
    trial = Machine(exchange=False)
    assert fails(trial, forced, inputs, forced.prepare(tmp_path / "trial", inputs)) is None
    kinds = [kind for kind, _ in trial.calls if kind not in ("fsync", "fdatasync")]
    machine = Machine("kill", kinds.index("rename") + 2, exchange=False)
    assert isinstance(fails(machine, forced, inputs, place), KilledError)
    assert not (place / "out").exists()

    with pytest.raises(MergebenchError, match="exists already"):
        plain.run(inputs, place)

    assert_visible(place, before)
    forced.run(inputs, place)
    assert_same_state(place, expected("replace"))
