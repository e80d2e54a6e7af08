"""Task vectors of several tasks in one file: one vector, and a mask and a scale for each."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mergebench import merge_models
from tests.helpers.compare import assert_same
from tests.helpers.files import read
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

PACK = ("edit", "pack-tasks", "ft1", "ft2", "-b", "base")
CHAINS = [
    ("-m", "emr"),
    ("-m", "emr", "-p", "over=tensors", "-p", "lam=0.3"),
    ("-m", "tall_masks", "-p", "mask_lam=0.2"),
    ("-m", "ties", "-p", "divisor=none", "--then", "tall_mask", "--then", "scale:lam=0.7"),
]


def packed(scene: Scene, *how: str) -> Path:
    """The file of both tasks."""
    assert_done(call(*PACK, *how, "-o", "tasks.safetensors", "-f", cwd=scene.path))
    return scene.path / "tasks.safetensors"


def about(path: Path) -> dict[str, Any]:
    """What the file says of itself."""
    with safe_open(path, "np") as file:
        found: dict[str, Any] = json.loads(file.metadata()["mergebench"])
    return found


@pytest.mark.parametrize("how", CHAINS)
def test_a_task_is_what_the_merge_writes(scene: Scene, how: tuple[str, ...]) -> None:
    """Bit for bit, from the file as from the fine-tunes."""
    packed(scene, *how)
    for task in ("ft1", "ft2"):
        merge = ("merge", "ft1", "ft2", "-b", "base", *how, "--task", task, "-o", "whole", "-f")
        assert_done(call(*merge, cwd=scene.path))
        one = ("merge", f"tasks.safetensors#{task}", "-b", "base", "-m", "task_arithmetic")
        assert_done(call(*one, "-o", "one", "-f", cwd=scene.path))
        assert_same(read(scene.path / "one"), read(scene.path / "whole"))


def test_the_file_is_vector_masks_and_scales(scene: Scene) -> None:
    """By the rule of the documentation, without this package's reader, and as small as it says."""
    path = packed(scene, "-m", "emr")
    said, stored = about(path), load_file(path)
    tau = [
        {n: scene.tuned[k][n] - a for n, a in scene.base.items() if a.dtype.kind == "f"}
        for k in (0, 1)
    ]
    whole = [np.concatenate([np.ravel(t[n]) for n in said["tensors"]]) for t in tau]
    total = whole[0] + whole[1]
    sign = np.where(total > 0, 1.0, -1.0)
    agrees = [each * sign > 0 for each in whole]
    unified = np.max([np.abs(w) * a for w, a in zip(whole, agrees, strict=True)], axis=0) * sign
    order = said["tasks"]
    for row, task in enumerate(order):
        one = ("ft1", "ft2").index(task)
        scale = np.abs(whole[one]).sum() / np.abs(unified * agrees[one]).sum()
        assert said["scales"][row] == pytest.approx(scale, rel=1e-6)
        got = []
        for name in said["tensors"]:
            shared = stored[f"{name}.unified"]
            bits = np.unpackbits(stored[f"{name}.masks"][row], bitorder="little")[: shared.size]
            got.append(np.ravel(shared) * bits)
        np.testing.assert_allclose(np.concatenate(got), unified * agrees[one], atol=1e-7)
    assert said["lam"] == 1
    sizes = [scene.base[name].size for name in said["tensors"]]
    assert sum(each.nbytes for each in stored.values()) == sum(
        4 * size + 2 * -(-size // 8) for size in sizes
    )


def test_python_recipes_and_pairs(scene: Scene) -> None:
    """A task stands wherever an adapter may."""
    packed(scene, "-m", "emr")
    with chdir(scene.path):
        task = "tasks.safetensors#ft2"
        one = merge_models([task], base="base", method="task_arithmetic")
        Path("recipe.yaml").write_text(
            "mergebench: 1\nmethod: task_arithmetic\nbase: base\nout: ran\n"
            f"models:\n- path: {task}\n  weight: 1.0\n"
        )
        assert_done(call("run", "recipe.yaml", cwd=scene.path))
        assert_same(read(scene.path / "ran"), one)
        paired = merge_models([f"base+{task}"], method="linear")
        for name, array in one.items():
            np.testing.assert_allclose(paired[name], array, atol=1e-6)
        assert_done(call("inspect", task, cwd=scene.path))


def test_tasks_of_one_file_are_different_models(scene: Scene) -> None:
    """They are drawn for apart, and their order does not matter."""
    packed(scene, "-m", "emr")
    tasks = [str(scene.path / f"tasks.safetensors#{each}") for each in ("ft1", "ft2")]
    base = str(scene.path / "base")
    one = merge_models(tasks, base=base, method="dare", seed=1)
    other = merge_models(tasks[::-1], base=base, method="dare", seed=1)
    assert_same(one, other)
    again = ("merge", *tasks, "-b", "base", "-m", "ties", "-o", tasks[0].partition("#")[0], "-f")
    assert_refused(call(*again, cwd=scene.path), "input")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("merge", "tasks.safetensors", "-b", "base"), "none is named"),
        (("merge", "tasks.safetensors#ft3", "-b", "base"), "holds no task 'ft3'"),
        (("merge", "lora1#ft1", "-b", "base"), "single task vector"),
        (("merge", "ft1#ft1", "-b", "base"), "is a model"),
    ],
)
def test_a_task_is_named(scene: Scene, words: tuple[str, ...], message: str) -> None:
    """And is there."""
    packed(scene, "-m", "emr")
    ran = call(*words, "-m", "task_arithmetic", "-o", "out", cwd=scene.path)
    assert_refused(ran, message)
    assert not (scene.path / "out").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (("-m", "ties", "-o", "t.safetensors"), "not one vector under masks"),
        (("-m", "tsv_compress", "-o", "t.safetensors"), "not one vector under masks"),
        (("--then", "trim:density=0.5", "-o", "t.safetensors"), "not one vector under masks"),
        (("-o", "folder"), "one file"),
        (("-p", "oevr=tensors", "-o", "t.safetensors"), "over"),
    ],
)
def test_what_cannot_be_packed(scene: Scene, how: tuple[str, ...], message: str) -> None:
    """Refused before anything is written."""
    assert_refused(call(*PACK, *how, cwd=scene.path), message)
    assert not (scene.path / "t.safetensors").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("tasks", []),
        ("tasks", ["ft1", "ft1"]),
        ("tasks", "ft"),
        ("scales", [1.0]),
        ("scales", [1.0, "x"]),
        ("scales", [1.0, float("inf")]),
        ("lam", None),
        ("tensors", []),
        ("tensors", [3]),
    ],
)
def test_metadata_that_do_not_fit(scene: Scene, key: str, value: Any) -> None:
    """A file that says something else than it holds is refused in words."""
    path = packed(scene, "-m", "emr")
    said, stored = about(path), load_file(path)
    save_file(stored, path, metadata={"mergebench": json.dumps({**said, key: value})})
    ran = call("merge", f"{path}#ft1", "-b", "base", "-o", "out", cwd=scene.path)
    assert_refused(ran, "tasks.safetensors")


def test_masks_that_do_not_fit(scene: Scene) -> None:
    """Masks have a row for each task and a bit for each entry."""
    path = packed(scene, "-m", "emr")
    said, stored = about(path), load_file(path)
    name = said["tensors"][0]
    for wrong in (stored[f"{name}.masks"][:, :-1], stored[f"{name}.masks"].astype(np.int8)):
        changed = {**stored, f"{name}.masks": np.ascontiguousarray(wrong)}
        save_file(changed, path, metadata={"mergebench": json.dumps(said)})
        ran = call("merge", f"{path}#ft1", "-b", "base", "-o", "out", cwd=scene.path)
        assert_refused(ran, "masks do not go with it")
