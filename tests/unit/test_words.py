"""Codes of packed planes: complete, prefix-free, short, and the same for ever."""

from __future__ import annotations

import hashlib
from math import log2

import numpy as np
import pytest

from mergebench.compute.words import CLASSES, LOOK, class_of, code_lengths, code_of, words_of

SOME = (1, 2, 5, 9, 13, 19, 31, 47, 59)


@pytest.mark.parametrize("number", SOME)
def test_words_are_the_leaves_of_a_tree(number: int) -> None:
    """Every row of bits begins with exactly one word."""
    words = words_of(number)

    assert len(words) == 1024
    assert sum(2.0**-length for _, length, _ in words) == 1.0
    found = {format(bits, f"0{length}b")[::-1] for _, length, bits in words}
    assert not any(word[:cut] in found for word in found for cut in range(1, len(word)))


@pytest.mark.parametrize("number", SOME)
def test_codes_fill_the_table_and_find_their_words(number: int) -> None:
    """Each of 4096 looks meets a code, and no code is longer than a look."""
    weights = [weight for weight, _, _ in words_of(number)]
    lengths = code_lengths(weights)

    assert max(lengths) <= LOOK
    assert sum(2.0**-length for length in lengths) == 1.0
    look = code_of(number).look
    sizes = look & np.uint64(15)
    assert sizes.min() >= 1
    assert np.bincount(sizes.astype(int)).tolist() == [
        count * 2 ** (LOOK - size) for size, count in enumerate(np.bincount(lengths))
    ]


@pytest.mark.parametrize("number", range(1, 21))
def test_codes_are_near_the_entropy_of_their_class(number: int) -> None:
    """At most 0.7 % above it, before anything else is stored."""
    share = 2.0 ** (-1 - number / 4)
    words = words_of(number)
    lengths = code_lengths([weight for weight, _, _ in words])
    chances = [
        share ** bits.bit_count() * (1 - share) ** (length - bits.bit_count())
        for _, length, bits in words
    ]
    bits = sum(p * code for p, code in zip(chances, lengths, strict=True))
    entries = sum(p * length for p, (_, length, _) in zip(chances, words, strict=True))
    entropy = -share * log2(share) - (1 - share) * log2(1 - share)

    assert entropy <= bits / entries <= 1.007 * entropy


def test_classes_are_the_nearest() -> None:
    """Half is stored as it is; a quarter is class 4; nothing is the sparsest class."""
    assert [class_of(*each) for each in ((50, 100), (25, 100), (0, 100), (1, 10**9))] == [
        0, 4, CLASSES[-1], CLASSES[-1],
    ]  # fmt: skip


def test_tables_are_those_of_version_1() -> None:
    """Files name a class and nothing else: its tables may never change."""
    digest = hashlib.sha256()
    for number in CLASSES:
        digest.update(code_of(number).look.astype("<u8").tobytes())

    assert digest.hexdigest() == "2cab2154aa6fd766e49fe63f1c408c621ea61b11f14ba4e40ddef6cf3dd4dca8"
