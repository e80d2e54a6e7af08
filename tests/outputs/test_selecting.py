"""Filters, gradients, rules and block weights, through files and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench import merge_models
from mergebench.core.errors import MismatchError
from tests.helpers.files import F32, F64, Array, read, tree, write
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene


def added(scene: Scene, factor: Any) -> dict[str, Array]:
    """Base plus, for every tensor, the two task vectors times ``factor(name)``: one number each."""
    expected = {}
    for name, array in scene.base.items():
        expected[name] = array
        if array.dtype == F32:
            one, two = factor(name)
            steps = one * scene.taus[0][name] + two * scene.taus[1][name]
            expected[name] = array.astype(F64) + steps
    return expected


def assert_close(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Equal names, float32 rounding apart; integers and untouched tensors bit for bit."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        if array.dtype == F64:
            np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6, err_msg=name)
            assert np.abs(found[name] - array.astype(F32)).max() <= 5e-7, name
        else:
            assert found[name].tobytes() == array.tobytes(), name


def test_the_comparison_can_fail(scene: Scene) -> None:
    """Another factor is not close."""
    with pytest.raises(AssertionError):
        assert_close(dict(scene.base), added(scene, lambda name: (1e-3, 0)))


def merged(scene: Scene, *extra: str, out: str = "out.safetensors") -> dict[str, Array]:
    """Task arithmetic of ft1 and ft2 with further arguments."""
    assert_done(
        call(
            *("merge", "ft1", "ft2", "--base", "base", "-m", "task_arithmetic", "-o", out),
            *("-p", "lam=0.5", *extra),
            cwd=scene.path,
        )
    )
    return read(scene.path / out)


def test_include_and_exclude(scene: Scene) -> None:
    """What is not selected has the base's bytes."""
    found = merged(scene, "--include", r"layers\.\d+\.mlp", "--exclude", "class=bias")
    expected = added(scene, lambda name: (0.5, 0.5) if "up_proj.weight" in name else (0, 0))
    assert_close(found, expected)
    for name, array in scene.base.items():
        if "up_proj.weight" not in name:
            assert found[name].tobytes() == array.tobytes()


def test_what_is_left_is_listed(scene: Scene) -> None:
    """By the plan, by name, with the reason; and as a note."""
    ran = call(
        *("plan", "ft1", "ft2", "--base", "base", "-m", "ties", "--exclude", "class=embedding"),
        *("--exclude", "lm_head", "--json"),
        cwd=scene.path,
    )
    plan = assert_done(ran).json
    copied = {name: why for name, why in plan["tensors"]["copied"].items() if "ids" not in name}
    assert copied == {
        "lm_head.weight": "not selected",
        "model.embed_tokens.weight": "not selected",
    }
    assert plan["notes"] == [
        (
            "2 tensors are not selected and taken from the base unchanged: lm_head.weight, "
            "model.embed_tokens.weight"
        )
    ]
    assert plan["tensors"]["merged"] == 7


def test_filters_stand_before_the_comparison_of_shapes(scene: Scene) -> None:
    """A head of another size does not matter if it is not selected."""
    wide = dict(scene.tuned[0], **{"lm_head.weight": np.ones((3, 16), F32)})
    wide["score.weight"] = np.ones((2, 16), F32)
    write(scene.path / "wide.safetensors", wide)
    arguments = ("merge", "wide.safetensors", "--base", "base", "-m", "task_arithmetic", "-o", "o")
    assert_refused(call(*arguments, cwd=scene.path), "lm_head.weight", "3×16")
    assert_done(call(*arguments, "--exclude", "class=head", cwd=scene.path))
    expected = added(scene, lambda name: (0 if name == "lm_head.weight" else 1, 0))
    assert_close(read(scene.path / "o" / "model.safetensors"), expected)


def test_filters_of_adapters(scene: Scene) -> None:
    """An adapter written out holds the selected modules alone."""
    assert_done(
        call(
            *("merge", "lora1", "lora2", "-m", "task_arithmetic", "--include", "block=1"),
            *("-o", "some"),
            cwd=scene.path,
        )
    )
    names = read(scene.path / "some" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0] for name in names} == {
        "base_model.model.model.layers.1.self_attn.q_proj",
        "base_model.model.model.layers.1.mlp.up_proj",
    }


