"""WIDEN against its equations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mergebench import merge_models
from mergebench.core.site import make_sites
from mergebench.merge.at import At
from mergebench.merge.op import OPS
from tests.oracle.columns import widen
from tests.oracle.test_spectral import CASES, Arrays, assert_close

SHAPES = {
    "model.layers.0.q.weight": (6, 5),
    "model.layers.0.up.weight": (4, 9),
    "model.layers.0.one.weight": (7, 1),
    "model.layers.0.row.weight": (1, 4),
    "model.layers.0.bias": (5,),
    "model.embed_tokens.weight": (8, 3),
    "lm_head.weight": (8, 3),
    "model.conv.weight": (3, 2, 2, 2),
    "model.scale": (),
    "model.empty.weight": (0, 3),
}


def unit(name: str, kernels: str) -> str:
    """What is scored in a tensor."""
    if name == "model.embed_tokens.weight":
        return "row"
    enough = len(SHAPES[name]) == 2 or (len(SHAPES[name]) > 2 and kernels == "matrix")
    return "column" if enough else "entry"


def models(random: np.random.Generator, count: int, kind: str) -> tuple[Arrays, list[Arrays]]:
    """A base and task vectors: of any columns, of few, or with columns and bases of zeros."""
    base = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    taus = []
    for _ in range(count):
        tau = {name: 0.1 * random.normal(size=shape) for name, shape in SHAPES.items()}
        if kind != "all":
            tau = {name: array * (random.random(array.shape) < 0.4) for name, array in tau.items()}
        taus.append(tau)
    if kind == "zeros":
        for name in ("model.layers.0.q.weight", "model.embed_tokens.weight"):
            base[name][:, 1] = 0.0
            base[name][2] = 0.0
            taus[0][name] = np.zeros(SHAPES[name])
    return base, taus


@given(data=st.data())
@CASES
def test_widen(data: st.DataObject) -> None:
    """Every weight of every column, for all parameters."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    count = data.draw(st.integers(1, 4))
    base, taus = models(random, count, data.draw(st.sampled_from(["all", "few", "zeros"])))
    weights = [float(w) for w in random.choice([1.0, 0.5, 2.0, -0.75], count)]
    kernels, lam = (
        data.draw(st.just("matrix")),
        data.draw(st.sampled_from([1.0, 0.5])),
    )
    params: dict[str, Any] = {
        "ratio": data.draw(st.sampled_from([1.0, 0.5, 1.7, 0.0])),
        "calibration": data.draw(st.sampled_from([1.0, 0.25])),
    }
    tuned = [{name: base[name] + tau[name] for name in base} for tau in taus]
    pairs = list(zip(tuned, weights, strict=True))
    got = merge_models(pairs, base=base, method="widen", lam=lam, **params)
    wanted = {}
    for name in SHAPES:
        own = [np.asarray(each[name] - base[name]) for each in tuned]
        merged = widen(base[name], own, weights, **params, unit=unit(name, kernels))
        wanted[name] = np.asarray(base[name] + lam * merged)
    assert_close(got, wanted, 1e-9)


def test_columns_are_those_of_the_output_side() -> None:
    """A weight stored input × output is scored by stored rows, an embedding by tokens."""
    random = np.random.default_rng(2)
    base, taus = random.normal(size=(6, 4)), [random.normal(size=(6, 4)) for _ in range(2)]
    for name, turned, expected in (
        ("w", False, "column"),
        ("w", True, "row"),
        ("embed.weight", False, "row"),
    ):
        site = make_sites({name: (6, 4)}, transposed=[name] if turned else [])[name]
        at = At(site, 0, 24, (1.0, 0.5), base=base.reshape(-1))
        got = np.tensordot(
            (1.0, 0.5), OPS["disentangle"]().apply(np.stack(taus).reshape(2, -1), at), 1
        ).reshape(6, 4)
        exact = widen(base, taus, (1.0, 0.5), unit=expected)
        assert np.allclose(got, exact, rtol=0, atol=1e-12)
        for other in {"column", "row"} - {expected}:
            assert not np.allclose(got, widen(base, taus, (1.0, 0.5), unit=other), atol=1e-3)


def test_small_updates_are_told_apart() -> None:
    """Columns that move by 1e-7 of their length are ranked by that, not by rounding."""
    random = np.random.default_rng(4)
    base = {"w": random.normal(size=(50, 20)).astype(np.float32).astype(np.float64)}
    sizes = np.linspace(1e-8, 2e-7, 20)
    turn = random.normal(size=(50, 20))
    turn -= base["w"] * (base["w"] * turn).sum(0) / (base["w"] ** 2).sum(0)
    tau = sizes * turn / np.linalg.norm(turn, axis=0) * np.linalg.norm(base["w"], axis=0)
    grown = sizes[::-1] * base["w"]
    pair = [{"w": base["w"] + tau}, {"w": base["w"] + grown}]
    got = merge_models(pair, base=base, method="widen")["w"] - base["w"]
    weights = np.linalg.lstsq(np.stack([tau[:, 19], grown[:, 19]], axis=1), got[:, 19], rcond=None)[
        0
    ]
    # The last column turned most in one model, and grew least in the other.
    assert weights[0] > 0.9
    assert 0.3 < weights[1] < 0.9
