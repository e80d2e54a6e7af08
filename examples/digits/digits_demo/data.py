"""Handwritten digits: splits, and six domains that share one set of ten labels.

An image batch is a float32 array of shape ``[n, 8, 8]`` with values in ``[0, 1]``
(0 background, 1 ink). Every domain is a pure function of a batch and a seed, so the same
seed gives the same pixels every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Seed = int | tuple[int, ...]
Transform = Callable[[Images, Seed], Images]

SIZE = 8
SPLITS = ("train", "val", "test")
UPRIGHT = "upright"
# The scan values of the dataset are counts of set pixels in 4x4 cells: 0 to 16.
_MAX_INTENSITY = 16.0
_SPLIT_FRACTION = 0.2
_NOISE_STD = 0.4
_QUADRANT = 4
# A derangement: no quadrant stays in place.
_QUADRANT_ORDER = (3, 2, 0, 1)


@dataclass(frozen=True)
class Split:
    """One part of the dataset: ``images`` ``[n, 8, 8]`` float32, ``labels`` ``[n]`` int64."""

    images: Images
    labels: Labels


def upright(images: Images, seed: Seed = 0) -> Images:
    """Return the images unchanged: the pretraining domain."""
    return images


def rotate90(images: Images, seed: Seed = 0) -> Images:
    """Rotate every image by 90 degrees counter-clockwise."""
    return np.ascontiguousarray(np.rot90(images, axes=(1, 2)))


def invert(images: Images, seed: Seed = 0) -> Images:
    """Swap ink and background: ``1 - x``."""
    return (np.float32(1.0) - images).astype(np.float32)


def mirror(images: Images, seed: Seed = 0) -> Images:
    """Flip every image left to right."""
    return np.ascontiguousarray(images[:, :, ::-1])


def shuffle_blocks(images: Images, seed: Seed = 0) -> Images:
    """Move the four 4x4 quadrants by one fixed permutation that leaves none in place."""
    n, q = len(images), _QUADRANT
    blocks = images.reshape(n, 2, q, 2, q).transpose(0, 1, 3, 2, 4).reshape(n, 4, q, q)
    moved = blocks[:, list(_QUADRANT_ORDER)].reshape(n, 2, 2, q, q)
    return np.ascontiguousarray(moved.transpose(0, 1, 3, 2, 4).reshape(n, SIZE, SIZE))


def add_noise(images: Images, seed: Seed = 0) -> Images:
    """Add Gaussian noise of standard deviation 0.4 drawn from ``seed``, clipped to [0, 1]."""
    noise = np.random.default_rng(seed).normal(0.0, _NOISE_STD, size=images.shape)
    noisy: Images = np.clip(images + noise.astype(np.float32), 0.0, 1.0)
    return noisy


def downscale(images: Images, seed: Seed = 0) -> Images:
    """Average 2x2 cells to a 4x4 image and repeat each value back to 8x8."""
    n, half = len(images), SIZE // 2
    small = images.reshape(n, half, 2, half, 2).mean(axis=(2, 4))
    back: Images = small.repeat(2, axis=1).repeat(2, axis=2)
    return back


DOMAINS: dict[str, Transform] = {
    "rotated": rotate90,
    "inverted": invert,
    "mirrored": mirror,
    "shuffled": shuffle_blocks,
    "noisy": add_noise,
    "downscaled": downscale,
}


def load_splits(seed: int) -> dict[str, Split]:
    """Split the 1797 bundled digits 60/20/20 into train, val and test, stratified by label.

    ``seed`` decides the split; no image is in two parts.
    """
    digits = load_digits()
    images = (digits.images / _MAX_INTENSITY).astype(np.float32)
    labels = digits.target.astype(np.int64)
    index = np.arange(len(labels))
    held_out = round(_SPLIT_FRACTION * len(labels))
    rest, test = train_test_split(index, test_size=held_out, stratify=labels, random_state=seed)
    train, val = train_test_split(
        rest, test_size=held_out, stratify=labels[rest], random_state=seed
    )
    parts = dict(zip(SPLITS, (train, val, test), strict=True))
    return {name: Split(images[rows], labels[rows]) for name, rows in parts.items()}


def in_domain(split: Split, domain: str, seed: Seed) -> Split:
    """Return ``split`` with its images moved to ``domain`` (or left ``upright``)."""
    transform = upright if domain == UPRIGHT else DOMAINS[domain]
    return Split(transform(split.images, seed), split.labels)
