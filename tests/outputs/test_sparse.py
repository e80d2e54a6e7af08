"""Sparse differences: extracted from fine-tunes, composed with the base, and refused in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mergebench import merge_models
from tests.helpers.files import write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

EXTRACT = ("edit", "extract-sparse")


def largest(scene: Scene, model: int, count: int) -> dict[str, np.ndarray]:
    """The task vector with all but its largest entries at zero, one after the other."""
    tau = {
        name: np.asarray(scene.tuned[model][name] - array)
        for name, array in scene.base.items()
        if array.dtype.kind == "f"
    }
    names = sorted(tau, key=str.encode)
    every = [(-abs(float(x)), k, i) for k, n in enumerate(names) for i, x in enumerate(tau[n].flat)]
    kept = {(k, i) for _, k, i in sorted(every)[:count]}
    return {
        name: np.array([x * ((k, i) in kept) for i, x in enumerate(tau[name].flat)], np.float32)
        .reshape(tau[name].shape)
        for k, name in enumerate(names)
    }  # fmt: skip


def dense(path: Path) -> dict[str, np.ndarray]:
    """A saved sparse difference in full, by the rule of its metadata."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["mergebench"])
    arrays = load_file(path)
    found = {}
    for name, shape in about["shapes"].items():
        values = np.zeros(int(np.prod(shape)), np.float32)
        values[arrays[f"{name}.sparse_indices"]] = arrays[f"{name}.sparse_values"]
        found[name] = values.reshape(shape)
    return found


@pytest.mark.parametrize("how", [("--count", 50), ("--density", 0.1), ("--count", 2368)])
def test_the_largest_entries_are_kept(scene: Scene, how: Any) -> None:
    """Exactly as many as asked for, over the whole model, and each with its value."""
    count = how[1] if how[0] == "--count" else 236
    common = (*EXTRACT, "ft1", "-b", "base", *how, "-o", "d.safetensors", "--json")
    about = json.loads(assert_done(call(*common, cwd=scene.path)).out)
    wanted = largest(scene, 0, count)
    got = dense(scene.path / "d.safetensors")
    assert about["entries"] == 2368
    assert about["stored"] == sum(np.count_nonzero(a) for a in wanted.values()) == count
    assert set(got) == {name for name, array in wanted.items() if array.any()}
    for name, array in got.items():
        assert np.array_equal(array, wanted[name])
    assert about["bytes"] == (scene.path / "d.safetensors").stat().st_size


def test_scope_and_filters(scene: Scene) -> None:
    """A tenth of each tensor, and nothing of what is excluded."""
    more = ("--density", 0.1, "--scope", "tensor", "--exclude", "class=norm")
    out = ("-o", "d.safetensors")
    assert_done(call(*EXTRACT, "ft1", "-b", "base", *more, *out, cwd=scene.path))
    got = dense(scene.path / "d.safetensors")
    for name, array in got.items():
        assert "norm" not in name
        assert np.count_nonzero(array) == array.size // 10


@pytest.mark.parametrize("form", ["safetensors", "sft"])
def test_a_whole_difference_is_the_model(scene: Scene, form: str) -> None:
    """Of density 1, base plus difference has the entries of the fine-tune, within a rounding."""
    out = "d.safetensors" if form == "safetensors" else "d"
    more = ("--density", 1, "--format", form, "-o", out)
    assert_done(call(*EXTRACT, "ft1", "-b", "base", *more, cwd=scene.path))
    assert_done(call("merge", f"base+{out}", "-o", "back.safetensors", cwd=scene.path))
    got = load_file(scene.path / "back.safetensors")
    for name, array in scene.tuned[0].items():
        assert np.abs(got[name] - array).max(initial=0) <= 2.0**-22 * np.abs(array).max(initial=1)


def test_any_number_composes_in_any_order(scene: Scene) -> None:
    """θ0 + Σ of three sparse differences, in both formats and whatever their order."""
    for number, (model, form) in enumerate((("ft1", "safetensors"), ("ft2", "sft"))):
        out = f"d{number}" + (".safetensors" if form == "safetensors" else "")
        more = ("--count", 60, "--format", form, "-o", out)
        assert_done(call(*EXTRACT, model, "-b", "base", *more, cwd=scene.path))
    names = ["d0.safetensors", "d1", "tau1.safetensors"]
    paths = [scene.path / name for name in names]
    base = scene.path / "base"
    outs = [
        merge_models(order, base=base, method="task_arithmetic")
        for order in (paths, paths[::-1], [paths[1], paths[2], paths[0]])
    ]
    one, other = largest(scene, 0, 60), largest(scene, 1, 60)
    for name, array in scene.base.items():
        if array.dtype.kind != "f":
            continue
        tau = scene.taus[0][name]
        expected = array.astype(np.float64) + one[name] + other[name] + tau
        assert np.abs(outs[0][name] - expected).max(initial=0) < 1e-5
        assert all(np.array_equal(out[name], outs[0][name]) for out in outs)
    alone = merge_models(paths[:2], method="task_arithmetic")
    for name, array in alone.items():
        assert np.abs(array - one[name] - other[name]).max(initial=0) < 1e-6


