"""Adapters onto diffusion models in either layout, against diffusers' converters and loaders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from diffusers import SD3Transformer2DModel

from mergebench.adapters_zoo.adapter import ReadOptions, read_adapter
from mergebench.adapters_zoo.layouts.view import view_of
from mergebench.core.delta import LowRank
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.core.tensor import Array, ArrayTensor, read_all

from .diffusion import ROOT, arrays, converted, dotted, fused, kohya, model, open_clip
from .support import assert_close, source_of, values_of

NETS = ("sd15", "sdxl", "flux")


def both(name: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """A model in diffusers' layout, and in the original one without its root."""
    own = arrays(model(name).state_dict())
    view = view_of({key: value.shape for key, value in own.items()})
    assert view is not None
    tensors = view.tensors({key: ArrayTensor(value) for key, value in own.items()})
    return own, {key.removeprefix(ROOT): read_all(tensors[key]) for key in view.other}


def rooted(name: str, original: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors of the original layout as checkpoints hold them."""
    return {(key if name == "flux" else ROOT + key): value for key, value in original.items()}


def options(base: Mapping[str, Array]) -> ReadOptions:
    """Reading options that know a base."""
    shapes = {key: value.shape for key, value in base.items()}
    return ReadOptions(base_shapes=shapes, base={k: ArrayTensor(v) for k, v in base.items()})


def moved(base: Mapping[str, Array], stored: Mapping[str, Array]) -> dict[str, Array]:
    """A base with an adapter on top."""
    out = dict(base)
    for key, delta in read_adapter(source_of(stored), options(base)).items():
        out[key] = base[key] + values_of(delta)
    return out


def assert_weights(got: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    """The same names, and the same values to float32's precision."""
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert_close(np.asarray(got[key]), value)


@pytest.mark.parametrize("name", NETS)
def test_names_are_those_that_diffusers_converts(name: str) -> None:
    """Diffusers' converter turns our original layout into the model it came from."""
    own, original = both(name)

    assert_weights(converted(name, rooted(name, original)), own)


#: Modules that trainers adapt, in diffusers' layout and in the original one.
ADAPTED: dict[str, dict[str, str]] = {
    "sd15": {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.attentions.1.proj_in": "input_blocks.2.1.proj_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q":
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_out.0":
            "input_blocks.8.1.transformer_blocks.0.attn2.to_out.0",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj":
            "middle_block.1.transformer_blocks.0.ff.net.0.proj",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k":
            "output_blocks.11.1.transformer_blocks.0.attn2.to_k",
        "up_blocks.3.resnets.1.time_emb_proj": "output_blocks.10.0.emb_layers.1",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
        "down_blocks.2.attentions.1.transformer_blocks.2.attn1.to_v":
            "input_blocks.8.1.transformer_blocks.2.attn1.to_v",
        "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
        "mid_block.attentions.0.transformer_blocks.1.attn2.to_q":
            "middle_block.1.transformer_blocks.1.attn2.to_q",
        "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2":
            "output_blocks.3.1.transformer_blocks.0.ff.net.2",
    },
    "flux": {
        "transformer_blocks.0.norm1.linear": "double_blocks.0.img_mod.lin",
        "transformer_blocks.1.ff_context.net.0.proj": "double_blocks.1.txt_mlp.0",
        "transformer_blocks.1.attn.to_add_out": "double_blocks.1.txt_attn.proj",
        "single_transformer_blocks.2.proj_out": "single_blocks.2.linear2",
        "single_transformer_blocks.0.norm.linear": "single_blocks.0.modulation.lin",
    },
}  # fmt: skip
FUSED = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.qkv", "single_blocks.1.linear1")


def shapes(base: Mapping[str, Array], modules: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Flattened name -> shape of the weight, of modules of a base."""
    return {flat: base[f"{module}.weight"].shape for flat, module in modules.items()}


def flat(module: str) -> str:
    """A module's name as Kohya's trainers write it."""
    return "lora_unet_" + module.replace(".", "_")


def assert_everywhere(name: str, stored: Mapping[str, Array], like: Mapping[str, Array]) -> None:
    """A LoRA moves a model in either layout to what diffusers makes of it with ``like``."""
    own, original = both(name)
    expected = fused(name, like)
    changed = {key for key in own if not np.array_equal(own[key], expected[key])}

    assert len(changed) * 3 >= len(stored), changed
    assert_weights(moved(own, stored), expected)
    assert_weights(converted(name, moved(rooted(name, original), stored)), expected)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("side", ["diffusers", "original"])
def test_kohya_names_of_either_layout(name: str, side: str) -> None:
    """Flattened names of diffusers' modules (SD 1.5) or of the original ones (SDXL, Flux)."""
    _, original = both(name)
    pairs = ADAPTED[name]
    ours = {flat(two): flat(one) for one, two in pairs.items()}
    named = {flat(two): two for two in pairs.values()}
    stored = kohya(shapes(original, named), alphas=(1, 2, 5) if name == "flux" else (2,))
    like = stored
    if name == "sd15":
        # diffusers reads the original names with SDXL's structure in mind only.
        like = {ours[key.partition(".")[0]] + key[key.index(".") :]: v for key, v in stored.items()}
    if side == "diffusers":
        stored = {
            ours[key.partition(".")[0]] + key[key.index(".") :]: v for key, v in stored.items()
        }
    assert_everywhere(name, stored, like)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_names_of_diffusers(name: str, old: bool) -> None:
    """`unet.….lora_A.weight` and `….lora.down.weight`, on either layout."""
    own, _ = both(name)
    named = {flat(one): one for one in ADAPTED[name]}
    component = "transformer" if name == "flux" else "unet"
    full = {key: f"{component}.{one}" for key, one in named.items()}
    stored = dotted(kohya(shapes(own, named)), full, old)
    assert_everywhere(name, stored, stored)


def test_fused_weights_of_flux() -> None:
    """One LoRA on query, key and value together moves all three, and the other way round."""
    _, original = both("flux")
    together = kohya(shapes(original, {flat(module): module for module in FUSED}), alphas=(1, 5))
    assert_everywhere("flux", together, together)

    parts = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    own = both("flux")[0]
    named = {f"x{i}": f"single_transformer_blocks.1.{part}" for i, part in enumerate(parts)}
    apart = dotted(
        kohya(shapes(own, named)), {k: f"transformer.{v}" for k, v in named.items()}, old=False
    )
    assert_everywhere("flux", apart, apart)
    delta = read_adapter(source_of(apart), options(original))["single_blocks.1.linear1.weight"]
    assert isinstance(delta, LowRank)
    assert delta.rank == 12
    assert delta.shape == (56, 8)


def test_parts_of_different_scale() -> None:
    """Query, key and value with an α each, stacked in one weight."""
    own, original = both("flux")
    named = {f"lora_transformer_single_transformer_blocks_1_attn_to_{one}": (8, 8) for one in "qkv"}
    stored = kohya(named, alphas=(1, 5, 2))

    assert_weights(converted("flux", moved(original, stored)), moved(own, stored))
    assert_weights(moved(own, stored), fused("flux", stored))


def test_part_of_a_fused_weight() -> None:
    """A LoRA on the values alone leaves query and key as they are, exactly."""
    own, original = both("flux")
    named = {"x": "transformer_blocks.0.attn.to_v"}
    stored = dotted(
        kohya(shapes(own, named)), {"x": "transformer.transformer_blocks.0.attn.to_v"}, old=False
    )
    ((name, delta),) = read_adapter(source_of(stored), options(original)).items()
    values = values_of(delta)

    assert name == "double_blocks.0.img_attn.qkv.weight"
    assert isinstance(delta, LowRank)
    assert delta.rank == 3
    assert not values[:16].any()
    assert values[16:].any()
    assert_everywhere("flux", stored, stored)


def test_swapped_halves_of_the_last_layer() -> None:
    """Scale and shift of Flux' last layer stand in the other order in diffusers."""
    _, original = both("flux")
    module = "final_layer.adaLN_modulation.1"
    stored = kohya(shapes(original, {flat(module): module}))
    own, _ = both("flux")
    ours = moved(own, stored)["norm_out.linear.weight"] - own["norm_out.linear.weight"]
    theirs = moved(original, stored)[f"{module}.weight"] - original[f"{module}.weight"]

    assert_close(ours, np.concatenate([theirs[8:], theirs[:8]]))
    assert np.abs(ours[:8] - theirs[:8]).max() > 1e-3
    assert_weights(converted("flux", moved(original, stored)), moved(own, stored))


def sdxl_checkpoint() -> dict[str, Array]:
    """U-Net and both text encoders as one file holds them."""
    clip = arrays(model("clip").state_dict())
    first = "conditioner.embedders.0.transformer."
    level = "" if next(iter(clip)).startswith("text_model.") else "text_model."
    vae = {"first_stage_model.encoder.conv_in.weight": np.ones((4, 4, 3, 3))}
    texts = {first + level + key: value for key, value in clip.items()} | open_clip()
    return rooted("sdxl", both("sdxl")[1]) | texts | vae


def test_open_clip_layout() -> None:
    """The test's own checkpoint is one that diffusers converts into the encoder."""
    import torch
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    root = "conditioner.embedders.1.model."
    given = {key: torch.tensor(value) for key, value in open_clip().items()}
    expected = arrays(model("openclip").state_dict())
    assert_weights(arrays(convert_open_clip_checkpoint(model("openclip"), given, root)), expected)


def test_lora_on_all_parts_of_sdxl() -> None:
    """U-Net in original names, two text encoders in those of transformers, one of them fused."""
    base = sdxl_checkpoint()
    layer = "text_model.encoder.layers.1"
    text = [f"{layer}.self_attn.{one}_proj" for one in ("q", "v", "out")] + [f"{layer}.mlp.fc1"]
    sizes = {"mlp.fc1": (12, 8)}
    named = {
        f"lora_{te}_{module.replace('.', '_')}": sizes.get(module[-7:], (8, 8))
        for te in ("te1", "te2")
        for module in text
    }
    unet = [*ADAPTED["sdxl"].values(), "input_blocks.0.0"]
    stored = kohya(named | shapes(both("sdxl")[1], {flat(one): one for one in unet}), alphas=(2, 2))
    got = moved(base, stored)
    te1 = fused("clip", stored, "text_encoder")
    te2 = fused("openclip", stored, "text_encoder_2")
    second = "conditioner.embedders.1.model.transformer.resblocks.1."
    bare = layer.removeprefix("text_model.")
    prefix, other = (
        f"{layer if f'{layer}.mlp.fc1.weight' in net else bare}." for net in (te1, te2)
    )

    root = "conditioner.embedders.0.transformer.text_model.encoder.layers.1."
    for part in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"):
        assert_close(got[f"{root}{part}.weight"], te1[f"{prefix}{part}.weight"])
    qkv = [te2[f"{other}self_attn.{one}_proj.weight"] for one in "qkv"]
    assert_close(got[f"{second}attn.in_proj_weight"], np.concatenate(qkv))
    assert_close(got[f"{second}mlp.c_fc.weight"], te2[f"{other}mlp.fc1.weight"])
    assert_weights(converted("sdxl", got), fused("sdxl", stored))
    changed = {key for key in base if not np.array_equal(base[key], got[key])}
    assert len(changed) == len(unet) + 4 + 3


@pytest.mark.parametrize("kind", ["loha", "dora", "full"])
def test_other_kinds_on_fused_weights(kind: str) -> None:
    """Updates that are no low-rank factors, also those that depend on the weights."""
    own, original = both("flux")
    modules = [f"transformer_blocks.0.attn.to_{one}" for one in "qk"]
    random = np.random.default_rng(1)
    stored: dict[str, Array] = {}
    for module in modules:
        name = "lora_transformer_" + module.replace(".", "_")
        if kind == "full":
            stored[f"{name}.diff"] = random.normal(size=(8, 8))
        elif kind == "loha":
            for role, shape in (("1_a", (8, 2)), ("1_b", (2, 8)), ("2_a", (8, 2)), ("2_b", (2, 8))):
                stored[f"{name}.hada_w{role}"] = random.normal(size=shape)
        else:
            stored |= kohya({name: (8, 8)})
            stored[f"{name}.dora_scale"] = random.normal(size=(8, 1))
    expected = moved(own, stored)
    got = moved(original, stored)

    assert_weights(converted("flux", got), expected)
    changed = {key for key in own if not np.array_equal(own[key], expected[key])}
    assert changed == {f"{module}.weight" for module in modules}


def test_two_updates_of_the_same_rows() -> None:
    """Query, key and value together and the query apart are two updates of one weight."""
    _, original = both("flux")
    stored = kohya(
        {flat("double_blocks.0.img_attn.qkv"): (24, 8),
         "lora_transformer_transformer_blocks_0_attn_to_q": (8, 8)}
    )  # fmt: skip
    with pytest.raises(MismatchError, match=r"same rows of double_blocks\.0\.img_attn\.qkv"):
        read_adapter(source_of(stored), options(original))


def test_other_models_have_one_layout() -> None:
    """Nothing is renamed where no table fits."""
    assert view_of({"model.layers.0.self_attn.q_proj.weight": (2, 2)}) is None
    assert view_of({}) is None


def _sd3() -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of a small Stable Diffusion 3 in diffusers' layout, and some of the single file's."""
    made = SD3Transformer2DModel(
        sample_size=4, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=5, out_channels=4,
        pos_embed_max_size=4,
    )  # fmt: skip
    own = {name: tuple(value.shape) for name, value in made.state_dict().items()}
    block = f"{ROOT}joint_blocks.0."
    single: dict[str, tuple[int, ...]] = {
        f"{ROOT}x_embedder.proj.weight": own["pos_embed.proj.weight"],
        f"{ROOT}context_embedder.weight": own["context_embedder.weight"],
        f"{block}x_block.attn.qkv.weight": (24, 8),
        f"{block}context_block.attn.qkv.weight": (24, 8),
        f"{block}x_block.mlp.fc1.weight": (32, 8),
    }
    return own, single


@pytest.mark.parametrize(
    ("stored", "on_diffusers"),
    [
        ({"transformer_blocks.0.attn.to_q": (8, 8)}, True),
        ({"lora_unet_transformer_blocks_0_attn_to_q": (8, 8)}, True),
        ({f"{ROOT}joint_blocks.0.x_block.attn.qkv": (24, 8)}, False),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv": (24, 8)}, False),
    ],
)
def test_stable_diffusion_3_is_not_mapped(
    stored: dict[str, tuple[int, ...]], on_diffusers: bool
) -> None:
    """An adapter applies to the base whose names it has; on the other one the error says why."""
    own, single = _sd3()
    (module,) = stored
    flat_names = module.startswith("lora_")
    down, up = ("lora_down", "lora_up") if flat_names else ("lora_A", "lora_B")
    (rows, columns) = stored[module]
    source = source_of(
        {f"{module}.{down}.weight": np.ones((2, columns), np.float32),
         f"{module}.{up}.weight": np.ones((rows, 2), np.float32)},
        None if flat_names else {"peft_type": "LORA", "r": 2, "lora_alpha": 2},
    )  # fmt: skip
    fitting, other = (own, single) if on_diffusers else (single, own)
    (name,) = read_adapter(source, ReadOptions(base_shapes=fitting))
    assert fitting[name] == (rows, columns)
    wanted = "transformer of a diffusers folder" if on_diffusers else "single file"
    with pytest.raises(MismatchError, match=f"Stable Diffusion 3 is not mapped.*{wanted}"):
        read_adapter(source, ReadOptions(base_shapes=other))


def test_one_part_of_a_pipeline() -> None:
    """A LoRA for all of a pipeline, on the folder of one of its models."""
    own, _ = both("sd15")
    stored = kohya(
        {flat("conv_in"): (4, 4, 3, 3), "lora_te_text_model_encoder_layers_0_mlp_fc1": (12, 8)}
    )
    given = options(own)
    with pytest.raises(MismatchError, match=r"lora_te_text.*fits no tensor.*--part"):
        read_adapter(source_of(stored), given)
    assert list(read_adapter(source_of(stored), replace(given, part="unet"))) == ["conv_in.weight"]
    with pytest.raises(MismatchError, match="nothing for the text_encoder_2"):
        read_adapter(source_of(stored), replace(given, part="text_encoder_2"))
    with pytest.raises(ParameterError, match="did you mean 'unet'"):
        read_adapter(source_of(stored), replace(given, part="unett"))
