"""How tensors are cut, and the memory that it takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.compute.tiles import JOB, TILE, Load, Tiling, fit

LOADS = st.builds(
    Load,
    models=st.integers(1, 12),
    outputs=st.integers(1, 5),
    itemsize=st.sampled_from([4, 8]),
    out_itemsize=st.sampled_from([1, 2, 4, 8]),
    unit=st.sampled_from([1, 7, 4096, 100_000, 5_000_000]),
    fixed=st.integers(0, 1 << 27),
    largest=st.sampled_from([0, 1, 5000, 5_000_000, 1 << 30]),
)


@given(load=LOADS, share=st.floats(1.0, 40.0), workers=st.integers(1, 16))
@settings(max_examples=200, deadline=None)
def test_fit_stays_within_a_sufficient_budget(load: Load, share: float, workers: int) -> None:
    """Any budget from the least upwards is kept, with pieces and workers no larger than asked."""
    _, least = fit(load, 0, workers)
    budget = int(least * share)
    tiling, again = fit(load, budget, workers)
    assert load.bytes(tiling) <= budget
    assert again == least
    assert 1 <= tiling.workers <= workers
    assert 1 <= tiling.tile <= tiling.job
    assert tiling.tile <= TILE
    assert tiling.job <= JOB


@given(load=LOADS, workers=st.integers(1, 16))
@settings(max_examples=100, deadline=None)
def test_least_is_attained(load: Load, workers: int) -> None:
    """The least memory is what the tiling for it takes; with less, nothing smaller is found."""
    tiling, least = fit(load, 0, workers)
    assert load.bytes(tiling) == least
    at_least, _ = fit(load, least, workers)
    assert load.bytes(at_least) <= least
    below, _ = fit(load, least - 1, workers)
    assert load.bytes(below) == least


def test_memory_is_no_concern() -> None:
    """With plenty of memory the preferred sizes and all workers are used."""
    load = Load(3, 1, 4, 2, 1, 1 << 23, 1 << 30)
    assert fit(load, 1 << 40, 5)[0] == Tiling(TILE, JOB, 5)


def test_workers_are_given_up_last() -> None:
    """Jobs and tiles shrink as far as they can before a worker goes."""
    load = Load(3, 1, 4, 2, 1, 0, 1 << 30)
    smallest = fit(load, 0, 1)[0].tile
    budget = load.bytes(Tiling(smallest, smallest, 5))
    assert fit(load, budget, 5)[0] == Tiling(smallest, smallest, 5)
    assert fit(load, budget - 1, 5)[0] == Tiling(smallest, smallest, 4)
    assert fit(load, load.bytes(Tiling(TILE, TILE, 5)), 5)[0] == Tiling(TILE, TILE, 5)


@given(load=LOADS, small=st.integers(1, 1 << 30), large=st.integers(1, 1 << 30))
@settings(max_examples=100, deadline=None)
def test_more_memory_never_means_smaller_pieces(load: Load, small: int, large: int) -> None:
    """A larger budget never gives a tiling that takes less memory."""
    small, large = sorted((small, large))
    assert load.bytes(fit(load, small, 4)[0]) <= load.bytes(fit(load, large, 4)[0]) or (
        load.bytes(fit(load, small, 4)[0]) > small
    )


@given(
    tile=st.integers(1, 50),
    job=st.integers(1, 120),
    size=st.integers(0, 300),
    row=st.integers(0, 40),
    granularity=st.sampled_from(["entry", "row", "tensor"]),
)
@settings(max_examples=200, deadline=None)
def test_pieces_cover_everything_once(
    tile: int, job: int, size: int, row: int, granularity: str
) -> None:
    """Jobs and their tiles follow each other without gap or overlap and cut no unit."""
    rows = size // row if row else 0
    size = rows * row if granularity == "row" else size
    tiling = Tiling(tile, job, 1)
    unit = tiling.unit(granularity, size, row)
    jobs = list(tiling.jobs(size, unit))
    pieces = [piece for start, stop in jobs for piece in tiling.tiles(start, stop, unit)]
    for cuts in (jobs, pieces):
        assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts)][: len(cuts)]
        assert (cuts[-1][1] if cuts else 0) == size
        assert all(start < stop for start, stop in cuts)
        assert all(start % unit == 0 for start, _ in cuts)
        assert all(stop % unit == 0 or stop == size for _, stop in cuts)
    assert all(stop - start <= max(tile, unit) for start, stop in pieces)
    assert all(stop - start <= max(job, tile, unit) for start, stop in jobs)


@pytest.mark.parametrize(
    ("granularity", "size", "row", "expected"),
    [
        ("entry", 12, 4, 1),
        ("row", 12, 4, 4),
        ("row", 0, 0, 1),
        ("tensor", 12, 4, 12),
        ("tensor", 0, 4, 1),
    ],
)
def test_units(granularity: str, size: int, row: int, expected: int) -> None:
    """An entry, a row or the tensor may not be cut; an empty one counts as one entry."""
    assert Tiling().unit(granularity, size, row) == expected