def test_heads_are_stored_whole(scene: Scene) -> None:
    """``--whole class=head`` keeps a new head; a language is composed without its own."""
    for name, form, out in (("ft1", "safetensors", "task.safetensors"), ("ft2", "sft", "language")):
        more = ("--count", 40, "--whole", "class=head", "--format", form, "-o", out)
        ran = assert_done(call(*EXTRACT, name, "-b", "base", *more, cwd=scene.path))
        assert "1 tensors in full" in ran.out
    loaded = torch.load(scene.path / "language" / "pytorch_diff.bin", weights_only=True)
    assert list(loaded["abs"]) == ["lm_head.weight"]
    assert "lm_head.weight" not in loaded["diffs"]
    task = scene.path / "task.safetensors"
    got = merge_models([task], base=scene.path / "base", method="task_arithmetic")
    head = scene.tuned[0]["lm_head.weight"]
    assert np.abs(got["lm_head.weight"] - head).max() < 1e-6
    # On its base alone nothing is subtracted and added again.
    assert_done(call("merge", "base+task.safetensors", "-o", "alone.safetensors", cwd=scene.path))
    alone = load_file(scene.path / "alone.safetensors")
    assert np.array_equal(alone["lm_head.weight"], head)
    language = scene.path / "language"
    both = merge_models(
        [language], base=scene.path / "base", method="task_arithmetic", exclude=["class=head"]
    )
    assert np.array_equal(both["lm_head.weight"], scene.base["lm_head.weight"])
    assert not np.array_equal(both["model.embed_tokens.weight"],
                              scene.base["model.embed_tokens.weight"])  # fmt: skip


def test_heads_that_the_base_lacks(scene: Scene) -> None:
    """A task's head is new: stored whole, it comes out beside the difference."""
    head = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(scene.path / "task.safetensors", {**scene.tuned[0], "classifier.weight": head})
    out = ("-o", "d.safetensors")
    common = (*EXTRACT, "task.safetensors", "-b", "base", "--count", 9, *out)
    assert_refused(call(*common, cwd=scene.path), "classifier.weight")
    assert not (scene.path / "d.safetensors").exists()
    assert_done(call(*common, "--whole", "^classifier", cwd=scene.path))
    assert np.array_equal(load_file(scene.path / "d.safetensors")["classifier.weight"], head)
    assert_done(call("inspect", "d.safetensors", cwd=scene.path))


def test_inspect_counts_what_is_stored(scene: Scene) -> None:
    """The kind, and entries that differ beside those of the tensors they are in."""
    out = ("-o", "d.safetensors")
    assert_done(call(*EXTRACT, "ft1", "-b", "base", "--count", 50, *out, cwd=scene.path))
    about = json.loads(assert_done(call("inspect", "d.safetensors", "--json", cwd=scene.path)).out)
    assert about["kind"] == "adapter"
    assert about["update"]["adapter"] == "sparse"
    assert about["update"]["stored_entries"] == 50
    assert about["update"]["deltas"] == {"sparse": about["update"]["modules"]}
    plan = json.loads(
        assert_done(
            call("plan", "d.safetensors", "-b", "base", "-m", "ties", "--json", cwd=scene.path)
        ).out
    )
    norm = np.sqrt(sum(np.sum(a.astype(float) ** 2) for a in largest(scene, 0, 50).values()))
    assert plan["origin"]["task_vector_norms"]["d.safetensors"] == pytest.approx(norm, rel=1e-6)


def test_another_base_is_refused(scene: Scene) -> None:
    """The file knows the base it was taken from."""
    out = ("-o", "d.safetensors")
    assert_done(call(*EXTRACT, "ft1", "-b", "base", "--count", 50, *out, cwd=scene.path))
    ran = call("merge", "d.safetensors", "-b", "ft2", "-m", "ties", "-o", "x", cwd=scene.path)
    assert_refused(ran, "another model than the base")


