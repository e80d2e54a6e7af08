"""Streamed sums and inner products: exact places of blocks, whatever the tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.compute.gram import BLOCK, block_sums, combined, gram, row_inner_products
from mergebench.core.errors import MergebenchError
from mergebench.core.site import Site
from mergebench.merge.at import At


@dataclass
class Cut:
    """A sweep over a stack cut at given places."""

    stack: Any
    places: tuple[int, ...] = ()

    @property
    def models(self) -> int:
        return int(self.stack.shape[0])

    @property
    def size(self) -> int:
        return int(self.stack.shape[1])

    def __call__(self, visit: Callable[[Any, At], Any]) -> Iterator[tuple[At, Any]]:
        ends = [0, *self.places, self.size]
        for start, stop in pairwise(ends):
            if stop > start:
                at = At(Site("w", (self.size,)), start, stop)
                yield at, visit(self.stack[:, start:stop], at)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_cut_changes_a_bit(data: st.DataObject) -> None:
    """Tiles of any size, through the middle of blocks and at their ends, give the same bits."""
    size = data.draw(st.sampled_from([1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    stack = random.normal(size=(3, size)).astype(np.float32)
    near = [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]
    place = st.one_of(st.integers(0, size), st.sampled_from(near).map(lambda at: min(at, size)))
    cuts = tuple(sorted(data.draw(st.lists(place, max_size=6))))
    whole = gram(Cut(stack))
    assert gram(Cut(stack, cuts)).tobytes() == whole.tobytes()
    exact = stack.astype(np.longdouble) @ stack.astype(np.longdouble).T
    assert np.allclose(whole, exact.astype(np.float64), rtol=1e-14, atol=1e-12)


def test_empty_tensors_have_products_of_zero() -> None:
    """Nothing sums to zero, of the right shape."""
    assert np.array_equal(gram(Cut(np.zeros((2, 0), np.float32))), np.zeros((2, 2)))


def test_sums_that_are_not_finite_are_refused() -> None:
    """Products beyond float64 are an error that names the tensor."""
    with pytest.raises(MergebenchError, match=r"^w: "):
        gram(Cut(np.full((2, 3), 1e200)))


def test_torch_gives_the_same_with_gradients() -> None:
    """On torch tensors the sum is torch's, and has a derivative."""
    stack = np.arange(6.0).reshape(2, 3)
    tensor = torch.tensor(stack, requires_grad=True)
    found = block_sums(Cut(tensor), lambda part: part.sum(dim=2).T)
    found.sum().backward()
    assert found.tolist() == [3.0, 12.0]
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [[1.0] * 3] * 2


def test_products_of_rows() -> None:
    """Rows of 2: [1, 2 | 3, 4] and [5, 6 | 7, 8]."""
    found = row_inner_products(np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32), 2)
    assert found.tolist() == [[[5, 17], [17, 61]], [[25, 53], [53, 113]]]


@pytest.mark.parametrize("pivot", [0, 1])
def test_averages_leave_equal_entries_alone(pivot: int) -> None:
    """Shares .7 and .3 of equal numbers are those numbers, to the last bit."""
    random = np.random.default_rng(1)
    line = random.normal(size=1000).astype(np.float32)
    stack = np.stack([line, line])
    assert combined(stack, np.array([0.7, 0.3]), pivot).tobytes() == line.tobytes()
    plain = np.float32(0.7) * line + np.float32(0.3) * line
    assert plain.tobytes() != line.tobytes()


def test_shares_may_differ_between_rows() -> None:
    """One row is averaged, the other summed."""
    stack = np.array([[[1.0, 2.0], [1.0, 2.0]], [[3.0, 4.0], [3.0, 4.0]]])
    found = combined(stack, np.array([[0.5, 1.0], [0.5, 2.0]]))
    assert found.tolist() == [[[2, 3], [7, 10]]]
