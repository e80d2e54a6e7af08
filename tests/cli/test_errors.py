"""Everything a user can get wrong gives one line, exit code 2 and no traceback."""

from __future__ import annotations

import json

import pytest

from tests.helpers.files import listing, read, tree, write
from tests.helpers.models import base_model
from tests.helpers.running import Ran, assert_refused, call, command
from tests.helpers.scene import Scene

FTS = ("merge", "ft1", "ft2", "-b", "base")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*FTS, "-m", "tiess"), ("no merge method 'tiess'", "did you mean 'ties'?")),
        ((*FTS, "-m", "ties", "-p", "densty=0.3"), ("ties: no parameter `densty`", "'density'?")),
        ((*FTS, "--then", "scal:lam=2"), ("no op 'scal'", "did you mean 'scale'?")),
        ((*FTS, "--then", "scale:lm=2"), ("scale: no parameter `lm`", "did you mean 'lam'?")),
        ((*FTS, "-m", "ties", "--compat", "mergekit"), ("'mergekit'", "'mergekit-0.1.5'?")),
        ((*FTS, "--dtype", "bf17"), ("--dtype", "'bf17'", "did you mean 'bf16'?")),
        ((*FTS, "--as", "modl"), ("--as", "'modl'", "did you mean 'model'?")),
        (("methods", "breadcrumb"), ("'breadcrumb'", "did you mean 'breadcrumbs'?")),
        (("mereg", "ft1"), ("No such command 'mereg'", "Did you mean 'merge'?")),
        ((*FTS, "--metod", "ties"), ("--metod", "--method", "see `mergebench merge --help`")),
    ],
)
def test_unknown_names_get_the_nearest_one(
    scene: Scene, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """A typo in the name of anything is answered with the name that was meant."""
    assert_refused(call(*arguments, cwd=scene.path), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("merge",), ("Missing argument 'MODEL...'", "mergebench merge --help")),
        ((*FTS, "-m", "ties", "-p", "density=1.4"), ("`density` must be", "(0, 1]", "got 1.4")),
        ((*FTS, "-m", "ties", "-p", "density=high"), ("`density` must be a number", "got high")),
        ((*FTS, "-m", "ties", "-p", "scope=layer"), ("one of row, tensor, model", "got layer")),
        ((*FTS, "-m", "ties", "-p", "density"), ("name=value", "'density'")),
        ((*FTS, "-m", "ties", "-p", "lam=1", "-p", "lam=2"), ("'lam' is given twice", "lam=a,b")),
        ((*FTS, "-m", "ties", "-p", "lam=1,1"), ("same place", "once")),
        ((*FTS, "--then", "scale"), ("scale: `lam` is required",)),
        ((*FTS, "--then", "sum"), ("sum: nothing left to combine",)),
        ((*FTS, "--memory", "12XB"), ("--memory: a size must be", "such as 5GB", "'12XB'")),
        ((*FTS, "--shard-size", "big"), ("--shard-size: a size must be", "'big'")),
        (("merge", "ft1:nan", "ft2"), ("ft1: `weight`", "must be a number", "got nan")),
        (("merge", "lora1", "lora2:-inf"), ("lora2: `weight`", "must be a number", "got -inf")),
        ((*FTS, "--workers", "0"), ("--workers", "1")),
        (("merge", "ft1", "ft3"), ("ft3: no such file or folder",)),
        (("merge", "ft1", "ft2", "-b", "bse"), ("bse: no such file or folder",)),
        (("merge", "ft1", "", "-b", "base"), ("a model without a name", "`.` is this folder")),
        (("merge", "ft1", "ft2", "-b", ""), ("a model without a name",)),
        (("merge", ":0.5", "ft2", "-b", "base"), ("a model without a name",)),
        ((*FTS, "-o", "", "--force"), ("out: no name of an output",)),
        (("verify", "base", "--inputs", "nowhere"), ("'--inputs'", "'nowhere' does not exist")),
        (("spectral", "base", "--base", "base"), ("no model has a tensor that it could have",)),
        (("merge", "ft1", "lora1"), ("ft1 is a full checkpoint", "task vectors", "--base")),
        (("merge", "ft1", "ft2", "-b", "lora1"), ("lora1: the base must be a checkpoint",)),
        (("merge", "ft1", "-b", "base+lora1"), ("base+lora1: the base", "mergebench merge base+")),
        (("merge", "lora1", "lora2", "--as", "model"), ("task vectors alone", "--base")),
        (("merge", "lora1+base"), ("lora1: is not a checkpoint", "base+adapter")),
        (("merge", "base+ft1"), ("ft1: is not an adapter", "base+adapter")),
        (("diff", "ft1", "lora1"), ("checkpoint and a task vector cannot be compared",)),
        (("inspect", "nowhere"), ("nowhere: no such file or folder",)),
        (("run", "nowhere.yaml"), ("nowhere.yaml: no such recipe",)),
    ],
)
def test_mistakes_are_one_line(
    scene: Scene, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """Wrong values, missing inputs and impossible combinations say what and what to do."""
    before = listing(scene.path)

    assert_refused(call(*arguments, cwd=scene.path), *words)

    assert listing(scene.path) == before


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"models": ["ft1"], "metod": "ties"}, ("unknown key 'metod'", "did you mean 'method'?")),
        ({"models": [{"path": "ft1", "wieght": 1}]}, ("'wieght'", "did you mean 'weight'?")),
        ({"method": "linear"}, ("`models` must be a list",)),
        ({"models": ["ft1"], "method": "linear", "ops": ["sum"]}, ("both `method` and `ops`",)),
        ({"models": ["ft1"], "mergebench": 9}, ("recipe version", "expected 1", "got 9")),
        ({"models": ["ft1"], "dtype": "int8"}, ("`dtype`", "bf16, f16, f32, f64")),
        ({"models": ["ft1"], "params": [1]}, ("`params` must be a mapping",)),
        ({"models": ["ft1"], "ops": [{"sum": {}, "scale": {}}]}, ("an op is a name",)),
        (["ft1"], ("a recipe is a mapping", "list")),
        ({"models": ["ft1"], "models_": 1}, ("unknown key 'models_'", "did you mean 'models'?")),
    ],
)
def test_recipes_are_checked(scene: Scene, recipe: object, words: tuple[str, ...]) -> None:
    """A recipe that means nothing names the file, the key and the nearest known key."""
    (scene.path / "recipe.yaml").write_text(json.dumps(recipe))

    assert_refused(call("run", "recipe.yaml", cwd=scene.path), "recipe.yaml", *words)


