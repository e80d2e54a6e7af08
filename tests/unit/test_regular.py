"""Selectors find what ``re`` finds, and no pattern makes them endless."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.core.errors import ParameterError
from mergebench.core.regular import Machine, finder, parsed
from mergebench.core.selector import Selector
from mergebench.core.site import make_sites, parse_pattern
from tests.adapters.test_patterns import PATTERNS

NAMES = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def site(name: str) -> object:
    return make_sites({name: (2, 2)})[name]


@settings(max_examples=500, deadline=None)
@given(pattern=PATTERNS, text=st.text("abA1.\n", max_size=6), flags=st.sampled_from(["", "(?i)"]))
def test_the_machine_finds_what_re_finds(pattern: str, text: str, flags: str) -> None:
    """Also ends in the middle of a pattern, line feeds and letters in either case."""
    pattern = flags + pattern
    assert Machine(parsed(pattern), anywhere=True).match(text) is bool(re.search(pattern, text))


@pytest.mark.parametrize(
    "pattern",
    ["mlp", r"layers\.\d+\.mlp", r"^(?!.*norm).*weight$", r"(?i)MODEL.*Q_.*proj.*WEIGHT.*",
     r"layers\.(0|11)\.(self_attn|mlp)", r"(\w+\.)+weight", "m.*l.*a.*w.*", r"\bnorm\b", "$", "^$",
     r"(?<=head)\.w", r"(l)\w+\1", r"(?:model\.)?lm_.*"],
)  # fmt: skip
def test_patterns_as_people_write_them(pattern: str) -> None:
    for name in NAMES:
        assert Selector(pattern).matches(site(name)) is bool(re.search(pattern, name))


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a?){60}a{60}b", "a*a*a*a*a*a*a*b"])
@pytest.mark.parametrize("flags", ["", "(?i)"])
def test_patterns_that_never_end_in_re(pattern: str, flags: str) -> None:
    assert finder(flags + pattern)("a" * 1000) is False
    assert finder(flags + pattern)("a" * 130 + "b") is True


@pytest.mark.parametrize(
    "pattern", ["(?=(a+)+b)", r"(a+)+\1b", "(?!(a|a)*b)c", r"\b(a*)*b", "(?=.)a*a*a*a*a*b"]
)
def test_what_cannot_be_bounded_is_refused(pattern: str) -> None:
    with pytest.raises(ParameterError, match="could take forever"):
        Selector(pattern)


def test_block_patterns() -> None:
    """Their groups need ``re``, so what could be endless is refused."""
    parse_pattern(r"(?P<stack>(?:\w+\.)*layers)\.(?P<index>\d+)\.")
    parse_pattern(r"(?P<stack>.+)\.(?P<index>\d+)\.")
    for pattern in (r"(?P<stack>(\w+)+)\.(?P<index>\d+)", r"(?P<stack>(a|ab|b)*)(?P<index>\d+)"):
        with pytest.raises(ParameterError, match="too many ways"):
            parse_pattern(pattern)
