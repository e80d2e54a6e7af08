"""Configurations of mergekit as recipes: every key, every level, everything that is refused."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from mergebench.core.errors import FormatError
from mergebench.core.schedule import value_at
from mergebench.core.site import make_sites
from mergebench.merge.method import METHODS
from mergebench.mergekit import Translation, is_mergekit, parse, read_either, translate
from mergebench.mergekit.table import CHATML, PRESET, RULES, reading
from mergebench.mergekit.values import compiled, over_slices
from mergebench.recipe.reading import recipe_from_dict

TWO = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 0.5}}]"


def read(text: str) -> Translation:
    """The translation of a configuration."""
    return translate(parse(dedent(text).strip() + "\n", "m.yml"), METHODS)


def recipe(text: str) -> dict[str, Any]:
    """Its recipe as plain data, which reads back to the same recipe."""
    made = read(text).recipe
    assert recipe_from_dict(made.to_dict()).to_dict() == made.to_dict()
    return made.to_dict()


def assert_refused(text: str, message: str) -> None:
    """One message that begins with the file, and ends as given."""
    with pytest.raises(FormatError) as caught:
        read(text)
    assert str(caught.value) == f"m.yml{message}"


def test_a_plain_configuration() -> None:
    """Models, weights, base, parameters and dtypes."""
    made = read(f"""
        merge_method: ties
        base_model: base
        {TWO}
        parameters: {{density: 0.3, normalize: false, int8_mask: true, lambda: 0.9}}
        dtype: bfloat16
        out_dtype: float16
    """)
    assert made.recipe.to_dict() == {
        "mergebench": 1,
        "method": "ties",
        "params": {"density": 0.3, "lam": 0.9, "divisor": "none"},
        "models": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 0.5}],
        "base": "base",
        "compat": PRESET,
        "dtype": "f16",
    }
    assert made.notes == (
        "int8_mask changes how mergekit stores masks, and nothing here",
        (
            "dtype: bfloat16 is what mergekit computes in; here it is float32 (float64 where an "
            "input is), rounded once"
        ),
    )


def test_levels() -> None:
    """Source before slice before module before whole; filters fall through to the next level."""
    made = recipe("""
        merge_method: task_arithmetic
        base_model: base
        modules:
          default:
            slices:
              - sources:
                  - {model: base, layer_range: [0, 2]}
                  - model: a
                    layer_range: [0, 2]
                    parameters: {weight: [{filter: q_proj, value: 1}, {filter: mlp, value: 2}]}
                parameters: {weight: [{filter: mlp, value: 3}, {filter: k_proj, value: 4}]}
            parameters: {weight: [{filter: o_proj, value: 5}], lambda: 0.5}
        parameters: {weight: 6, lambda: 7}
    """)
    cases = [("q_proj", 1), ("mlp", 2), ("mlp", 3), ("k_proj", 4), ("o_proj", 5)]
    expected = [{"select": name, "value": float(value)} for name, value in cases]
    assert made["models"][0]["weight"] == {"cases": expected, "else": 6.0}
    assert made["params"] == {"lam": 0.5}
    assert made["base"] == "base[0-1]"
    assert made["models"][0]["path"] == "a[0-1]"


def test_gradients_and_filters() -> None:
    """Lists run over the layers; a filter is a part of a name, whatever its characters."""
    made = recipe("""
        merge_method: task_arithmetic
        base_model: base
        models:
          - model: a
            parameters:
              weight:
                - {filter: mlp.up, value: [0, 0.5, 1]}
                - {filter: "*", value: "0.25"}
                - {filter: never, value: 9}
          - {model: b, parameters: {weight: [2]}}
          - {model: c, parameters: {weight: [{filter: class=norm, value: 1}, {value: 0}]}}
        parameters: {lambda: [0.5, 1], normalize: [{filter: norm, value: true}, {value: false}]}
    """)
    assert [each["weight"] for each in made["models"]] == [
        {"cases": [{"select": r"mlp\.up", "value": "0..0.5..1"}], "else": 0.25},
        2.0,
        {"cases": [{"select": "(?:class=norm)", "value": 1.0}], "else": 0.0},
    ]
    assert made["params"] == {
        "lam": "0.5..1",
        "normalize": {"cases": [{"select": "norm", "value": True}], "else": False},
    }


def test_parameters_of_single_models() -> None:
    """A density that all share is a parameter of the merge; others stay with their models."""
    text = """
        merge_method: breadcrumbs
        base_model: base
        models:
          - {{model: a, parameters: {{weight: 1, density: 0.5, gamma: {0}}}}}
          - {{model: base}}
          - {{model: b, parameters: {{weight: 1, density: 0.5}}}}
        parameters: {{gamma: 0.1}}
    """
    made = recipe(text.format("[0.1, 0.2]"))
    assert made["params"] == {"density": 0.5}
    assert [each.get("params") for each in made["models"]] == [
        {"gamma": "0.1..0.2"},
        {"gamma": 0.1},
    ]
    made = recipe(text.format(0.1))
    assert made["params"] == {"density": 0.5, "gamma": 0.1}
    assert [each.get("params") for each in made["models"]] == [None, None]


def test_slices() -> None:
    """Blocks of one model that follow each other are one; values follow the slices."""
    made = read("""
        merge_method: linear
        slices:
          - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [1, 4]}]
            parameters: {weight: [0, 1]}
          - sources:
              - {model: a, layer_range: [3, 4]}
              - {model: c, layer_range: [0, 1], parameters: {weight: [{filter: mlp, value: 7}]}}
        parameters: {weight: [5, 6]}
    """).recipe
    assert [each.path for each in made.models] == ["a[0-3]", "b[1-3],c[0-0]"]
    names = [f"layers.{i}.{part}.w" for i in range(4) for part in ("mlp", "attn")]
    sites = make_sites(dict.fromkeys([*names, "embed.w", "norm.w", "lm_head.w"], (2, 2)))
    first, second = (
        {name: value_at(each.weight, site) for name, site in sites.items()} for each in made.models
    )
    assert [first[f"layers.{i}.mlp.w"] for i in range(4)] == [0, 0.5, 1, 6]
    assert [second[f"layers.{i}.mlp.w"] for i in range(4)] == [0, 0.5, 1, 7]
    assert [second[f"layers.{i}.attn.w"] for i in range(4)] == [0, 0.5, 1, 6]
    outside = ("embed.w", "norm.w", "lm_head.w")
    assert [first[name] for name in outside] == [0, 5, 5]
    assert [second[name] for name in outside] == [0, 5, 5]


def test_parameters_missing_from_some_slices() -> None:
    """They have mergekit's default there."""
    made = recipe("""
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 2], parameters: {scale: 3}}]
          - sources: [{model: a, layer_range: [1, 3]}]
    """)
    assert made["params"]["scale"] == {
        "cases": [
            {"select": "block=0-1", "value": 3.0},
            {"select": "block=2-3", "value": 1.0},
            {"select": "block=after", "value": 1.0},
        ],
        "else": 3.0,
    }
    assert made["models"] == [{"path": "a[0-1],a[1-2]", "weight": 1.0}]


