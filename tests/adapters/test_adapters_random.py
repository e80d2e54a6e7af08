"""Random adapters: the exact ΔW or a clear error, never a silently wrong scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from mergebench.adapters_zoo.adapter import ReadOptions, read_adapter
from mergebench.adapters_zoo.lora_settings import Settings, scale_of
from mergebench.core.errors import FormatError, MergebenchError, MismatchError, ParameterError
from mergebench.core.tensor import Array

from .support import read_values, source_of

MODULES = ("model.layers.0.q", "model.layers.1.q", "model.layers.1.k", "head", "layers.10.q", "x+y")
PATTERNS = ("q", "k", "1.q", r"layers\.1", r"layers\.\d+\.q", "model.*", "^head$", "h.ad|k", "x+y")
# How long drawing takes depends on what else the machine does.
SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SCALES = st.integers(-9, 9).filter(bool)


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, Array], dict[str, Any], dict[str, Array]]:
    """Tensors, a config and the displacements they must mean, worked out the plain way."""
    names = draw(st.lists(st.sampled_from(MODULES), min_size=1, unique=True))
    rslora = draw(st.booleans())
    r, alpha = draw(st.integers(1, 4)), draw(SCALES)
    rank_pattern = draw(st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 4), max_size=3))
    alpha_pattern = draw(st.dictionaries(st.sampled_from(PATTERNS), SCALES, max_size=3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    arrays: dict[str, Array] = {}
    expected: dict[str, Array] = {}
    for name in names:
        rank = rank_pattern.get(get_pattern_key(list(rank_pattern), name), r)
        top = alpha_pattern.get(get_pattern_key(list(alpha_pattern), name), alpha)
        out, into = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        a = random.integers(-4, 5, (rank, into)).astype(np.float16)
        b = random.integers(-4, 5, (out, rank)).astype(np.float32)
        arrays[f"base_model.model.{name}.lora_A.weight"] = a
        arrays[f"base_model.model.{name}.lora_B.weight"] = b
        scale = top / (math.sqrt(rank) if rslora else rank)
        expected[f"{name}.weight"] = scale * (b.astype(np.float64) @ a.astype(np.float64))
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    return arrays, config, expected


def assert_means(values: dict[str, Array], expected: dict[str, Array]) -> None:
    """The same tensors, entry by entry; products of small integers may cancel to rounding."""
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name].shape == value.shape
        assert np.abs(values[name] - value).max() < 1e-12


@settings(SLOW, max_examples=200)
@given(adapters())
def test_ranks_and_patterns(
    adapter: tuple[dict[str, Array], dict[str, Any], dict[str, Array]],
) -> None:
    """Ranks, α and patterns as PEFT's own rule gives them."""
    arrays, config, expected = adapter

    assert_means(read_values(source_of(arrays, config)), expected)


def _drop_tensor(arrays: dict[str, Array], config: dict[str, Any], pick: Callable[..., Any]) -> str:
    key = pick(sorted(arrays))
    del arrays[key]
    return key.rpartition(".lora_")[0].removeprefix("base_model.model.")


def _drop_alpha(arrays: dict[str, Array], config: dict[str, Any], pick: Callable[..., Any]) -> str:
    config.pop("lora_alpha")
    config["alpha_pattern"] = {}
    return "--lora-alpha"


def _add_tensor(arrays: dict[str, Array], config: dict[str, Any], pick: Callable[..., Any]) -> str:
    key = pick(
        [
            "base_model.model.layers.0.q.lora_C.weight",
            "model.layers.9.q.weight",
            "base_model.model.layers.0.q.lora_magnitude_vector",
            "lora_unet_x.lora_down.weight",
            "base_model.model.norm.weight",
            "base_model.model.x.alpha",
        ]
    )
    arrays[key] = np.ones((1, 1), np.float32)
    return key


def _widen_factor(
    arrays: dict[str, Array], config: dict[str, Any], pick: Callable[..., Any]
) -> str:
    key = pick(sorted(arrays))
    axis = 0 if "lora_A" in key else 1
    arrays[key] = np.concatenate([arrays[key], arrays[key]], axis=axis)
    return key.rpartition(".lora_")[0]


def _wrong_rank(arrays: dict[str, Array], config: dict[str, Any], pick: Callable[..., Any]) -> str:
    config["r"], config["rank_pattern"] = 7, {}
    return "expected 7"


FAULTS = (_drop_tensor, _drop_alpha, _add_tensor, _widen_factor, _wrong_rank)


@settings(SLOW, max_examples=300)
@given(adapters(), st.sampled_from(FAULTS), st.data())
def test_faults_are_errors_that_name_the_place(
    adapter: tuple[dict[str, Array], dict[str, Any], dict[str, Array]],
    fault: Callable[..., str],
    data: st.DataObject,
) -> None:
    """Each kind of damage is found, by the class and with the name that belong to it."""
    arrays, config, expected = adapter
    named = fault(arrays, config, lambda options: data.draw(st.sampled_from(options)))
    classes: tuple[type[MergebenchError], ...] = {
        _drop_tensor: (FormatError,),
        _drop_alpha: (ParameterError,),
        _add_tensor: (FormatError,),
        _widen_factor: (MismatchError,),
        _wrong_rank: (MismatchError,),
    }[fault]
    with pytest.raises(MergebenchError) as caught:
        read_adapter(source_of(arrays, config))

    assert type(caught.value) in classes
    assert named in str(caught.value)
    assert expected


@settings(SLOW, max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b_c", "d_0_e"]), st.integers(1, 3), st.none() | SCALES),
        min_size=1,
        unique_by=lambda one: one[0],
    ),
    st.none() | SCALES,
)
def test_kohya_with_and_without_alpha(
    modules: list[tuple[str, int, int | None]], fallback: int | None
) -> None:
    """α over rank where there is an α, the user's where there is none, else scale 1."""
    arrays: dict[str, Array] = {}
    expected: dict[str, Array] = {}
    for name, rank, alpha in modules:
        a = np.arange(1, rank * 2 + 1, dtype=np.float32).reshape(rank, 2)
        b = np.arange(3 * rank, dtype=np.float64).reshape(3, rank)
        arrays[f"lora_unet_{name}.lora_down.weight"] = a
        arrays[f"lora_unet_{name}.lora_up.weight"] = b
        if alpha is not None:
            arrays[f"lora_unet_{name}.alpha"] = np.asarray(alpha, np.float16)
        top = next((value for value in (alpha, fallback) if value is not None), rank)
        expected[f"lora_unet_{name}.weight"] = top / rank * (b @ a.astype(np.float64))

    assert_means(read_values(source_of(arrays), ReadOptions(lora_alpha=fallback)), expected)


@settings(SLOW, max_examples=300)
@given(
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 99), max_size=6),
    st.sampled_from(MODULES),
)
def test_pattern_rule_is_pefts(patterns: dict[str, int], module: str) -> None:
    """The first pattern in file order that matches a path's end, as in PEFT."""
    chosen = patterns.get(get_pattern_key(list(patterns), module), 100)
    stated = Settings(lora_alpha=100, alpha_pattern=patterns)
    scale = scale_of("toy", "key", module, 1, stated, alpha=None, fallback=None)

    assert scale == chosen
