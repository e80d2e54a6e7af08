"""Every registered diagnostic answers the same questions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mergebench.core.delta import Delta, Dense, Difference, LowRank
from mergebench.core.params import bind
from mergebench.core.site import Site
from mergebench.core.tensor import ArrayTensor
from mergebench.spectral.diagnostic import DIAGNOSTICS, Diagnostic
from mergebench.spectral.report import gather
from mergebench.spectral.spectrum import SiteSpectrum, Tuned, look

EVERY = list(DIAGNOSTICS)
N, M, RANK = 14, 11, 3
LABELS = ("a", "b", "c")


def products(count: int = 2) -> list[tuple[np.ndarray, np.ndarray]]:
    """Factors of some updates."""
    random = np.random.default_rng(0)
    return [
        (random.standard_normal((N, RANK)), random.standard_normal((RANK, M))) for _ in range(count)
    ]


def weights() -> np.ndarray:
    """A base."""
    return np.random.default_rng(1).standard_normal((N, M))


def frozen(array: np.ndarray) -> ArrayTensor:
    """A tensor that refuses to be written to."""
    held = np.ascontiguousarray(array)
    held.flags.writeable = False
    return ArrayTensor(held)


def rows(
    spec: Diagnostic, base: np.ndarray, deltas: Mapping[int, Delta], site: Site
) -> list[dict[str, Any]]:
    """What a diagnostic with default parameters says of one site, as records."""
    tensor = frozen(base)
    everyone = sorted(deltas)
    looked = look(tensor, deltas, site.size)
    at = SiteSpectrum(site, tensor, deltas, looked, spec.uses, everyone, everyone)
    params = bind(spec.name, spec.params, {})
    if spec.per == "model":
        found = [(spec.function(Tuned(at, m), site, **params), m, None) for m in deltas]
    else:
        found = [(r.values, r.model, r.other) for r in spec.function(at, site, **params)]
    place = {"tensor": site.name, "layer": "linear", "module": "w", "shape": [N, M]}
    return [
        {**place, "model": model, "other": other, "values": values}
        for values, model, other in found
    ]


def assert_alike(one: Any, other: Any, tolerance: float = 2e-6) -> None:
    """Equal structure; numbers equal but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key], tolerance)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_alike(left, right, tolerance)
    elif isinstance(one, (int, float)):
        assert other == pytest.approx(one, rel=tolerance, abs=tolerance)
    else:
        assert one == other


