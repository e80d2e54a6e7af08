"""Where entries lie, as tensors tell it to whoever asks ahead: the very bytes that are read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.adapters_zoo.layouts.pieces import Rows as Pieces
from mergebench.adapters_zoo.layouts.tables import Span
from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.distributed import open_dcp
from mergebench.checkpoints.gguf import open_gguf
from mergebench.checkpoints.reader import open_safetensors
from mergebench.checkpoints.rows import MeanRows, Rows
from mergebench.core.delta import LowRank
from mergebench.core.extents import Extent, extents
from mergebench.core.tensor import ArrayTensor, Tensor, size_of
from mergebench.sources import Applied
from tests.helpers.files import write

from .test_distributed import BOXES, write_chunks
from .test_gguf import quantized
from .test_gguf import write as write_gguf

SHAPE = (6, 4)


def lying(tensor: Any, start: int, stop: int) -> bytes:
    """The bytes of the files that are said to hold some entries."""
    found = bytearray()
    for store, offset, length in extents(tensor, start, stop):
        assert isinstance(store, Handle)
        piece = bytearray(length)
        assert store.read_at(memoryview(piece), offset) == length
        found += piece
    return bytes(found)


def assert_lies(tensor: Tensor, start: int, stop: int) -> None:
    """They are those of the entries, in order."""
    assert lying(tensor, start, stop) == tensor.read(start, stop).tobytes()


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Tensor]:
    """Two tensors of one file, one of them with further rows."""
    random = np.random.default_rng(0)
    arrays = {
        "a": random.standard_normal(SHAPE).astype(np.float16),
        "b": random.standard_normal((9, 4)).astype(np.float16),
    }
    return dict(open_safetensors(write(tmp_path / "a.safetensors", arrays)).tensors)


RANGES = [(0, 24), (0, 0), (5, 17), (23, 24)]


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_stored_entries(stored: dict[str, Tensor], start: int, stop: int) -> None:
    """Of a file; below an adapter; and rows of a fused tensor, in the order in which they lie."""
    assert_lies(stored["a"], start, stop)
    factors = ArrayTensor(np.ones((6, 1))), ArrayTensor(np.ones((1, 4)))
    applied = Applied(stored["a"], LowRank(*factors, 1.0, SHAPE))
    assert lying(applied, start, stop) == stored["a"].read(start, stop).tobytes()
    spans = ((stored["b"], Span("b", 3, 2, 0)), (stored["a"], Span("a", 1, 4, 2)))
    assert_lies(Pieces(SHAPE, spans), start, stop)


def test_rows_in_another_order_tell_of_all_or_nothing(stored: dict[str, Tensor]) -> None:
    """Their entries may be anywhere."""
    index = np.array([3, -1, 0, 5, -1, 8])
    every = [*extents(stored["b"], 0, 36), *extents(stored["a"], 0, 24)]
    for tensor in (
        Rows(stored["b"], index, stored["a"]),
        MeanRows((stored["b"], stored["a"]), (index, index), "F16"),
    ):
        assert tensor.shape == SHAPE
        assert list(extents(tensor, 0, 24)) == every
        assert list(extents(tensor, 1, 24)) == []


def test_blocks_of_a_quantized_tensor(tmp_path: Path) -> None:
    """All that hold a wanted entry."""
    raw, values = quantized("Q4_0")
    tensor = open_gguf(write_gguf(tmp_path / "a.gguf", {"w": ("Q4_0", raw)})).tensors["w"]
    size, block = raw.size // 15, values.size // 15

    for start, stop in ((0, values.size), (block + 1, block + 2), (block, 3 * block + 1)):
        first, last = start // block, -(-stop // block)
        assert lying(tensor, start, stop) == raw.reshape(-1)[first * size : last * size].tobytes()


@pytest.mark.parametrize("how", BOXES)
def test_chunks_of_a_distributed_checkpoint(tmp_path: Path, how: str) -> None:
    """The whole is every chunk; rows lie in the chunks that meet them, one after another."""
    tensor = open_dcp(write_chunks(tmp_path, (5, 4, 3), BOXES[how])).tensors["w"]
    chunks = [
        Extent(each.handle, each.offset, each.length)
        for each in tensor.chunks  # type: ignore[attr-defined]
        if size_of(each.sizes)
    ]

    assert list(extents(tensor, 0, 60)) == chunks
    assert list(extents(tensor, 7, 7)) == []
    for chunk in chunks:
        parts = [
            each
            for row in range(5)
            for each in extents(tensor, 12 * row, 12 * row + 12)
            if each.store is chunk.store and chunk.offset <= each.offset < chunk.end
        ]
        assert parts[0].offset == chunk.offset
        assert parts[-1].end == chunk.end
        assert all(one.end == other.offset for one, other in pairwise(parts))