def test_gradients_of_parameters_and_weights(scene: Scene) -> None:
    """Depth 0 and 1 of two blocks; outside of them the first number."""
    one = added(scene, lambda name: (2.0, 2.0) if "layers.1" in name else (0.25, 0.25))
    arguments = ("merge", "ft1", "ft2", "-b", "base", "-m", "task_arithmetic", "-o")
    assert_done(call(*arguments, "g.safetensors", "-p", "lam=0.25..2", cwd=scene.path))
    assert_close(read(scene.path / "g.safetensors"), one)
    weighted = ("merge", "ft1:0..1", "ft2:1..0", *arguments[3:], "w.safetensors")
    assert_done(call(*weighted, cwd=scene.path))
    two = added(scene, lambda name: (1, 0) if "layers.1" in name else (0, 1))
    assert_close(read(scene.path / "w.safetensors"), two)


def test_rules(scene: Scene) -> None:
    """By class, block and name, for parameters and for weights; the first that matches wins."""
    found = merged(
        scene,
        *("--where", "class=norm:lam=0", "--where", "class=embedding:weight=1/0"),
        *("--where", "block=1:lam=2", "--where", "layers:lam=1,weight=1/3"),
    )

    def factor(name: str) -> tuple[float, float]:
        if "embed" in name:
            return 0.5, 0
        if "layers.1" in name:
            return 2, 6
        if "layers.0" in name:
            return 1, 3
        return (0, 0) if "norm" in name else (0.5, 0.5)

    assert_close(found, added(scene, factor))


def test_rules_of_sweeps(scene: Scene) -> None:
    """Each output is the one that its value alone gives."""
    arguments = ("merge", "ft1", "ft2", "-b", "base", "-m", "breadcrumbs")
    rule = ("--where", "class=bias:gamma=0,density=1")
    assert_done(call(*arguments, *rule, "-p", "lam=0.5,1", "-o", "swept", cwd=scene.path))
    for lam in ("0.5", "1"):
        assert_done(call(*arguments, *rule, "-p", f"lam={lam}", "-o", lam, cwd=scene.path))
        alone = read(scene.path / lam / "model.safetensors")
        swept = read(scene.path / "swept" / f"lam={lam}" / "model.safetensors")
        assert {n: a.tobytes() for n, a in alone.items()} == {
            n: a.tobytes() for n, a in swept.items()
        }


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_rules_of_sparse_methods(scene: Scene, method: str) -> None:
    """A tensor with parameters of its own is what a merge with these parameters gives."""
    common = ("-b", "base", "-m", method, "-p", "scope=tensor", "-p", "lam=0.75")
    tie = ("-p", "tie=plus") if method == "ties" else ()
    where = ("--where", "up_proj:density=0.5,lam=1", "-o", "mixed.safetensors")
    assert_done(call("merge", "ft1", "ft2", *common, *tie, *where, cwd=scene.path))
    plain = ("-b", "base", "-m", method, "-p", "scope=tensor", *tie)
    for name, extra in (("one", ("-p", "lam=0.75")), ("two", ("-p", "density=0.5", "-p", "lam=1"))):
        out = ("-o", f"{name}.safetensors", *extra)
        assert_done(call("merge", "ft1", "ft2", *plain, *out, cwd=scene.path))
    mixed, one, two = (read(scene.path / f"{name}.safetensors") for name in ("mixed", "one", "two"))
    for name, array in mixed.items():
        assert array.tobytes() == (two if "up_proj" in name else one)[name].tobytes(), name


def test_recipes_keep_schedules(scene: Scene) -> None:
    """The stored recipe gives the same bytes, and so does one written by hand."""
    extra = ("--where", "class=norm:lam=0,weight=0/1", "-p", "lam=0..1", "--include", "model")
    arguments = ("merge", "ft1:0.3", "ft2:0..2", "-b", "base", "-m", "task_arithmetic")
    assert_done(call(*arguments, *extra, "-o", "first", cwd=scene.path))
    stored = scene.path / "first" / "mergebench_recipe.yaml"
    assert_done(call("run", stored, "-o", "again", cwd=scene.path))
    (scene.path / "hand.yaml").write_text(
        "method: task_arithmetic\nbase: base\nparams: {lam: 0..1}\ninclude: model\n"
        "where: ['class=norm:lam=0,weight=0/1']\n"
        "models: [{path: ft1, weight: 0.3}, {path: ft2, weight: 0..2}]\n"
    )
    assert_done(call("run", "hand.yaml", "-o", "hand", cwd=scene.path))
    trees = [tree(scene.path / name) for name in ("first", "again", "hand")]
    weights = [{n: c for n, c in each.items() if "safetensors" in n} for each in trees]
    assert weights[0] == weights[1] == weights[2]


