"""Every op after every method: it does to the result what it does alone, or is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from mergebench.core.errors import MergebenchError
from mergebench.merge.chains import is_apart
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS

from .support import apply_each, merge_each

Arrays = dict[str, np.ndarray]

#: A value for parameters that have no default.
REQUIRED = {
    "density": 0.5,
    "t": 0.01,
    "lam": 0.5,
    "rank": 2,
    "select_topk": 0.5,
    "coefficients": "0.5/-1",
}
#: It is about names of Stable Diffusion's tensors, which these models do not have.
ELSEWHERE = {"block_weights": "weights=GRAD_V"}


def _models() -> tuple[Arrays, list[Arrays]]:
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed.weight": (7, 5), "model.norm.weight": (5,)}
    for block in range(3):
        place = f"model.layers.{block}"
        shapes |= {f"{place}.attn.q.weight": (5, 5), f"{place}.attn.k.weight": (5, 5)}
        shapes |= {f"{place}.mlp.up.weight": (8, 5), f"{place}.mlp.down.weight": (5, 8)}
        shapes |= {f"{place}.norm.weight": (5,)}
    base = {name: random.normal(size=shape) for name, shape in shapes.items()}
    tuned = [
        {name: array + random.normal(size=array.shape) / 9 for name, array in base.items()}
        for _ in range(3)
    ]
    return base, tuned


BASE, TUNED = _models()


def _spelled(op: str) -> str:
    if op in ELSEWHERE:
        return f"{op}:{ELSEWHERE[op]}"
    needed = [each.name for each in OPS[op].params.values() if each.required]
    return op + ":" * bool(needed) + ",".join(f"{name}={REQUIRED[name]}" for name in needed)


def _merged(method: str, *then: str) -> list[Arrays]:
    count = METHODS[method].models[1] or len(TUNED)
    form = "model" if METHODS[method].space == "weight" else "delta"
    found: Any = merge_each(
        TUNED[:count], base=BASE, method=method, then=list(then), form=form, memory="1GiB"
    )
    return found if isinstance(found, list) else [found]


@cache
def _alone(method: str) -> list[Arrays]:
    return _merged(method)


def _is_refused(method: str, op: str) -> bool:
    """What must be refused: nothing to combine, no update, too many models, other names."""
    spec, apart = OPS[op], is_apart(METHODS[method]())
    combines_nothing = (spec.reduces or spec.apart == "each") and not apart
    no_update = spec.of_updates and METHODS[method].space == "weight"
    too_many = spec.most is not None and len(TUNED) > spec.most
    return combines_nothing or no_update or too_many or op in ELSEWHERE


@pytest.mark.parametrize("op", list(OPS))
def test_every_op_after_every_method(op: str) -> None:
    """The chain gives what the op makes of the method's result, or one error in words."""
    settings = {name: REQUIRED[name] for name in REQUIRED if name in OPS[op].params}
    needed = {each.name for each in OPS[op].params.values() if each.required}
    for method in METHODS:
        if _is_refused(method, op):
            with pytest.raises(MergebenchError) as refusal:
                _merged(method, _spelled(op))
            assert len(str(refusal.value)) > 30
            continue
        chained, before = _merged(method, _spelled(op)), _alone(method)
        for each in chained:
            assert {name: array.shape for name, array in each.items()} == {
                name: array.shape for name, array in BASE.items()
            }
            assert all(np.isfinite(array).all() for array in each.values()), method
        # What looks at the inputs too, or at a base beside weights, is held elsewhere; what is
        # drawn for several results goes by what their models hold.
        drawn_apart = "seed" in OPS[op].params and len(before) > 1
        if OPS[op].needs_models or METHODS[method].space == "weight" or drawn_apart:
            continue
        own = {name: value for name, value in settings.items() if name in needed}
        expected: Any = apply_each((OPS[op](**own),), before, base=BASE)
        expected = expected if isinstance(expected, list) else [expected]
        assert len(chained) == len(expected), method
        for got, wanted in zip(chained, expected, strict=True):
            for name, array in wanted.items():
                np.testing.assert_allclose(
                    got[name], array, rtol=1e-9, atol=1e-12, err_msg=f"{method} {op} {name}"
                )
