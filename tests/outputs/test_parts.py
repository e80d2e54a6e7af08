"""Parts of a model merged by methods of their own, against each part merged by itself."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mergebench import merge_models
from mergebench.recipe.reading import recipe_from_dict
from tests.helpers.files import F32, Array, read, tree, write
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

NORM = "class=norm"
MODELS = [{"path": "ft1", "weight": 0.3}, {"path": "ft2", "weight": 0.9}]


def run(scene: Scene, out: str = "out", **recipe: Any) -> dict[str, Array]:
    """The output of a recipe over ft1 and ft2."""
    data = {"models": MODELS, "base": "base", **recipe}
    (scene.path / "recipe.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    assert_done(call("run", "recipe.yaml", "-o", out, "-f", cwd=scene.path))
    return read(scene.path / out)


def assert_parts(found: dict[str, Array], expected: dict[str, Any]) -> None:
    """Each tensor has the bytes of the model whose pattern is found in its name, first wins."""
    assert all(sorted(found) == sorted(model) for model in expected.values())
    for name, array in found.items():
        model = next(each for key, each in expected.items() if key in name)
        assert array.dtype == model[name].dtype
        assert array.tobytes() == model[name].tobytes(), name


def test_weights_here_and_displacements_there(scene: Scene) -> None:
    """Norms by linear, which averages weights; the rest by TIES, whose threshold counts the rest.

    Norms are what it says in a run with them alone, the rest in a run without them.
    """
    found = run(
        scene,
        method="ties",
        params={"density": 0.4, "lam": 0.7},
        parts=[{"select": NORM, "method": "linear", "params": {"normalize": False}}],
    )
    alone = {
        "norm": run(scene, method="linear", params={"normalize": False}, include=[NORM]),
        "": run(scene, method="ties", params={"density": 0.4, "lam": 0.7}, exclude=[NORM]),
    }
    assert_parts(found, alone)
    # Weights 0.3 and 0.9, which are no displacement of the base by these.
    name = "model.norm.weight"
    expected = 0.3 * scene.tuned[0][name] + 0.9 * scene.tuned[1][name]
    np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    whole = run(scene, method="ties", params={"density": 0.4, "lam": 0.7})
    with pytest.raises(AssertionError):
        assert_parts(whole, alone)


def test_alone(scene: Scene) -> None:
    """Without a method for the rest, the rest is the base's, byte by byte."""
    parts = [
        {"select": "q_proj", "method": "breadcrumbs", "params": {"density": 0.5}},
        {"select": {"include": ["layers"], "exclude": ["block=0", NORM]}, "method": "ties"},
    ]
    found = run(scene, parts=parts)
    alone = {
        "q_proj": run(scene, method="breadcrumbs", params={"density": 0.5}, include=["q_proj"]),
        "layers.1.mlp": run(
            scene, method="ties", include=["layers"], exclude=["block=0", NORM, "q_proj"]
        ),
        "": scene.base,
    }
    assert_parts(found, alone)
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.up_proj.weight"):
        assert found["model." + name].tobytes() != scene.base["model." + name].tobytes()


def test_the_first_part_wins(scene: Scene) -> None:
    """As with rules; what all parts have together is everything."""
    parts = [
        {"select": "up_proj", "method": "task_arithmetic", "params": {"lam": 0.25}},
        {"select": ["block=1", "embed"], "method": "task_arithmetic", "params": {"lam": 0.5}},
        {"select": ".", "method": "task_arithmetic", "params": {"lam": 2.0}},
    ]
    found = run(scene, parts=parts)
    steps = {"up_proj": 0.25, "layers.1": 0.5, "embed": 0.5, "": 2.0}
    by_lam = {
        lam: run(scene, method="task_arithmetic", params={"lam": lam})
        for lam in set(steps.values())
    }
    assert_parts(found, {key: by_lam[lam] for key, lam in steps.items()})