def test_python_takes_the_same(scene: Scene) -> None:
    """Rules and filters as texts, gradients as texts."""
    found = merge_models(
        [scene.tuned[0], (scene.tuned[1], "0..1")],
        base=scene.base,
        method="task_arithmetic",
        where=["class=norm:lam=3"],
        exclude=["class=head"],
    )

    def factor(name: str) -> tuple[float, float]:
        if "lm_head" in name:
            return 0, 0
        return (3 if "norm" in name else 1), (1 if "layers.1" in name else 0)

    assert_close(found, added(scene, factor))


def test_difference_by_blocks(scene: Scene) -> None:
    """``A + w_block m (B - C)``: A stays whole, whichever way round the files lie."""
    names = {
        "model.diffusion_model.input_blocks.0.0.weight": 0.1,
        "model.diffusion_model.middle_block.0.weight": 0.7,
        "model.diffusion_model.output_blocks.11.0.weight": 0.9,
        "cond_stage_model.w.weight": 0.25,
    }
    random = np.random.default_rng(0)
    a, b, c = ({name: random.normal(size=(2, 2)).astype(F32) for name in names} for _ in range(3))
    for file, table in (("A", a), ("B", b), ("C", c)):
        write(scene.path / f"{file}.safetensors", table)
    weights = "/".join(map(str, [0.25, 0.1] + [0.5] * 11 + [0.7] + [0.5] * 11 + [0.9]))
    how = ("-b", "C.safetensors", "-m", "add_difference", "-p", f"blocks={weights}")
    for first, other, one, two in (("A", "B", a, b), ("B", "A", b, a)):
        models = (f"{first}.safetensors", f"{other}.safetensors:0.8")
        ran = call("merge", *models, *how, "-o", "m.safetensors", "-f",
                   cwd=scene.path)  # fmt: skip
        assert_done(ran)
        found = read(scene.path / "m.safetensors")
        for name, w in names.items():
            expected = one[name] + w * 0.8 * (two[name] - c[name])
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(MismatchError, match="no tensor of a Stable Diffusion model"):
        merge_models(
            [scene.path / "ft1", scene.path / "ft2"],
            base=scene.path / "base",
            method="add_difference",
            blocks="GRAD_V",
        )


