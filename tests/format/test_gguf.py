"""GGUF files, written and quantized by llama.cpp's own package."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergebench.checkpoints import gguf as ours
from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.gguf import BlockTensor, open_gguf
from mergebench.checkpoints.gguf_header import parse_header
from mergebench.checkpoints.layout import open_checkpoint
from mergebench.checkpoints.reader import FileTensor
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import DTYPES, Array, Tensor, read_all

from .helpers import assert_array, put, random_array, save

LAST = (
    "names are llama.cpp's, and so is the order of rows where its converter permutes them: "
    "combine it only with GGUF files of the same model"
)
PLAIN = ("F16", "BF16", "F32", "F64", "I8", "I16", "I32", "I64")
# What the package can quantize; the other kinds are tested on random bytes.
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
DECODED = tuple(
    kind.name for kind in Kind if kind in gguf.quants._type_traits and kind.name not in PLAIN
)


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, Array]],
    fields: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A file of tensors ``name: (kind, bytes or values, row-major)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama", **options)
    for name, value in (fields or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name, value)
    for name, (kind, value) in tensors.items():
        raw = value.view(np.uint8) if kind == "BF16" else value
        writer.add_tensor(name, raw, raw_dtype=None if kind in native() else Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def native() -> tuple[str, ...]:
    """Kinds that the writer knows from the dtype of an array."""
    return tuple(kind for kind in PLAIN if kind != "BF16")


def quantized(kind: str, rows: int = 3, blocks: int = 5, seed: int = 0) -> tuple[Array, Array]:
    """Blocks of a kind and the float32 they stand for, ``rows`` by ``blocks`` blocks."""
    entries, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    random = np.random.default_rng(seed)
    if kind in QUANTIZED:
        values = random.standard_normal((rows, blocks * entries), np.float32)
        raw = gguf.quants.quantize(values, Kind[kind])
    else:
        # Small bytes keep the scales, which are halves at unlike places, finite.
        raw = random.integers(0, 60, (rows, blocks * size), np.uint8)
    return raw, gguf.quants.dequantize(raw, Kind[kind])


def assert_refused(path: Path, *words: str) -> None:
    """Refused in one message that names the file, holds the words, and says what to do."""
    with pytest.raises(MergebenchError) as caught:
        open_checkpoint(path)
    for word in (str(path), *words):
        assert word in str(caught.value), (word, str(caught.value))
    assert caught.value.fix


# --- values --------------------------------------------------------------------------------------


def test_plain_numbers_are_read_bit_for_bit(tmp_path: Path) -> None:
    """In their own dtype, and in the order of dimensions of torch."""
    arrays = {kind: random_array(kind, (4, 3, 32), at) for at, kind in enumerate(PLAIN)}
    path = write(tmp_path / "a.gguf", {kind: (kind, array) for kind, array in arrays.items()})

    found = open_gguf(path)

    assert list(found.tensors) == list(PLAIN)
    for kind, array in arrays.items():
        tensor = found.tensors[kind]
        assert isinstance(tensor, FileTensor)
        assert (tensor.dtype, tensor.shape) == (kind, (4, 3, 32))
        assert_array(read_all(tensor), array)
    assert found.notes == (f"a.gguf: {LAST}",)


def test_the_dimensions_of_the_file_are_reversed(tmp_path: Path) -> None:
    """Looked up in the bytes: the innermost comes first there."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write(tmp_path / "a.gguf", {"w": ("F32", array)})
    raw = path.read_bytes()
    at = raw.index(b"\1\0\0\0\0\0\0\0w") + 9

    assert struct.unpack_from("<IQQ", raw, at) == (2, 3, 2)
    assert_array(read_all(open_gguf(path).tensors["w"]), array)


def test_a_block_worked_out_by_hand(tmp_path: Path) -> None:
    """Q8_0: a half as scale, then 32 signed bytes."""
    raw = np.frombuffer(struct.pack("<e32b", 0.5, *range(-16, 16)), np.uint8).reshape(1, 34)
    path = write(tmp_path / "a.gguf", {"w": ("Q8_0", raw)})

    tensor = open_gguf(path).tensors["w"]

    assert (tensor.dtype, tensor.shape) == ("F32", (1, 32))
    assert read_all(tensor).tolist() == [[value / 2 for value in range(-16, 16)]]


