"""Schedules, selectors and rules: values that differ between tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergebench import merge_models
from mergebench.core.errors import ParameterError
from mergebench.core.rules import add_rules, parse_rule, parse_weight
from mergebench.core.schedule import (
    ByName,
    Cases,
    Gradient,
    parse_schedule,
    to_plain,
    value_at,
)
from mergebench.core.selector import Selector
from mergebench.core.site import Site, make_sites
from mergebench.core.unet import unet_block
from mergebench.merge.ops.block_weights import PRESETS, factors_of

SITES = make_sites(
    {
        "embed_tokens.weight": (8, 4),
        **{f"layers.{block}.mlp.up.weight": (4, 4) for block in range(5)},
        "layers.2.norm.weight": (4,),
        "layers.4.mlp.up.bias": (4,),
        "lm_head.weight": (8, 4),
    }
)


@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, -2.0, 5.0), (0.3, 0.1, 0.9, 0.2, 0.7)])
def test_gradients_are_interpolated_over_depth(values: tuple[float, ...]) -> None:
    """As numpy interpolates at block / (L - 1), exactly at the ends."""
    gradient = Gradient(values)
    ends = np.linspace(0, 1, len(values))
    found = [gradient.at(SITES[f"layers.{block}.mlp.up.weight"]) for block in range(5)]
    np.testing.assert_allclose(found, np.interp(np.linspace(0, 1, 5), ends, values), rtol=1e-15)
    assert (found[0], found[-1]) == (values[0], values[-1])
    assert gradient.at(SITES["embed_tokens.weight"]) == gradient.at(SITES["lm_head.weight"])
    assert gradient.at(SITES["lm_head.weight"]) == values[0]
    assert parse_schedule(str(gradient), "lam") == gradient


def test_a_single_block_is_the_last() -> None:
    """A stack of one block has depth 1."""
    (site,) = make_sites({"layers.0.w": (2, 2)}).values()
    assert Gradient((0.25, 0.5, 4.0)).at(site) == 4.0


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("class=norm", ["layers.2.norm.weight"]),
        ("class=bias", ["layers.4.mlp.up.bias"]),
        ("class=embedding", ["embed_tokens.weight"]),
        ("class=head", ["lm_head.weight"]),
        ("block=4", ["layers.4.mlp.up.bias", "layers.4.mlp.up.weight"]),
        ("blocks=1-2", [f"layers.{b}.mlp.up.weight" for b in (1, 2)] + ["layers.2.norm.weight"]),
        (r"^layers\.[03]\.", ["layers.0.mlp.up.weight", "layers.3.mlp.up.weight"]),
        ("x=1", []),
    ],
)
def test_selectors_match(text: str, names: list[str]) -> None:
    """Classes, blocks with both ends, and regular expressions searched in names."""
    found = [name for name, site in SITES.items() if Selector(text).matches(site)]
    assert sorted(found) == sorted(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class=norms", "selector 'class=norms': no class 'norms'; did you mean 'norm'?"),
        ("block=a", ("selector 'block=a', expected block=3, block=3-7, block=before or "
         "block=after")),
        ("", "a selector is empty; give a regular expression or class=norm"),
        ("(", ("selector '(' is not a regular expression, got missing ), unterminated subpattern "
         "at position 0")),
    ],
)  # fmt: skip
def test_what_is_no_selector(text: str, message: str) -> None:
    """The message names the selector and what is wrong with it."""
    with pytest.raises(ParameterError) as caught:
        Selector(text)
    assert str(caught.value) == message


def test_the_first_case_that_matches_wins() -> None:
    """Then the value otherwise."""
    value = parse_schedule(
        {
            "cases": [
                {"select": "class=norm", "value": 0},
                {"select": "layers", "value": "1..3"},
                {"select": "layers.2", "value": 9},
            ],
            "else": 0.5,
        },
        "lam",
    )
    assert value_at(value, SITES["layers.2.norm.weight"]) == 0
    assert value_at(value, SITES["layers.2.mlp.up.weight"]) == 2
    assert value_at(value, SITES["lm_head.weight"]) == 0.5
    assert parse_schedule(to_plain(value), "lam") == value
    assert value_at(7, Site("x", ())) == 7


@pytest.mark.parametrize(
    "data",
    [
        {"cases": []},
        {"cases": [1]},
        {"cases": [{"select": "a"}]},
        {"cases": [{"select": "a", "value": 1, "more": 2}]},
        {"cases": [{"select": "a", "value": [1]}]},
        {"cases": [{"select": "a", "value": {"cases": []}}]},
        {"cases": [{"select": "a", "value": 1}], "otherwise": 2},
        {"else": 1},
        "0..",
        "a..b",
        "0..nan",
        "0..inf",
        "0....1",
    ],
)
def test_what_is_no_schedule(data: Any) -> None:
    """Malformed mappings and gradients are refused by the name of the parameter."""
    with pytest.raises(ParameterError, match="`lam`"):
        parse_schedule(data, "lam")


def test_rules_add_cases() -> None:
    """In their order; weights for every model, or one each; values swept keep their rules."""
    params, weights = add_rules(
        ["class=norm:lambda=0,weight=1/0", "a:b=(c):lam=2", "block=1:weight=0..1"],
        {"lam": ("0.5", 1)},
        [0.3, 0.7],
    )
    norm, text, block = Selector("class=norm"), Selector("a:b=(c)"), Selector("block=1")
    assert params == {
        "lam": (
            Cases(((norm, "0"), (text, "2")), "0.5"),
            Cases(((norm, "0"), (text, "2")), 1),
        )
    }
    slope = Gradient((0.0, 1.0))
    assert weights == [
        Cases(((norm, 1.0), (block, slope)), 0.3),
        Cases(((norm, 0.0), (block, slope)), 0.7),
    ]


@pytest.mark.parametrize(
    "text", ["", "lam=0", "class=norm", "class=norm:", "class=norm:lam", "class=norm:lam=", ":a=1"]
)
def test_what_is_no_rule(text: str) -> None:
    """The message shows how one is written."""
    with pytest.raises(ParameterError, match="a rule is written SELECTOR:name=value"):
        parse_rule(text)


def test_rules_need_a_weight_for_every_model() -> None:
    """Or one for all."""
    with pytest.raises(ParameterError, match="rule for a: 2 weights, expected 1 or 3"):
        add_rules(["a:weight=1/2"], {}, [1.0, 1.0, 1.0])
    with pytest.raises(ParameterError, match="a: `weight` must be a number, got x"):
        add_rules(["a:weight=x"], {}, [1.0])


@pytest.mark.parametrize(
    ("name", "net", "block"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "sd15", 0),
        ("model.diffusion_model.input_blocks.11.0.in_layers.0.weight", "sd15", 11),
        ("model.diffusion_model.middle_block.1.norm.weight", "sd15", 12),
        ("model.diffusion_model.output_blocks.0.0.in_layers.0.weight", "sd15", 13),
        ("model.diffusion_model.output_blocks.11.1.norm.weight", "sd15", 24),
        ("model.diffusion_model.out.2.weight", "sd15", 24),
        ("model.diffusion_model.time_embed.0.weight", "sd15", 0),
        ("model.diffusion_model.label_emb.0.0.weight", "sdxl", 0),
        ("model.diffusion_model.output_blocks.0.0.in_layers.0.weight", "sdxl", 10),
        ("conv_in.weight", "sd15", 0),
        ("down_blocks.0.resnets.0.norm1.weight", "sd15", 1),
        ("down_blocks.0.attentions.1.proj_in.weight", "sd15", 2),
        ("down_blocks.0.downsamplers.0.conv.weight", "sd15", 3),
        ("down_blocks.3.resnets.1.conv1.weight", "sd15", 11),
        ("unet.mid_block.attentions.0.norm.weight", "sd15", 12),
        ("up_blocks.0.upsamplers.0.conv.weight", "sd15", 15),
        ("up_blocks.3.attentions.2.proj_in.weight", "sd15", 24),
        ("up_blocks.2.resnets.2.conv1.weight", "sdxl", 18),
        ("conv_out.bias", "sdxl", 18),
        ("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight", "sd15", None),
        ("first_stage_model.decoder.conv_in.weight", "sd15", None),
        ("first_stage_model.encoder.mid.block_1.norm1.weight", "sdxl", None),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "sdxl", None),
    ],
)
def test_blocks_of_a_unet(name: str, net: Any, block: int | None) -> None:
    """Original and diffusers names, as the checkpoint converters of both pair them."""
    assert unet_block(name, net) == block


def test_block_presets() -> None:
    """The numbers that people paste: 25 for SD 1.5, 19 for SDXL."""
    fall = [1 - n / 12 for n in range(12)]
    for name, expected in {
        "GRAD_V": [*fall, 0.0, *fall[::-1]],
        "GRAD_A": [*(1 - x for x in fall), 1.0, *(1 - x for x in fall[::-1])],
        "FLAT_25": [0.25] * 25,
        "WRAP08": [1.0] * 4 + [0.0] * 17 + [1.0] * 4,
        "WRAP16": [1.0] * 8 + [0.0] * 9 + [1.0] * 8,
        "OUT07": [0.0] * 18 + [1.0] * 7,
        "OUT12": [0.0] * 13 + [1.0] * 12,
    }.items():
        outside, found = factors_of(name, 0.5, "sd15")
        assert outside == 0.5
        np.testing.assert_allclose(found, expected, atol=1e-15)
    step = factors_of("SMOOTHSTEP", 0, "sdxl")[1]
    np.testing.assert_allclose(step[:3] + step[-1:], [0, 3 / 18**2 - 2 / 18**3, 0.0342935528, 1])
    for name in PRESETS:
        assert all(0 <= each <= 1 for each in factors_of(name, 0, "sdxl")[1])
    assert factors_of("0.5/" + "/".join(["1"] * 19), 0, "sdxl") == (0.5, [1.0] * 19)
    with pytest.raises(ParameterError, match="expected 25 finite numbers"):
        factors_of("1/2", 0, "sd15")
    with pytest.raises(ParameterError, match="no preset 'GRAD_B'; did you mean 'GRAD_"):
        factors_of("GRAD_B", 0, "sd15")


def test_numbers_by_name() -> None:
    """A tensor's own number, or what is said of the others; round trip through plain data."""
    value = ByName((("layers.0.mlp.up.weight", 0.25), ("lm_head.weight", -1.0)), 0.5)
    assert value.at(SITES["layers.0.mlp.up.weight"]) == 0.25
    assert value_at(value, SITES["lm_head.weight"]) == -1.0
    assert value.at(SITES["embed_tokens.weight"]) == 0.5
    assert parse_schedule(to_plain(value), "weight") == value
    alone = ByName((("a", 2.0),))
    assert to_plain(alone) == {"by_name": {"a": 2.0}}
    assert parse_weight(to_plain(alone), "a model") == ByName((("a", 2.0),), 1.0)


