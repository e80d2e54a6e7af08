"""The workers of a real Dask cluster: the bytes of one process, also when one of them is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import dask
import pytest
from distributed import Client, LocalCluster

import mergebench as mb
from mergebench.checkpoints.placed import Placed, Staged
from mergebench.core.errors import MergebenchError, MismatchError, ResourceError
from mergebench.merge.engine import execute
from mergebench.merge.many import cluster as cluster_module
from mergebench.merge.many import crew, where
from mergebench.merge.many.agree import check_alike, marks_of
from mergebench.merge.many.cluster import ClusterRun
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe
from tests.faults.merges import assert_same_state, hidden, state
from tests.helpers.files import read, tree
from tests.helpers.running import assert_done, assert_refused, call
from tests.many.hanging import Hang
from tests.many.scene import MERGES, arguments, build, run_alone, spoiled


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three worker processes."""
    with LocalCluster(
        processes=True, n_workers=3, threads_per_worker=1, dashboard_address=":0"
    ) as made:
        yield made


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    """A client, with all workers there: a killed one is replaced by Dask."""
    with Client(cluster, set_as_default=False) as made:
        made.wait_for_workers(3, timeout=60)
        yield made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and adapters."""
    return build(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", list(MERGES))
def test_a_cluster_gives_the_bytes_of_one_process(
    cluster: LocalCluster, inputs: Path, tmp_path: Path, name: str
) -> None:
    """Every file of every output, and nothing beside them."""
    run_alone(name, inputs, tmp_path / "one")
    (tmp_path / "many").mkdir()
    sent: list[bool] = []

    def travels(visit: Any) -> bool:
        sent.append(true(visit))
        return sent[-1]

    true = cluster_module._can_travel
    with patch.object(cluster_module, "_can_travel", travels):
        ran = call(
            *arguments(name, inputs, tmp_path / "many"),
            "--executor", "dask", "--scheduler", cluster.scheduler_address,
            cwd=tmp_path,
        )  # fmt: skip

    assert_done(ran)
    # Whatever there is to measure is measured by workers.
    assert all(sent)
    assert_same_state(tmp_path / "many", state(tmp_path / "one"))


def kill_first(marker: Path, killed: list[int]) -> None:
    """Kill the worker that stands still."""
    while not marker.exists() or not marker.read_text():
        time.sleep(0.01)
    killed.append(int(marker.read_text()))
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.parametrize("step", ["look", "merge_unit"])
@pytest.mark.parametrize("name", ["sweep", "truncated"])
def test_a_killed_worker_is_replaced(
    client: Client, inputs: Path, tmp_path: Path, name: str, step: str
) -> None:
    """SIGKILL in the middle of a sweep over the model, or of a unit that is being written."""
    run_alone(name, inputs, tmp_path / "one")
    (tmp_path / "many").mkdir()
    marker, killed = tmp_path / "marker", list[int]()
    client.register_plugin(Hang(step, str(marker)), name="hang")
    killer = threading.Thread(target=kill_first, args=(marker, killed), daemon=True)
    killer.start()
    try:
        ran = call(
            *arguments(name, inputs, tmp_path / "many"),
            "--executor", "dask", "--scheduler", client.scheduler.address,
            cwd=tmp_path,
        )  # fmt: skip
    finally:
        client.unregister_worker_plugin("hang")

    assert_done(ran)
    assert len(killed) == 1
    assert_same_state(tmp_path / "many", state(tmp_path / "one"))


def recipe(inputs: Path, out: Path, **options: Any) -> Recipe:
    """TIES of two fine-tunes, with a threshold over the whole model."""
    refs = tuple(ModelRef(str(inputs / name)) for name in ("ft1", "ft2"))
    return Recipe(refs, base=str(inputs / "base"), **{"method": "ties", "out": str(out), **options})


def test_a_client_that_dies_is_followed_by_one_that_goes_on(
    client: Client, inputs: Path, tmp_path: Path
) -> None:
    """What workers have finished is noted by the client, for the next run of any kind."""
    plan = make_plan(recipe(inputs, tmp_path / "out"))
    seen: list[str] = []

    def dies(what: str, done: int, total: int) -> None:
        seen.append(what)
        if seen.count("merging") == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, run=ClusterRun(client, 1 << 29), progress=dies)
    assert not (tmp_path / "out").exists()
    notes: list[str] = []

    execute(plan, note=notes.append)

    assert notes == [
        "resuming an interrupted run: 4 of 10 tensors and 2 measurements are done already"
    ]
    assert hidden(tmp_path) == []
    execute(make_plan(recipe(inputs, tmp_path / "apart" / "out")))
    assert tree(tmp_path / "out") == tree(tmp_path / "apart" / "out")


def test_a_cluster_goes_on_where_one_process_was_stopped(
    client: Client, inputs: Path, tmp_path: Path
) -> None:
    """The other way round."""
    plan = make_plan(recipe(inputs, tmp_path / "out"), workers=1)
    count = 0

    def dies(what: str, done: int, total: int) -> None:
        nonlocal count
        count += what == "merging"
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, progress=dies)
    notes: list[str] = []

    execute(plan, run=ClusterRun(client, 1 << 29), note=notes.append)

    assert notes[0].startswith("resuming an interrupted run: ")
    execute(make_plan(recipe(inputs, tmp_path / "apart" / "out")))
    assert tree(tmp_path / "out") == tree(tmp_path / "apart" / "out")


def test_what_cannot_be_sent_is_measured_by_the_client(
    client: Client, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a visitor that holds something of its own process."""
    monkeypatch.setattr(cluster_module, "_can_travel", lambda visit: False)
    monkeypatch.setattr(crew, "look_at", None)

    execute(make_plan(recipe(inputs, tmp_path / "out")), run=ClusterRun(client, 1 << 29))

    execute(make_plan(recipe(inputs, tmp_path / "apart" / "out")))
    assert tree(tmp_path / "out") == tree(tmp_path / "apart" / "out")