@pytest.mark.parametrize("kind", DECODED)
def test_every_kind_is_decoded_as_the_package_decodes_it(tmp_path: Path, kind: str) -> None:
    """Whole, and in ranges that start and stop inside of blocks."""
    raw, expected = quantized(kind)
    path = write(tmp_path / "a.gguf", {"one": ("F32", np.ones(3, np.float32)), "w": (kind, raw)})

    found = open_gguf(path)

    tensor = found.tensors["w"]
    assert isinstance(tensor, BlockTensor)
    assert isinstance(tensor, Tensor)
    assert (tensor.dtype, tensor.shape) == ("F32", expected.shape)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected)) > 2
    assert_array(read_all(tensor), expected)
    flat, block = expected.reshape(-1), expected.shape[1] // 5
    edges = [0, 1, block - 1, block, block + 1, 5 * block, 7 * block + 3, flat.size - 1, flat.size]
    for start in edges:
        for stop in edges:
            if start <= stop:
                assert_array(tensor.read(start, stop), flat[start:stop])
    assert found.notes == (f"a.gguf: dequantized from {kind}: w", f"a.gguf: {LAST}")


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 12])
def test_ranges_are_decoded_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Of any number of blocks, into any buffer."""
    monkeypatch.setattr(ours, "_PIECE", piece)
    raw, expected = quantized("Q4_0")
    tensor = open_gguf(write(tmp_path / "a.gguf", {"w": ("Q4_0", raw)})).tensors["w"]
    flat = expected.reshape(-1)

    for start, stop in (
        (0, flat.size),
        (5, 5),
        (5, 6),
        (31, 33),
        (40, 400),
        (flat.size, flat.size),
    ):
        out = np.full(4 * (stop - start) + 3, 7, np.uint8)
        got = tensor.read(start, stop, out)
        assert_array(got, flat[start:stop])
        assert out[-3:].tolist() == [7, 7, 7]
        assert start == stop or np.shares_memory(got, out)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 481), (481, 481)])
def test_a_range_outside_of_the_tensor_is_a_mistake(tmp_path: Path, start: int, stop: int) -> None:
    """Never the bytes of a neighbour."""
    raw, _ = quantized("Q4_0")
    path = write(tmp_path / "a.gguf", {"v": ("Q4_0", raw), "w": ("Q4_0", raw)})

    with pytest.raises(IndexError, match="of 480"):
        open_gguf(path).tensors["v"].read(start, stop)


def test_every_tensor_lies_where_it_should(tmp_path: Path) -> None:
    """Several of unlike kinds, and an alignment of the file's own."""
    parts = {f"w{at}": ("Q5_1", quantized("Q5_1", seed=at)[0]) for at in range(3)}
    parts |= {"odd": ("F32", np.arange(3, dtype=np.float32))}
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name, (kind, raw) in {**parts, "last": parts["w0"]}.items():
        writer.add_tensor(name, raw, raw_dtype=None if kind == "F32" else Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = open_gguf(path).tensors

    for at in range(3):
        assert_array(read_all(found[f"w{at}"]), quantized("Q5_1", seed=at)[1])
    assert read_all(found["odd"]).tolist() == [0, 1, 2]
    assert_array(read_all(found["last"]), quantized("Q5_1")[1])


# --- layouts -------------------------------------------------------------------------------------


def test_a_file_is_a_checkpoint(tmp_path: Path) -> None:
    """Alone, or as the only model of its folder; what was dequantized is told by kind."""
    raw, _ = quantized("Q8_0")
    other, _ = quantized("Q4_0")
    tensors = {f"blk.{at}.attn_q.weight": ("Q8_0", raw) for at in range(3)}
    path = write(
        tmp_path / "model-q8.gguf",
        tensors
        | {"output.weight": ("Q4_0", other), "output_norm.weight": ("F16", np.ones(4, "f2"))},
        {"general.name": "A model", "llama.block_count": 3, "general.file_type": 7},
    )
    put(tmp_path / "tokenizer.json", b"{}")

    for place in (path, tmp_path):
        checkpoint = open_checkpoint(place)
        assert checkpoint.tensors["output_norm.weight"].dtype == "F16"
        assert checkpoint.tensors["output.weight"].dtype == "F32"
        assert dict(checkpoint.metadata) == {
            "general.architecture": "llama",
            "general.name": "A model",
        }
        assert checkpoint.notes == (
            "model-q8.gguf: dequantized from Q4_0: output.weight",
            "model-q8.gguf: dequantized from Q8_0: blk.0.attn_q.weight and 2 more",
            f"model-q8.gguf: {LAST}",
        )
        (about,) = checkpoint.identity
        assert (about["name"], about["size"]) == ("model-q8.gguf", path.stat().st_size)
        assert len(about["header_hash"]) == 32
    assert open_checkpoint(tmp_path).sides() == {"tokenizer.json": tmp_path / "tokenizer.json"}
    save(tmp_path / "model.safetensors", {"safe": np.zeros(1, np.float32)})
    assert list(open_checkpoint(tmp_path).tensors) == ["safe"]


def test_the_header_is_what_identifies_a_file(tmp_path: Path) -> None:
    """A copy has the same; another name of a tensor is another file."""
    array = np.ones(3, np.float32)
    one = write(tmp_path / "one.gguf", {"a": ("F32", array)})
    two = write(tmp_path / "two.gguf", {"b": ("F32", array)})
    copy = put(tmp_path / "copy.gguf", one.read_bytes())

    assert open_gguf(one).header_hash == open_gguf(copy).header_hash
    assert open_gguf(one).header_hash != open_gguf(two).header_hash


# --- refusals ------------------------------------------------------------------------------------


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step is a command; files that are no GGUF need no package to say so."""
    path = write(tmp_path / "a.gguf", {"a": ("F32", np.ones(3, np.float32))})
    monkeypatch.setitem(sys.modules, "gguf", None)

    assert_refused(path, "needs the gguf package", "pip install 'mergebench[gguf]'")
    assert_refused(put(tmp_path / "b.gguf", b"PK\3\4 and so on"), "zip archive", "a GGUF file")


SOUND_FIELDS = {"general.type": "model", "split.count": 1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"general.type": "adapter"}, ("is no model", "got adapter", "as PEFT saved it")),
        ({"general.type": "imatrix"}, ("is no model", "got imatrix")),
        ({"split.count": 3, "split.no": 1}, ("one part", "split.no 1 of 3", "llama-gguf-split")),
    ],
)
def test_what_is_no_whole_model_is_refused(
    tmp_path: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    """Adapters, statistics, parts."""
    tensors = {"a": ("F32", np.ones(3, np.float32))}
    assert list(open_gguf(write(tmp_path / "a.gguf", tensors, SOUND_FIELDS)).tensors) == ["a"]

    assert_refused(write(tmp_path / "b.gguf", tensors, fields), *words)


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    """Rather than read as noise."""
    tensors = {"a": ("F32", np.ones(3, np.float32))}
    path = write(tmp_path / "a.gguf", tensors, endianess=gguf.GGUFEndian.BIG)

    assert_refused(path, "another byte order", "gguf-convert-endian")


def test_a_kind_that_cannot_be_decoded_is_refused(tmp_path: Path) -> None:
    """On opening, by name."""
    entries, size = gguf.GGML_QUANT_SIZES[Kind.Q8_1]
    path = write(tmp_path / "a.gguf", {"w": ("Q8_1", np.zeros((2, size), np.uint8))})

    assert entries == 32
    assert_refused(path, "tensor 'w' is quantized with Q8_1", "llama-quantize")


def _sound(folder: Path) -> bytes:
    raw, _ = quantized("Q4_0")
    return write(
        folder / "sound.gguf", {"w": ("Q4_0", raw), "v": ("F32", np.ones(9, "f4"))}
    ).read_bytes()


def test_cut_files_are_refused_at_every_length(tmp_path: Path) -> None:
    """On opening; nothing is cut in silence."""
    raw = _sound(tmp_path)
    path = tmp_path / "a.gguf"
    header = raw.index(b"\1\0\0\0\0\0\0\0v") + 9 + 4 + 8 + 4 + 8
    # The last tensor ends before the padding does.
    for length in range(1, len(raw) - 28):
        put(path, raw[:length])
        if length < 4:
            assert_refused(path, "of another format", "a GGUF file")
        elif length < header:
            assert_refused(path, "is damaged", f"the file has {length}")
        else:
            assert_refused(path, "the file is truncated: tensor", f"got {length}")


def test_the_header_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    """Every type of field; arrays are passed over, whatever they hold."""
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "uint8": 7,
        "int8": -7,
        "uint16": 300,
        "int16": -300,
        "uint32": 70_000,
        "int32": -70_000,
        "uint64": 1 << 40,
        "int64": -(1 << 40),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "tęxt",
    }.items():
        getattr(writer, f"add_{name}")(name, value)
    # More than one block of reading.
    writer.add_token_list(["token" * 20_000] * 25)
    writer.add_array("numbers", list(range(1000)))
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_uint32("after", 5)
    for at, shape in enumerate(((3,), (2, 3), (2, 3, 4), (1, 2, 3, 4))):
        writer.add_tensor(f"t{at}", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = parse_header(Handle(path), path.stat().st_size)

    fields = dict(header.fields)
    assert fields.pop("general.architecture") == "llama"
    assert (fields.pop("after"), fields.pop("string"), fields.pop("float64")) == (5, "tęxt", 0.1)
    assert fields == {
        "uint8": 7,
        "int8": -7,
        "uint16": 300,
        "int16": -300,
        "uint32": 70_000,
        "int32": -70_000,
        "uint64": 1 << 40,
        "int64": -(1 << 40),
        "float32": 0.5,
        "bool": True,
    }
    assert [(e.name, e.kind, e.shape, e.offset) for e in header.entries] == [
        (t.name, t.tensor_type, tuple(reversed(t.shape.tolist())), t.data_offset)
        for t in gguf.GGUFReader(path).tensors
    ]


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _field(name: bytes, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _info(name: bytes, kind: int, *shape: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)


def _header(fields: list[bytes], infos: list[bytes], version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(infos), len(fields))
    return b"GGUF" + counts + b"".join(fields + infos) + bytes(200)


HEADERS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "version 1": (_header([], [], 1), ("is damaged", "version 1 of the format")),
    "version 99": (_header([], [], 99), ("is damaged", "version 99")),
    "2^40 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), ("the file has 24",)),
    "an array of 2^56 numbers": (
        _header([_field(b"x", 9, struct.pack("<IQ", 0, 1 << 56))], []),
        ("is needed, the file has",),
    ),
    "an array of 2^56 texts": (
        _header([_field(b"x", 9, struct.pack("<IQ", 8, 1 << 56))], []),
        ("is needed, the file has",),
    ),
    "arrays in arrays in arrays": (
        _header([_field(b"x", 9, struct.pack("<IQ", 9, 1) * 5000)], []),
        ("is damaged",),
    ),
    "a field twice": (_header([_field(b"x", 0, b"1")] * 2, []), ("the field 'x' twice",)),
    "a tensor twice": (_header([], [_info(b"w", 0, 1)] * 2), ("the tensor 'w' twice",)),
    "an unknown type": (_header([_field(b"x", 13, b"1")], []), ("unknown type of value 13",)),
    "a name that is no text": (_header([_field(b"\xff", 0, b"1")], []), ("is damaged", "utf-8")),
    "an alignment of nothing": (
        _header([_field(b"general.alignment", 4, bytes(4))], []),
        ("an alignment of 0",),
    ),
    "an alignment in words": (
        _header([_field(b"general.alignment", 8, _text(b"32"))], []),
        ("an alignment of '32'",),
    ),
    "65 dimensions": (_header([], [_info(b"w", 0, *[1] * 65)]), ("65 dimensions of 'w'",)),
    "an unknown kind": (_header([], [_info(b"w", 999, 1)]), ("'w' is of a type", "upgrade gguf")),
    "a row of half a block": (
        _header([], [_info(b"w", 8, 48)]),
        ("no whole blocks of Q8_0", "expected a multiple of 32", "got 48"),
    ),
    "a quantized scalar": (_header([], [_info(b"w", 8)]), ("no whole blocks of Q8_0",)),
    "larger than any file": (
        _header([], [_info(b"w", 0, 1 << 63, 1 << 63)]),
        ("the file is truncated: tensor 'w'",),
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_unsound_headers_are_refused(tmp_path: Path, case: str) -> None:
    """One clear message each, and none that takes forever."""
    content, words = HEADERS[case]

    assert_refused(put(tmp_path / "a.gguf", content), *words)


def test_headers_made_by_hand_are_sound_otherwise(tmp_path: Path) -> None:
    """So the cases above are refused for what they say; a scalar and version 2 among them."""
    fields = [
        _field(b"general.name", 8, _text(b"x")),
        _field(b"general.alignment", 4, b"\x40\0\0\0"),
    ]
    content = _header(fields, [_info(b"w", 8, 32), _info(b"s", 0)], 2)

    found = open_gguf(put(tmp_path / "a.gguf", content))

    assert found.tensors["w"].shape == (32,)
    assert read_all(found.tensors["s"]).tolist() == 0
    assert dict(found.metadata) == {"general.name": "x"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty",)),
        (b"version https://git-lfs.github.com/spec/v1\n", ("is a Git-LFS pointer", "git lfs pull")),
        (b"<html>", ("web page",)),
        (b"text", ("of another format",)),
    ],
)
def test_unsound_files_are_refused(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    """One clear message each."""
    assert_refused(put(tmp_path / "a.gguf", content), *words)


def test_a_file_cut_while_open_names_file_and_tensor(tmp_path: Path) -> None:
    """The header was sound; the bytes went away afterwards."""
    raw, _ = quantized("Q4_0", rows=100)
    path = write(tmp_path / "a.gguf", {"w": ("Q4_0", raw)})
    tensor = open_gguf(path).tensors["w"]
    os.truncate(path, path.stat().st_size - 4000)

    with pytest.raises(MergebenchError, match=r"a\.gguf: the file ends inside tensor 'w'"):
        tensor.read(0, 100 * 160)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_damaged_files_open_or_are_refused(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    """Any bytes of the header changed: nothing but our own errors."""
    raw = bytearray(_sound(tmp_path))
    for at, byte in edits:
        raw[at % (len(raw) - 300)] = byte
    try:
        found = open_gguf(put(tmp_path / "a.gguf", bytes(raw)))
    except MergebenchError:
        return
    for tensor in found.tensors.values():
        assert tensor.dtype in DTYPES
