"""Recipes: data that survives YAML and JSON, and errors for anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.core.errors import FormatError, ParameterError
from mergebench.recipe import DTYPES, FORMS, ModelRef, Recipe
from mergebench.recipe.reading import read_recipe, recipe_from_dict
from mergebench.steps import OpRef, parse_assignment, parse_op

# Anything that can stand in a UTF-8 file: surrogates cannot, and PyYAML folds the line separator
# of EBCDIC into a space.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=12)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
NUMBERS = st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.booleans() | NUMBERS | TEXT
OPS = st.lists(st.builds(OpRef, NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)
SEVERAL = st.lists(VALUES, min_size=1, max_size=3).map(tuple)
MODELS = st.lists(
    st.builds(ModelRef, TEXT, NUMBERS.map(float)), min_size=1, max_size=3
).map(tuple)  # fmt: skip


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Recipes of a method or of a chain written out."""
    what: dict[str, Any] = {"ops": tuple(draw(OPS))}
    if what["ops"]:
        what["method"] = ""
    else:
        what["method"] = draw(NAMES)
        what["params"] = draw(st.dictionaries(NAMES, VALUES | SEVERAL, max_size=3))
    text = st.none() | TEXT
    return Recipe(
        models=draw(MODELS),
        then=tuple(draw(OPS)),
        base=draw(text),
        compat=draw(text),
        dtype=draw(st.sampled_from(DTYPES)),
        form=draw(st.sampled_from(FORMS)),
        shard_size=draw(text),
        lora_alpha=draw(st.none() | NUMBERS.map(float)),
        ignore_saved_base=draw(st.booleans()),
        out=draw(text),
        **what,
    )


