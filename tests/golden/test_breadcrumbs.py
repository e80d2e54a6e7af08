"""Model Breadcrumbs, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mergebench import merge_models

from .support import assert_exactly, merged

ROWS = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]]


def test_row_by_row() -> None:
    """Keep half of each row of four after dropping its largest."""
    got = merged("breadcrumbs", ROWS, density=0.5, gamma=0.25, lam=1.0)
    assert_exactly(got, [[0, 2, 3, 0], [0, 20, 30, 0]])


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_flattened(scope: str) -> None:
    """Of all eight drop the largest two and keep the next four."""
    got = merged("breadcrumbs", ROWS, density=0.5, gamma=0.25, lam=1.0, scope=scope)
    assert_exactly(got, [[0, 0, 3, 4], [10, 20, 0, 0]])


def test_mergekit_preset_is_flattened() -> None:
    """The preset of mergekit works on whole tensors, unscaled."""
    got = merged("breadcrumbs", ROWS, density=0.5, gamma=0.25, compat="mergekit-0.1.5")
    assert_exactly(got, [[0, 0, 3, 4], [10, 20, 0, 0]])


def test_scope_model_counts_over_all_tensors() -> None:
    """Two tensors share one band where the scope is the model, and have their own otherwise."""
    tau = {name: np.array(row, np.float32) for name, row in zip("ba", ROWS, strict=True)}
    base = {name: np.zeros_like(array) for name, array in tau.items()}
    settings = {"density": 0.5, "gamma": 0.25, "lam": 1.0}
    for scope, expected in (
        ("model", {"b": [0, 0, 3, 4], "a": [10, 20, 0, 0]}),
        ("tensor", {"b": [0, 2, 3, 0], "a": [0, 20, 30, 0]}),
    ):
        got = merge_models([tau], base=base, method="breadcrumbs", scope=scope, **settings)
        assert_exactly({name: array.tolist() for name, array in got.items()}, expected)


@pytest.mark.parametrize(("conflict", "expected"), [("drop", [1, 2, 0, 0]), ("keep", [1, 2, 3, 0])])
@pytest.mark.parametrize("scope", ["row", "tensor", "model"])
def test_shares_that_exceed_everything(scope: str, conflict: str, expected: list[float]) -> None:
    """Three quarters kept and half dropped do not fit: one of the shares yields."""
    got = merged(
        "breadcrumbs", ROWS[0], density=0.75, gamma=0.5, lam=1.0, scope=scope, conflict=conflict
    )
    assert_exactly(got, expected)


@pytest.mark.parametrize(
    ("density", "gamma", "count", "expected"),
    [
        (0.2, 0.25, "exact", [0, 0, 0, 0]),
        (0.2, 0.25, "at_least_one", [0, 0, 3, 0]),
        (0.5, 0.75, "exact", [1, 0, 0, 0]),
        (0.2, 0.99, "exact", [0, 0, 0, 0]),
        (0.2, 0.99, "at_least_one", [1, 0, 0, 0]),
        (1.0, 0.0, "exact", [1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("scope", ["row", "tensor", "model"])
def test_short_scopes(
    scope: str, density: float, gamma: float, count: str, expected: list[float]
) -> None:
    """A row, tensor or model too short for its share keeps one entry, or none where exact."""
    got = merged(
        "breadcrumbs", ROWS[0], density=density, gamma=gamma, lam=1.0, count=count, scope=scope
    )
    assert_exactly(got, expected)


def test_defaults_are_the_share_of_the_authors() -> None:
    """Of ten entries the largest goes, the next two stay, times .4."""
    tau = [float(x) for x in (1, -2, 3, -4, 5, -6, 7, -8, 9, -10)]
    lam = np.float32(0.4)
    expected = [0.0] * 7 + [float(np.float32(-8) * lam), float(np.float32(9) * lam), 0.0]
    assert_exactly(merged("breadcrumbs", tau), expected)
    assert_exactly(merged("breadcrumbs", tau, compat="official"), expected)


def test_weights_and_signs() -> None:
    """Magnitudes decide, signs survive, and models add with their weights."""
    got = merged(
        "breadcrumbs", [1, -2, 3, -4], [8, 6, -4, 2], weights=(1.0, 0.5),
        density=0.5, gamma=0.25, lam=1.0,
    )  # fmt: skip
    assert_exactly(got, [0, -2 + 3, 3 - 2, 0])


def test_equals_are_dropped_and_kept_in_their_order() -> None:
    """Of equal magnitudes the earlier counts as the larger: it is dropped first, and kept next."""
    got = merged("breadcrumbs", [1, 1, -1, 1], density=0.5, gamma=0.25, lam=1.0)
    assert_exactly(got, [0, 1, -1, 0])
    got = merged("breadcrumbs", [1, 1, -1, 1], density=0.5, gamma=0.25, lam=1.0, scope="model")
    assert_exactly(got, [0, 1, -1, 0])


def test_the_election_of_ties() -> None:
    """Kept are 2 and 3 of the first, 6 and -4 of the second; where signs differ the larger wins."""
    params = {"density": 0.5, "gamma": 0.25}
    got = merged("breadcrumbs_ties", [1, -2, 3, -4], [8, 6, -4, 2], **params)
    assert_exactly(got, [0, 6, -4, 0])
    got = merged("breadcrumbs_ties", [1, 2, 3, -4], [8, 6, 4, 2], **params)
    assert_exactly(got, [0, (2 + 6) / 2, (3 + 4) / 2, 0])
    got = merged("breadcrumbs_ties", [1, 2, 3, -4], [8, 6, 4, 2], weights=(1, 0.5), **params,
                 compat="mergekit-0.1.5")  # fmt: skip
    assert_exactly(got, [0, 2 + 6 / 2, 3 + 4 / 2, 0])
