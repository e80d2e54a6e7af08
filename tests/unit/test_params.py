"""Declared parameters: parsing, bounds, and messages to the letter."""

from __future__ import annotations

from sys import float_info
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.core.errors import MergebenchError, ParameterError, did_you_mean
from mergebench.core.params import Param, bind, declared
from mergebench.core.registry import Registry
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.trim import trim


def sample(
    share: Annotated[float, Interval(gt=0, le=1)],
    low: Annotated[float, Ge(0)] = 0.5,
    above: Annotated[float, Gt(0)] = 1,
    high: Annotated[float, Le(2)] = 0,
    below: Annotated[float, Lt(2)] = 0,
    any_number: float = 0,
    half_open: Annotated[float, Interval(ge=-1, lt=1)] = 0,
    count: Annotated[int, Interval(ge=1, le=8)] = 4,
    seed: int = 0,
    flag: bool = False,
    text: str = "x",
    rule: Literal["mass", "count"] = "mass",
) -> None:
    """Every kind of declaration."""


DECLARED = declared(sample)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("share", "a number in (0, 1]"),
        ("low", "a number >= 0"),
        ("above", "a number > 0"),
        ("high", "a number <= 2"),
        ("below", "a number < 2"),
        ("any_number", "a number"),
        ("half_open", "a number in [-1, 1)"),
        ("count", "an integer in [1, 8]"),
        ("seed", "an integer"),
        ("flag", "true or false"),
        ("text", "text"),
        ("rule", "one of mass, count"),
    ],
)
def test_declarations_in_words(name: str, words: str) -> None:
    """Each declaration says what is allowed."""
    assert DECLARED[name].describe() == words


@pytest.mark.parametrize(
    ("owner", "given_values", "message"),
    [
        ("ties", {"density": 1.4}, "ties: `density` must be a number in (0, 1], got 1.4"),
        ("ties", {"density": 0}, "ties: `density` must be a number in (0, 1], got 0"),
        ("ties", {"density": "much"}, "ties: `density` must be a number in (0, 1], got much"),
        ("ties", {"density": "nan"}, "ties: `density` must be a number in (0, 1], got nan"),
        ("ties", {"lam": -0.5}, "ties: `lam` must be a number >= 0, got -0.5"),
        ("ties", {"lambda": -0.5}, "ties: `lam` must be a number >= 0, got -0.5"),
        ("ties", {"scope": "layer"},
         "ties: `scope` must be one of row, tensor, model, got layer"),
        ("breadcrumbs", {"gamma": 1}, "breadcrumbs: `gamma` must be a number in [0, 1), got 1"),
        ("linear", {"normalize": "perhaps"},
         "linear: `normalize` must be true or false, got perhaps"),
        ("ties", {"densty": 0.3}, "ties: no parameter `densty`; did you mean 'density'?"),
        ("linear", {"lambda": 1}, "linear: no parameter `lambda`; known: normalize"),
        ("task_arithmetic", {"lam": float("inf")},
         "task_arithmetic: `lam` must be a number, got inf"),
    ],
)  # fmt: skip
def test_messages(owner: str, given_values: dict[str, Any], message: str) -> None:
    """What the user reads, to the letter."""
    with pytest.raises(ParameterError) as caught:
        METHODS[owner].expand(given_values)
    assert str(caught.value) == message


def test_required_parameters() -> None:
    """A parameter without default must be given, and the message says how."""
    with pytest.raises(ParameterError) as caught:
        trim()
    expected = "trim: `density` is required, a number in (0, 1]; give density=…"
    assert str(caught.value) == expected
    assert [each.required for each in DECLARED.values()] == [True] + [False] * 11


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("share", "0.2", 0.2),
        ("share", 1, 1.0),
        ("share", "1e-3", 0.001),
        ("count", "4", 4),
        ("count", 4.0, 4),
        ("flag", "True", True),
        ("flag", "no", False),
        ("flag", "1", True),
        ("flag", "0", False),
        ("text", 3, "3"),
        ("rule", "count", "count"),
    ],
)
def test_values_are_converted(name: str, value: Any, expected: Any) -> None:
    """Texts and other numbers become values of the declared type."""
    got = DECLARED[name].check(value, "sample")
    assert got == expected
    assert type(got) is type(expected)