def test_python_takes_a_client(client: Client, inputs: Path, tmp_path: Path) -> None:
    """As well as an address."""
    models = [inputs / "ft1", (inputs / "ft2", 0.5)]
    for out, options in (("a", {}), ("b", {"executor": "dask", "scheduler": client})):
        mb.merge_models(
            models, base=inputs / "base", method="ties", out=tmp_path / out / "out", **options
        )

    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_workers_that_see_other_files_refuse(
    client: Client, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is merged, nothing is left, and one line says what differs."""
    plan = make_plan(recipe(inputs, tmp_path / "out"))
    (marks,) = marks_of(plan)
    other = ({**marks, "models": "0", "layout": "0"},)
    monkeypatch.setattr("mergebench.merge.many.cluster.marks_of", lambda plan: other)

    with pytest.raises(MismatchError) as caught:
        execute(plan, run=ClusterRun(client, 1 << 29))

    assert "does not see the merge" in str(caught.value)
    assert "other models: other names, sizes, times or headers of their files; another layout" in (
        str(caught.value)
    )
    assert list(tmp_path.iterdir()) == []


def test_what_differs_is_said() -> None:
    """By kind, over all outputs."""
    mine = ({"mergebench": "1", "base": "b"}, {"mergebench": "1", "base": "b"})
    theirs = ({"mergebench": "2", "base": "b"}, {"mergebench": "2", "base": "c"})
    check_alike(mine, mine, "worker w", "out")

    with pytest.raises(MismatchError, match=r"got another version of mergebench; another base: "):
        check_alike(mine, theirs, "worker w", "out")
    with pytest.raises(MismatchError, match=r"another number of outputs"):
        check_alike(mine, mine[:1], "worker w", "out")


def test_relative_paths_mean_nothing_elsewhere(
    cluster: LocalCluster, inputs: Path, tmp_path: Path
) -> None:
    """The workers stand in another folder; the error says so, and what to do."""
    ran = call(
        "merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", tmp_path / "out",
        "--executor", "dask", "--scheduler", cluster.scheduler_address,
        cwd=inputs,
    )  # fmt: skip

    assert_refused(ran, "cannot plan the merge", "the worker stands in ")
    assert "give absolute paths that all machines share" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_bad_data_end_a_merge(client: Client, inputs: Path, tmp_path: Path) -> None:
    """What a worker finds is said by the client, and no half of an output stays."""
    bad = spoiled(inputs / "ft1", tmp_path / "bad")
    options = {"base": str(inputs / "base"), "method": "task_arithmetic"}
    plan = make_plan(Recipe((ModelRef(str(bad)),), out=str(tmp_path / "out"), **options))

    with pytest.raises(MergebenchError, match=r"bad: tensor .* has 3 NaN and 0 infinite entries"):
        execute(plan, run=ClusterRun(client, 1 << 29))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_a_process_does_one_unit_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of its threads: all of them and all of the memory are for that one."""
    hired = crew.Crew(None)
    hired.setup(SimpleNamespace(address="here", state=SimpleNamespace(nthreads=4)))
    monkeypatch.setattr(hired, "_ready", lambda: None)
    busy, most = 0, 0

    def work(_: Any) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        time.sleep(0.01)
        busy -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: hired.do(work), range(8)))

    assert most == 1


