"""Counter-based random numbers: published vectors, places, and what chance should give."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mergebench.compute.random import as_shares, chosen, draws, stream_of, words

WORD = (1 << 64) - 1
#: Outputs of SplitMix64 as published: Rosetta Code's, and those of Java's SplittableRandom(0).
PUBLISHED = {
    1234567: [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ],
    0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
}
STREAMS = [0, 1, 1234567, WORD, 0x9E3779B97F4A7C15]


def splitmix64(state: int) -> int:
    """One output by Python's integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & WORD
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", PUBLISHED)
def test_words_are_the_published_ones(seed: int) -> None:
    """The first outputs of two seeds are those of other implementations."""
    assert words(seed, 0, len(PUBLISHED[seed])).tolist() == PUBLISHED[seed]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("start", [0, 1, 2, 12345, (1 << 33) - 3])
def test_draws_are_halves_of_words(stream: int, start: int) -> None:
    """Entry i has the lower or upper half of word i // 2, at any place, with wrapping sums."""
    found = draws(stream, start, start + 9)
    assert found.dtype == np.uint32
    for offset, number in enumerate(found.tolist()):
        index = start + offset
        word = splitmix64((stream + (index // 2 + 1) * 0x9E3779B97F4A7C15) & WORD)
        assert number == (word >> 32 if index % 2 else word & 0xFFFFFFFF)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pieces_are_the_whole(size: int) -> None:
    """Cut anywhere, a stream is the same; no entries are no numbers."""
    whole = draws(42, 0, 301)
    parts = [draws(42, begin, min(begin + size, 301)) for begin in range(0, 301, size)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert draws(42, 5, 5).shape == (0,)
    assert np.array_equal(draws(42, 100, 201), whole[100:201])


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_as_many_are_chosen_as_should_be(share: float) -> None:
    """Of a million entries a share is chosen, to five standard deviations, in every stream."""
    size = 1 << 20
    spread = 5 * (share * (1 - share) / size) ** 0.5
    for stream in STREAMS:
        assert abs(float(chosen(stream, 0, size, share).mean()) - share) < spread


def test_everything_and_nothing_can_be_chosen() -> None:
    """A probability of 1 chooses all, and one below 2^-33 none."""
    assert chosen(3, 0, 1000, 1.0).all()
    assert not chosen(3, 0, 1000, 2.0**-34).any()
    assert chosen(3, 0, 5, 1.0).shape == (5,)


def test_a_larger_probability_chooses_more() -> None:
    """What a probability chooses, a larger one does too."""
    masks = [chosen(9, 10, 5000, share) for share in (0.1, 0.4, 0.7, 1.0)]
    for smaller, larger in itertools.pairwise(masks):
        assert not np.any(smaller & ~larger)
        assert smaller.sum() < larger.sum()


def test_shares_are_uniform() -> None:
    """Shares lie in [0, 1), and their moments and neighbours' products are those of chance."""
    size = 1 << 20
    shares = as_shares(draws(stream_of(7, 8, 9), 0, size))
    assert shares.min() >= 0
    assert shares.max() < 1
    for power in (1, 2, 3):
        spread = 5 * (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5 / size**0.5
        assert abs(float((shares**power).mean()) - 1 / (power + 1)) < spread
    centred = shares - 0.5
    for lag in (1, 2, 3, 64, 4096):
        product = float((centred[lag:] * centred[:-lag]).mean())
        assert abs(product) < 5 / 12 / (size - lag) ** 0.5


def test_streams_differ_and_do_not_depend_on_each_other() -> None:
    """Every part of a stream's name matters, their order too; neighbours are uncorrelated."""
    names = [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (2, 1, 0), (0, 12), (0, 1), ()]
    streams = [stream_of(*name) for name in names]
    assert len(set(streams)) == len(names)
    assert all(0 <= stream <= WORD for stream in streams)
    size = 1 << 18
    centred = [as_shares(draws(stream_of(seed, 1, 2), 0, size)) - 0.5 for seed in range(8)]
    for one, other in itertools.combinations(centred, 2):
        assert abs(float((one * other).mean())) < 5 / 12 / size**0.5


def test_names_of_streams_are_fixed() -> None:
    """The numbers that a recipe draws today are those that it draws in later releases."""
    assert stream_of(0, 1, 2) == 0x83341505F293B77D
    assert draws(stream_of(0, 1, 2), 0, 4).tolist() == [
        2976154190,
        1728948328,
        2464125689,
        945053668,
    ]
