"""Workers i of N: real processes on one disk, killed, missing, doubled, at their own pace."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import mergebench as mb
from mergebench.checkpoints import locks
from mergebench.core.errors import MergebenchError, ResourceError
from mergebench.merge.engine import execute
from mergebench.merge.many import numbered
from mergebench.merge.many.board import Board
from mergebench.merge.many.codec import pack
from mergebench.merge.many.numbered import execute_as_worker
from mergebench.merge.many.team import Seat
from mergebench.merge.outcome import Written
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from tests.faults.merges import assert_same_state, hidden, state
from tests.helpers.files import tree
from tests.helpers.running import assert_done, assert_refused, call, kill, started
from tests.many.scene import MERGES, arguments, build, run_alone, spoiled

# The command, slowed down so that it can be met at any step: it says what it is about to leave for
# the others, and waits for a line on its standard input.
SLOW = """
import sys
from mergebench.merge.many import board
true = board.Board.put
def put(self, name, value):
    print(name, flush=True)
    sys.stdin.readline()
    true(self, name, value)
board.Board.put = put
from mergebench.cli.main import main
main()
"""
WAITING = "--wait", "60"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters."""
    return build(tmp_path_factory.mktemp("inputs"))


def reach(process: subprocess.Popen[str], what: str, left: int = 0) -> None:
    """Let it go on until it is about to leave a result of a kind, after ``left`` of them."""
    assert process.stdin is not None
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(what) or left:
        assert line, process.stderr
        left -= line.startswith(what)
        process.stdin.write("\n")
        process.stdin.flush()


