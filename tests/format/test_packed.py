"""Packed tensors and files: exact, near the entropy, and safe to open."""

from __future__ import annotations

import json
import struct
from math import log2
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mergebench.adapters_zoo.packed_file import (
    Cache,
    Unpacked,
    open_packed_file,
    packed_metadata,
)
from mergebench.adapters_zoo.packing import (
    CODECS,
    ROW,
    Head,
    Packed,
    blocks_of,
    head_bytes,
    open_packed,
    pack_block,
)
from mergebench.adapters_zoo.planes import BLOCK
from mergebench.compute.machine import cores
from mergebench.core.errors import FormatError
from mergebench.core.tensor import DTYPES, ArrayTensor

F32 = np.float32


def packed(coded: Any, head: Head, name: str = "x") -> bytes:
    """The bytes of a packed tensor."""
    flat = np.ascontiguousarray(coded).reshape(-1)
    made = [pack_block(head.codec, flat[start:stop]) for start, stop in blocks_of(flat.size)]
    table = np.array([row for _, row in made], ROW)
    return head_bytes(name, head, table) + b"".join(data for data, _ in made)


def opened(data: bytes, name: str = "x") -> Packed:
    return open_packed("file", name, ArrayTensor(np.frombuffer(data, np.uint8)))


def unpacked(data: bytes, name: str = "x") -> Any:
    tensor = Unpacked(opened(data, name), Cache())
    return tensor.read(0, int(np.prod(tensor.shape))).reshape(tensor.shape)


def signs(shape: Any, density: float, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    kept = random.random(shape) < density
    return np.asarray(kept * np.where(random.random(shape) < 0.5, -1, 1)).astype(np.int8)


SHAPES = ((), (0,), (1,), (7, 9), (0, 3), (255,), (257, 3), (BLOCK,), (BLOCK + 1,), (3, BLOCK - 5))
DENSITIES = (0, 0.0001, 0.02, 0.2, 0.45, 0.5, 0.8, 0.999, 1)


def assert_same_bits(got: Any, expected: Any) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
def test_ternary_tensors_come_back_bit_for_bit(shape: Any, density: float) -> None:
    """At any density and size, in any floating dtype."""
    coded = signs(shape, density)
    for dtype in ("F8_E5M2", "F16", "BF16", "F32", "F64"):
        head = Head("ternary", dtype, shape, (0.0, 0.3125))
        levels = np.array([0, 0.3125, -0.3125], F32).astype(DTYPES[dtype])
        assert_same_bits(unpacked(packed(coded, head)), np.asarray(levels[coded]))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(0, 3000),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    codec=st.sampled_from(["ternary", "one_bit", "two_bit", "sparse", "raw"]),
    data=st.data(),
)
def test_any_tensor_comes_back(
    size: int, density: float, seed: int, codec: str, data: st.DataObject
) -> None:
    """Whole, and any part of it."""
    random = np.random.default_rng(seed)
    coded = signs(size, density, seed)
    side = np.where(random.random(size) < 0.5, -1, 1).astype(np.int8)
    mean, inner, outer = (F32(each) for each in (0.25, 0.5, 1.5))
    if codec == "ternary":
        head, expected = Head(codec, "F32", (size,), (0.25, 0.5)), mean + coded * inner
    elif codec == "one_bit":
        head, coded, expected = Head(codec, "F32", (size,), (0.25, 0.5)), side, mean + side * inner
    elif codec == "two_bit":
        head = Head(codec, "F32", (size,), (0.25, 0.5, 1.5))
        expected = mean + side * np.where(coded != 0, outer, inner)
        coded = (side * np.where(coded != 0, 2, 1)).astype(np.int8)
    elif codec == "sparse":
        head = Head(codec, "F32", (size,), (1.0,), "BF16")
        coded = (random.standard_normal(size) * coded).astype(ml_dtypes.bfloat16)
        expected = np.where(coded != 0, coded.astype(F32), F32(0))
    else:
        head, coded = Head(codec, "F32", (size,)), random.standard_normal(size).astype(F32)
        expected = coded
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))

    made = packed(coded, head)

    assert_same_bits(unpacked(made), expected.astype(F32))
    assert_same_bits(Unpacked(opened(made), Cache()).read(start, stop), expected[start:stop])


