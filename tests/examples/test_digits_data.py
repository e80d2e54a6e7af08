import numpy as np
import pytest
from digits_demo.data import (
    DOMAINS,
    SPLITS,
    UPRIGHT,
    add_noise,
    downscale,
    in_domain,
    invert,
    load_splits,
    mirror,
    rotate90,
    shuffle_blocks,
)
from sklearn.datasets import load_digits

# Every pixel of every image has a value of its own, exact in float32.
RAMP = (np.arange(5 * 64, dtype=np.float32) / 512).reshape(5, 8, 8)


def test_the_six_domains_are_the_published_ones():
    assert list(DOMAINS) == [
        "rotated", "inverted", "mirrored", "shuffled", "noisy", "downscaled",
    ]  # fmt: skip


@pytest.mark.parametrize("domain", [UPRIGHT, *DOMAINS])
def test_a_domain_keeps_labels_shape_type_and_range_and_repeats(domain):
    split = load_splits(0)["val"]
    before = split.images.copy()
    once, again = in_domain(split, domain, (3, 1)), in_domain(split, domain, (3, 1))
    np.testing.assert_array_equal(once.images, again.images)
    np.testing.assert_array_equal(once.labels, split.labels)
    np.testing.assert_array_equal(split.images, before)
    assert once.images.shape == split.images.shape
    assert once.images.dtype == np.float32
    assert once.images.min() >= 0
    assert once.images.max() <= 1
    assert np.array_equal(once.images, split.images) == (domain == UPRIGHT)


def test_rotation_turns_counter_clockwise_and_four_make_a_whole():
    turned = rotate90(RAMP)
    for i in range(8):
        for j in range(8):
            np.testing.assert_array_equal(turned[:, i, j], RAMP[:, j, 7 - i])
    np.testing.assert_array_equal(rotate90(rotate90(rotate90(turned))), RAMP)


def test_mirror_swaps_left_and_right_and_undoes_itself():
    np.testing.assert_array_equal(mirror(RAMP)[:, :, 0], RAMP[:, :, 7])
    np.testing.assert_array_equal(mirror(mirror(RAMP)), RAMP)


def test_inversion_sums_to_one_and_undoes_itself():
    np.testing.assert_array_equal(invert(RAMP) + RAMP, np.ones_like(RAMP))
    np.testing.assert_array_equal(invert(invert(RAMP)), RAMP)


def test_block_shuffle_moves_every_quadrant_whole():
    def quadrants(images):
        return [images[:, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]

    moved, still = quadrants(shuffle_blocks(RAMP)), quadrants(RAMP)
    sources = [[k for k, old in enumerate(still) if np.array_equal(new, old)] for new in moved]
    assert sources == [[3], [2], [0], [1]]
    fourth = shuffle_blocks(shuffle_blocks(shuffle_blocks(shuffle_blocks(RAMP))))
    np.testing.assert_array_equal(fourth, RAMP)


def test_noise_has_the_documented_size_and_follows_the_seed():
    grey = np.full((2000, 8, 8), 0.5, np.float32)
    noisy = add_noise(grey, 7)
    inside = (noisy > 0) & (noisy < 1)
    # P(|N(0, 0.4)| < 0.5) = 0.7887: the rest is clipped.
    assert inside.mean() == pytest.approx(0.7887, abs=0.005)
    assert noisy.mean() == pytest.approx(0.5, abs=0.005)
    assert not np.array_equal(noisy, add_noise(grey, 8))


def test_downscaling_writes_the_cell_mean_to_the_whole_cell():
    small = downscale(RAMP)
    for i in range(0, 8, 2):
        for j in range(0, 8, 2):
            mean = RAMP[:, i : i + 2, j : j + 2].mean(axis=(1, 2))
            for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):
                np.testing.assert_array_equal(small[:, i + di, j + dj], mean)
    np.testing.assert_array_equal(downscale(small), small)


def test_splits_are_a_stratified_partition_that_the_seed_decides():
    splits = load_splits(0)
    assert {name: len(splits[name].labels) for name in SPLITS} == {
        "train": 1079, "val": 359, "test": 359,
    }  # fmt: skip
    digits = load_digits()
    everything = sorted(
        (image.astype(np.float32) / 16).tobytes() + bytes([label])
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    parts = sorted(
        image.tobytes() + bytes([label])
        for split in splits.values()
        for image, label in zip(split.images, split.labels, strict=True)
    )
    assert parts == everything
    whole = np.bincount(digits.target) / len(digits.target)
    for split in splits.values():
        share = np.bincount(split.labels) / len(split.labels)
        np.testing.assert_allclose(share, whole, atol=0.003)
    np.testing.assert_array_equal(splits["test"].images, load_splits(0)["test"].images)
    assert not np.array_equal(splits["test"].images, load_splits(1)["test"].images)