def test_thresholds_are_of_their_part(scene: Scene) -> None:
    """Also where two parts and the rest have the very same chain."""
    params = {"density": 0.3, "lam": 1.0, "scope": "model"}
    parts = [{"select": f"block={n}", "method": "ties", "params": params} for n in (0, 1)]
    found = run(scene, method="ties", params=params, parts=parts)
    alone = {
        "layers.0": run(scene, method="ties", params=params, include=["block=0"]),
        "layers.1": run(scene, method="ties", params=params, include=["block=1"]),
        "": run(scene, method="ties", params=params, exclude=["block=0-1"]),
    }
    assert_parts(found, alone)
    with pytest.raises(AssertionError):
        assert_parts(run(scene, method="ties", params=params), alone)


def test_weights_of_a_part(scene: Scene) -> None:
    """One for each model, in the order of the recipe; numbers, gradients and cases."""
    own = [0.25, 0.75]
    part = {"select": "proj", "method": "slerp", "weights": own}
    found = run(scene, method="task_arithmetic", parts=[part])
    models = [{"path": f"ft{n}", "weight": w} for n, w in zip((1, 2), own, strict=True)]
    alone = {
        "proj": run(scene, method="slerp", models=models),
        "": run(scene, method="task_arithmetic"),
    }
    assert_parts(found, alone)
    backwards = run(
        scene,
        models=MODELS[::-1],
        method="task_arithmetic",
        parts=[{**part, "weights": own[::-1]}],
    )
    assert_parts(backwards, alone)
    sloped = ["1..0", {"cases": [{"select": "mlp", "value": 2.0}], "else": "0..1"}]
    sloped_part = {"select": "proj", "method": "task_arithmetic", "weights": sloped}
    found = run(scene, parts=[sloped_part])
    models = [{"path": f"ft{n}", "weight": w} for n, w in zip((1, 2), sloped, strict=True)]
    alone = {"proj": run(scene, method="task_arithmetic", models=models), "": scene.base}
    assert_parts(found, alone)


def test_same_model_twice_with_weights_of_a_part(scene: Scene) -> None:
    """The order of the command line does not change a bit, here neither."""
    models = [{"path": "ft1"}] * 3
    outputs = []
    for weights in permutations((1.3, 0.21, -0.37)):
        part = {"select": "proj", "method": "task_arithmetic", "weights": list(weights)}
        run(scene, models=models, parts=[part])
        outputs.append((scene.path / "out/model.safetensors").read_bytes())
    assert len(set(outputs)) == 1


def test_parameters_of_a_model_are_for_the_method_of_the_rest(scene: Scene) -> None:
    """A part has its own, the same for all models."""
    models = [{**MODELS[0], "params": {"density": 0.6}}, MODELS[1]]
    params = {"density": 0.2, "scope": "tensor", "tie": "plus"}
    part = {"select": "block=0", "method": "ties", "params": params}
    found = run(scene, models=models, method="ties", params=params, parts=[part])
    alone = {
        "layers.0": run(scene, method="ties", params=params),
        "": run(scene, models=models, method="ties", params=params),
    }
    assert_parts(found, alone)


def test_chains_and_what_follows(scene: Scene) -> None:
    """``ops`` in place of a method, and ``then`` of a part and of the rest."""
    ops = [{"trim": {"density": 0.5, "scope": "tensor"}}, "weigh", "sum"]
    then = [{"scale": {"lam": 0.5}}]
    part = {"select": "mlp", "ops": ops, "then": then}
    rest = [{"lines": {"alpha": 0.2, "beta": 1.0}}]
    found = run(scene, method="task_arithmetic", then=rest, parts=[part])
    alone = {
        "mlp": run(scene, ops=ops, then=then),
        "": run(scene, method="task_arithmetic", then=rest),
    }
    assert_parts(found, alone)


def test_gradients_run_over_the_whole_model(scene: Scene) -> None:
    """Depth is where a tensor stands in the model, not in the part."""
    params = {"lam": "0.5..2"}
    part = {"select": "layers.1", "method": "task_arithmetic", "params": params}
    alone = {
        "layers.1": run(scene, method="task_arithmetic", params={"lam": 2.0}),
        "": scene.base,
    }
    assert_parts(run(scene, parts=[part]), alone)