@pytest.mark.parametrize("first", [0, 8, 3])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32", "F64"])
@pytest.mark.parametrize("codec", ["ternary", "one_bit", "two_bit", "sparse", "raw"])
def test_entries_land_where_they_are_wanted(codec: str, dtype: str, first: int) -> None:
    """Over borders of blocks and of words, at any byte, and nothing beside them."""
    coded = signs(2 * BLOCK + 100, 0.2)
    numbers = {"ternary": (0.0, 1.0), "one_bit": (0.0, 1.0), "two_bit": (0.0, 1.0, 2.0)}
    if codec == "one_bit":
        coded[coded == 0] = 1
    elif codec == "two_bit":
        coded = np.where(coded == 0, -2, coded).astype(np.int8)
    stored = coded.astype(DTYPES["F8_E4M3" if codec == "sparse" else dtype])
    packable = stored if codec in {"sparse", "raw"} else coded
    head = Head(
        codec, dtype, coded.shape, numbers.get(codec, (0.0,)[: codec == "sparse"]), "F8_E4M3"
    )
    data = packed(packable, head)
    start, stop = BLOCK - 70, 2 * BLOCK + 33
    size = DTYPES[dtype].itemsize * (stop - start)
    room = np.full(first + size + 5, 0xAB, np.uint8)
    tensor = Unpacked(opened(data), Cache())

    got = tensor.read(start, stop, room[first:])

    assert got.tobytes() == coded[start:stop].astype(DTYPES[dtype]).tobytes()
    assert room[first : first + size].tobytes() == got.tobytes()
    assert set(room[:first]) | set(room[first + size :]) == {0xAB}
    with pytest.raises(ValueError, match=f"{stop - start} are needed"):
        tensor.read(start, stop, room[:800])
    with pytest.raises(IndexError, match="of 524388"):
        tensor.read(start, 2 * BLOCK + 101)


@pytest.mark.parametrize(
    ("codec", "dtype"), [("ternary", "BF16"), ("one_bit", "F32"), ("raw", "F64")]
)
def test_few_unpacked_blocks_are_kept(codec: str, dtype: str) -> None:
    """However many a file has: no plan of a merge counts them."""
    coded = signs(40 * BLOCK, 0.05 if codec == "ternary" else 1)
    data = packed(
        coded.astype(DTYPES[dtype]) if codec == "raw" else coded,
        Head(codec, dtype, coded.shape, () if codec == "raw" else (0.0, 1.0)),
    )
    cache = Cache()
    tensor = Unpacked(opened(data), cache)

    assert np.array_equal(tensor.read(0, coded.size).astype(np.int8), coded)

    assert [number for _, number in cache.blocks] == [*range(40 - len(cache.blocks), 40)]
    one = BLOCK * 8 if codec == "raw" else BLOCK // 8 * (1 if codec == "one_bit" else 2)
    assert len(cache.blocks) == cache.held // one
    if codec == "raw":
        assert len(cache.blocks) == min(cores(), 40)
    else:
        assert 1 << 19 < cache.held <= max(1 << 20, (one + 512) * cores())


def test_values_in_eight_bits_are_steps(tmp_path: Path) -> None:
    """Of I8 the stored number counts steps."""
    coded = np.array([0, 3, -127, 0, 1], np.int8)
    head = Head("sparse", "F32", (5,), (0.5,), "I8")

    assert unpacked(packed(coded, head)).tolist() == [0, 1.5, -63.5, 0, 0.5]


@pytest.mark.parametrize("density", [0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.45, 0.5])
def test_size_is_within_three_per_cent_of_the_entropy(density: float) -> None:
    """All of a packed tensor of a million entries, head and table included; and never below."""
    size = 1 << 20
    random = np.random.default_rng(1)
    coded = np.zeros(size, np.int8)
    count = int(density * size)
    places = random.choice(size, count, replace=False)
    coded[places] = np.where(random.random(count) < 0.5, -1, 1)
    entropy = -density * log2(density) - (1 - density) * log2(1 - density) + density

    bits = 8 * len(packed(coded, Head("ternary", "BF16", (1024, 1024), (0.0, 1.0)))) / size

    assert 0.9995 * entropy <= bits <= 1.011 * entropy


