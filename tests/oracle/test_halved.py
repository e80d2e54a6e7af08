"""Half reset and adapter averaging against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench import merge_models
from tests.oracle.halved import blended, reset_modules

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
CATEGORIES = {"attention": ATTENTION, "feed-forward": FEED_FORWARD, "norm": NORMS}
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
FEW = settings(max_examples=30, deadline=None)


def model(layers: int, biases: bool = False) -> list[str]:
    """Names of a small llama, with biases if wanted."""
    names = list(OUTSIDE)
    for block in range(layers):
        for part in (*ATTENTION, *FEED_FORWARD, *NORMS):
            names.append(f"model.layers.{block}.{part}.weight")
            if biases:
                names.append(f"model.layers.{block}.{part}.bias")
    return names


def reset_by(names: list[str], seed: int, **how: object) -> set[str]:
    """What a merge takes back to the base."""
    base = {name: np.full((2,), 0.5, np.float32) for name in names}
    tuned = {name: array + 1 for name, array in base.items()}
    got = merge_models([tuned], base=base, method="hft", seed=seed, **how)
    assert all(np.all(a == 0.5) or np.all(a == 1.5) for a in got.values())
    return {name for name, array in got.items() if np.all(array == 0.5)}


@given(layers=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), biases=st.booleans())
@FEW
def test_half_of_every_category_is_reset(layers: int, seed: int, biases: bool) -> None:
    """The modules drawn in plain Python, with their biases; nothing outside of blocks."""
    names = model(layers, biases)
    wanted = set()
    for category, parts in CATEGORIES.items():
        blocks = [[f"model.layers.{b}.{part}" for part in parts] for b in range(layers)]
        wanted |= reset_modules(blocks, "model.layers", category, seed)
    assert reset_by(names, seed) == {n for n in names if n.rpartition(".")[0] in wanted}


def test_seeds_draw_evenly() -> None:
    """Over many seeds every module of every category is reset half of the time."""
    names, rounds = model(4), 400
    count = dict.fromkeys(names, 0)
    for seed in range(rounds):
        for name in reset_by(names, seed):
            count[name] += 1
    # Five standard deviations of fair coins; what is never reset is outside.
    assert all(abs(n - rounds / 2) < 5 * rounds**0.5 / 2 for n in count.values() if n)
    assert {name for name, n in count.items() if not n} == set(OUTSIDE)


@pytest.mark.parametrize("count", range(1, 5))
@given(data=st.data())
@FEW
def test_the_last_is_blended(count: int, data: st.DataObject) -> None:
    """Whatever the models hold, the last one named is the new one."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    m = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    taus = [random.normal(size=(3, 4)) for _ in range(count)]
    weights = data.draw(st.lists(st.sampled_from([1.0, 2.0, -0.5]), min_size=count, max_size=count))
    base = {"w": np.zeros((3, 4))}
    pairs = [({"w": tau}, weight) for tau, weight in zip(taus, weights, strict=True)]
    got = merge_models(pairs, base=base, method="mos", m=m, lam=0.5)["w"]
    scaled = [weight * tau for tau, weight in zip(taus, weights, strict=True)]
    assert np.abs(got - 0.5 * blended(scaled, m)).max() < 1e-12