@pytest.mark.parametrize(
    "data",
    [
        {"by_name": {}},
        {"by_name": [1.0]},
        {"by_name": {"a": "1"}},
        {"by_name": {"a": True}},
        {"by_name": {"a": 1.0}, "cases": []},
        {"by_name": {"a": 1.0}, "else": "x"},
    ],
)
def test_numbers_by_name_are_numbers(data: Any) -> None:
    """Anything else is refused with the name of the parameter."""
    with pytest.raises(ParameterError, match="weight"):
        parse_weight(data, "a model")


def test_numbers_by_name_reach_their_tensors() -> None:
    """In a merge, and a name that no merged tensor has is refused."""
    base = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    tuned = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    weight = {"by_name": {"a": 0.25}, "else": 2.0}
    merged = merge_models([(tuned, weight)], base=base, method="task_arithmetic", lam=1.0)
    np.testing.assert_array_equal(merged["a"], [0.25, 0.25])
    np.testing.assert_array_equal(merged["b"], [2.0, 2.0])
    lam = {"by_name": {"b": 0.5}, "else": 0.0}
    scaled = merge_models([tuned], base=base, method="task_arithmetic", lam=lam)
    assert (scaled["a"].tolist(), scaled["b"].tolist()) == ([0.0, 0.0], [0.5, 0.5])
    with pytest.raises(ParameterError, match="not merged, such as 'aa'"):
        merge_models([(tuned, {"by_name": {"aa": 1.0}})], base=base, method="task_arithmetic")
