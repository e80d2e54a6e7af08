"""What ops declare about matrices, models and memory is what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergebench import apply, merge_models
from mergebench.core.site import Site
from mergebench.merge.at import At
from mergebench.merge.chains import chain, sides_of, tolerance_of, workspace_of
from mergebench.merge.op import OPS, Op, op
from mergebench.merge.ops.scale import scale
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.svc import svc
from mergebench.merge.ops.trim import trim

from .support import GENERIC, parameters

SITE = Site("w", (5, 4))


def op_of(data: st.DataObject, name: str) -> Op:
    """An op with drawn parameters."""
    fixed = {"density": 0.5, "solver": "exact"}
    return OPS[name](**data.draw(parameters(OPS[name].params, **fixed), label="parameters"))


def run(op: Op, stack: np.ndarray, models: np.ndarray, **where: Any) -> np.ndarray:
    """The op on matrices, (n, rows, columns)."""
    count = len(models)
    named = {"models": models.reshape(3, -1), "keys": tuple(range(count)), **where}
    at = At(SITE, 0, stack[0].size, (1.0,) * count, **named)
    out = np.asarray(op.apply(stack.reshape(len(stack), -1), at))
    return out.reshape(-1, *stack.shape[1:])


def orthonormal(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random orthonormal columns."""
    found: np.ndarray = np.linalg.qr(random.normal(size=(rows, columns)))[0]
    return found


#: Ops that may run on low-rank inputs in other bases: those that declare it and the linear ones.
SPECTRAL = {
    "centred",
    "compress",
    "core_space",
    "crosstalk",
    "cut_spectrum",
    "descend_wudi",
    "isotropic",
    "knots",
    "project_rows",
    "singular_vectors",
    "subspaces",
    "svc",
    "truncate",
    "twin",
}
#: Of these, ops that change nothing, so that what they compute can only be reported.
LOOKING = {"crosstalk"}
TURNED = [name for name in OPS if OPS[name].linear() or name in SPECTRAL]


def test_the_ops_that_may_be_turned_are_these() -> None:
    """What declares a side is in the list above, and nothing else is."""
    plain: dict[str, dict[str, Any]] = {
        "truncate": {"rank": 1},
        "descend_wudi": {"solver": "exact"},
    }
    declared = {
        name
        for name in OPS
        if not any(p.required for p in OPS[name].params.values()) or name in plain
        if OPS[name](**plain.get(name, {})).sides != "none"
    }
    assert declared <= set(TURNED)
    assert {name for name in TURNED if not OPS[name].linear()} <= declared


@pytest.mark.parametrize("name", TURNED)
@given(data=st.data())
@GENERIC
def test_changes_of_basis_pass_through(name: str, data: st.DataObject) -> None:
    """``op(P X Qᵀ) = P op(X) Qᵀ``, also where P and Q lead from small matrices to larger ones."""
    op = op_of(data, name)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    rows, columns = data.draw(st.sampled_from([(5, 4), (3, 4), (3, 2), (2, 2)]), label="core")
    if op.sides == "left":
        columns = 4
    small = random.normal(size=(3, rows, columns))
    left = orthonormal(random, 5, rows)
    right = np.eye(4) if op.sides == "left" else orthonormal(random, 4, columns)
    large = left @ small @ right.T
    summed = small.sum(axis=0, keepdims=True)
    if not op.spec.needs_models:
        summed = small
    inside = run(op, summed, small, core=(rows, columns))
    outside = run(op, left @ summed @ right.T, large)
    wanted = left @ inside @ right.T
    assert np.abs(outside - wanted).max() <= 1e-6 * max(np.abs(wanted).max(), 1e-3)


def test_a_chain_is_turned_where_all_of_it_is() -> None:
    """One op that sees entries, or measures something, keeps a chain in the bases it came in."""
    assert sides_of(chain(sum_(), svc())) == "both"
    assert sides_of(chain(OPS["knots"](), svc())) == "left"
    assert sides_of(chain(trim(0.5, "row"), sum_(), svc())) == "none"
    assert sides_of(chain(sum_(), trim(0.5, "tensor"))) == "none"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Register an op that notes what reaches it as ``At.models``."""
    assert "svc" in OPS
    monkeypatch.setattr(OPS, "_entries", {**OPS._entries})

    def add(**declared: Any) -> list[Any]:
        seen: list[Any] = []

        @op(**declared)
        def look(stack: Any, at: At) -> Any:
            """Note the models."""
            seen.append(None if at.models is None else np.array(at.models))
            return stack

        return seen

    return add


@pytest.mark.parametrize("granularity", ["entry", "tensor"])
@pytest.mark.parametrize("swept", [False, True])
def test_models_reach_the_ops_that_need_them(
    register: Callable[..., list[Any]], granularity: str, swept: bool
) -> None:
    """After they were combined, trimmed and measured, the task vectors are those that came."""
    seen = register(needs_models=True, granularity=granularity)
    random = np.random.default_rng(0)
    taus = [{"w": random.normal(size=(5, 4)).astype(np.float32)} for _ in range(3)]
    lam = [0.5, 2.0] if swept else 0.5
    base = {"w": np.zeros((5, 4), np.float32)}
    merge_models(taus, base=base, method="ties", then=["look", "svc"], lam=lam, workers=1)
    came = np.stack([tau["w"].reshape(-1) for tau in taus])
    assert len(seen) == (2 if swept else 1)
    for models in seen:
        # Models have an order of their own.
        assert sorted(map(tuple, models)) == sorted(map(tuple, came))
    seen.clear()
    apply(chain(trim(0.5), sum_(), scale(2.0), OPS["look"]()), taus)
    assert np.array_equal(seen[0], came)


def test_models_are_kept_from_other_ops(register: Callable[..., list[Any]]) -> None:
    """An op that does not ask for the task vectors does not get them."""
    seen = register()
    taus = [{"w": np.ones((2, 2), np.float32)}]
    merge_models(taus, base=taus[0], method="ties", then=["look"])
    apply(OPS["look"](), taus)
    assert seen == [None, None]


def test_decompositions_declare_tolerance_and_memory() -> None:
    """Every op with a tolerance works on whole tensors and says what it holds, more for larger."""
    watched = {
        name: OPS[name](**({"rank": 2} if name == "truncate" else {}))
        for name in OPS
        if OPS[name].tolerance or name in LOOKING
    }
    assert {name for name in TURNED if not OPS[name].linear()} <= set(watched)
    assert all(OPS[name].report is not None for name in LOOKING)
    for name, one in watched.items():
        assert one.granularity == "tensor"
        assert workspace_of((one,), 2, (200, 100)) > 8 * 200 * 100
        assert workspace_of((one,), 2, (400, 100)) > workspace_of((one,), 2, (200, 100))
        first = [] if one.spec.reduces or one.spec.apart else [sum_()]
        wanted = 0 if name in LOOKING else 1e-5
        assert tolerance_of(chain(*first, one)) == wanted
    assert workspace_of(chain(sum_(), scale(1.0)), 3, (200, 100)) == 0
    assert tolerance_of(chain(sum_(), scale(1.0))) == 0
