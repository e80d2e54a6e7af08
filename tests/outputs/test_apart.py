"""Methods that give every model a result of its own: places, recipes, adapters."""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergebench import merge_models
from mergebench.core.errors import MergebenchError, MismatchError, ParameterError
from mergebench.merge.apart import names_of
from mergebench.merge.replay import plan_replay, replay
from tests.helpers.compare import assert_close, assert_files, assert_same
from tests.helpers.files import F32, listing, read, tree, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

EMR = ("merge", "ft1", "ft2", "-b", "base", "-m", "emr")


# Where results go, and what they are called


def test_a_folder_holds_one_model_for_each(scene: Scene) -> None:
    """Each is whole, and the one that a run for it alone writes."""
    assert_done(call(*EMR, "-o", "out", cwd=scene.path))

    assert listing(scene.path / "out") == ["ft1", "ft2"]
    for task in ("ft1", "ft2"):
        alone = scene.path / "alone" / task
        assert_done(call(*EMR, "--task", task, "-o", alone, cwd=scene.path))
        assert_files(tree(scene.path / "out" / task), tree(alone))
    one, two = (read(scene.path / "out" / task) for task in ("ft1", "ft2"))
    assert any(not np.array_equal(one[name], two[name]) for name in one)


def test_files_are_named_by_their_models(scene: Scene) -> None:
    """As those of several values are."""
    before = set(listing(scene.path))
    models = ("ft1.safetensors", "ft2.safetensors")
    ran = call("merge", *models, "-b", "base", "-m", "tall_masks", cwd=scene.path)

    assert_done(ran)
    made = set(listing(scene.path)) - before
    assert made == {"merged-ft1.safetensors", "merged-ft2.safetensors"}
    assert all(name in ran.out for name in made)


def test_values_and_tasks_give_every_combination(scene: Scene) -> None:
    """From one reading, and each as by itself; a chosen task has no name of its own."""
    common = (*EMR[:-1], "tall_masks", "-p", "mask_lam=0.2,0.6")
    assert_done(call(*common, "-o", "out", cwd=scene.path))
    assert_done(call(*common, "--task", "ft2", "-o", "one", cwd=scene.path))

    labels = [f"{task},mask_lam={lam}" for task in ("ft1", "ft2") for lam in ("0.2", "0.6")]
    assert listing(scene.path / "out") == labels
    assert listing(scene.path / "one") == ["mask_lam=0.2", "mask_lam=0.6"]
    for lam in ("0.2", "0.6"):
        two = read(scene.path / "out" / f"ft2,mask_lam={lam}")
        assert_same(two, read(scene.path / "one" / f"mask_lam={lam}"))


def test_the_stored_recipe_gives_the_result_again(scene: Scene) -> None:
    """It names its task; the replay computes the same bytes."""
    assert_done(call(*EMR, "-o", "out", cwd=scene.path))
    for task in ("ft1", "ft2"):
        place = scene.path / "out" / task
        assert f"tasks:\n- {task}\n" in (place / "mergebench_recipe.yaml").read_text()
        with chdir(scene.path):
            assert replay(plan_replay(place)).findings == ()
        assert_done(call("run", place, "-o", "again", "-f", cwd=scene.path))
        assert_same(read(scene.path / "again"), read(place))
    assert_done(call("verify", "out/ft1", "--replay", "all", cwd=scene.path))


def test_a_recipe_names_tasks(scene: Scene) -> None:
    """Those alone are written, in folders of their names where there are several."""
    text = """
        mergebench: 1
        ops: [trim: {density: 0.5}, emr, scale: {lam: 0.5}]
        models: [ft1, ft2, {path: ft1.safetensors, weight: 2}]
        base: base
        tasks: [ft1-2, ft2]
        out: out
    """
    (scene.path / "recipe.yaml").write_text(text)
    names = sorted(names_of(["ft1", "ft2", "ft1.safetensors"]))
    assert names == ["ft1", "ft1-2", "ft2"]
    assert_done(call("run", "recipe.yaml", cwd=scene.path))
    assert listing(scene.path / "out") == ["ft1-2", "ft2"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["a.safetensors", "b.bin"], ["a", "b"]),
        (["x/model.safetensors", "y/model.safetensors"], ["x-model", "y-model"]),
        (["r/x/out", "s/x/out", "z"], ["r-x-out", "s-x-out", "z"]),
        (["a/m", "b/m", "c"], ["a-m", "b-m", "c"]),
        (["m", "m", "m-2"], ["m", "m-3", "m-2"]),
        (["A", "a"], ["A", "a-2"]),
        (["base+lora", "hf://org/name@main"], ["lora", "name@main".replace("@", "_")]),
        (["models[0]", "models[1]"], ["models_0", "models_1"]),
        (["…/ü x", "a,b"], ["ü_x", "a_b"]),
        (["!", "?"], ["model", "model-2"]),
        ([":.", "x/:.."], ["model", "x"]),
    ],
)
def test_names(labels: list[str], expected: list[str]) -> None:
    """The last parts of paths that differ, numbered where nothing does."""
    assert list(names_of(labels)) == expected