def test_uneven_tensors_adapt_block_by_block() -> None:
    """A tensor that is dense in one half and empty in the other costs the dense half only."""
    coded = signs(4 * BLOCK, 0.3)
    whole = len(packed(coded, Head("ternary", "F32", (4 * BLOCK,), (0.0, 1.0))))
    coded[2 * BLOCK :] = 0
    half = len(packed(coded, Head("ternary", "F32", (4 * BLOCK,), (0.0, 1.0))))

    assert half < 0.51 * whole


def test_runs_that_no_code_fits_are_stored_as_they_are() -> None:
    """A plane never takes more than its bits."""
    coded = np.zeros(BLOCK, np.int8)
    coded[: BLOCK // 4] = 1
    data, _ = pack_block("ternary", coded)

    assert len(data) <= 12 + BLOCK // 8 + BLOCK // 32
    head = Head("ternary", "F32", (BLOCK,), (0.0, 1.0))
    assert_same_bits(unpacked(packed(coded, head)), coded.astype(F32))


def test_blocks_are_read_alone() -> None:
    """Reading an entry reads the bytes of its block, and no other's."""
    coded = signs(8 * BLOCK, 0.2)
    data = packed(coded, Head("ternary", "F32", (8 * BLOCK,), (0.0, 1.0)))
    reads: list[tuple[int, int]] = []

    class Watched(ArrayTensor):
        def read(self, start: int, stop: int, out: Any = None) -> Any:
            reads.append((start, stop))
            return super().read(start, stop, out)

    tensor = Unpacked(open_packed("f", "x", Watched(np.frombuffer(data, np.uint8))), Cache())
    reads.clear()

    entry = tensor.read(5 * BLOCK + 3, 5 * BLOCK + 4)

    assert entry[0] == coded[5 * BLOCK + 3]
    assert sum(stop - start for start, stop in reads) < len(data) / 7


@pytest.mark.parametrize("codec", ["ternary", "two_bit", "sparse", "one_bit", "raw"])
def test_every_changed_byte_is_found(codec: str) -> None:
    """In head, table and blocks; a tensor under another name too."""
    coded: Any = np.where(signs(600, 0.2) == 0, np.int8(1), signs(600, 0.2))
    if codec == "ternary":
        coded = signs(600, 0.2)
    if codec in ("sparse", "raw"):
        coded = coded.astype(F32)
    count = CODECS[codec].numbers
    stored = "F32" if codec == "sparse" else "BOOL"
    data = packed(coded, Head(codec, "F32", (20, 30), (1.0,) * count, stored))
    unpacked(data)

    for place in range(len(data)):
        for change in (1, 0x80):
            broken = bytearray(data)
            broken[place] ^= change
            with pytest.raises(FormatError, match="file: x"):
                unpacked(bytes(broken))
    for cut in range(len(data)):
        with pytest.raises(FormatError, match="file: x"):
            unpacked(data[:cut])
    with pytest.raises(FormatError, match="checksum of its head"):
        unpacked(data, "y")


def sealed(start: bytes, name: str = "x") -> bytes:
    """A head with a sound checksum and no table."""
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start + name.encode()))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (struct.pack("<4s4BQ2f", b"TERN", 13, 0, 1, 2, 1 << 60, 0, 1), "cannot hold"),
        (struct.pack("<4s4BQ2f", b"TERN", 13, 0, 1, 2, 1 << 63, 0, 1), "is no shape"),
        (struct.pack("<4s4B8Q2f", b"TERN", 13, 0, 8, 2, *[1 << 32] * 8, 0, 1), "is no shape"),
        (struct.pack("<4s4BQ2f", b"TERN", 13, 0, 1, 2, BLOCK + 1, 0, 1), "cannot hold"),
        (struct.pack("<4s4BQ2f", b"TERN", 13, 0, 1, 2, 0, 0, float("inf")), "not finite"),
        (struct.pack("<4s4BQ", b"TERN", 13, 0, 1, 0, 0), "another size"),
        (struct.pack("<4s4BQ2f", b"WHAT", 13, 0, 1, 2, 0, 0, 1), "no known codec"),
        (struct.pack("<4s4BQ2f", b"TERN", 99, 0, 1, 2, 0, 0, 1), "no known codec"),
        (struct.pack("<4s4B", b"TERN", 13, 0, 255, 2), "no known codec"),
    ],
)
def test_heads_that_promise_too_much(start: bytes, words: str) -> None:
    """Refused from the head alone, with nothing allocated for what it states."""
    with pytest.raises(FormatError, match=words):
        opened(sealed(start))