def test_a_nan_in_it_is_refused(scene: Scene) -> None:
    """Named, with its count, like any other."""
    folder = scene.path / "sft"
    folder.mkdir()
    values = torch.tensor([1.0, float("nan")])
    entry = {"size": torch.Size((16,)), "index_steps": [2, 3], "values": values}
    torch.save({"diffs": {"model.norm.weight": entry}, "abs": {}}, folder / "pytorch_diff.bin")
    ran = call("merge", "sft", "-b", "base", "-m", "task_arithmetic", "-o", "x", cwd=scene.path)
    assert_refused(ran, "1 NaN and 0 infinite entries of 16")
    assert not (scene.path / "x").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "either a density or a count"),
        (("--density", 0.5, "--count", 3), "either a density or a count"),
        (("--density", 0), "--density"),
        (("--density", "nan"), "--density"),
        (("--count", 0), "--count"),
        (("--count", 2369), "at most 2368"),
        (("--count", 3, "--scope", "tensor"), "of the whole model"),
        (("--density", 0.5, "--scope", "depth"), "scope"),
        (("--density", 0.5, "--format", "pickle"), "safetensors, sft"),
        (("--density", 0.5, "--whole", "class=nose"), "no class 'nose'"),
        (("--density", 0.5, "--whole", "^absent"), "matches no tensor"),
        (("--density", 0.5, "--exclude", "."), "leave nothing to merge"),
        (("--density", 0.5, "--memory", "16KiB"), "--memory"),
    ],
)
def test_bad_parameters(scene: Scene, more: Any, words: str) -> None:
    """Refused in one line, and nothing is written."""
    ran = call(*EXTRACT, "ft1", "-b", "base", *more, "-o", "d.safetensors", cwd=scene.path)
    assert_refused(ran, words)
    assert not (scene.path / "d.safetensors").exists()


def test_places_are_guarded(scene: Scene) -> None:
    """Nothing is replaced without --force, no input ever, and formats have names of their own."""
    common = (*EXTRACT, "ft1", "-b", "base", "--count", 5)
    for out, form in (("d.safetensors", "safetensors"), ("d", "sft")):
        how = ("-o", out, "--format", form)
        assert_done(call(*common, *how, cwd=scene.path))
        assert_refused(call(*common, *how, cwd=scene.path), "exists already", "--force")
        ran = assert_done(call(*common, *how, "--force", "--quiet", cwd=scene.path))
        assert ran.out == ""
    assert_refused(call(*common, "-o", "d.bin", cwd=scene.path), "name it .safetensors")
    assert_refused(call(*common, "-o", "d.safetensors", "--format", "sft", "-f", cwd=scene.path))
    assert_refused(
        call(*common, "-o", "ft1/model.safetensors", "-f", cwd=scene.path), "inside the input"
    )
    files = ("ft1.safetensors", "-b", "base.safetensors", "--count", 5)
    assert_refused(call(*EXTRACT, *files, "-o", "ft1.safetensors", "-f", cwd=scene.path), "replace")
    (scene.path / "blocked").write_text("x")
    assert_refused(call(*common, "-o", "blocked/d", "--format", "sft", cwd=scene.path), "blocked")
    mode = (scene.path / "d" / "pytorch_diff.bin").stat().st_mode & 0o777
    assert mode == (scene.path / "d.safetensors").stat().st_mode & 0o777
    assert sorted(path.name for path in (scene.path / "d").iterdir()) == ["pytorch_diff.bin"]


def test_no_difference_at_all(scene: Scene) -> None:
    """The base itself differs nowhere: an empty difference, which changes nothing."""
    out = ("-o", "d.safetensors")
    ran = assert_done(call(*EXTRACT, "base", "-b", "base", "--density", 0.1, *out, cwd=scene.path))
    assert "0 of 2368 entries in 0 tensors" in ran.out


def test_of_a_task_vector(scene: Scene) -> None:
    """A LoRA is a task vector too: the largest entries of its product."""
    out = ("-o", "d.safetensors")
    common = (*EXTRACT, "lora1", "-b", "base", "--count", 30, *out)
    assert_done(call(*common, cwd=scene.path))
    update = np.concatenate([each.reshape(-1) for each in scene.updates[0].values()])
    got = np.concatenate(
        [array[array != 0] for array in dense(scene.path / "d.safetensors").values()]
    )
    assert np.allclose(np.sort(np.abs(got)), np.sort(np.abs(update))[-30:], rtol=1e-5)
    assert_refused(call(*common, "-f", "--whole", "layers.0", cwd=scene.path), "checkpoint")