def test_several_outputs(scene: Scene) -> None:
    """Values of the recipe's own parameters are swept; parts are the same in each output."""
    part = {"select": "block=0", "method": "ties", "params": {"density": 0.2}}
    densities = [0.2, 0.6]
    recipe = {"method": "ties", "params": {"density": densities}, "parts": [part]}
    (scene.path / "recipe.yaml").write_text(
        yaml.safe_dump({"models": MODELS, "base": "base"} | recipe)
    )
    assert_done(call("run", "recipe.yaml", "-o", "both", cwd=scene.path))
    block = run(scene, method="ties", params={"density": 0.2}, include=["block=0"])
    for density in densities:
        rest = run(scene, method="ties", params={"density": density}, exclude=["block=0"])
        found = read(scene.path / "both" / f"density={density}")
        assert_parts(found, {"layers.0": block, "": rest})


def test_adapters(scene: Scene) -> None:
    """An adapter is written with the modules that parts and rest give."""
    base = ("merge", "lora1", "lora2")
    mixed = ("-m", "task_arithmetic", "--method-for", "block=1:ties:density=0.5", "-o", "two")
    assert_done(call(*base, *mixed, cwd=scene.path))
    some = ("-m", "ties", "-p", "density=0.5", "--include", "block=1", "-o", "ties")
    assert_done(call(*base, *some, cwd=scene.path))
    assert_done(call(*base, "-m", "task_arithmetic", "-o", "sum", cwd=scene.path))
    ties, total = (read(scene.path / n / "adapter_model.safetensors") for n in ("ties", "sum"))
    found = read(scene.path / "two" / "adapter_model.safetensors")
    assert sorted(found) == sorted(total)
    for name, array in found.items():
        expected = ties if "layers.1" in name else total
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_parts_of_tied_models(tmp_path: Path) -> None:
    """Names that are tied are one tensor, whichever is meant; the head is the embedding."""
    stream = np.random.default_rng(0)
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
    for model in ("base", "ft1", "ft2"):
        arrays = {name: stream.normal(size=(8, 4)).astype(F32) for name in names}
        arrays["lm_head.weight"] = arrays[names[0]]
        save_folder(tmp_path / model, arrays, config={"tie_word_embeddings": True})
    common = ("merge", "ft1", "ft2", "-b", "base", "--allow-base-mismatch", "-o")
    part = ("--method-for", "lm_head:ties:density=0.5")
    assert_done(call(*common, "out", *part, cwd=tmp_path))
    rest = ("-m", "ties", "-p", "density=0.5", "--include", "lm_head")
    assert_done(call(*common, "alone", *rest, cwd=tmp_path))
    found, alone = read(tmp_path / "out"), read(tmp_path / "alone")
    assert found[names[0]].tobytes() == alone[names[0]].tobytes()
    assert found[names[0]].tobytes() != read(tmp_path / "base")[names[0]].tobytes()
    assert found[names[1]].tobytes() == read(tmp_path / "base")[names[1]].tobytes()


def test_command_line_and_python_give_the_same(scene: Scene) -> None:
    """``--method-for`` and ``parts=`` are the recipe's."""
    parts = ["class=norm:linear", "self_attn|mlp:ties:density=0.3,scope=tensor"]
    line = [piece for part in parts for piece in ("--method-for", part)]
    models = ("merge", "ft1:0.3", "ft2:0.9", "--base", "base")
    assert_done(call(*models, *line, "-m", "task_arithmetic", "-o", "cli", cwd=scene.path))
    found = run(
        scene,
        method="task_arithmetic",
        parts=[
            {"select": "class=norm", "method": "linear"},
            {
                "select": "self_attn|mlp",
                "method": "ties",
                "params": {"density": 0.3, "scope": "tensor"},
            },
        ],
    )
    assert_parts(read(scene.path / "cli"), {"": found})
    paths = [scene.path / "ft1", scene.path / "ft2"]
    result = merge_models(
        list(zip(paths, (0.3, 0.9), strict=True)),
        base=scene.path / "base",
        method="task_arithmetic",
        parts=[parts[0], {"select": "self_attn|mlp", "method": "ties",
                          "params": {"density": 0.3, "scope": "tensor"}}],
    )  # fmt: skip
    assert_parts(found, {"": result})
    assert_done(call(*models, *line, "-o", "alone", cwd=scene.path))
    assert_parts(
        read(scene.path / "alone"), {"embed": scene.base, "lm_head": scene.base, "": found}
    )