def test_slerp_counts_from_its_base() -> None:
    """The base has weight 1 - t, wherever it stands."""
    for models in ("[{model: a}]", "[{model: a}, {model: base}]", "[{model: base}, {model: a}]"):
        made = recipe(f"""
            merge_method: slerp
            base_model: base
            models: {models}
            parameters: {{t: [{{filter: mlp, value: [0, 1]}}, {{value: 0.25}}]}}
        """)
        assert "base" not in made
        assert made["models"] == [
            {
                "path": "base",
                "weight": {"cases": [{"select": "mlp", "value": "1..0"}], "else": 0.75},
            },
            {"path": "a", "weight": {"cases": [{"select": "mlp", "value": "0..1"}], "else": 0.25}},
        ]


def test_a_base_among_the_models() -> None:
    """In a mean of weights it is an input; it comes first and so decides on the config."""
    text = "merge_method: linear\nbase_model: base\nmodels: {}\nparameters: {{weight: 2}}"
    for models in ("[{model: a}]", "[{model: a}, {model: base}]"):
        made = recipe(text.format(models))
        assert made["models"] == [{"path": "base", "weight": 2.0}, {"path": "a", "weight": 2.0}]
    made = recipe("merge_method: karcher\nbase_model: b\nmodels: [{model: a}]")
    assert [each["path"] for each in made["models"]] == ["b", "a"]
    notes = read("""
        merge_method: passthrough
        base_model: base
        slices: [{sources: [{model: a, layer_range: [0, 2]}]}]
    """).notes
    assert notes == (
        (
            "base_model base is no source of every slice and takes no part; config and tokenizer "
            "are those of the first source"
        ),
    )


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("nuslerp", "{nuslerp_flatten: false}", {"scope": "row"}),
        ("nuslerp", "{nuslerp_flatten: true, nuslerp_row_wise: false}", {"scope": "tensor"}),
        ("multislerp", "{normalize_weights: false, eps: 1e-8}", {"normalize": False}),
        ("linear", "{normalize: false}", {"normalize": False}),
        ("task_arithmetic", "{normalize: true}", {"normalize": True}),
        ("ties", "{normalize: true}", {"divisor": "weights"}),
        ("model_stock", "{filter_wise: true}", {"scope": "row"}),
        ("sce", "{select_topk: 0.1}", {"select_topk": 0.1}),
        ("ram", "{epsilon: 0.5}", {"epsilon": 0.5}),
        ("ramplus_tl", "{r: 0.5, alpha: 0.25}", {"r": 0.5, "alpha": 0.25}),
        ("karcher", "{max_iter: 3, tol: 0.5}", {"max_iter": 3, "tol": 0.5}),
    ],
)
def test_parameters_by_name(method: str, given: str, expected: dict[str, Any]) -> None:
    """Ours for mergekit's, and ours accept the values."""
    weighted = RULES[method].weighted
    own = "{weight: 1}" if weighted else "{}"
    base = "base_model: base" if RULES[method].base in ("required", "optional") else ""
    made = read(f"""
        merge_method: {method}
        {base}
        models: [{{model: a, parameters: {own}}}, {{model: b, parameters: {own}}}]
        parameters: {given}
    """).recipe
    assert dict(made.params) == expected
    METHODS[method].expand(made.params, made.compat)


