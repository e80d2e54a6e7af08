"""Blocks of several models on top of each other, as an input like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench import merge_models
from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.stacking import Slice, parse_slices, stack
from mergebench.core.errors import MismatchError
from mergebench.core.selector import Selector
from mergebench.core.site import make_sites, stands_before
from mergebench.core.tensor import ArrayTensor
from tests.helpers.files import F32, Array, read, tree, write
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene
from tests.outputs.test_transformers import INPUT, llama, tied_llama

BLOCKS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def stacked(models: list[dict[str, Array]], blocks: list[tuple[int, int]]) -> dict[str, Array]:
    """Blocks ``(model, block)`` bottom up; the embedding of the first, the rest of the last."""
    found = {name: a for name, a in models[blocks[0][0]].items() if "embed" in name}
    for place, (model, block) in enumerate(blocks):
        for name, array in models[model].items():
            if name.startswith(f"model.layers.{block}."):
                found[name.replace(f".{block}.", f".{place}.", 1)] = array
    last = models[blocks[-1][0]].items()
    return found | {n: a for n, a in last if "layers" not in n and "embed" not in n}


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Equal names and bytes."""
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name


def test_the_comparison_can_fail(scene: Scene) -> None:
    """Two blocks in the other order are noticed."""
    models = list(scene.tuned)
    with pytest.raises(AssertionError):
        assert_same(stacked(models, BLOCKS), stacked(models, BLOCKS[:2] + BLOCKS[:1:-1]))


def test_blocks_are_stacked_bit_for_bit(scene: Scene) -> None:
    """A frankenmerge: every tensor is that of its block, and the config counts the blocks."""
    done = call("merge", "ft1[0-1],ft2[0-1]", "-m", "passthrough", "-o", "tall", cwd=scene.path)
    assert_done(done)
    assert_same(read(scene.path / "tall"), stacked(list(scene.tuned), BLOCKS))


def test_a_whole_model_in_slices_is_itself(scene: Scene) -> None:
    """All blocks in their order, from one slice or two."""
    for reference in ("ft1[0-1]", "ft1[0-0],ft1[1-1]"):
        found = merge_models([str(scene.path / reference.replace(",", f",{scene.path}/"))])
        assert_same(found, scene.tuned[0])


def test_the_stored_recipe_gives_the_same_bytes(scene: Scene) -> None:
    """The recipe of an output names the blocks; `slices` is another way to write them."""
    args = ("ft1[0-1],ft2[1-1]", "ft2[0-0],ft1[0-1]", "-m", "linear", "-o", "one")
    assert_done(call("merge", *args, cwd=scene.path))
    assert_done(call("run", "one", "-o", "two", cwd=scene.path))
    written = """
    method: linear
    models:
      - slices: [{path: ft1, blocks: 0-1}, {path: ft2, blocks: 1}]
      - {slices: [{path: ft2, blocks: 0}, {path: ft1, blocks: 0-1}], weight: 1.0}
    """
    (scene.path / "own.yaml").write_text(written)
    assert_done(call("run", "own.yaml", "-o", "three", cwd=scene.path))
    one = tree(scene.path / "one")
    for other in ("two", "three"):
        found = tree(scene.path / other)
        assert found["model.safetensors"] == one["model.safetensors"]
        assert found["mergebench_recipe.yaml"] == one["mergebench_recipe.yaml"]


def test_outputs_are_verified(scene: Scene) -> None:
    """Manifests name the models that blocks come from, also where those lie elsewhere now."""
    args = ("ft1[0-1],ft2[1-1]", "ft2[0-0],ft1[0-1]", "-m", "linear", "-o", "out")
    assert_done(call("merge", *args, cwd=scene.path))
    assert_done(call("verify", "out", "--replay", "all", cwd=scene.path))
    (scene.path / "away").mkdir()
    args = ("verify", "../out", "--inputs", "..", "--replay", "all")
    assert "13 of 13" in assert_done(call(*args, cwd=scene.path / "away")).out
    changed = {**scene.tuned[1], "model.norm.weight": scene.tuned[0]["model.norm.weight"]}
    write(scene.path / "ft2" / "model.safetensors", changed, {"format": "pt"})
    ran = call("verify", "out", cwd=scene.path)
    assert ran.code == 1
    assert "is not the input that was merged" in ran.out