def test_empty_list_of_values(scene: Scene) -> None:
    """A parameter with no value at all is named."""
    recipe = {"models": ["ft1"], "base": "base", "method": "ties", "params": {"lam": []}}
    (scene.path / "recipe.json").write_text(json.dumps(recipe))

    assert_refused(call("run", "recipe.json", cwd=scene.path), "'lam' has an empty list")


def test_text_that_is_no_recipe(scene: Scene) -> None:
    """Broken YAML, binary, and a folder that is no output are refused by name."""
    (scene.path / "broken.yaml").write_text("models: [ft1\n  base: {")
    for name in ("broken.yaml", "base.safetensors"):
        assert_refused(call("run", name, cwd=scene.path), name, "not YAML or JSON")
    assert_refused(call("run", "base", cwd=scene.path), "base/mergebench_recipe.yaml: no such")


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "1 NaN and 0 infinite"), (-float("inf"), "0 NaN and 1 inf")]
)
def test_nonfinite_entries_stop_the_merge(scene: Scene, value: float, words: str) -> None:
    """A NaN or an infinity names model and tensor, and leaves no output."""
    arrays = {name: array.copy() for name, array in scene.tuned[1].items()}
    arrays["model.norm.weight"][3] = value
    write(scene.path / "bad.safetensors", arrays)
    before = listing(scene.path)

    for method in ("ties", "linear"):
        ran = call("merge", "ft1", "bad.safetensors", "-b", "base", "-m", method, cwd=scene.path)
        assert_refused(ran, "bad.safetensors", "model.norm.weight", words)

    assert listing(scene.path) == before


def test_missing_and_extra_tensors_are_named(scene: Scene) -> None:
    """Models of other architectures are refused, with counts and names."""
    arrays = read(scene.path / "ft2.safetensors")
    arrays["extra.weight"] = arrays.pop("model.norm.weight")
    write(scene.path / "odd.safetensors", arrays)

    ran = call("merge", "ft1", "odd.safetensors", cwd=scene.path)

    assert_refused(ran, "'model.norm.weight'", "'extra.weight'", "1 tensors are missing")


def test_paths_are_printed_as_they_are(scene: Scene) -> None:
    """Brackets and colons in a path are not taken for markup or emoji."""
    for name in ("[bold]nowhere", "a:x:b", ":smile:"):
        assert_refused(call("inspect", name, cwd=scene.path), f"error: {name}: no such file")
    write(scene.path / "[red]:x:.safetensors", base_model())
    ran = call("merge", "[red]:x:.safetensors", "-o", "[b]:x:", cwd=scene.path)
    assert (ran.code, ran.out.split(": model")[0]) == (0, "[b]:x:")


def test_internal_errors_are_bugs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw is one line that says so, exit code 70; a switch shows the traceback."""

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("mergebench.merge.engine.execute", broken)
    ran = call("merge", "ft1", "ft2", cwd=scene.path)

    assert_refused(ran, "internal error: ZeroDivisionError: float division", "a bug", code=70)
    with pytest.raises(ZeroDivisionError):
        call("merge", "ft1", "ft2", cwd=scene.path, env={"MERGEBENCH_DEBUG": "1"})


def test_installed_command_reports_the_same(scene: Scene) -> None:
    """The real command gives the same line, code and untouched folder."""
    before = tree(scene.path)

    ran = command(*FTS, "-m", "tiess", cwd=scene.path)

    expected = call(*FTS, "-m", "tiess", cwd=scene.path)
    assert ran == Ran(2, "", expected.err)
    assert tree(scene.path) == before