def let_go(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Let it run to its end; exit code and standard error."""
    _, err = process.communicate("\n" * 10_000, timeout=60)
    return process.returncode, err


def recipe(inputs: Path, out: Path, **options: Any) -> Recipe:
    """TIES of two fine-tunes, with a threshold over the whole model."""
    refs = tuple(ModelRef(str(inputs / name)) for name in ("ft1", "ft2"))
    return Recipe(refs, base=str(inputs / "base"), **{"method": "ties", "out": str(out), **options})


def together(seats: Sequence[Seat], made: Recipe, **options: Any) -> list[list[Written]]:
    """Workers on threads of this process."""
    with ThreadPoolExecutor(len(seats)) as pool:
        plans = [make_plan(made, workers=1) for _ in seats]
        jobs = [
            pool.submit(execute_as_worker, plan, seat, wait=30, **options)
            for plan, seat in zip(plans, seats, strict=True)
        ]
        return [job.result() for job in jobs]


def recipe_of(name: str, inputs: Path, place: Path) -> Recipe:
    """What the command line makes of a merge."""
    found: list[Recipe] = []
    with patch("mergebench.cli.merging.do", lambda made, *_, **__: found.append(made)):
        assert_done(call(*arguments(name, inputs, place), cwd=place))
    return found[0]


@pytest.mark.parametrize("name", list(MERGES))
def test_workers_give_the_bytes_of_one_process(inputs: Path, tmp_path: Path, name: str) -> None:
    """Every file of every output, and nothing beside them; all workers say the same."""
    run_alone(name, inputs, tmp_path / "one")
    (tmp_path / "many").mkdir()
    left: list[bool] = []
    true = Board.put

    def put(self: Board, name: str, value: Any) -> None:
        left.append(value[0])
        true(self, name, value)

    with patch.object(Board, "put", put):
        said = together([Seat(k, 3) for k in range(3)], recipe_of(name, inputs, tmp_path / "many"))

    # Whatever there is to measure can be left to others.
    assert all(left)
    assert_same_state(tmp_path / "many", state(tmp_path / "one"))
    assert said[0] == said[1] == said[2]
    alone = execute(make_plan(recipe_of(name, inputs, tmp_path / "many")), force=True)
    assert said[0] == alone


def test_processes_of_the_command(inputs: Path, tmp_path: Path) -> None:
    """As users start them, in any order; with folders to be made, and one worker too many."""
    run_alone("sweep", inputs, tmp_path / "one")
    given = [*arguments("sweep", inputs, tmp_path / "many")[:-1], tmp_path / "many" / "out"]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(SLOW, *given, "--worker", f"{number}/3", *WAITING, cwd=tmp_path)
            )
            for number in (2, 0, 1)
        ]
        with ThreadPoolExecutor(3) as pool:
            ends = list(pool.map(let_go, processes))

    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert_same_state(tmp_path / "many", state(tmp_path / "one"))


@pytest.mark.parametrize("step", ["sweep1", "merged"])
def test_a_killed_worker_is_replaced_by_the_others(inputs: Path, tmp_path: Path, step: str) -> None:
    """SIGKILL when it has done one unit and is about to leave the next; nobody starts it again."""
    run_alone("ties", inputs, tmp_path / "one")
    (tmp_path / "many").mkdir()
    given = arguments("ties", inputs, tmp_path / "many")
    with (
        started(SLOW, *given, "--worker", "0/3", *WAITING, cwd=tmp_path) as first,
        started(SLOW, *given, "--worker", "1/3", *WAITING, cwd=tmp_path) as dying,
        started(SLOW, *given, "--worker", "2/3", *WAITING, cwd=tmp_path) as last,
        ThreadPoolExecutor(2) as pool,
    ):
        others = [pool.submit(let_go, each) for each in (first, last)]
        reach(dying, step, left=1)
        kill(dying)
        ends = [each.result() for each in others]

    assert [code for code, _ in ends] == [0, 0], ends
    assert "note: worker 1/3 has died; doing its work\n" in ends[0][1] + ends[1][1]
    assert_same_state(tmp_path / "many", state(tmp_path / "one"))


def test_a_killed_worker_can_be_started_again(inputs: Path, tmp_path: Path) -> None:
    """It goes on from what it has left; the other has waited for nobody else."""
    run_alone("ties", inputs, tmp_path / "one")
    (tmp_path / "many").mkdir()
    given = arguments("ties", inputs, tmp_path / "many")
    with started(SLOW, *given, "--worker", "0/2", *WAITING, cwd=tmp_path) as first:
        reach(first, "sweep1", left=2)
        kill(first)
    # Alone it does all that is its own, and waits for the other.
    with (
        started(SLOW, *given, "--worker", "0/2", *WAITING, cwd=tmp_path) as again,
        started(SLOW, *given, "--worker", "1/2", *WAITING, cwd=tmp_path) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        ends = list(pool.map(let_go, (again, other)))

    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_state(tmp_path / "many", state(tmp_path / "one"))


@pytest.mark.parametrize("name", ["sweep", "one file"])
def test_a_worker_that_comes_too_late_finds_all_done(
    inputs: Path, tmp_path: Path, name: str
) -> None:
    """The others have done its work after its death; it is told so, and that is no failure."""
    run_alone(name, inputs, tmp_path / "many")
    before = state(tmp_path / "many")
    given = arguments(name, inputs, tmp_path / "many")

    ran = assert_done(call(*given, "--worker", "1/2", cwd=tmp_path))

    assert "is complete, the other workers have done it all" in ran.err
    assert state(tmp_path / "many") == before
    alone = execute(make_plan(recipe_of(name, inputs, tmp_path / "many")), force=True)
    late = execute_as_worker(make_plan(recipe_of(name, inputs, tmp_path / "many")), Seat(1, 2))
    assert [each.digests for each in late] == [each.digests for each in alone]
    assert_refused(call(*given, cwd=tmp_path), "exists already")
    other = [*given[:-2], "-p", "lam=0.123", *given[-2:]]
    if name == "one file":
        assert_refused(call(*other, "--worker", "1/2", cwd=tmp_path), "exists already")


@pytest.mark.parametrize("damage", ["size", "manifest"])
def test_what_others_have_done_must_be_whole(inputs: Path, tmp_path: Path, damage: str) -> None:
    """An output of other bytes is not taken for the one that was asked for."""
    run_alone("ties", inputs, tmp_path / "many")
    out = tmp_path / "many" / "out"
    name = {"size": "model.safetensors", "manifest": "mergebench_manifest.json"}[damage]
    data = (out / name).read_bytes()
    (out / name).write_bytes(data[:-1] if damage == "size" else data.replace(b'"ties"', b'"dare"'))

    ran = call(*arguments("ties", inputs, tmp_path / "many"), "--worker", "0/2", cwd=tmp_path)

    assert_refused(ran, "exists already")


def test_all_workers_killed_a_plain_run_goes_on(inputs: Path, tmp_path: Path) -> None:
    """Or begins again: what workers leave for each other is in nobody's way."""
    run_alone("ties", inputs, tmp_path / "one")
    (tmp_path / "many").mkdir()
    given = arguments("ties", inputs, tmp_path / "many")
    with started(SLOW, *given, "--worker", "0/1", cwd=tmp_path) as only:
        reach(only, "merged", left=3)
    assert not (tmp_path / "many" / "out").exists()

    assert_done(call(*given, cwd=tmp_path))

    assert_same_state(tmp_path / "many", state(tmp_path / "one"))


def test_a_missing_worker_is_named(inputs: Path, tmp_path: Path) -> None:
    """Exit 2 after the time that was given; started later, it finds what the others have done."""
    given = arguments("ties", inputs, tmp_path)
    refused = call(*given, "--worker", "0/3", "--wait", "0.3", "--quiet", cwd=tmp_path)

    assert_refused(refused, "not started: worker 1/3, 2/3", "nothing from there for 0.3 s")
    assert "what is done is kept: run the same command again to go on from there" in refused.err
    assert not (tmp_path / "out").exists()
    said = call(*given, "--worker", "0/3", "--wait", "0.3", cwd=tmp_path)
    assert "note: waiting up to 0.3 s for the start of worker 1/3, 2/3\n" in said.err
    # The first is not there any more, so that the others do what it has left undone.
    together([Seat(1, 3), Seat(2, 3)], recipe_of("ties", inputs, tmp_path))
    run_alone("ties", inputs, tmp_path / "one")
    assert tree(tmp_path / "out") == tree(tmp_path / "one" / "out")
    assert hidden(tmp_path) == []


def test_nobody_is_the_same_worker_twice(inputs: Path, tmp_path: Path) -> None:
    """The second is refused while the first lives, and so are workers of another number."""
    given = arguments("ties", inputs, tmp_path)
    with started(SLOW, *given, "--worker", "0/2", *WAITING, cwd=tmp_path) as first:
        reach(first, "sweep1")
        before = hidden(tmp_path)

        twice = call(*given, "--worker", "0/2", cwd=tmp_path)
        assert_refused(twice, "--worker 0/2: that worker is at work already", f"{first.pid} on ")
        others = call(*given, "--worker", "1/3", cwd=tmp_path)
        assert_refused(others, "--worker 1/3: others of this merge are at work", "worker 0/2")

        assert hidden(tmp_path) == before
        assert first.poll() is None


def test_other_runs_keep_away(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain run, and workers of another merge, until the last worker has gone."""
    monkeypatch.setattr("mergebench.merge.many.numbered._DOOR", 0.1)
    given = arguments("ties", inputs, tmp_path)
    other = arguments("task arithmetic", inputs, tmp_path)
    with started(SLOW, *given, "--worker", "0/2", *WAITING, cwd=tmp_path) as first:
        reach(first, "sweep1")
        held = state(tmp_path)
        for command in (given, other, [*other, "--worker", "0/2"]):
            refused = call(*command, cwd=tmp_path)
            assert_refused(refused, "out: is being written by another run", f"{first.pid}")
        assert {name for name in held if "worker-" not in name} == {
            name for name in state(tmp_path) if "worker-" not in name
        }

    assert_done(call(*other, cwd=tmp_path))
    assert hidden(tmp_path) == []


def test_a_run_that_shows_the_output_is_followed(inputs: Path, tmp_path: Path) -> None:
    """Killed after its last unit, before the output stands: the next one shows it."""
    run_alone("one file", inputs, tmp_path / "one")
    (tmp_path / "many").mkdir()
    made = recipe_of("one file", inputs, tmp_path / "many")

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with (
        patch("mergebench.merge.many.numbered._finished", dies),
        pytest.raises(KeyboardInterrupt),
    ):
        execute_as_worker(make_plan(made), Seat(0, 1))
    with patch("mergebench.merge.many.team.merge_unit", dies):
        execute_as_worker(make_plan(made), Seat(0, 1))

    assert_same_state(tmp_path / "many", state(tmp_path / "one"))


def test_what_cannot_be_left_to_others_everybody_measures(inputs: Path, tmp_path: Path) -> None:
    """As of an op by somebody else, whose results are of types of its own."""
    made = recipe_of("ties", inputs, tmp_path)
    left: list[bool] = []

    def refuse(value: Any) -> bytes:
        if isinstance(value[1], list):
            raise TypeError("not this")
        left.append(value[0])
        return pack(value)

    with patch("mergebench.merge.many.board.pack", refuse):
        together([Seat(0, 2), Seat(1, 2)], made)

    assert left.count(False) >= 10
    run_alone("ties", inputs, tmp_path / "one")
    assert tree(tmp_path / "out") == tree(tmp_path / "one" / "out")


def test_nobody_shows_files_that_others_have_begun(inputs: Path, tmp_path: Path) -> None:
    """A worker that comes to the door late finds another staged output, which has no bytes yet."""
    made = recipe_of("ties", inputs, tmp_path)
    late: list[Any] = []

    def comes_late(*arguments: Any) -> Any:
        late.append(arguments)
        return true(*arguments)

    true = numbered._finished
    with patch("mergebench.merge.many.numbered._finished", comes_late):
        execute_as_worker(make_plan(made), Seat(0, 1), force=True)
    (tmp_path / "out").rename(tmp_path / "aside")

    with pytest.raises(MergebenchError, match="another run has taken the place of this one"):
        true(*late[0])

    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside"]


def test_a_disk_without_locks_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There nobody could tell whose the work of a common name is."""

    def refuse(fd: int, shared: bool) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_lock", refuse)

    refused = call(*arguments("ties", inputs, tmp_path), "--worker", "0/2", cwd=tmp_path)

    assert_refused(refused, "out: workers cannot share a disk without locks")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_result_is_made_again(inputs: Path, tmp_path: Path) -> None:
    """As after a power cut."""
    made = recipe_of("ties", inputs, tmp_path)
    with pytest.raises(ResourceError, match=r"not started: worker 1/2"):
        execute_as_worker(make_plan(made), Seat(0, 2), wait=0)
    (found,) = (tmp_path / ".out.mergebench-room").iterdir()
    left = sorted(found.glob("sweep1-*"))
    assert len(left) > 1
    left[0].write_bytes(left[0].read_bytes()[:-1])

    together([Seat(0, 2), Seat(1, 2)], made)

    run_alone("ties", inputs, tmp_path / "one")
    assert tree(tmp_path / "out") == tree(tmp_path / "one" / "out")


def test_bad_data_end_all_workers(inputs: Path, tmp_path: Path) -> None:
    """Each says which input it is, and nothing is left."""
    bad = spoiled(inputs / "ft1", tmp_path / "bad")
    made = Recipe(
        (ModelRef(str(bad)),),
        base=str(inputs / "base"),
        method="task_arithmetic",
        out=str(tmp_path / "out"),
    )
    plans = [make_plan(made), make_plan(made)]
    errors = []

    def work(number: int) -> None:
        with pytest.raises(MergebenchError) as caught:
            execute_as_worker(plans[number], Seat(number, 2), wait=30)
        errors.append(str(caught.value))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))

    assert len(errors) == 2
    assert all("3 NaN and 0 infinite entries" in error for error in errors), errors
    assert hidden(tmp_path) == []


