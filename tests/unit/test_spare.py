"""Room that jobs use one after the other."""

from __future__ import annotations

import numpy as np

from mergebench.compute.spare import Spare


def test_what_was_given_back_is_given_out_again() -> None:
    """Whatever part of it is asked for; two at a time are never the same."""
    spare = Spare(100)
    one, other = spare.take(100), spare.take(7)
    assert not np.shares_memory(one, other)
    assert one.size == other.size == 100
    spare.give(other)
    assert spare.take(3) is other
    assert not np.shares_memory(spare.take(3), other)


def test_what_is_larger_is_not_kept() -> None:
    """So that nothing is held beyond what was planned."""
    spare = Spare(100)
    large = spare.take(101)
    assert large.size == 101
    spare.give(large)
    assert spare.take(101) is not large
    assert spare.take(100).size == 100


def test_blocks_begin_with_a_page() -> None:
    spare = Spare(100)
    for size in (1, 100, 5000, 1 << 20):
        block = spare.take(size)
        assert block.__array_interface__["data"][0] % 4096 == 0
        assert block.size >= size