def test_block_weights(scene: Scene) -> None:
    """``A + w_block (B - A)``, text encoder apart."""
    names = {
        "model.diffusion_model.input_blocks.0.0.weight": 0.1,
        "model.diffusion_model.middle_block.0.weight": 0.7,
        "model.diffusion_model.output_blocks.11.0.weight": 0.9,
        "cond_stage_model.w.weight": 0.25,
    }
    a = {name: np.full((2, 2), n, F32) for n, name in enumerate(names)}
    b = {name: np.full((2, 2), -4 * n + 2, F32) for n, name in enumerate(names)}
    write(scene.path / "A.safetensors", a)
    write(scene.path / "B.safetensors", b)
    weights = [0.25, 0.1] + [0.5] * 11 + [0.7] + [0.5] * 11 + [0.9]
    op = "block_weights:weights=" + "/".join(map(str, weights))
    arguments = ("merge", "B.safetensors", "-b", "A.safetensors", "-m", "task_arithmetic")
    assert_done(call(*arguments, "--then", op, "-o", "m.safetensors", cwd=scene.path))
    found = read(scene.path / "m.safetensors")
    for name, w in names.items():
        np.testing.assert_allclose(found[name], (1 - w) * a[name] + w * b[name], rtol=1e-6)
    sdxl = "block_weights:weights=GRAD_V,net=sdxl"
    assert_refused(
        call(*arguments, "--then", sdxl, "-o", "x", cwd=scene.path),
        "output_blocks.11.0.weight: sdxl has no block output_blocks.11; choose the other net",
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--include", "nothing_like_it"), ("include: nothing_like_it matches no tensor",)),
        (("--exclude", "class=conv"), ("exclude: class=conv matches no tensor",)),
        (("--exclude", "."), ("leave nothing to merge", "10 tensors, all excluded")),
        (("--include", "["), ("selector '[' is not a regular expression",)),
        (("--where", "class=conv:lam=0"), ("lam: class=conv matches no tensor",)),
        (("--where", "block=7:weight=0"), ("weight: block=7 matches no tensor",)),
        (("--where", "class=norm:lamm=0"), ("no parameter `lamm`", "did you mean 'lam'?")),
        (("--where", "class=norm:density=2"), ("`density` must be a number in (0, 1]", "got 2")),
        (("--where", "norm:lam=0,lam=1"), ("gives 'lam' twice",)),
        (("--where", "class=norm"), ("a rule is written SELECTOR:name=value",)),
        (("-p", "density=0.1..1.5"), ("`density` must be a number in (0, 1]", "got 1.5")),
        (
            ("-p", "density=0.1..0.9"),
            ("trim looks at the whole model at once", "give scope=tensor or scope=row"),
        ),
        (("--include", "norm", "--where", "up_proj:lam=0"), ("lam: up_proj matches no tensor",)),
    ],
)
def test_mistakes(scene: Scene, extra: tuple[str, ...], words: tuple[str, ...]) -> None:
    """One line, exit code 2, nothing written."""
    before = sorted(scene.path.iterdir())
    ran = call("merge", "ft1", "ft2", "-b", "base", "-m", "ties", "-o", "x", *extra, cwd=scene.path)
    assert_refused(ran, *words)
    assert sorted(scene.path.iterdir()) == before


def test_thresholds_count_selected_tensors_alone(scene: Scene) -> None:
    """Also where a full model meets an adapter, which has nothing in most tensors."""
    both = ("merge", "ft1", "lora1", "-b", "base", "-m", "ties", "-p", "density=0.3",
            "--include", r"layers\.1\.mlp\.up_proj.weight")  # fmt: skip
    name = "model.layers.1.mlp.up_proj.weight"
    assert_done(call(*both, "-p", "scope=model", "-o", "model.safetensors", cwd=scene.path))
    assert_done(call(*both, "-p", "scope=tensor", "-o", "tensor.safetensors", cwd=scene.path))
    one, two = read(scene.path / "model.safetensors"), read(scene.path / "tensor.safetensors")
    assert (one[name] != scene.base[name]).mean() < 0.7
    assert one[name].tobytes() == two[name].tobytes()


def test_filters_do_not_move_gradients(scene: Scene) -> None:
    """Depth counts the blocks of the whole adapter, whichever of them are selected."""
    arguments = ("merge", "lora1:1..3", "lora2:0", "-m", "task_arithmetic", "--as", "delta")
    some = ("--include", "block=0")
    assert_done(call(*arguments, "-o", "all.safetensors", cwd=scene.path))
    assert_done(call(*arguments, *some, "-o", "some.safetensors", cwd=scene.path))
    whole, part = read(scene.path / "all.safetensors"), read(scene.path / "some.safetensors")
    assert part
    for name, array in part.items():
        assert array.tobytes() == whole[name].tobytes()


def test_integers_are_filtered_too(scene: Scene) -> None:
    """A buffer that differs does not matter if it is not selected."""
    other = dict(scene.tuned[0], mask_ids=np.arange(3))
    base = dict(scene.base, mask_ids=np.arange(3)[::-1].copy())
    write(scene.path / "other.safetensors", other)
    write(scene.path / "with.safetensors", base)
    arguments = ("merge", "other.safetensors", "-b", "with.safetensors", "-m", "task_arithmetic")
    assert_refused(call(*arguments, "-o", "x", cwd=scene.path), "mask_ids", "must agree")
    assert_done(call(*arguments, "--exclude", "mask", "-o", "y.safetensors", cwd=scene.path))
    assert read(scene.path / "y.safetensors")["mask_ids"].tolist() == [2, 1, 0]