@given(st.lists(st.text(max_size=12), min_size=1, max_size=6))
def test_names_are_fit_for_files(labels: list[str]) -> None:
    """Of whatever text, and all of them differ."""
    names = names_of(labels)
    assert len({name.lower() for name in names}) == len(labels)
    for name in names:
        assert name
        assert not {"/", "\\", "\0", ",", ":"} & set(name)
        assert name not in (".", "..")


def test_what_cannot_be_is_refused(scene: Scene) -> None:
    """A task that there is none of, one named twice, and tasks of what gives one result."""
    before = listing(scene.path)
    for words, options in (
        (("emr: no result is called 'ft3'", "ft1, ft2"), ("--task", "ft3")),
        (("a task is named twice",), ("--task", "ft1", "--task", "ft1")),
        (("nothing left to combine",), ("--then", "sum", "--then", "sum")),
        (("one result for all models",), ("--then", "sum", "--task", "ft1")),
    ):
        assert_refused(call(*EMR, *options, "-o", "out", cwd=scene.path), *words)
    ran = call(*EMR[:-1], "ties", "--task", "ft1", "-o", "out", cwd=scene.path)
    assert_refused(ran, "ties gives one result for all models", "leave out --task")
    ran = call("merge", "ft1", "-b", "base", "-m", "emr", "-o", ".", cwd=scene.path)
    assert_refused(ran, "would replace or lie inside the input")
    assert listing(scene.path) == before


def test_results_may_be_combined_again(scene: Scene) -> None:
    """An op behind that combines leaves one result, and it is a model as any other."""
    assert_done(call(*EMR, "--then", "mean", "-o", "mean", cwd=scene.path))
    assert_done(call(*EMR, "--dtype", "f64", "-o", "out", cwd=scene.path))
    one, two = (read(scene.path / "out" / task) for task in ("ft1", "ft2"))
    wanted = {n: (one[n] + two[n]) / 2 if one[n].dtype.kind == "f" else one[n] for n in one}
    assert_close(read(scene.path / "mean"), wanted)


def test_values_differ_between_tensors(scene: Scene) -> None:
    """Schedules reach the results of every model."""
    assert_done(call(*EMR, "--where", "class=norm:lam=0", "-o", "out", cwd=scene.path))
    assert_done(call(*EMR, "-o", "plain", cwd=scene.path))
    for task in ("ft1", "ft2"):
        got, plain = read(scene.path / "out" / task), read(scene.path / "plain" / task)
        for name in got:
            assert_same({"": got[name]}, {"": (scene.base if "norm" in name else plain)[name]})


def test_the_plan_shows_every_result(scene: Scene) -> None:
    """With label, place and chain."""
    data = assert_done(call("plan", *EMR[1:], "-o", "out", "--json", cwd=scene.path)).json
    assert [each["label"] for each in data["outputs"]] == ["ft1", "ft2"]
    assert [each["path"] for each in data["outputs"]] == ["out/ft1", "out/ft2"]
    assert data["passes"] == 2


def test_python_gives_a_list_in_the_order_of_the_models() -> None:
    """Of state dicts too; a single task that is asked for comes alone."""
    models = [{"w": torch.tensor(values)} for values in ([4.0, 0], [0, 8.0], [0, 1.0])]
    base = {"w": torch.zeros(2)}
    found = merge_models(models, base=base, method="tall_masks")
    assert [each["w"].tolist() for each in found] == [[4, 0], [0, 9], [0, 0]]
    swapped = merge_models(models[::-1], base=base, method="tall_masks")
    assert [each["w"].tolist() for each in swapped] == [[0, 0], [0, 9], [4, 0]]
    for tasks in ("models_1", ["models_1"]):
        alone = merge_models(models, base=base, method="tall_masks", tasks=tasks)
        assert torch.equal(alone["w"], found[1]["w"])
    two = merge_models(models, base=base, method="tall_masks", tasks=["models_2", "models_0"])
    assert [each["w"].tolist() for each in two] == [[4, 0], [0, 0]]
    with pytest.raises(ParameterError, match="no result is called 'models_3'"):
        merge_models(models, base=base, method="tall_masks", tasks="models_3")
    assert isinstance(merge_models(models[:1], base=base, method="emr"), list)


def test_heads_stay_with_their_models(tmp_path: Path) -> None:
    """What no base has is each model's own; of other shapes there is no common layout."""
    base = {"w": np.zeros((2, 2), F32)}
    heads = [np.full((3, 2), value, F32) for value in (1, 2)]
    for number, head in enumerate(heads):
        write(
            tmp_path / f"ft{number}.safetensors", {"w": np.eye(2, dtype=F32), "head.weight": head}
        )
    write(tmp_path / "base.safetensors", base)
    paths = [tmp_path / f"ft{number}.safetensors" for number in (0, 1)]
    found = merge_models(paths, base=tmp_path / "base.safetensors", method="emr")
    for each, head in zip(found, heads, strict=True):
        assert_same({"": each["head.weight"]}, {"": head})
    with pytest.raises(MismatchError, match="hold different values"):
        merge_models(paths, base=tmp_path / "base.safetensors", method="ties")
    write(paths[1], {"w": base["w"], "head.weight": np.ones((5, 2), F32)})
    with pytest.raises(MergebenchError, match=r"head\.weight"):
        merge_models(paths, base=tmp_path / "base.safetensors", method="emr")
