"""Memory that does not suffice for statistics and grafts: advice, never a stack trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.fit import memory
from mergebench.merge.fit.candidate import only
from mergebench.merge.fit.graft import Settings, graft
from mergebench.merge.fit.memory import RoomError, advised, available
from mergebench.merge.fit.statistics import How, collect
from mergebench.merge.fit.through import collect_through
from tests.fit.networks import save_network, task_file, task_of, values_of
from tests.fit.support import make, recipe_of
from tests.helpers.files import read, write
from tests.helpers.running import Ran, assert_done, assert_refused, call, clean_environment

WIDE = 4096
#: One layer of wide inputs: its Gram matrix has 128 MiB.
TASK = f"""
import torch


class Wide:
    def score(self, model, split):
        return {{"x": 1.0}}

    def module(self):
        module = torch.nn.Module()
        module.lin = torch.nn.Linear({WIDE}, 2048, bias=False)
        module.forward = lambda x: module.lin(x)
        return module

    def batches(self, split):
        yield (torch.ones(2, {WIDE}),)

    def loss(self, outputs, batch):
        return outputs.square().mean()


def task():
    return Wide()
"""
#: The command with as many more bytes of addresses as are left to it once libraries are there.
LIMITED = """
import resource, sys
import numpy, scipy.linalg, safetensors.numpy, torch, torch._dynamo
from mergebench.cli import fitting
from mergebench.cli.main import main
import mergebench.merge.fit.statistics, mergebench.merge.fit.graft

torch.ones(300, 300) @ torch.ones(300, 300)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""
MIB = 1 << 20
STATISTICS = ("fit", "statistics", "one", "-b", "base", "--task", "wide.py", "--workers", "1")
COMMANDS = {
    "gram": (*STATISTICS, "--kind", "gram", "-o", "out.safetensors"),
    "gram_pp": (*STATISTICS, "--kind", "gram_pp", "-o", "out.safetensors"),
    "fisher": (*STATISTICS, "--kind", "fisher", "--labels", "true", "-o", "out.safetensors"),
    "graft": ("fit", "graft", "one", "-b", "base", "--task", "wide.py", "--epochs", "1",
              "--workers", "1", "-o", "out.safetensors"),
}  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a model of 32 MiB."""
    folder = tmp_path_factory.mktemp("wide")
    for name, value in (("base", 0.0), ("one", 0.5)):
        (folder / name).mkdir()
        values = {"lin.weight": np.full((2048, WIDE), value, np.float32)}
        write(folder / name / "model.safetensors", values)
    (folder / "wide.py").write_text(TASK)
    return folder


def limited(scene: Path, room: int, *args: str) -> Ran:
    """The command in a process with so many bytes beside the libraries."""
    surroundings = clean_environment(
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "XDG_CACHE_HOME": str(scene / "c"),
         # LLVM ends a process that it has no memory for.
         "MALLOC_ARENA_MAX": "1", "MERGEBENCH_KERNELS": "off"}
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), *args],
        cwd=scene, env=surroundings, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("kind", COMMANDS)
def test_running_out_is_one_line(scene: Path, kind: str) -> None:
    """With what was asked for, what needs less, and nothing left behind."""
    ran = limited(scene, 96 * MIB, *COMMANDS[kind])
    what = "grafting" if kind == "graft" else "collecting statistics"
    assert_refused(ran, f"{what} ran out of memory on cpu, got ", "--exclude",
                   "--batch-size", "--limit")  # fmt: skip
    assert not (scene / "out.safetensors").exists()


def test_what_was_asked_for_and_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As numpy and torch say it; free memory only where it explains anything."""
    for error, left, words in (
        (MemoryError("Unable to allocate 256. KiB for an array with shape (1,)"), 1000,
         "got 256 KiB asked for, 1000 bytes available"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                      "134217728 bytes. Error code 12"), 1 << 27, "got 128 MiB asked for;"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0"), 3 << 29,
         "got 20 GiB asked for, 1.5 GiB available"),
        (RuntimeError("can't start new thread"), 5 << 20, "got 5 MiB available"),
        (MemoryError("no room"), None, "got no room"),
    ):  # fmt: skip
        monkeypatch.setattr(memory, "available", lambda device, left=left: left)
        with pytest.raises(RoomError) as raised, advised("cpu", "trying", "less of it"):
            raise error
        assert f"trying ran out of memory on cpu, {words}" in str(raised.value)
        assert str(raised.value).endswith("less of it")


def test_what_is_free_is_known() -> None:
    """Less than there is, and more than nothing."""
    there = memory.there("cpu")
    free = available("cpu")
    assert there is not None
    assert free is not None
    assert 0 < free < there


