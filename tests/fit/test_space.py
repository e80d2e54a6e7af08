"""What may be tried: ranges, lists, gradients, declared bounds."""

from __future__ import annotations

from typing import Any

import pytest

from mergebench.core.errors import ParameterError
from mergebench.core.schedule import Gradient
from mergebench.merge.fit.ranges import DECLARED, Choices, Range
from mergebench.merge.fit.space import (
    Dimension,
    check_known,
    fixed_and_free,
    numbers_of,
    variants_of,
    with_values,
)
from mergebench.merge.method import METHODS
from mergebench.recipe import ModelRef, Recipe
from mergebench.steps import parse_op


def recipe(method: str = "ties", then: tuple[str, ...] = (), **params: Any) -> Recipe:
    """A recipe of models that are not looked at."""
    ops = tuple(map(parse_op, then))
    return Recipe(models=(ModelRef("a"),), method=method, params=params, then=ops)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0.5", None),
        (0.5, None),
        ("0..0.5..1", None),
        ("0.1/0.4", Choices((0.1, 0.4))),
        (("0.1", "0.4", "1"), Choices((0.1, 0.4, 1.0))),
        (("0.1",), None),
        ("0.05:0.5", Range(0.05, 0.5)),
        ("0.1:0.5:0.2", Range(0.1, 0.5, step=0.2)),
        ("0.1:1:log", Range(0.1, 1.0, log=True)),
        ("0.1:1:x3", Range(0.1, 1.0, anchors=3)),
        ("0.1:1:0.3:x2", Range(0.1, 1.0, step=0.3, anchors=2)),
        (DECLARED, Range(0.01, 1.0)),
    ],
)
def test_values_of_a_number(value: Any, expected: Any) -> None:
    """As they are written, and with the declared bounds: here (0, 1]."""
    plain, dimensions = fixed_and_free(recipe(density=value, lam="0.7"))

    if expected is None:
        fixed = value[0] if isinstance(value, tuple) else value
        assert (dict(plain.params), dimensions) == ({"density": fixed, "lam": "0.7"}, [])
    else:
        assert dict(plain.params) == {"lam": "0.7"}
        assert dimensions == [Dimension("density", -1, "density", expected)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0:0.5", r"ties: `density` must be a number in \(0, 1\], got 0"),
        ("0.5:1.5", "got 1.5"),
        ("0.1/2", "got 2"),
        ("0.5:0.1", "`density` has no range '0.5:0.1'"),
        ("0.5:0.5", "has no range"),
        ("0.1:0.5:0", "has no range"),
        ("0.1:0.5:nan", "has no range"),
        ("0.1:0.5:1", "has no range"),
        ("0.1:0.5:lag", "has no range.*LOW:HIGH:log"),
        ("0.1:0.5:0.1:log", "has no range"),
        ("0.1:0.5:x1", "has no range"),
        ("0.1:0.5:x2:x3", "has no range"),
        (":", r"`density` must be a number in \(0, 1\]"),
    ],
)
def test_what_is_no_range(text: str, words: str) -> None:
    """Refused with what is allowed."""
    with pytest.raises(ParameterError, match=words):
        fixed_and_free(recipe(density=text))


def test_a_logarithmic_range_starts_above_zero() -> None:
    """Also where the parameter itself may be 0."""
    with pytest.raises(ParameterError, match="`lam` has no range"):
        fixed_and_free(recipe(lam="0:1:log"))


def test_words_and_integers() -> None:
    """Choices of words are checked, integers go in steps of one, texts are left alone."""
    _, (scope,) = fixed_and_free(recipe(scope=("row", "model")))
    assert scope.values == Choices(("row", "model"))
    _, (every,) = fixed_and_free(recipe(scope=DECLARED))
    assert every.values == Choices(("row", "tensor", "model"))
    with pytest.raises(ParameterError, match="`scope` must be one of row, tensor, model, got rows"):
        fixed_and_free(recipe(scope="row/rows"))
    _, (k,) = fixed_and_free(recipe("consensus_ta", k="1:4"))
    assert k.listed == (1, 2, 3, 4)
    assert all(type(each) is int for each in k.listed)
    plain, none = fixed_and_free(recipe("lines", alpha="folder/file:1"))
    assert (dict(plain.params), none) == ({"alpha": "folder/file:1"}, [])
    with pytest.raises(ParameterError, match=r"`alpha` declares no range.*alpha=LOW:HIGH"):
        fixed_and_free(recipe("lines", alpha=DECLARED))