def test_inputs_in_memory_are_refused(client: Client, inputs: Path, tmp_path: Path) -> None:
    """Other processes cannot see them."""
    states = [read(inputs / name) for name in ("ft1", "ft2")]
    with pytest.raises(MergebenchError, match=r"models\[\d\]: is held by this process"):
        mb.merge_models(states, out=tmp_path / "out", executor="dask", scheduler=client)

    assert list(tmp_path.iterdir()) == []


def test_without_workers_it_gives_up_in_time(inputs: Path, tmp_path: Path) -> None:
    """After a note; what is done is kept."""
    plan = make_plan(recipe(inputs, tmp_path / "out"))
    notes: list[str] = []
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as empty,
        Client(empty, set_as_default=False) as client,
        pytest.raises(ResourceError, match=r"no worker is connected to the scheduler, got none"),
    ):
        execute(plan, run=ClusterRun(client, 1 << 29, patience=0.1), note=notes.append)

    assert notes == ["no worker is connected; waiting up to 0 s for one"]
    assert not (tmp_path / "out").exists()


def test_nobody_answers(inputs: Path, tmp_path: Path) -> None:
    """One line, exit 2, nothing written."""
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        ran = call(
            *arguments("ties", inputs, tmp_path),
            "--executor", "dask", "--scheduler", "tcp://127.0.0.1:9",
            cwd=tmp_path,
        )  # fmt: skip

    assert_refused(ran, "tcp://127.0.0.1:9: no Dask scheduler answers there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--executor", "dask"), "no scheduler is given"),
        (("--executor", "dusk"), "--executor: 'dusk'; did you mean 'dask'?"),
        (("--scheduler", "tcp://h:1"), "--scheduler: is for --executor dask"),
        (("--executor", "dask", "--worker", "0/2"), "a cluster numbers its workers itself"),
        (("--worker", "2/2"), "i/N with i from 0 to N - 1"),
        (("--worker", "one"), "i/N with i from 0 to N - 1"),
    ],
)
def test_options_that_do_not_fit(
    inputs: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    """Said before anything is opened."""
    ran = call("merge", "nowhere", *options, "-o", tmp_path / "out", cwd=tmp_path)

    assert_refused(ran, words)


def test_without_dask_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that can be pasted."""
    monkeypatch.setattr(where, "find_spec", lambda name: None)

    ran = call("merge", "nowhere", "--executor", "dask", "--scheduler", "tcp://h:1", cwd=tmp_path)

    assert_refused(ran, "Dask is not installed here", "pip install 'mergebench[dask]'")


def test_files_of_another_run_are_not_written(inputs: Path, tmp_path: Path) -> None:
    """A worker that comes late finds other files under the names it was given."""
    plan = make_plan(recipe(inputs, tmp_path / "out.safetensors"))
    layout = plan.package.layout_of(plan.variants[0])
    (file,) = layout.files
    place = tmp_path / "staged"
    place.write_bytes(bytes(file.size))
    staged = Staged.of(place, None)
    place.rename(tmp_path / "before")
    place.write_bytes(bytes(file.size))

    name = next(iter(layout.places))
    with Placed(staged, layout) as sink, pytest.raises(MergebenchError, match="another run"):
        sink.write(name, 0, next(iter(plan.aligned.items.values())).base.read(0, 1))

    assert place.read_bytes() == bytes(file.size)


def test_a_scheduler_that_dies(inputs: Path, tmp_path: Path) -> None:
    """One line; what is done is kept for the next run."""
    plan = make_plan(recipe(inputs, tmp_path / "out"))
    seen: list[str] = []
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
    ) as own:

        def dies(what: str, done: int, total: int) -> None:
            seen.append(what)
            if seen.count("merging") == 2:
                own.close()

        with (
            Client(own, set_as_default=False) as client,
            pytest.raises(ResourceError, match="the scheduler of the cluster has gone") as caught,
        ):
            execute(plan, run=ClusterRun(client, 1 << 29), progress=dies)

    assert caught.value.__notes__ == [
        "what is done is kept: run the same command again to go on from there"
    ]
    notes: list[str] = []
    execute(plan, note=notes.append)
    assert notes[0].startswith("resuming an interrupted run: 2 of 10 tensors")