def test_python_takes_a_worker(inputs: Path, tmp_path: Path) -> None:
    """The same call in every process."""
    given = {"base": inputs / "base", "method": "ties"}
    models = [inputs / "ft1", inputs / "ft2"]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(
                mb.merge_models, models, out=tmp_path / "a" / "out", worker=f"{k}/2", **given
            )
            for k in range(2)
        ]
        digests = [job.result().digests for job in jobs]
    alone = mb.merge_models(models, out=tmp_path / "b" / "out", **given)

    assert digests == [alone.digests] * 2
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    with pytest.raises(MergebenchError, match="give out="):
        mb.merge_models(models, worker="0/2", **given)


def test_an_existing_output_is_replaced_only_by_force(inputs: Path, tmp_path: Path) -> None:
    """As by a plain run; the old one stays until the new one is whole."""
    made = recipe_of("ties", inputs, tmp_path)
    execute(make_plan(recipe_of("task arithmetic", inputs, tmp_path)))
    with pytest.raises(MergebenchError, match="exists already"):
        together([Seat(0, 1)], made)

    together([Seat(0, 2), Seat(1, 2)], made, force=True)

    run_alone("ties", inputs, tmp_path / "one")
    assert tree(tmp_path / "out") == tree(tmp_path / "one" / "out")
    assert hidden(tmp_path) == []