def test_tied_names_are_one_tensor(tmp_path: Path) -> None:
    """Selecting the head selects the embedding that it repeats, and leaving out either both."""
    tied = {"tie_word_embeddings": True}
    for name, value in (("base", 1.0), ("ft", 2.0)):
        embed = np.arange(6, dtype=F32).reshape(3, 2) * value
        arrays = {"model.embed_tokens.weight": embed, "lm_head.weight": embed.copy(),
                  "model.layers.0.w.weight": embed + 1}  # fmt: skip
        save_folder(tmp_path / name, arrays, tied)
    base, ft = (read(tmp_path / name / "model.safetensors") for name in ("base", "ft"))
    arguments = ("merge", "ft", "-b", "base", "-m", "task_arithmetic", "-o", "out", "--force")
    for option, moved in (("--include", True), ("--exclude", False)):
        assert_done(call(*arguments, option, "lm_head", cwd=tmp_path))
        found = read(tmp_path / "out" / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert found[name].tobytes() == (ft if moved else base)[name].tobytes()
        other = "model.layers.0.w.weight"
        assert found[other].tobytes() == (base if moved else ft)[other].tobytes()


def test_block_weights_of_other_models(scene: Scene) -> None:
    """They mean nothing there, and would silently give the base."""
    arguments = ("merge", "ft1", "-b", "base", "-m", "task_arithmetic", "-o", "x")
    ran = call(*arguments, "--then", "block_weights:weights=ALL_B", cwd=scene.path)
    assert_refused(ran, "is no tensor of a Stable Diffusion model", "--where")


def test_names_of_sweeps_stay_in_their_folder(scene: Scene) -> None:
    """Whatever a recipe from elsewhere sweeps over."""
    case = "{cases: [{select: 'layers.0|/../../escaped', value: 0}], else: 0.5}"
    (scene.path / "r.yaml").write_text(
        f"method: task_arithmetic\nbase: base\nparams: {{lam: [{case}, 0.25]}}\nmodels: [ft1]\n"
    )
    before = sorted(path.name for path in scene.path.parent.iterdir())
    assert_done(call("run", "r.yaml", "-o", "swept", cwd=scene.path))
    assert sorted(path.name for path in (scene.path / "swept").iterdir()) == ["lam=0.25", "lam=0.5"]
    assert sorted(path.name for path in scene.path.parent.iterdir()) == before


@pytest.mark.parametrize("text", ["then: 5", "then: true", "ops: 5",
                                  "params: {lam: {cases: [{select: [t], value: 0}]}}"])  # fmt: skip
def test_odd_recipes(scene: Scene, text: str) -> None:
    """Numbers for lists, lists for texts."""
    (scene.path / "odd.yaml").write_text(f"base: base\nmodels: [ft1]\n{text}\n")
    ran = call("run", "odd.yaml", "-o", "x", cwd=scene.path)
    assert ran.code == 2, ran


def test_places_that_no_disk_has(scene: Scene) -> None:
    """A name that is too long is one line."""
    ran = call("merge", "ft1", "-b", "base", "-m", "ties", "-o", "x" * 300, cwd=scene.path)
    assert_refused(ran, "no place that an output can have")


def test_filters_need_a_base(scene: Scene) -> None:
    """Averages of whole models have nowhere to take the other tensors from."""
    ran = call("merge", "ft1", "ft2", "--include", "mlp", "-o", "x", cwd=scene.path)
    assert_refused(ran, "tensors that are not selected come from the base", "add --base")


def test_weights_that_sum_to_zero_somewhere(scene: Scene) -> None:
    """Found before any work, also at a single tensor."""
    where = ("--where", "class=norm:weight=1/-1")
    ran = call("merge", "ft1", "ft2", "-b", "base", *where, "-o", "x", cwd=scene.path)
    assert_refused(ran, "mean: the weights sum to zero")


def test_unselected_sweeps_name_outputs_by_their_value(scene: Scene) -> None:
    """Selectors do not reach the names of folders."""
    rule = ("--where", r"layers\.0/x|norm:lam=0")
    arguments = ("merge", "ft1", "-b", "base", "-m", "task_arithmetic", "-p", "lam=0.5,1", *rule)
    assert_done(call(*arguments, "-o", "swept", cwd=scene.path))
    assert sorted(path.name for path in (scene.path / "swept").iterdir()) == ["lam=0.5", "lam=1"]