def test_outputs_say_so(scene: Scene) -> None:
    """Plan, recipe, manifest and card; and the stored recipe gives the same bytes."""
    parts = [
        {"select": NORM, "method": "linear"},
        {"select": {"exclude": ["mlp"]}, "method": "ties", "weights": [0.5, 1]},
    ]
    run(scene, method="breadcrumbs", compat="mergekit-0.1.5", parts=parts)
    plan = assert_done(call("run", "recipe.yaml", "--dry-run", "--json", cwd=scene.path)).json
    assert plan["parts"] == [
        {"select": NORM, "method": "linear", "tensors": 1},
        {"select": "everything, without mlp", "method": "ties", "tensors": 4},
    ]
    shown = assert_done(call("run", "recipe.yaml", "--dry-run", cwd=scene.path)).out
    assert "class=norm: linear, 1 tensors" in " ".join(shown.split())
    assert len(plan["outputs"][0]["chains"]) == 3
    stored = yaml.safe_load((scene.path / "out/mergebench_recipe.yaml").read_text())
    assert stored["parts"][0] == {
        "select": NORM,
        "method": "linear",
        "params": {"normalize": True},
    }
    assert stored["parts"][1]["params"]["density"] == 0.2
    assert stored["parts"][1]["params"]["scope"] == "model"
    weights = {
        m["path"]: w for m, w in zip(stored["models"], stored["parts"][1]["weights"], strict=True)
    }
    assert weights == {"ft1": 0.5, "ft2": 1.0}
    assert recipe_from_dict(stored).to_dict() == stored
    manifest = json.loads((scene.path / "out/mergebench_manifest.json").read_text())
    assert manifest["recipe"] == stored
    card = (scene.path / "out/README.md").read_text()
    assert "- `class=norm` with **linear** (" in card
    assert "- `everything, without mlp` with **ties** ([arXiv:2306.01708]" in card
    first = tree(scene.path / "out")
    assert_done(call("run", "out", "-o", "again/out", cwd=scene.path))
    assert tree(scene.path / "again/out") == first
    assert_done(call("verify", "out", "--replay", "all", cwd=scene.path))
    for extra in (("--workers", "3"), ("--workers", "1", "--memory", "100MiB")):
        assert_done(call("run", "recipe.yaml", "-o", "more/out", "-f", *extra, cwd=scene.path))
        assert tree(scene.path / "more/out") == first


def test_order_of_the_user_matters_where_a_part_depends_on_it(scene: Scene) -> None:
    """The stored recipe keeps it, with the weights of parts in it."""
    models = MODELS[::-1]
    parts = [
        {"select": "block=0", "method": "orthogonal", "weights": [0.5, 0.8]},
        {"select": "block=1", "method": "task_arithmetic", "weights": [0.2, 0.1]},
    ]
    found = run(scene, models=models, parts=parts)
    stored = yaml.safe_load((scene.path / "out/mergebench_recipe.yaml").read_text())
    assert [model["path"] for model in stored["models"]] == ["ft2", "ft1"]
    assert [part["weights"] for part in stored["parts"]] == [[0.5, 0.8], [0.2, 0.1]]
    assert_done(call("run", "out", "-o", "again", cwd=scene.path))
    assert_parts(read(scene.path / "again"), {"": found})


