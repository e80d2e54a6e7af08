"""Patterns of configs: as ``re`` matches them, in time that grows with the text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.adapters_zoo.patterns import ends_with
from mergebench.core.regular import STATES

ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^.]", "[a-c0-2]", "^", "$"])
REPEATS = st.sampled_from(["", "*", "+", "?", "*?", "{2}", "{1,3}", "{2,}"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, REPEATS).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
    ),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None)
@given(pattern=PATTERNS, text=st.text("ab1.", max_size=6))
def test_matches_are_those_of_re(pattern: str, text: str) -> None:
    """At the end of a path, as PEFT asks; an end in the middle of a pattern is refused."""
    try:
        found = ends_with(pattern, text)
    except re.error:
        assert "$" in pattern
        return
    assert found is (re.match(rf"(.*\.)?({pattern})$", text) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["q", "model.layers.0.q", "layers.12.k", "x.layers", "q-_1",
     r"layers\.\d+\.(q|k)", r".*\.self_attn\.(q|k|v)_proj", "^a.q",
     r"(?i:Q)", r"\bq"],
)  # fmt: skip
def test_patterns_as_configs_hold_them(pattern: str) -> None:
    """Names, numbers of layers, choices."""
    for text in ("q", "a.q", "model.layers.0.q", "x.layers.12.k", "m.self_attn.v_proj", "aq"):
        assert ends_with(pattern, text) is bool(re.match(rf"(.*\.)?({pattern})$", text))


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)*(.*)*x", "a*a*a*a*a*a*a*b"])
def test_patterns_that_never_end_in_re(pattern: str) -> None:
    """A thousand letters take as many steps; ``re`` would need 2¹⁰⁰⁰."""
    assert ends_with(pattern, "a" * 1000) is False


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(", "unterminated"),
        ("(?=(a*)*)b*", "bounded time"),
        (r"(a*)(b*)\1", "bounded time"),
        ("(?i:a*b*)", "bounded time"),
        (f"(a*){{{STATES}}}b*", "too large"),
        ("(" * 3000 + ")" * 3000, "recursion"),
        ("a{99999999999}", "too large"),
    ],
)
def test_what_is_no_pattern(pattern: str, words: str) -> None:
    """With the reason."""
    with pytest.raises(re.error, match=words):
        ends_with(pattern, "a")


def test_what_python_will_read_differently_is_no_warning() -> None:
    """Warnings are errors in these tests."""
    assert ends_with("[[a]*b*", "aab")