def without_curves(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without lists, whose length is that of the factors, and full decompositions'."""
    kept = []
    for record in records:
        values = {k: v for k, v in record["values"].items() if not isinstance(v, list)}
        kept.append({**record, "values": values})
    return kept


@pytest.mark.parametrize("name", EVERY)
def test_factors_and_matrices_agree(name: str) -> None:
    """An update says the same as a product, entry by entry, and as a difference of weights."""
    spec, base, site = DIAGNOSTICS[name], weights(), Site("w", (N, M))
    low, dense, apart = {}, {}, {}
    for number, (left, right) in enumerate(products()):
        low[number] = LowRank(frozen(left), frozen(right), 0.5, (N, M))
        dense[number] = Dense(frozen(0.5 * left @ right))
        apart[number] = Difference(frozen(base + 0.5 * left @ right), frozen(base))

    thin = without_curves(rows(spec, base, low, site))

    assert thin
    assert_alike(thin, without_curves(rows(spec, base, dense, site)))
    assert_alike(thin, without_curves(rows(spec, base, apart, site)))


@pytest.mark.parametrize("name", EVERY)
def test_storage_turned_around(name: str) -> None:
    """A weight stored input × output says the same as one stored output × input."""
    spec, base = DIAGNOSTICS[name], weights()
    plain = {i: Dense(frozen(left @ right)) for i, (left, right) in enumerate(products())}
    turned = {i: Dense(frozen((left @ right).T)) for i, (left, right) in enumerate(products())}
    low = {
        i: LowRank(frozen(left), frozen(right), 1.0, (M, N), transposed=True)
        for i, (left, right) in enumerate(products())
    }

    straight = without_curves(rows(spec, base, plain, Site("w", (N, M))))

    site = Site("w", (M, N), transposed=True)
    assert_alike(straight, without_curves(rows(spec, base.T, turned, site)))
    assert_alike(straight, without_curves(rows(spec, base.T, low, site)))


@pytest.mark.parametrize("name", EVERY)
def test_order_of_models(name: str) -> None:
    """What is said of a model does not depend on the others' order."""
    spec, base, site = DIAGNOSTICS[name], weights(), Site("w", (N, M))
    deltas = {i: Dense(frozen(left @ right)) for i, (left, right) in enumerate(products(3))}
    swapped = {0: deltas[2], 1: deltas[1], 2: deltas[0]}
    names = {0: 2, 1: 1, 2: 0, None: None}

    first, second = (
        gather(name, bind(name, spec.params, {}), rows(spec, base, each, site), LABELS).rows
        for each in (deltas, swapped)
    )
    one = {(e["model"], e["other"]): e for e in first}
    two = {(names[e["model"]], names[e["other"]]): e for e in second}

    for pair, values in one.items():
        back = pair if pair in two else pair[::-1]
        assert_alike(spec.headline(values), spec.headline(two[back]))
    assert len(one) == len(two)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_of_one_matrix_is_that_matrix(name: str) -> None:
    """Totals of a single row show what the row shows, and every sentence is a text."""
    spec, base, site = DIAGNOSTICS[name], weights(), Site("w", (N, M))
    deltas = {i: Dense(frozen(left @ right)) for i, (left, right) in enumerate(products())}
    found = gather(name, bind(name, spec.params, {}), rows(spec, base, deltas, site), LABELS)

    assert len(found.all) == len(found.layers) == len(found.modules) == len(found.rows)
    for whole, row in zip(found.all, found.rows, strict=True):
        assert_alike(spec.headline(whole), spec.headline(row))
        assert (whole["where"], whole["model"], whole["other"]) == (
            "all",
            row["model"],
            row["other"],
        )
    assert len(found.sentences) == len(found.all)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (40, 2), (2, 40)])
def test_thin_matrices(name: str, shape: tuple[int, int]) -> None:
    """Rows, columns and single numbers have results, and totals of them."""
    spec, site = DIAGNOSTICS[name], Site("w", shape)
    random = np.random.default_rng(2)
    base, one, other = random.standard_normal((3, *shape))
    found = rows(spec, base, {0: Dense(frozen(one)), 1: Dense(frozen(other))}, site)

    assert found
    gather(name, bind(name, spec.params, {}), found, LABELS)


@pytest.mark.parametrize("name", EVERY)
def test_a_base_of_zeros(name: str) -> None:
    """A base without directions, and an update that equals what it removes, have results."""
    spec, site = DIAGNOSTICS[name], Site("w", (N, M))
    one, other = (left @ right for left, right in products())
    deltas = {0: Dense(frozen(one)), 1: Dense(frozen(other))}
    for base in (np.zeros((N, M)), -one, np.full((N, M), 3.0)):
        found = rows(spec, base, deltas, site)
        assert found
        gather(name, bind(name, spec.params, {}), found, LABELS)


@pytest.mark.parametrize("name", EVERY)
def test_declarations(name: str) -> None:
    """A summary of one line, known decompositions, and no memory below zero."""
    spec = DIAGNOSTICS[name]

    assert spec.summary.endswith((".", "rule."))
    assert spec.uses <= {
        "base.svd", "base.values", "tuned", "tuned.svd", "tuned.values", "tuned.top", "base.top",
        "delta.svd", "delta.values", "products", "signs", "entries",
    }  # fmt: skip
    assert spec.work(10, 20, 2) >= 0
    assert (spec.per == "site") == (spec.least > 1)
    if spec.base:
        assert spec.per == "model"