def block_of(kind: int, ones: int, lengths: tuple[int, ...], rest: bytes) -> bytes:
    """A tensor of one block of 1000 ternary entries with sound checksums."""
    data = struct.pack("<I4H", kind | ones << 8, *lengths) + rest
    table = np.array([(len(data), xxhash.xxh3_64_intdigest(data))], ROW)
    return head_bytes("x", Head("ternary", "F32", (1000,), (0.0, 1.0)), table) + data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (block_of(0, 3, (0, 0, 0, 0), bytes(126)), "another number of bits"),
        (block_of(0, 0, (1, 0, 0, 0), bytes(126)), "ends within a plane"),
        (block_of(0, 0, (0, 0, 0, 0), bytes(60)), "ends within a plane"),
        (block_of(0, 0, (0, 0, 0, 0), bytes(126)), "another number of signs"),
        (block_of(60, 0, (1, 1, 1, 1), bytes(4)), "no known code"),
        (block_of(5, 0, (1, 1, 1, 900), bytes(4)), "no known code"),
        (block_of(5, 0, (0, 1, 1, 1), bytes(3)), "do not fill"),
        (block_of(5, 0, (1, 1, 1, 1), bytes(4)), "does not end"),
        (block_of(5, 0, (900, 1, 1, 1), bytes(903)), "does not end"),
        (block_of(5, 0, (1, 1, 1, 1), b"\xff" * 4), "does not end"),
    ],
)
def test_blocks_that_contradict_themselves(data: bytes, words: str) -> None:
    """Refused although all checksums are sound."""
    with pytest.raises(FormatError, match=rf"file: x: block 0.*{words}"):
        unpacked(data)


def packed_file(of: str | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    coded = signs((30, 40), 0.2)
    data = packed(coded, Head("ternary", "F32", (30, 40), (0.0, 1.0)), "a")
    tensors = {"a": ArrayTensor(np.frombuffer(data, np.uint8))}
    metadata = {"format": "pt", "other": "kept"} | ({} if of is None else {"mergebench": of})
    return tensors, packed_metadata(metadata, tensors, {"scheme": "ternary"})


def test_a_packed_file_stands_for_the_original() -> None:
    """Its metadata come back, and how it was packed."""
    tensors, metadata = packed_file('{"kind": "delta"}')

    found = open_packed_file("f", tensors, metadata)

    assert found.metadata == {
        "format": "pt", "other": "kept", "mergebench": '{"kind": "delta"}',
    }  # fmt: skip
    assert found.made == {"scheme": "ternary"}
    assert found.tensors["a"].shape == (30, 40)


@pytest.mark.parametrize("place", ["other", "format", "name", "made", "of", "version"])
def test_changed_metadata_are_found(place: str) -> None:
    """Whatever the header says is under a checksum."""
    tensors, metadata = packed_file()
    about = json.loads(metadata["mergebench"])
    if place == "name":
        tensors = {"b": tensors["a"]}
    elif place in ("made", "of", "version"):
        about[place] = {"made": {}, "of": "null", "version": 2}[place]
        metadata = {**metadata, "mergebench": json.dumps(about)}
    else:
        metadata = {**metadata, place: "changed"}

    with pytest.raises(FormatError, match=r"checksum of its metadata|unknown version"):
        open_packed_file("f", tensors, metadata)


def test_adapters_that_would_unpack_to_gigabytes_are_refused() -> None:
    """Factors are held whole, so an empty one of any size is no adapter."""
    rows = 1 << 14
    size = rows * BLOCK
    data, row = pack_block("ternary", np.zeros(BLOCK, np.int8))
    table = np.array([row] * rows, ROW)
    blob = head_bytes("a", Head("ternary", "F32", (size,), (0.0, 1.0)), table) + data * rows
    tensors = {"a": ArrayTensor(np.frombuffer(blob, np.uint8))}

    with pytest.raises(FormatError, match="would unpack to 17179869184"):
        open_packed_file("f", tensors, packed_metadata({}, tensors, {}))