@given(recipe=recipes())
@settings(max_examples=150, deadline=None)
def test_yaml_and_json_bring_it_back(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Written as YAML or as JSON a recipe reads back equal, types included."""
    folder = tmp_path_factory.getbasetemp()
    path = folder / "recipe.yaml"
    path.write_bytes(recipe.to_yaml().encode())
    assert repr(read_recipe(path)) == repr(recipe)
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
    assert repr(read_recipe(path)) == repr(recipe)
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_defaults_are_left_out() -> None:
    """Only what differs from the defaults is written."""
    recipe = Recipe((ModelRef("a"), ModelRef("b", 0.5)), form="delta", params={"lam": (0.1, 0.2)})
    assert recipe.to_dict() == {
        "mergebench": 1,
        "method": "linear",
        "params": {"lam": [0.1, 0.2]},
        "models": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 0.5}],
        "as": "delta",
    }


def test_a_recipe_as_a_person_writes_it(tmp_path: Path) -> None:
    """Short forms of models and ops mean their long ones."""
    path = tmp_path / "r.yml"
    path.write_text(
        "method: ties\nparams: {density: 0.3}\nbase: p\nmodels:\n- a\n- {path: b, weight: 2}\n"
        "then: scale:lam=0.5\n"
    )
    assert read_recipe(path) == Recipe(
        (ModelRef("a"), ModelRef("b", 2.0)),
        "ties",
        {"density": 0.3},
        then=(OpRef("scale", {"lam": "0.5"}),),
        base="p",
    )
    path.write_text("ops:\n- trim: {density: 0.1}\n- sum\nmodels: [a]\n")
    expected = (OpRef("trim", {"density": 0.1}), OpRef("sum"))
    assert read_recipe(path).ops == expected
    assert read_recipe(path).method == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "{}: a recipe is a mapping, got list"),
        ("metod: ties\nmodels: [a]", "{}: unknown key 'metod'; did you mean 'method'?"),
        ("models: [a]\nparms: {}", "{}: unknown key 'parms'; did you mean 'params'?"),
        ("mergebench: 2\nmodels: [a]", "{}: recipe version, expected 1, got 2"),
        ("ops: [sum]\nmethod: ties\nmodels: [a]",
         "{}: has both `method` and `ops`; keep one of them"),
        ("method: ties", "{}: `models` must be a list of references, got None"),
        ("models: a", "{}: `models` must be a list of references, got 'a'"),
        ("models: []", "{}: `models` must be a list of references, got []"),
        ("models: [3]", "{}: a model is a path or `{{path, weight}}`, got 3"),
        ("models: [{path: a, wieght: 1}]",
         "{}: unknown key 'wieght' of a model; did you mean 'weight'?"),
        ("models: [{path: a, weight: heavy}]", "{}: a: `weight` must be a number, got heavy"),
        ("models: [a]\nparams: [1]", "{}: `params` must be a mapping, got [1]"),
        ("models: [a]\ndtype: f8",
         "{}: `dtype`, expected one of keep, bf16, f16, f32, f64, got 'f8'"),
        ("models: [a]\nas: adapter",
         "{}: `as`, expected one of auto, model, lora, delta, got 'adapter'"),
        ("models: [a]\nignore_saved_base: 1",
         "{}: `ignore_saved_base` must be true or false, got 1"),
        ("models: [a]\nlora_alpha: true", "{}: `lora_alpha` must be a number, got True"),
        ("models: [a]\nbase: [b]", "{}: `base` must be text, got ['b']"),
        ("models: [a]\nbase: true", "{}: `base` must be text, got True"),
        ("models: [a]\nthen: [3]",
         "{}: `then`: an op is a name or `name: {{parameter: value}}`, got 3"),
    ],
)  # fmt: skip
def test_what_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    """Anything unexpected is refused with the file, the key, and the nearest known one."""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        read_recipe(path)
    assert str(caught.value) == message.format(path)


@pytest.mark.parametrize(
    "text", ["models: [a]\nthen: [2020-01-01]", "models: [a]\nops: [!!set {b}]"]
)
def test_types_of_yaml_alone_are_refused(text: str, tmp_path: Path) -> None:
    """Dates and sets, which JSON does not have."""
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(FormatError, match="which is no plain value"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_weights_are_finite(number: str, tmp_path: Path) -> None:
    """A weight that is no finite number is refused."""
    (tmp_path / "r.yaml").write_text(f"models: [{{path: a, weight: {number}}}]")
    with pytest.raises(FormatError, match="weight"):
        read_recipe(tmp_path / "r.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing files, broken YAML and other bytes are errors that name the file."""
    with pytest.raises(FormatError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml")
    path = tmp_path / "r.yaml"
    for content in (b"models: [a", b"\xff\xfe\x00", b"a: b: c"):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"r\.yaml: not YAML or JSON"):
            read_recipe(path)


def test_variants() -> None:
    """Lists of values give one recipe per combination, labelled by what differs."""
    recipe = Recipe((ModelRef("a"),), "ties", {"lam": (0.5, 1.0), "density": 0.2, "tie": ("plus",)})
    found = list(recipe.variants())
    assert [label for label, _ in found] == ["lam=0.5,tie=plus", "lam=1.0,tie=plus"]
    assert [dict(each.params) for _, each in found] == [
        {"lam": 0.5, "density": 0.2, "tie": "plus"},
        {"lam": 1.0, "density": 0.2, "tie": "plus"},
    ]
    assert [label for label, _ in Recipe((ModelRef("a"),)).variants()] == [""]


def test_ops_and_assignments_as_typed() -> None:
    """`name:k=v,k=v` and `k=v`, and what is not so."""
    assert parse_op("scale") == OpRef("scale")
    assert parse_op("trim:density=0.2, scope=row") == OpRef(
        "trim", {"density": "0.2", "scope": "row"}
    )
    assert parse_assignment("a = b=c") == ("a", "b=c")
    for text in ("a", "=b", ""):
        with pytest.raises(ParameterError, match="a parameter is written name=value"):
            parse_assignment(text)
    with pytest.raises(ParameterError):
        parse_op("scale:0.5")


def test_yaml_keeps_the_order_of_keys() -> None:
    """The text begins with the version and the method, for whoever reads it."""
    text = Recipe((ModelRef("ä"),), "ties", {"lam": 0.5}, base="p").to_yaml()
    assert list(yaml.safe_load(text)) == ["mergebench", "method", "params", "models", "base"]
    assert "ä" in text
