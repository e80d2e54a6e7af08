"""`mergebench run` on configurations of mergekit."""

from __future__ import annotations

from typing import Any

import numpy as np
import yaml

from mergebench.recipe.reading import recipe_from_dict
from tests.helpers.files import F32, read
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

CONFIG: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [
        {"model": "ft1", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}},
        {"model": "ft2", "parameters": {"weight": [0, 1]}},
    ],
    "dtype": "bfloat16",
    "out_dtype": "float32",
}


def write(scene: Scene, **changes: Any) -> None:
    """A configuration in the folder."""
    text = yaml.safe_dump({**CONFIG, **changes}, sort_keys=False)
    (scene.path / "mergekit.yml").write_text(text)


def test_a_configuration_runs(scene: Scene) -> None:
    """It is found out by its keys; what should be known stands on standard error."""
    write(scene)
    ran = assert_done(call("run", "mergekit.yml", "-o", "out", cwd=scene.path))
    assert ran.err.startswith("note: dtype: bfloat16 is what mergekit computes in; here it is f")
    for name, array in read(scene.path / "out").items():
        if array.dtype == F32:
            first, second = 0.5 if "mlp" in name else 1, 1 if "layers.1." in name else 0
            taus = [tau[name] for tau in scene.taus]
            expected = scene.base[name] + first * taus[0] + second * taus[1]
            np.testing.assert_allclose(array, expected, rtol=0, atol=2e-6, err_msg=name)
    quiet = assert_done(call("run", "mergekit.yml", "-o", "quiet", "-q", cwd=scene.path))
    assert (quiet.out, quiet.err) == ("", "")


def test_its_plan_has_the_notes(scene: Scene) -> None:
    """As a table and as JSON; nothing is written."""
    write(scene)
    shown = assert_done(call("run", "mergekit.yml", "--dry-run", cwd=scene.path))
    assert "bfloat16 is what mergekit computes in" in " ".join(shown.out.split())
    plan = assert_done(call("run", "mergekit.yml", "--dry-run", "--json", cwd=scene.path)).json
    assert plan["notes"][0].startswith("dtype: bfloat16")
    assert not (scene.path / "merged").exists()


def test_the_recipe_is_printed(scene: Scene) -> None:
    """YAML or JSON on standard output, which reads back; no model is looked for."""
    write(scene, base_model="elsewhere", chat_template="[{{ messages }}] ü")
    ran = assert_done(call("run", "mergekit.yml", "--print-recipe", cwd=scene.path))
    assert ran.err.startswith("note: dtype")
    recipe = yaml.safe_load(ran.out)
    assert recipe["base"] == "elsewhere"
    assert recipe["chat_template"] == "[{{ messages }}] ü"
    assert recipe_from_dict(recipe).to_dict() == recipe
    args = ("run", "mergekit.yml", "--print-recipe", "--json", "-q", "-o", "x")
    ran = assert_done(call(*args, cwd=scene.path))
    assert ran.json == {**recipe, "out": "x"}
    assert ran.err == ""


def test_recipes_of_ours_are_printed_too(scene: Scene) -> None:
    """With everything that was abbreviated written out."""
    (scene.path / "own.yaml").write_text("{models: [a, b], where: ['mlp:weight=1/0']}")
    ran = assert_done(call("run", "own.yaml", "--print-recipe", cwd=scene.path))
    assert yaml.safe_load(ran.out)["models"][1]["weight"] == {
        "cases": [{"select": "mlp", "value": 0.0}],
        "else": 1.0,
    }


def test_errors_are_one_line(scene: Scene) -> None:
    """With file, line and key; and those that only the models show."""
    write(scene, densty=1)
    ran = call("run", "mergekit.yml", "-o", "out", cwd=scene.path)
    assert_refused(ran, "mergekit.yml, line 17: densty: unknown key")
    write(
        scene,
        models=[
            {
                "model": "ft1",
                "parameters": {"weight": [{"filter": "mpl", "value": 1}, {"value": 0}]},
            }
        ],
    )
    ran = call("run", "mergekit.yml", "-o", "out", cwd=scene.path)
    assert_refused(ran, "weight: mpl matches no tensor")
    write(scene, parameters={"lambda": "x"})
    ran = call("run", "mergekit.yml", "--print-recipe", cwd=scene.path)
    assert_refused(ran, "parameters.lambda: must be a number, got 'x'")
    write(scene, merge_method="ties", parameters={"density": 1.7})
    ran = call("run", "mergekit.yml", "-o", "out", cwd=scene.path)
    assert_refused(ran, "`density` must be a number in (0, 1], got 1.7")
    assert not (scene.path / "out").exists()


def test_what_would_be_no_recipe_is_refused(scene: Scene) -> None:
    """Values of their own in more layers than a recipe can hold."""
    weight = [{"filter": f"part{number}", "value": [0, 1]} for number in range(200)]
    sources = [{"model": "ft1", "layer_range": [0, 800]}]
    slices = [{"sources": sources, "parameters": {"weight": [*weight, {"value": 1}]}}] * 2
    text = yaml.safe_dump({"merge_method": "linear", "slices": slices})
    (scene.path / "mergekit.yml").write_text(text)
    ran = call("run", "mergekit.yml", "--print-recipe", cwd=scene.path)
    assert_refused(ran, "mergekit.yml: asks for different values in too many layers")
