"""Plain data of strangers: what is read, and what is refused before it does harm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.plain import DEPTH, JSON_VALUES, VALUES, YAML, parse_json, parse_yaml
from mergebench.recipe import MOST, ModelRef
from mergebench.recipe.reading import LARGEST, read_recipe

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=12),
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(data=PLAIN)
def test_plain_data_are_read_as_pyyaml_reads_them(data: object) -> None:
    """The limits cost nothing that a recipe may hold."""
    text = yaml.safe_dump(data, allow_unicode=True)

    assert parse_yaml(text) == yaml.safe_load(text) == data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a [1, 2]\nb: *a", {"a": [1, 2], "b": [1, 2]}),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        ("a: '2001-01-01'", {"a": "2001-01-01"}),
        ('{"a": 1e-05}', {"a": 1e-05}),
        ("", None),
        ("[" * DEPTH + "]" * DEPTH, None),
    ],
)
def test_what_recipes_may_use(text: str, expected: object) -> None:
    """Anchors, merges, dates in quotes, JSON's numbers."""
    assert parse_yaml(text) == expected or text.startswith("[[")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "the key 'a' twice"),
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ("a: &a [*a]", "contains itself"),
        ("&a a: b\n*a : c", "twice"),
        ("a: 0x1ffffffffffffffff", "beyond 64 bits"),
        ("a: !!set {b}", "a set"),
        ("a: !!binary aGk=", "a bytes"),
        ("a: 2001-01-01", "a date"),
        ("a: !!python/name:os.system ''", "constructor"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested"),
        ("[" * 200_000, "nested"),
        ("- " * 100_000, "nested"),
        (f"a: &a [{'1, ' * 400}]\nb: &b [{'*a, ' * 300}]", f"more than {VALUES} values"),
        ('"\\ud800"', "surrogates"),
    ],
)
def test_what_recipes_may_not_use(text: str, words: str) -> None:
    """One reason each."""
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)


def test_files_that_are_too_large(tmp_path: Path) -> None:
    """And files that are none."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"#" * (LARGEST + 1))

    with pytest.raises(MergebenchError, match=r"recipe\.yaml: is too large.*16777216"):
        read_recipe(path)
    with pytest.raises(MergebenchError, match="not a regular file"):
        read_recipe(tmp_path)


def test_large_texts_are_json(tmp_path: Path) -> None:
    """Which is read at once; of YAML, of too many values and of two equal keys nothing is made."""
    numbers = "/".join(["-0.0123456789"] * 100_000)
    data = {"models": [{"path": "a", "params": {"coefficients": numbers}}], "method": "atlas"}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    recipe = read_recipe(path)
    assert recipe.models[0].params == {"coefficients": numbers}
    written = recipe.to_yaml()
    assert json.loads(written) == recipe.to_dict()
    path.write_text(written)
    assert read_recipe(path) == recipe
    small = replace(recipe, models=(ModelRef("a"),)).to_yaml()
    assert not small.startswith("{")
    for text, words in (
        (yaml.safe_dump(data), "must be JSON"),
        ("{" + "}" * YAML, "must be JSON"),
        (f'["{"ä" * (YAML // 2)}"', "must be JSON"),
        (f'{{"a": "{numbers}", "a": 1}}', "a key twice"),
        (f"[{'1, ' * JSON_VALUES}1]", f"more than {JSON_VALUES} values"),
        (f"[{'[], ' * JSON_VALUES}1]", f"more than {JSON_VALUES} values"),
        (f"[{'{}, ' * JSON_VALUES}1]", f"more than {JSON_VALUES} values"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_yaml(text)
        path.write_text(text)
        with pytest.raises(FormatError, match=words):
            read_recipe(path)
    most = f"[{', '.join(['1'] * (JSON_VALUES - 1))}]"
    assert len(parse_yaml(most)) == JSON_VALUES - 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 65 + "]" * 65, "nested"),
        ("[" * 100_000, "nested"),
        ('{"a":"\\ud800"}', "surrogate"),
        ("9" * 5000, "digits"),
        ("{", "Expecting"),
    ],
)
def test_json_that_could_do_harm_later(text: str, words: str) -> None:
    """Each is text that Python itself reads, or stumbles over."""
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_json_as_configs_hold_it() -> None:
    """Infinities, pairs of surrogates, nesting as deep as is allowed."""
    deepest = "[" * 64 + "]" * 64

    assert parse_json('{"a": Infinity, "b": "\\ud83d\\ude00"}') == {"a": float("inf"), "b": "😀"}
    assert str(parse_json(deepest)) == deepest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ops: 1", "must be a list of ops"),
        ("ops: 0", "`ops` is empty"),
        ("ops:", "`ops` is empty"),
        ("then: 0", "must be a list of ops"),
        ("params: []", "`params` must be a mapping"),
        ("include: 0", "must be a text or a list of texts"),
        ("then: 'trim:density'", "name=value"),
        ("then: [{'a:b': null}]", "an op is a name"),
        ("params: {a: []}", "has an empty list of values"),
        (f"params: {{a: {list(range(40))}, b: {list(range(40))}}}", f"1 to {MOST}, got 1600"),
        (f"where: 'block={'9' * 5000}:lam=1'", "block=3-7"),
    ],
)
def test_recipes_that_were_once_read_badly(tmp_path: Path, text: str, words: str) -> None:
    """Refused by name of the file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"models: [a, b]\n{text}\n")

    with pytest.raises(FormatError, match=r"recipe\.yaml") as caught:
        read_recipe(path)
    assert words in str(caught.value)