TIES = {"select": "mlp", "method": "ties"}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"parts": ["mpl:ties"]}, ("part 1 (mpl): mpl matches no tensor",)),
        ({"parts": [TIES, TIES]}, ("part 2 (mlp): has no tensor, as parts before it have all",)),
        ({"parts": [{**TIES, "weights": [1]}]}, ("part 1 (mlp): number of weights", "2, one for")),
        ({"parts": [{**TIES, "params": {"densty": 1}}]}, ("part 1 (mlp)", "densty", "density")),
        ({"parts": [{**TIES, "params": {"density": 1.5}}]}, ("part 1 (mlp)", "(0, 1]", "1.5")),
        ({"parts": [{**TIES, "params": {"density": [0.1, 0.2]}}]}, ("several values",)),
        ({"parts": [{**TIES, "methd": 1}]}, ("parts[0]: unknown key 'methd'", "method")),
        ({"parts": [{"select": "mlp"}]}, ("parts[0]: needs one of `method` and `ops`",)),
        ({"parts": [{**TIES, "ops": ["sum"]}]}, ("needs one of `method` and `ops`",)),
        ({"parts": [{"method": "ties"}]}, ("a part is `{select: …",)),
        ({"parts": [{"select": [], "method": "ties"}]}, ("`select` is empty",)),
        ({"parts": [{"select": {"includ": "a"}, "method": "ties"}]}, ("unknown key 'includ'",)),
        ({"parts": {"select": "mlp"}}, ("`parts` must be a list",)),
        ({"parts": ["mlp"]}, ("SELECTOR:METHOD",)),
        ({"parts": ["mlp:tise"]}, ("tise", "ties")),
        ({"parts": [{**TIES, "weights": 1}]}, ("`weights` must be a list",)),
        ({"parts": [{**TIES, "weights": ["x", 1]}]}, ("weights",)),
        ({"parts": [{"select": "mlp", "ops": ["weigh"]}]}, ("the ops leave several",)),
        ({"parts": [TIES], "then": ["scale"]}, ("`then` follows a method",)),
        ({"parts": ["mlp:emr"]}, ("gives every model a result of its own", "merge without parts")),
        ({"parts": [TIES], "method": "emr"}, ("gives every model a result of its own",)),
        ({"parts": [TIES], "params": {"lam": 1}}, ("`params` belong to a method",)),
        ({"parts": [TIES], "base": None}, ("add --base",)),
        ({"parts": [{**TIES, "params": {"density": "0.1..0.5"}}]}, ("whole model at once",)),
        (
            {"parts": [{**TIES, "params": {"lam": {"cases": [{"select": NORM, "value": 1}]}}}]},
            ("part 1 (mlp): lam: class=norm matches no tensor",),
        ),
        (
            {
                "method": "task_arithmetic",
                "params": {"lam": {"cases": [{"select": "mlp", "value": 1}], "else": 2}},
                "parts": [TIES],
            },
            ("lam: mlp matches no tensor",),
        ),
        (
            {"parts": ["mlp:slerp"], "models": ["ft1", "ft2", "ft1"]},
            ("part 1 (mlp): slerp: number of models", "3"),
        ),
    ],
)  # fmt: skip
def test_mistakes(scene: Scene, recipe: dict[str, Any], words: tuple[str, ...]) -> None:
    """One line, before any work."""
    data = {"models": MODELS, "base": "base", **recipe}
    data = {key: value for key, value in data.items() if value is not None}
    (scene.path / "recipe.yaml").write_text(yaml.safe_dump(data))
    assert_refused(call("run", "recipe.yaml", "-o", "out", cwd=scene.path), *words)
    assert not (scene.path / "out").exists()


def test_a_part_of_weights_needs_no_base(scene: Scene) -> None:
    """Where nothing needs task vectors, weights are combined everywhere."""
    write(scene.path / "one.safetensors", scene.tuned[0])
    found = run(
        scene,
        base=None,
        method="linear",
        parts=[{"select": "mlp", "method": "slerp", "weights": [1, 3]}],
    )
    models = [{"path": "ft1"}, {"path": "ft2", "weight": 3}]
    alone = {
        "mlp": run(scene, base=None, method="slerp", models=models),
        "": run(scene, base=None, method="linear"),
    }
    assert_parts(found, alone)