def test_every_method_of_the_table_that_there_is() -> None:
    """Each has the preset, and each of its parameters a counterpart."""
    there = [name for name in RULES if name in METHODS]
    assert len(there) >= 14
    for name in there:
        assert PRESET in METHODS[name].compat, name
        for parameter in {*RULES[name].names} - {"weight"}:
            if (name, parameter) != ("slerp", "t"):
                assert reading(parameter, METHODS[name]) is not None, (name, parameter)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("tokenizer_source: union", ("pad", None)),
        ("tokenizer_source: base", ("base", None)),
        ("tokenizer_source: base_dir", ("base", None)),
        ("tokenizer: {source: union}", ("pad", None)),
        ("tokenizer: {}", ("pad", None)),
        ("tokenizer: {source: base, tokens: {}}", ("base", None)),
        ("chat_template: auto", ("error", "auto")),
        ("chat_template: chatml", ("error", CHATML)),
        ("chat_template: '{{ messages }}'", ("error", "{{ messages }}")),
    ],
)
def test_tokenizers_and_templates(written: str, expected: tuple[str, str | None]) -> None:
    """The vocabulary of the output and its chat template."""
    made = read(f"merge_method: ties\nbase_model: base_dir\n{TWO}\n{written}").recipe
    assert (made.vocab, made.chat_template) == expected


def test_chatml() -> None:
    """What the template makes of a conversation."""
    from jinja2 import Template

    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    plain = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
    assert Template(CHATML, keep_trailing_newline=True).render(messages=messages) == plain
    asked = Template(CHATML, keep_trailing_newline=True).render(
        messages=messages, add_generation_prompt=True
    )
    assert asked == plain + "<|im_start|>assistant\n"


def test_references() -> None:
    """Paths, adapters on models, and both written out."""
    made = recipe("""
        merge_method: linear
        models:
          - model: a+lora
          - model: {model: {path: b}, lora: {path: l}}
          - model: {model: c}
        parameters: {weight: 1}
    """)
    assert [each["path"] for each in made["models"]] == ["a+lora", "b+l", "c"]


def test_options_of_the_command_line() -> None:
    """Those that change no value are noted."""
    made = read(
        f"merge_method: linear\n{TWO}\nlazy_unpickle: true\nallow_crimes: true\ncuda: false"
    )
    assert [note.split()[0] for note in made.notes] == ["lazy_unpickle", "allow_crimes"]


#: Configurations and the message that each is refused with, which begins with the file's name.
REFUSALS = [
    block.strip("\n").split("\n=> ")
    for block in Path(__file__).with_name("mergekit_refusals.txt").read_text().split("\n\n")
]


@pytest.mark.parametrize(("text", "message"), REFUSALS)
def test_what_is_refused(text: str, message: str) -> None:
    """Each with its line, its key and what to do."""
    assert_refused(text, message.rstrip())


def test_methods_that_are_missing_are_named() -> None:
    """The table is held against what is registered."""
    document = parse(f"merge_method: ties\nbase_model: x\n{TWO}", "m.yml")
    for methods in ({}, {"ties": METHODS["linear"]}):
        with pytest.raises(FormatError) as caught:
            translate(document, {name: m for name, m in methods.items() if name != "ties"})
        assert str(caught.value) == (
            "m.yml, line 1: merge_method: ties is not offered as mergekit computes it"
        )


def test_detection(tmp_path: Path) -> None:
    """By keys that only one of the two has; errors in files of either kind name the file."""
    assert is_mergekit({"merge_method": "ties"})
    assert is_mergekit({"base_model": "x", "models": []})
    for other in ({"models": []}, {"method": "x", "slices": []}, {"mergebench": 1}, None, []):
        assert not is_mergekit(other)
    path = tmp_path / "r.yml"
    path.write_text("mergebench: 1\nmodels: [a]\n")
    assert read_either(path, METHODS) == Translation(recipe_from_dict({"models": ["a"]}))
    for text, words in (("a: [", "not YAML or JSON"), ("a: 1\n---\nb: 2", "not YAML")):
        path.write_text(text)
        with pytest.raises(FormatError, match=words):
            read_either(path, METHODS)
    with pytest.raises(FormatError, match="no such recipe"):
        read_either(tmp_path / "none.yml", METHODS)


def test_values_without_slopes_stay_plain() -> None:
    """One value for all slices is that value."""
    document = parse("{}", "m.yml")
    value = compiled(
        document, [(("x",), [{"filter": "a", "value": 1}, {"value": 2}])], lambda p, v: v
    )
    assert over_slices([value, value], [2, 3]) == value
    assert over_slices([3.0, 3.0], [2, 3]) == 3.0