def test_what_cannot_fit_is_refused_before_data_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the network: two Gram matrices of 3 x 3 and the head's, or values and what is squared."""
    model, base = save_network(tmp_path / "one", 1), save_network(tmp_path / "base", 0)
    entries = sum(each.size for each in values_of(0).values())
    grams = 4 * entries + 3 * 8 * 9
    fisher = 4 * 4 * entries
    for kind, least, words in (
        ("gram", grams, "3 Gram matrices, the largest that of 'layers.0.lin.weight' with 7.2e-08"),
        ("fisher", fisher, "collecting a Fisher needs at least"),
    ):
        for there in (least, least - 1):
            monkeypatch.setattr(memory, "there", lambda device, there=there: there)
            with make(only(str(model)), "x") as candidate:
                if there == least:
                    collect(candidate, kind, [task_of()], How())
                    continue
                with pytest.raises(RoomError, match=words) as raised:
                    collect(candidate, kind, [task_of()], How())
                assert "--exclude" in raised.value.fix
    both = recipe_of(model, tmp_path / "base", method="linear", form="model")
    for there in (4 * entries + 2 * 3 * 8 * 9, 4 * entries + 2 * 3 * 8 * 9 - 1):
        monkeypatch.setattr(memory, "there", lambda device, there=there: there)
        with make(both, "x") as candidate:
            tasks = [[task_of(1)], [task_of(2)]]
            if there % 2 == 0:
                collect_through(candidate, tasks, How(), alpha=0.5)
                continue
            with pytest.raises(RoomError, match="collecting 6 Gram matrices"):
                collect_through(candidate, tasks, How(), alpha=0.5)
    grafted = recipe_of(model, base=str(base))
    settings = Settings(density=0.5, epochs=0)
    for there in (28 * entries, 28 * entries - 1):
        monkeypatch.setattr(memory, "there", lambda device, there=there: there)
        if there == 28 * entries:
            graft(grafted, [task_of()], settings, "val", make=make)
            continue
        with pytest.raises(RoomError, match="grafting needs at least") as raised:
            graft(grafted, [task_of()], settings, "val", make=make)
        assert "--exclude" in raised.value.fix


def test_tensors_can_be_left_out(tmp_path: Path) -> None:
    """By selectors, of every kind; what is left is as if all had been asked for."""
    model = save_network(tmp_path / "one", 1)
    other = save_network(tmp_path / "two", 2)

    def found(how: How) -> list[dict[str, np.ndarray]]:
        made = []
        for kind in ("gram", "fisher"):
            with make(only(str(model)), "x") as candidate:
                made.append(dict(collect(candidate, kind, [task_of()], how).tensors))
        both = recipe_of(model, other, method="linear", form="model")
        with make(both, "x") as candidate:
            tasks = [[task_of(1)], [task_of(2)]]
            made += [dict(e.tensors) for e in collect_through(candidate, tasks, how, alpha=0.5)]
        return made

    whole = found(How())
    for how, kept in (
        (How(exclude=("head", "block=1")), {"layers.0.lin.weight", "layers.0.lin.bias"}),
        (How(include=("layers",), exclude=("bias",)), {"layers.0.lin.weight",
                                                       "layers.1.lin.weight"}),
    ):  # fmt: skip
        for every, some in zip(whole, found(how), strict=True):
            assert set(some) == set(every) & kept
            for name, each in some.items():
                np.testing.assert_array_equal(each, every[name])
    for how, words in (
        (How(exclude=("nothing",)), "--exclude: nothing matches no tensor"),
        (How(exclude=("",)), "a selector is empty"),
        (How(include=("head",), exclude=("head",)), "leave nothing to collect"),
    ):
        with pytest.raises(ParameterError, match=words), make(only(str(model)), "x") as candidate:
            collect(candidate, "gram", [task_of()], how)
    with pytest.raises(MergebenchError, match="reach nothing"), make(only(str(model)), "x") as c:
        collect(c, "gram", [task_of()], How(include=("bias",)))


def test_the_options_reach_the_files(tmp_path: Path) -> None:
    """And the merge averages what they leave out."""
    for name, seed in (("one", 1), ("two", 2)):
        save_network(tmp_path / name, seed)
    task_file(tmp_path / "a.py")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    collect_both = ("fit", "statistics", "one", "two", "-t", "a=a.py", "-t", "b=a.py", "-o", "s")
    assert_done(call(*collect_both, "--exclude", "head", cwd=tmp_path, env=env))
    assert set(read(tmp_path / "s" / "one.safetensors")) == {
        "layers.0.lin.weight", "layers.1.lin.weight",
    }  # fmt: skip
    files = [part for n in ("one", "two") for part in ("--statistics", f"s/{n}.safetensors")]
    assert_done(call("merge", "one", "two", "-m", "regmean", *files, "-o", "out", cwd=tmp_path))
    mean = (values_of(1)["head.weight"] + values_of(2)["head.weight"]) / 2
    np.testing.assert_allclose(read(tmp_path / "out")["head.weight"], mean, rtol=1e-6)
