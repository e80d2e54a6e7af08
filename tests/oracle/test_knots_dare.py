"""KnOTS with DARE against its equations in float64."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergebench import apply
from mergebench.merge.method import METHODS
from tests.oracle import spectral
from tests.oracle.drawn import share
from tests.oracle.test_spectral import CASES, SHAPES, assert_close, shares, task_vectors


@given(data=st.data())
@CASES
def test_knots_dare_ties(data: st.DataObject) -> None:
    """Coordinates in the shared basis, dropped by their numbers, elected and combined."""
    taus = data.draw(task_vectors(least=2))
    weights = shares(data, len(taus))
    seed, keys = data.draw(st.integers(0, 9)), [5, 7, 2**63, 11][: len(taus)]
    density, divisor = (
        data.draw(st.sampled_from([0.3, 0.6, 1.0])),
        data.draw(st.sampled_from(["count", "none"])),
    )
    chain = METHODS["knots_dare_ties"](
        density=density, seed=seed, divisor=divisor, kernels="matrix", lam=0.5
    )
    got = apply(chain, taus, weights, keys=keys)
    for name, shape in SHAPES.items():
        if len(shape) < 2 or 0 in shape:
            continue
        plain = [torch.tensor(tau[name]).reshape(shape[0], -1) for tau in taus]
        numbers = [[share(seed, name, key, j) for j in range(plain[0].numel())] for key in keys]
        exact = 0.5 * spectral.knots_dare_ties(plain, weights, numbers, density, divisor)
        assert_close({"w": got[name]}, {"w": exact.reshape(shape).numpy()}, 1e-6)


def test_knots_dare_ties_keeps_the_mean() -> None:
    """Without opposed signs the average over seeds is what nothing dropped gives."""
    random = np.random.default_rng(1)
    tau = {"w": random.normal(size=(4, 3))}
    chains = [METHODS["knots_dare_ties"](density=0.5, seed=s, divisor="none") for s in range(4000)]
    mean = sum(apply(chain, [tau])["w"] for chain in chains) / len(chains)
    size = np.linalg.norm(tau["w"])
    # Every coordinate has the deviation |x|: of the mean, ‖τ‖ / √4000 in all.
    assert np.linalg.norm(mean - tau["w"]) < 4 * size / 4000**0.5
    assert np.linalg.norm(apply(chains[0], [tau])["w"] - tau["w"]) > 0.3 * size