@given(number=st.integers(-(2**70), 2**70))
@settings(deadline=None)
def test_large_integers_are_exact(number: int) -> None:
    """An integer, as such or as text, is that integer beyond what a float holds."""
    assert DECLARED["seed"].check(number, "sample") == number
    assert DECLARED["seed"].check(str(number), "sample") == number


@given(number=st.floats(allow_nan=True, allow_infinity=True) | st.just(10**400))
@settings(deadline=None)
def test_bounds_are_kept(number: float) -> None:
    """A value is accepted exactly where the interval holds it, and refused as ParameterError."""
    inside = {
        "share": 0 < number <= 1,
        "low": 0 <= number < float("inf"),
        "half_open": -1 <= number < 1,
        "below": float("-inf") < number < 2,
    }
    for name, allowed in inside.items():
        if allowed and number <= float_info.max:
            assert DECLARED[name].check(number, "sample") == number
        else:
            with pytest.raises(ParameterError, match=f"sample: `{name}` must be"):
                DECLARED[name].check(number, "sample")


@pytest.mark.parametrize("value", [True, None, [], {}, "", "0x1", object()])
def test_no_number(value: Any) -> None:
    """What is no number is refused, booleans too."""
    for name in ("share", "count", "any_number"):
        with pytest.raises(ParameterError):
            DECLARED[name].check(value, "sample")


def test_what_cannot_be_declared() -> None:
    """Annotations that no user could give a value for are a programming error."""

    def wrong(table: dict[str, int]) -> None:
        """Take a mapping."""

    with pytest.raises(TypeError, match="parameter table"):
        declared(wrong)


def test_explicit_over_preset_over_default() -> None:
    """A given value wins over a preset's, which wins over the declared default."""
    params = {"a": Param("a", float, 1.0), "b": Param("b", float, 2.0), "c": Param("c", float, 3.0)}
    assert bind("m", params, {"a": 9}, {"a": 8.0, "b": 7.0}) == {"a": 9.0, "b": 7.0, "c": 3.0}


def test_both_spellings_of_one_parameter_are_refused() -> None:
    """`lambda` and `lam` together contradict each other, and neither wins silently."""
    with pytest.raises(ParameterError, match="`lam`"):
        METHODS["ties"].expand({"lambda": 0.5, "lam": 0.3})


def test_ops_take_what_they_declare_and_nothing_else() -> None:
    """Surplus positional values, and a value given twice, are not dropped silently."""
    assert trim(0.2, "tensor") == trim(density=0.2, scope="tensor")
    with pytest.raises((TypeError, ParameterError)):
        scale(0.5, 3)
    with pytest.raises((TypeError, ParameterError)):
        scale(0.5, lam=0.3)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("densty", ["density", "lam"], "did you mean 'density'?"),
        ("tie", ["ties", "linear"], "did you mean 'ties'?"),
        ("nothing alike", ["b", "a"], "known: a, b"),
        ("x", [], "none are known"),
    ],
)
def test_did_you_mean(name: str, known: list[str], hint: str) -> None:
    """The nearest name where one is near, all names where none is."""
    assert did_you_mean(name, known) == hint


def test_registries_name_what_they_do_not_have() -> None:
    """An unknown name is an error with the nearest one; a second entry of a name is a bug."""
    with pytest.raises(ParameterError, match=r"^no merge method 'tie'; did you mean 'ties'\?$"):
        METHODS["tie"]
    with pytest.raises(ParameterError, match=r"^no op 'trimm'; did you mean 'trim'\?$"):
        OPS["trimm"]
    registry: Registry[int] = Registry("thing", "mergebench.merge.ops", "mergebench.nothing")
    assert registry.add("a", 1) == 1
    with pytest.raises(ValueError, match="thing 'a' is registered twice"):
        registry.add("a", 2)
    assert list(METHODS) == sorted(METHODS)


def test_errors_are_one_sentence() -> None:
    """An error says what, expected, got and the next step, and is no KeyError."""
    error = MergebenchError("a.b: shape", got="3", expected="4", fix="give another")
    assert str(error) == "a.b: shape, expected 4, got 3; give another"
    assert (error.what, error.got, error.expected, error.fix) == (
        "a.b: shape",
        "3",
        "4",
        "give another",
    )
    assert str(MergebenchError("only what")) == "only what"
    assert not issubclass(ParameterError, (KeyError, ValueError))