def test_task_vectors_against_a_stacked_base(scene: Scene) -> None:
    """Base and model in the same blocks: the difference is taken block by block."""
    args = ("ft1[0-1],ft2[0-1]:0.5", "--base", "base[0-1],base[0-1]", "-m", "task_arithmetic")
    assert_done(call("merge", *args, "-o", "out", cwd=scene.path))
    base = stacked([scene.base, scene.base], BLOCKS)
    tuned = stacked(list(scene.tuned), BLOCKS)
    for name, array in read(scene.path / "out").items():
        if array.dtype == F32:
            middle = (base[name].astype(np.float64) + tuned[name]) / 2
            np.testing.assert_allclose(array, middle, rtol=0, atol=1e-6, err_msg=name)


def test_blocks_of_a_model_with_an_adapter(scene: Scene) -> None:
    """The adapter's updates move along with their blocks."""
    reference = "base+lora1[1-1],base[0-1]"
    assert_done(call("merge", reference, "-m", "passthrough", "-o", "out", cwd=scene.path))
    update = scene.updates[0]
    found = read(scene.path / "out")
    for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
        below = scene.base[f"model.layers.1.{name}"] + update[f"model.layers.1.{name}"]
        np.testing.assert_allclose(found[f"model.layers.0.{name}"], below, atol=1e-5)
        above = scene.base[f"model.layers.1.{name}"]
        assert found[f"model.layers.2.{name}"].tobytes() == above.tobytes()


