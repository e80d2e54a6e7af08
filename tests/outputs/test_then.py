"""Ops on updates after methods that give updates, and after those that give weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergebench import merge_models, methods
from mergebench.core.errors import ParameterError
from mergebench.merge.op import OPS
from tests.contract.collecting import statistics_of, wanted
from tests.helpers.running import assert_refused, call
from tests.helpers.scene import Scene

#: What needs a displacement, and a spelling of each.
OF_UPDATES = {
    "lines": "lines:beta=0.5",
    "consensus": "consensus:k=1",
    "block_weights": "block_weights:weights=COSINE",
    "svc": "svc",
    "larv": "larv",
    "reset_half": "reset_half:seed=1",
    "tall_mask": "tall_mask",
    "deintrude": "deintrude",
}
OF_WEIGHTS = [name for name in methods if methods[name].space == "weight"]
EITHER = [name for name in methods if methods[name].space == "either"]


def test_the_list_is_that_of_the_ops() -> None:
    """What says that it needs updates is what is tested here."""
    assert {name for name in OPS if OPS[name].of_updates} == set(OF_UPDATES)
    assert {"linear", "slerp", "karcher", "passthrough"} <= set(OF_WEIGHTS)
    assert {"nuslerp", "multislerp"} <= set(EITHER)


@pytest.mark.parametrize("method", [*OF_WEIGHTS, *EITHER])
@pytest.mark.parametrize("then", OF_UPDATES)
def test_weights_are_not_scaled_as_updates(scene: Scene, method: str, then: str) -> None:
    """Refused in one line before anything is written, with the way out."""
    most = methods[method].models[1] or 2
    models = ("ft1", "ft2")[: min(most, 2)]
    how = ("-m", method, "--then", OF_UPDATES[then], "-o", "out")
    ran = call("merge", *models, *how, cwd=scene.path)
    assert_refused(ran, f"{then} works on updates, and {method} gives whole weights", "--base")
    assert not (scene.path / "out").exists()


@pytest.mark.parametrize("then", [name for name in OF_UPDATES if name != "block_weights"])
def test_a_base_alone_does_not_make_updates(scene: Scene, then: str) -> None:
    """`linear` averages weights beside a base too, of adapters on it as of checkpoints."""
    for models in (("ft1", "ft2"), ("lora1", "lora2")):
        how = ("-b", "base", "-m", "linear", "--then", OF_UPDATES[then], "-o", "out")
        assert_refused(call("merge", *models, *how, cwd=scene.path), "works on updates")


@pytest.mark.parametrize("method", EITHER)
def test_methods_on_either_take_them_with_a_base(scene: Scene, method: str) -> None:
    """With a base these combine task vectors: β = 0, α = 1/2 halves the update."""
    models = [scene.path / "ft1", scene.path / "ft2"]
    base = scene.path / "base"
    collected = statistics_of(wanted(method), models, None)
    common: Any = {"base": base, "method": method, "statistics": collected}
    plain: Any = merge_models(models, **common)
    got: Any = merge_models(models, **common, then=["lines:beta=0,alpha=0.5"])
    for name, array in scene.base.items():
        if array.dtype.kind == "f":
            half = (plain[name].astype(float) + array) / 2
            assert np.abs(got[name] - half).max(initial=0) < 1e-6


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_adapters_alone_are_updates(scene: Scene, method: str) -> None:
    """Without a base adapters are combined as ΔW, which may be scaled by depth."""
    models = [scene.path / "lora1", scene.path / "lora2"]
    plain: Any = merge_models(models, method=method, form="delta")
    then = ["lines:beta=0.5,alpha=0.25"]
    got: Any = merge_models(models, method=method, form="delta", then=then)
    assert any(".layers.1." in name for name in got)
    for name, array in plain.items():
        factor = 0.75 if ".layers.1." in name else 0.25
        assert np.allclose(got[name], factor * array, rtol=1e-5, atol=1e-7)


def test_chains_written_out_and_scale(scene: Scene) -> None:
    """A chain of ops works on task vectors; `scale` multiplies weights where they are combined."""
    models = [scene.path / "ft1", scene.path / "ft2"]
    got = merge_models(models, method="linear", then=["scale:lam=0.5"])
    plain = merge_models(models, method="linear")
    for name, array in plain.items():
        if array.dtype.kind == "f":
            assert np.allclose(got[name], array / 2, rtol=1e-6)
    with pytest.raises(ParameterError, match="works on updates"):
        merge_models(models, method="linear", then=["svc"], form="model")
