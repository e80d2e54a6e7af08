"""Parameters that have another value for each model, and values within values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mergebench as mb
from mergebench.core.errors import ParameterError
from mergebench.core.params import bind
from mergebench.core.schedule import Cases, Gradient, parse_schedule, to_plain, value_at
from mergebench.core.selector import Selector
from mergebench.core.site import make_sites
from mergebench.merge.abreast import Abreast, abreast
from mergebench.merge.method import METHODS
from mergebench.recipe.reading import recipe_from_dict
from tests.helpers.files import read, tree, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene
from tests.oracle import methods as oracle

DENSITIES = {"ft1": 0.2, "ft2": 0.7}


def recipe(method: str, own: dict[str, dict[str, Any]], **more: Any) -> str:
    """A recipe over ft1 and ft2, as JSON is YAML too."""
    models = [{"path": name, "params": params} for name, params in own.items()]
    data = {"method": method, "models": models, "base": "base", **more}
    return recipe_from_dict(data).to_yaml()


def run(scene: Scene, text: str, *args: str) -> dict[str, Any]:
    """The tensors that a recipe gives."""
    (scene.path / "recipe.yaml").write_text(text)
    assert_done(call("run", "recipe.yaml", "-o", "out", "-f", *args, cwd=scene.path))
    return read(scene.path / "out")


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_each_model_has_its_density(scene: Scene, scope: str) -> None:
    """TIES with two densities is the oracle's, whatever the order of the models."""
    own = {name: {"density": value} for name, value in DENSITIES.items()}
    texts = [
        recipe("ties", {name: own[name] for name in names}, params={"scope": scope})
        for names in (("ft1", "ft2"), ("ft2", "ft1"))
    ]
    first, second = (run(scene, text) for text in texts)
    assert {n: a.tobytes() for n, a in first.items()} == {n: a.tobytes() for n, a in second.items()}
    floating = [name for name, array in scene.base.items() if array.dtype.kind == "f"]
    # In float32, as the merge takes differences.
    deltas = {
        name: [np.asarray(tuned[name] - scene.base[name], np.float64) for tuned in scene.tuned]
        for name in floating
    }
    expected = oracle.ties(
        deltas, density=list(DENSITIES.values()), scope=scope, count="exact", tie="majority"
    )
    for name in floating:
        np.testing.assert_allclose(
            first[name], scene.base[name] + expected[name], rtol=0, atol=1e-6, err_msg=name
        )


def test_the_same_value_for_all_is_a_common_one(scene: Scene) -> None:
    """Byte for byte; and a value for one model leaves the other its common value."""
    same = recipe("breadcrumbs", {name: {"density": 0.4} for name in DENSITIES})
    common = recipe("breadcrumbs", {name: {} for name in DENSITIES}, params={"density": 0.4})
    one = recipe("breadcrumbs", {"ft1": {"density": 0.4}, "ft2": {}}, params={"density": 0.4})
    found = [{n: a.tobytes() for n, a in run(scene, t).items()} for t in (same, common, one)]
    assert found[0] == found[1] == found[2]


def test_the_stored_recipe_gives_the_same_bytes(scene: Scene) -> None:
    """It names each model's parameters, in the order of its models."""
    own = {"ft2": {"density": "0.2..0.6"}, "ft1": {"density": 0.7}}
    text = recipe("ties", own, params={"scope": "tensor", "tie": "plus"})
    run(scene, text)
    assert_done(call("run", "out", "-o", "again", cwd=scene.path))
    one, two = tree(scene.path / "out"), tree(scene.path / "again")
    assert one["model.safetensors"] == two["model.safetensors"]
    assert one["mergebench_recipe.yaml"] == two["mergebench_recipe.yaml"]


def test_tiles_and_threads_change_nothing(scene: Scene) -> None:
    """Thresholds of single models are measured tile by tile, on any number of threads."""
    random = np.random.default_rng(5)
    wide = {"w": random.standard_normal((1500, 1024)).astype(np.float32)}
    for name in ("base", "ft1", "ft2"):
        noise = 0.1 * random.standard_normal(wide["w"].shape).astype(np.float32)
        write(scene.path / name / "model.safetensors", {"w": wide["w"] + noise})
    text = recipe("ties", {n: {"density": d} for n, d in DENSITIES.items()})
    one = run(scene, text, "--workers", "1", "--memory", "84MiB")["w"]
    many = run(scene, text, "--workers", "4", "--memory", "1GiB")["w"]
    assert one.tobytes() == many.tobytes()
    base, first, second = (read(scene.path / n)["w"] for n in ("base", "ft1", "ft2"))
    kept = {}
    for name, tuned in (("ft1", first), ("ft2", second)):
        size = np.abs(tuned - base)
        kept[name] = size >= np.sort(size, axis=None)[-int(DENSITIES[name] * size.size)]
    alone = kept["ft2"] & ~kept["ft1"]
    np.testing.assert_allclose(one[alone], second[alone], rtol=0, atol=1e-6)
    neither = ~kept["ft2"] & ~kept["ft1"]
    assert one[neither].tobytes() == base[neither].tobytes()