@pytest.mark.parametrize("build", [llama, tied_llama])
def test_transformers_computes_the_stack(tmp_path: Path, build: Any) -> None:
    """The folder loads, and gives the logits of a model with these very layers."""
    one, two = build(1), build(2)
    for name, model in (("one", one), ("two", two)):
        model.save_pretrained(tmp_path / name)
    reference = "one[0-1],two[0-1],one[1-1]"
    assert_done(call("merge", reference, "-m", "passthrough", "-o", "tall", cwd=tmp_path))
    tall, report = type(one).from_pretrained(tmp_path / "tall", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert tall.config.num_hidden_layers == 5
    layers = [*one.model.layers, *two.model.layers, one.model.layers[1]]
    with torch.no_grad():
        rotary = one.model.rotary_emb(INPUT[..., None].float(), torch.arange(12)[None])
        hidden = one.model.embed_tokens(INPUT)
        mask = torch.full((12, 12), float("-inf")).triu(1)[None, None]
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        expected = one.lm_head(one.model.norm(hidden))
        torch.testing.assert_close(tall.eval()(INPUT).logits, expected, atol=1e-5, rtol=1e-4)


def part(label: str, blocks: int, config: dict[str, Any] | None = None, width: int = 2) -> Any:
    """A checkpoint in memory."""
    names = [
        "model.embed.weight",
        *(f"model.layers.{i}.mlp.weight" for i in range(blocks)),
        "model.norm.weight",
    ]
    tensors = {name: ArrayTensor(np.full((width, 2), i, F32)) for i, name in enumerate(names)}
    return Checkpoint(label, Path(label), tensors, {}, config)


def test_configs_follow_their_blocks() -> None:
    """Numbers of layers, lists by layer and lists of layers; other values stay."""
    one = part("one", 3, {
        "num_hidden_layers": 3, "max_window_layers": 3, "vocab_size": 3, "eos_token_id": [1, 2, 3],
        "layer_types": ["a", "b", "c"], "mlp_only_layers": [1], "first_k_dense_replace": 1,
        "text_config": {"n_layer": 3, "no_rope_layers": [1, 0, 1]},
    })  # fmt: skip
    two = part("two", 2, {
        "num_hidden_layers": 2, "layer_types": ["x", "y"], "mlp_only_layers": [],
        "first_k_dense_replace": 0, "text_config": {"n_layer": 2, "no_rope_layers": [5, 6]},
    })  # fmt: skip
    slices = [Slice("one", 0, 1), Slice("two", 1, 1), Slice("one", 1, 2)]
    made = stack("tall", slices, [one, two, one]).checkpoint
    assert made.config == {
        "num_hidden_layers": 5, "max_window_layers": 5, "vocab_size": 3, "eos_token_id": [1, 2, 3],
        "layer_types": ["a", "b", "y", "b", "c"], "mlp_only_layers": [1, 3],
        "first_k_dense_replace": 1,
        "text_config": {"n_layer": 5, "no_rope_layers": [1, 0, 6, 0, 1]},
    }  # fmt: skip
    assert made.config_changed
    assert next(iter(made.tensors)) == "model.embed.weight"
    assert made.tensors["model.layers.2.mlp.weight"] is two.tensors["model.layers.1.mlp.weight"]


@pytest.mark.parametrize(
    ("config", "slices", "message"),
    [
        (
            {"first_k_dense_replace": 1},
            [("one", 1, 2), ("one", 0, 0)],
            "dense blocks above blocks of experts",
        ),
        ({"layer_scales": [0.5, 1.5]}, [("one", 0, 1)], "'layer_scales' says something"),
        ({}, [("one", 2, 3)], "one[2-3]: one has no block 3, expected 0 to 2"),
    ],
)
def test_what_cannot_be_stacked(
    config: dict[str, Any], slices: list[tuple[str, int, int]], message: str
) -> None:
    """Refused by name."""
    one = part("one", 3, config)
    with pytest.raises(MismatchError) as caught:
        stack("tall", [Slice(*each) for each in slices], [one] * len(slices))
    assert message in str(caught.value)


def test_models_that_do_not_fit(scene: Scene) -> None:
    """Another width, another architecture, several stacks, ties on one side, no model at all."""
    path = scene.path
    wide = {n: np.zeros((24, 24) if a.ndim == 2 else a.shape, F32) for n, a in scene.base.items()}
    save_folder(path / "wide", wide)
    other = {f"{n[:-6]}extra" if "layers" in n else n: a for n, a in scene.base.items()}
    save_folder(path / "other", other)
    double = {**scene.base, "vision.layers.0.w": np.zeros((2, 2), F32)}
    write(path / "double.safetensors", double)
    save_folder(path / "tied", scene.base, {"tie_word_embeddings": False})
    head = {n: a for n, a in scene.base.items() if n != "lm_head.weight"}
    save_folder(path / "headless", head, {"tie_word_embeddings": True})
    for reference, *words in (
        ("base[0-1],wide[0-1]", "model.layers.0.self_attn.q_proj.weight: (24, 24) in wide"),
        ("base[0-1],other[0-1]", "the blocks of base have no such tensor"),
        ("double.safetensors[0-1]", "one stack of them, got model.layers, vision.layers"),
        ("tied[0-1],headless[0-1]", "one ties its head to the embeddings"),
        ("lora1[0-1]", "is an adapter", "base+lora1[0-1]"),
        ("base[1-0]", "the last block comes before the first"),
        ("base[0-1],nothing[0-1]", "nothing: no such file or folder"),
    ):
        ran = call("merge", reference, "-m", "passthrough", "-o", "out", cwd=path)
        assert_refused(ran, *words)
        assert not (path / "out").exists()


def test_outputs_in_an_input_are_refused(scene: Scene) -> None:
    """Blocks of a model are read from its files."""
    before = tree(scene.path / "ft1")
    ran = call("merge", "ft2[0-1],ft1[0-1]", "-m", "passthrough", "-o", "ft1", "-f", cwd=scene.path)
    assert_refused(ran, "would replace or lie inside the input")
    assert tree(scene.path / "ft1") == before


def test_references() -> None:
    """Every part has blocks, or it is no such reference."""
    assert parse_slices("a[0-3]") == (Slice("a", 0, 3),)
    assert parse_slices("a,b[0-3],c[1-1]") == (Slice("a,b", 0, 3), Slice("c", 1, 1))
    for other in ("a", "a[0]", "a[0-3],b", "[0-3]", "a[0-3]+b"):
        assert parse_slices(other) == ()


def test_a_folder_of_that_name_wins(scene: Scene) -> None:
    """A path that exists is that path."""
    save_folder(scene.path / "ft1[0-0]", scene.base)
    found = merge_models([str(scene.path / "ft1[0-0]")])
    assert_same(found, scene.base)


def test_before_and_after_the_blocks(scene: Scene) -> None:
    """Selectors for what stands outside of the blocks."""
    sites = make_sites({name: array.shape for name, array in scene.base.items()})
    for text, names in (
        ("block=before", ["model.embed_tokens.weight"]),
        ("block=after", ["lm_head.weight", "model.norm.weight", "model.position_ids"]),
    ):
        assert sorted(n for n, s in sites.items() if Selector(text).matches(s)) == names
    for name in ("embeddings.LayerNorm.bias", "wte.weight", "shared.weight", "ln_pre.weight"):
        assert stands_before(name), name
    for name in ("embed_out.weight", "ln_f.weight", "lm_head.bias", "score.weight"):
        assert not stands_before(name), name


def test_tokenizer_and_config_are_the_first_models(scene: Scene) -> None:
    """Side files come from the model at the bottom."""
    args = ("base[0-1],ft1[1-1]", "-m", "passthrough", "-o", "out")
    assert_done(call("merge", *args, cwd=scene.path))
    assert (scene.path / "out/tokenizer.json").read_bytes() == (
        scene.path / "base/tokenizer.json"
    ).read_bytes()
    assert json.loads((scene.path / "out/config.json").read_text())["model_type"] == "toy"