def test_ops_after_the_method() -> None:
    """Have names of their own, the second of a kind too, and take values by their place."""
    asked = recipe(then=("lines:alpha=0.5,beta=0.2/0.4", "scale:lam=0.5:1", "scale:lam=1/2"))
    plain, dimensions = fixed_and_free(asked)

    assert [each.name for each in dimensions] == ["lines.beta", "scale.lam", "scale.3.lam"]
    made = plain
    for each, value in zip(dimensions, (0.4, 0.75, 2.0), strict=True):
        made = each.put(made, value)
    assert [(ref.name, dict(ref.params)) for ref in made.then] == [
        ("lines", {"alpha": "0.5", "beta": 0.4}),
        ("scale", {"lam": 0.75}),
        ("scale", {"lam": 2.0}),
    ]
    assert dict(asked.then[0].params) == {"alpha": "0.5", "beta": "0.2/0.4"}


def test_grids() -> None:
    """Every combination, the last varying fastest; steps reach the end without rounding errors."""
    plain, dimensions = fixed_and_free(recipe(density="0.1/0.2", lam="0.1:1.5:0.1"))
    found = list(variants_of(plain, dimensions))

    assert [each.params["lam"] for _, each in found[:15]] == [
        round(n / 10, 1) for n in range(1, 16)
    ]
    assert [label for label, _ in found[13:17]] == [
        "density=0.1,lam=1.4", "density=0.1,lam=1.5", "density=0.2,lam=0.1", "density=0.2,lam=0.2",
    ]  # fmt: skip
    _, (anchored,) = fixed_and_free(recipe(lam="0:1:0.5:x2"))
    assert anchored.listed[:4] == tuple(
        Gradient(each) for each in ((0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.5, 0.0))
    )
    for params, words in (
        ({"lam": "0:1"}, "without a step.*lam=0:1:0.1"),
        ({"lam": "0:1:0.01:x4"}, "101 values at 4 places are too many"),
        ({"lam": "0:1:0.01", "density": "0.1:0.5:0.01"}, "at most 1000, got 4141"),
    ):
        with pytest.raises(ParameterError, match=words):
            list(variants_of(*fixed_and_free(recipe(**params))))


def test_declared_numbers() -> None:
    """Those that are not given, of the method and of ops after it, within what they declare."""
    found = {each.name: each.values for each in numbers_of(recipe(then=("lines:alpha=0.5",)))}
    assert found == {
        "density": Range(0.01, 1.0),
        # No upper end: twice the default.
        "lam": Range(0.0, 2.0),
        "lines.beta": found["lines.beta"],
    }
    assert [each.name for each in numbers_of(recipe(density="0.2"))] == ["lam"]
    with pytest.raises(ParameterError, match="linear: declares no number that could be searched"):
        numbers_of(recipe("linear"))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_declared_ranges_are_allowed(name: str) -> None:
    """Both ends of every range that is made of a declaration are values of the parameter."""
    try:
        dimensions = numbers_of(recipe(name))
    except ParameterError:
        assert not [each for each in METHODS[name].params.values() if each.kind is float]
        return
    for each in dimensions:
        assert isinstance(each.values, Range)
        for end in (each.values.low, each.values.high):
            METHODS[name].params[each.key].check(end, name)


def test_values_for_all_that_have_them() -> None:
    """Given by name to recipes whose method or op has the parameter and does not give it."""
    one, two = recipe(lam="0.3"), recipe(then=("lines", "lines:beta=0.5"))
    other = recipe("linear")
    texts = {"lambda": "0.1/0.2", "lines.beta": "0.4/0.6"}

    check_known(list(texts), [one, two, other])
    assert with_values(one, texts) == one
    assert with_values(other, texts) == other
    made = with_values(two, texts)
    assert dict(made.params) == {"lam": "0.1/0.2"}
    assert [dict(ref.params) for ref in made.then] == [{"beta": "0.4/0.6"}, {"beta": "0.5"}]
    with pytest.raises(ParameterError, match=r"no line has a parameter 'lines.bata'.*lines\.beta"):
        check_known(["lines.bata"], [two])