def test_by_row(scene: Scene) -> None:
    """Ops without statistics too: each row of the stack has its own."""
    text = recipe(
        "breadcrumbs", {n: {"density": d} for n, d in DENSITIES.items()}, params={"lam": 1.0}
    )
    found = run(scene, text)
    ops = mb.ops
    parts = []
    for tau, density in zip(scene.taus, DENSITIES.values(), strict=True):
        single = {n: t.astype(np.float32) for n, t in tau.items()}
        parts.append(mb.apply(ops["band"](density, 0.1), [single])[0])
    for name, array in parts[0].items():
        expected = scene.base[name] + array + parts[1][name]
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("rescale", ["l1", "none"])
@pytest.mark.parametrize("method", ["dare", "dare_linear", "della_linear"])
def test_what_is_drawn_for_a_model(scene: Scene, method: str, rescale: str) -> None:
    """Is what is drawn for it alone, with its own density."""
    params = {"rescale": rescale, **({} if method == "dare" else {"normalize": False})}
    densities = {"ft1": 0.35, "ft2": 0.8}
    own = {name: {"density": density} for name, density in densities.items()}
    both = run(scene, recipe(method, own, params={**params, "lam": 1}))
    moved = dict.fromkeys(both, 0.0)
    for name, density in densities.items():
        lam = {**params, "lam": 1}
        alone = run(scene, recipe(method, {name: {}}, params={**lam, "density": density}))
        for key, array in scene.base.items():
            if array.dtype.kind == "f":
                step = alone[key].astype(np.float64) - array
                assert np.count_nonzero(step) > 0 or step.size < 32, key
                moved[key] = moved[key] + step
    for key, array in scene.base.items():
        np.testing.assert_allclose(both[key], array + moved[key], rtol=0, atol=2e-6, err_msg=key)


@pytest.mark.parametrize(
    ("method", "own", "message"),
    [
        ("ties", {"lam": 0.5}, "`lam` cannot differ between models"),
        ("ties", {"tie": "plus"}, "`tie` cannot differ between models"),
        ("ties", {"densty": 0.5}, "did you mean 'density'?"),
        ("ties", {"density": 1.5}, "`density` must be a number in (0, 1]"),
        ("ties", {"scope": "tensor"}, "`scope` differs between models"),
    ],
)
def test_what_is_refused(scene: Scene, method: str, own: dict[str, Any], message: str) -> None:
    """Parameters where models are combined, and values that no model may have."""
    data = {"method": method, "base": "base", "models": ["ft1", {"path": "ft2", "params": own}]}
    (scene.path / "recipe.yaml").write_text(recipe_from_dict(data).to_yaml())
    assert_refused(call("run", "recipe.yaml", "-o", "out", cwd=scene.path), message)


def test_a_chain_has_no_parameters_of_models(scene: Scene) -> None:
    """They are those of a method."""
    data = {"ops": ["sum"], "base": "base", "models": [{"path": "ft2", "params": {"lam": 1}}]}
    (scene.path / "recipe.yaml").write_text(recipe_from_dict(data).to_yaml())
    assert_refused(call("run", "recipe.yaml", "-o", "out", cwd=scene.path), "belong to a method")


def test_chains_are_joined_where_they_differ() -> None:
    """Equal ops stay what they are."""
    chains = [METHODS["ties"](density=d, scope="tensor") for d in (0.2, 0.7)]
    joined = abreast(chains)
    assert isinstance(joined[0], Abreast)
    assert joined[1:] == chains[0][1:]
    assert str(joined[0]) == f"{chains[0][0]} | {chains[1][0]}"
    assert abreast([chains[0], chains[0]]) == chains[0]
    with pytest.raises(ParameterError):
        abreast([METHODS["ties"](lam=1.0), METHODS["ties"](lam=2.0)])


def test_cases_within_cases() -> None:
    """A selected part may be divided again; what is left unset has the default."""
    data = {
        "cases": [
            {"select": "block=0", "value": {"cases": [{"select": "mlp", "value": 3}]}},
            {
                "select": "block=1",
                "value": {"cases": [{"select": "x", "value": 5}], "else": "0..1"},
            },
        ],
        "else": {"cases": [{"select": "norm", "value": 7}], "else": 8},
    }
    value = parse_schedule(data, "lam")
    assert to_plain(value) == data
    bound = bind("m", METHODS["task_arithmetic"].params, {"lam": value}, {"lam": 0.25})["lam"]
    shapes = {f"layers.{b}.{n}.w": (1,) for b in (0, 1) for n in ("mlp", "attn")}
    sites = make_sites({**shapes, "norm.w": (1,), "head.w": (1,)})
    found = {name: value_at(bound, site) for name, site in sites.items()}
    assert found == {
        "layers.0.mlp.w": 3, "layers.0.attn.w": 0.25, "layers.1.mlp.w": 1, "layers.1.attn.w": 1,
        "norm.w": 7, "head.w": 8,
    }  # fmt: skip
    inner = Cases(((Selector("x"), Gradient((0.0, 1.0))),), 5)
    assert Cases(((Selector("block=1"), inner),)) != Cases(((Selector("block=1"), 5),))


def test_normalized_sums(scene: Scene) -> None:
    """Task arithmetic and Breadcrumbs divide by the sum of weights where that is asked for."""
    for method, params in (("task_arithmetic", ()), ("breadcrumbs", ("-p", "density=0.4"))):
        args = ("--base", "base", "-m", method, *params, "-p", "lam=1")
        assert_done(call("merge", "ft1:1", "ft2:3", *args, "-o", "plain", "-f", cwd=scene.path))
        done = call("merge", "ft1:1", "ft2:3", *args, "-p", "normalize=true", "-o", "mean", "-f",
                    cwd=scene.path)  # fmt: skip
        assert_done(done)
        plain, mean = read(scene.path / "plain"), read(scene.path / "mean")
        for name, array in scene.base.items():
            if array.dtype.kind == "f":
                quarter = (plain[name].astype(np.float64) - array) / 4
                np.testing.assert_allclose(mean[name] - array, quarter, rtol=0, atol=1e-6)
