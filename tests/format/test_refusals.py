"""What is refused, and that the safetensors library refuses it too."""

from __future__ import annotations

import json
import os
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergebench.checkpoints.reader import SafetensorsFile, open_safetensors
from mergebench.core.errors import FormatError, MergebenchError

from .helpers import (
    assert_as_library,
    assert_refused,
    build,
    entry,
    library_keys,
    put,
    raw_bytes,
)

ONE = entry("F32", [1], 0, 4)
FOUR = b"\0\0\x80?"


def one_tensor(text: str) -> bytes:
    """A file of one float whose header is ``text``, with ``%s`` standing for its description."""
    return build(text.replace("%s", json.dumps(ONE)), FOUR)


def _zip() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", b"x" * 100)
    return buffer.getvalue()


def _pickle(**options: Any) -> bytes:
    buffer = BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, **options)
    return buffer.getvalue()


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
NAMED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("is empty",)),
    "seven bytes": (b"\2\0\0\0\0\0\0", ("too short", "got 7")),
    "LFS pointer": (LFS, ("is a Git-LFS pointer", "run `git lfs pull`")),
    "web page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", ("web page",)),
    "web page, indented": (b"\n  <HTML><body>404</body></html>", ("web page",)),
    "object store error": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', ("web page",)),
    "zip": (_zip(), ("zip archive", "convert it to safetensors")),
    "torch zip": (_pickle(), ("zip archive", "convert it to safetensors")),
    "torch pickle": (_pickle(_use_new_zipfile_serialization=False), ("pickle", "convert it")),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(16), ("GGUF",)),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(16), ("HDF5",)),
    "index": (b'{"metadata": {}, "weight_map": {}}', ("is a JSON file",)),
    "text": (b"Once upon a time there was a model.", ("not a safetensors file", "100000000")),
    "header above 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", ("100000001",)),
    "header above the file": ((60).to_bytes(8, "little") + b'{"a":', ("ends inside its header",)),
    "cut header": (build({"a": ONE}, FOUR)[:40], ("ends inside its header",)),
    "cut header of 123 bytes": (b"{\0\0\0\0\0\0\0" + b'{"a":', ("ends inside its header",)),
    "cut header of 640 bytes": (b"\x80\2\0\0\0\0\0\0" + b'{"a":', ("ends inside its header",)),
    "no header": (build(b""), ("not sound JSON",)),
    "not UTF-8": (build(b'{"\xff":1}'), ("not UTF-8", "0xff at byte 10")),
    "not JSON": (build('{"a":'), ("not sound JSON",)),
    "byte order mark": (build("\ufeff{}"), ("not sound JSON",)),
    "trailing text": (build("{}x"), ("not sound JSON",)),
    "trailing NUL": (build("{}\0"), ("not sound JSON",)),
    "list": (build("[]"), ("not a JSON object", "list")),
    "deep nesting": (build("[" * 50_000), ("too many nested brackets",)),
    "control character": (build('{"\1":{}}'), ("not sound JSON",)),
    "lone surrogate": (one_tensor('{"\\ud800":%s}'), ("surrogate",)),
    "lone surrogate in metadata": (
        one_tensor('{"__metadata__":{"a":"\\udc00"},"a":%s}'),
        ("surrogate",),
    ),
    "metadata list": (build({"__metadata__": []}), ("__metadata__",)),
    "metadata number": (build({"__metadata__": {"a": 1}}), ("__metadata__", "{'a': 1}")),
    "metadata null value": (build({"__metadata__": {"a": None}}), ("__metadata__",)),
    "metadata twice": (build('{"__metadata__":{},"__metadata__":{}}'), ("'__metadata__' twice",)),
    "field twice": (
        build('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        ("'dtype' twice",),
    ),
    "not a description": (build({"a": 1}), ("tensor 'a'", "got 1")),
    "no offsets": (build({"a": {"dtype": "F32", "shape": [1]}}), ("dtype, shape",)),
    "no dtype": (build({"a": {"data_offsets": [0, 4], "shape": [1]}}, FOUR), ("tensor 'a'",)),
    "no shape": (build({"a": {"data_offsets": [0, 4], "dtype": "F32"}}, FOUR), ("tensor 'a'",)),
    "unknown dtype": (build({"a": entry("F33", [1], 0, 4)}, FOUR), ("'F33'", "'F32'?")),
    "dtype number": (build({"a": ONE | {"dtype": 32}}, FOUR), ("unknown dtype", "got 32")),
    "shape number": (build({"a": ONE | {"shape": 1}}, FOUR), ("no valid shape", "got 1")),
    "shape of text": (build({"a": ONE | {"shape": ["1"]}}, FOUR), ("no valid shape", "['1']")),
    "shape of a float": (build({"a": ONE | {"shape": [1.0]}}, FOUR), ("no valid shape",)),
    "shape of a bool": (build({"a": ONE | {"shape": [True]}}, FOUR), ("no valid shape", "True")),
    "negative shape": (build({"a": ONE | {"shape": [-1]}}, FOUR), ("no valid shape", "[-1]")),
    "negative shapes": (build({"a": ONE | {"shape": [-1, -1]}}, FOUR), ("no valid shape",)),
    "null shape": (build({"a": ONE | {"shape": None}}, FOUR), ("no valid shape", "None")),
    "shape 2^64": (build({"a": ONE | {"shape": [2**64]}}, FOUR), ("larger than any array",)),
    "shape of 30 digits": (build({"a": ONE | {"shape": [10**30]}}, FOUR), ("the number 1000",)),
    "shape of 5000 digits": (build('{"a":{"shape":[' + "9" * 5000 + "]}}"), ("the number 999",)),
    "shape product wraps": (
        build({"a": ONE | {"shape": [2**32, 2**32, 1]}}, FOUR),
        ("larger than any array",),
    ),
    "shape product wraps, empty": (
        build({"a": entry("F32", [2**63, 2, 0], 0, 0)}),
        ("larger than any array",),
    ),
    "bytes wrap": (build({"a": entry("F64", [2**61], 0, 0)}), ("larger than any array",)),
    "offset -0": (build('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', FOUR), ("-0",)),
    "offset NaN": (
        build('{"a":{"dtype":"F32","shape":[1],"data_offsets":[NaN,4]}}', FOUR),
        ("NaN",),
    ),
    "offsets of bools": (build({"a": entry("U8", [1], False, True)}, b"1"), ("data_offsets",)),
    "negative offset": (build({"a": entry("F32", [1], -4, 0)}, FOUR), ("data_offsets",)),
    "three offsets": (build({"a": ONE | {"data_offsets": [0, 4, 4]}}, FOUR), ("[0, 4, 4]",)),
    "offsets reversed": (build({"a": entry("F32", [0], 4, 0)}, FOUR), ("[4, 0]",)),
    "offsets too wide": (
        build({"a": entry("F32", [1], 0, 8)}, FOUR * 2),
        ("expected 4 bytes for F32 [1]", "got 8"),
    ),
    "offsets too narrow": (build({"a": entry("F32", [3], 0, 8)}, FOUR * 2), ("expected 12",)),
    "start not 0": (
        build({"a": entry("F32", [1], 4, 8)}, FOUR * 2),
        ("4 bytes before the first tensor",),
    ),
    "gap": (
        build({"a": ONE, "b": entry("F32", [1], 5, 9)}, FOUR * 3),
        ("1 bytes after 'a'", "expected 'b' to start at byte 4", "got 5"),
    ),
    "overlap": (
        build({"a": ONE, "b": entry("F32", [1], 3, 7)}, FOUR * 2)[:-1],
        ("'a' and 'b' share bytes", "byte 4", "got 3"),
    ),
    "one range, two names": (build({"a": ONE, "b": ONE}, FOUR), ("'a' and 'b' share bytes",)),
    "empty tensor inside another": (
        build({"a": entry("F32", [2], 0, 8), "b": entry("F32", [0], 4, 4)}, FOUR * 2),
        ("'a' and 'b' share bytes",),
    ),
    "empty tensor behind the end": (
        build({"a": ONE, "b": entry("F32", [0], 8, 8)}, FOUR),
        ("4 bytes after 'a'",),
    ),
    "hole at the end": (build({"a": ONE}, FOUR * 2), ("4 bytes at the end",)),
    "trailing byte": (build({"a": ONE}, FOUR + b"\0"), ("1 bytes at the end", "got 5")),
    "data without tensors": (build("{}", b"\0"), ("1 bytes at the end",)),
    "truncated": (build({"a": ONE}, FOUR[:3]), ("truncated", "'a'", "expected 4", "got 3")),
    "huge and truncated": (build({"a": entry("U8", [2**62], 0, 2**62)}), ("truncated", str(2**62))),
}


@pytest.mark.parametrize("case", NAMED)
def test_unsound_files_are_refused_as_the_library_does(tmp_path: Path, case: str) -> None:
    """One clear message each; none of them is anything the library would open."""
    content, words = NAMED[case]
    path = put(tmp_path / "model.safetensors", content)

    assert library_keys(path) is None
    assert_refused(path, *words)


STRICTER: dict[str, tuple[bytes, str]] = {
    "tensor twice": (one_tensor('{"a":%s,"a":%s}'), "'a' twice"),
    "metadata key twice": (build('{"__metadata__":{"a":"1","a":"2"}}'), "'a' twice"),
    "extra field": (build({"a": ONE | {"note": "x"}}, FOUR), "data_offsets, dtype, note, shape"),
    "positional fields": (build({"a": ["F32", [1], [0, 4]]}, FOUR), "tensor 'a'"),
    "dtype object": (build({"a": ONE | {"dtype": {"F32": None}}}, FOUR), "unknown dtype"),
    "65 dimensions": (build({"a": ONE | {"shape": [1] * 65}}, FOUR), "larger than any array"),
    "shape no array has": (build({"a": entry("F32", [0, 2**63, 2], 0, 0)}), "larger than any"),
    "F4": (build({"a": entry("F4", [2], 0, 1)}, b"\0"), "F4, which mergebench cannot read"),
    "F6_E2M3": (build({"a": entry("F6_E2M3", [4], 0, 3)}, b"\0" * 3), "F6_E2M3, which"),
    "F6_E3M2": (build({"a": entry("F6_E3M2", [4], 0, 3)}, b"\0" * 3), "F6_E3M2, which"),
    "F8_E8M0": (build({"a": entry("F8_E8M0", [1], 0, 1)}, b"\0"), "F8_E8M0, which"),
    "FNUZ": (build({"a": entry("F8_E4M3FNUZ", [1], 0, 1)}, b"\0"), "F8_E4M3FNUZ, which"),
    "FNUZ 5": (build({"a": entry("F8_E5M2FNUZ", [1], 0, 1)}, b"\0"), "F8_E5M2FNUZ, which"),
}


@pytest.mark.parametrize("case", STRICTER)
def test_where_we_are_stricter_than_the_library(tmp_path: Path, case: str) -> None:
    """The library opens these; we say why we do not."""
    content, words = STRICTER[case]
    path = put(tmp_path / "model.safetensors", content)

    assert library_keys(path) is not None
    assert_refused(path, words)


ACCEPTED: dict[str, bytes] = {
    "no tensors": build("{}"),
    "padded": build("{}      "),
    "unpadded": one_tensor('{"a":%s}'),
    "leading space": one_tensor(' \n{"a":%s}'),
    "trailing newline": one_tensor('{"a":%s}\r\n\t '),
    "null metadata": build({"__metadata__": None, "a": ONE}, FOUR),
    "empty metadata": build({"__metadata__": {}, "a": ONE}, FOUR),
    "escaped names": one_tensor('{"\\u005f_metadata__":{"a":"b"},"a\\/b":%s}'),
    "surrogate pair": one_tensor('{"\\ud83d\\ude00":%s}'),
    "raw Unicode": one_tensor('{"\u00e9\U0001f600":%s}'),
    "NUL in a name": one_tensor('{"a\\u0000":%s}'),
    "nameless": build({"": ONE}, FOUR),
    "JSON order is not byte order": build(
        {"a": entry("F32", [1], 4, 8), "b": ONE}, FOUR + FOUR[::-1]
    ),
    "misaligned": build({"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}, b"1" + FOUR),
    "empty tensors": build(
        {
            "a": entry("F32", [2], 0, 8),
            "b": entry("F32", [0], 0, 0),
            "c": entry("I8", [3, 0], 0, 0),
            "d": entry("F64", [0], 8, 8),
        },
        FOUR * 2,
    ),
    "only empty tensors": build({"a": entry("F32", [0], 0, 0), "b": entry("F32", [0], 0, 0)}),
    "wide and empty": build({"a": entry("F32", [2**31, 0], 0, 0)}),
    "scalar": build({"a": entry("F32", [], 0, 4)}, FOUR),
    "64 dimensions": build({"a": entry("F32", [1] * 64, 0, 4)}, FOUR),
    "header of 128 bytes": build(json.dumps({"a": ONE}).ljust(128), FOUR),
    "header of 640 bytes": build(json.dumps({"a": ONE}).ljust(640), FOUR),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_files_are_read_as_the_library_reads_them(tmp_path: Path, case: str) -> None:
    """Accepted by the library, so accepted here, with the same bytes."""
    assert_as_library(put(tmp_path / "model.safetensors", ACCEPTED[case]))


def test_misaligned_values_are_right(tmp_path: Path) -> None:
    """A float that starts at an odd byte."""
    path = put(tmp_path / "a.safetensors", ACCEPTED["misaligned"])

    assert open_safetensors(path).tensors["b"].read(0, 1).tolist() == [1.0]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Folders, pipes (without waiting for a writer), missing and impossible paths."""
    os.mkfifo(tmp_path / "pipe.safetensors")

    assert_refused(tmp_path, "not a regular file")
    assert_refused(tmp_path / "pipe.safetensors", "not a regular file")
    with pytest.raises(MergebenchError, match="No such file"):
        open_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(MergebenchError, match="null"):
        open_safetensors(Path("a\0b.safetensors"))


NUMBERS = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**25]),
    st.booleans(),
    st.none(),
    st.floats(),
    st.just("1"),
)
NAMES = st.one_of(st.sampled_from(["a", "b", "__metadata__", ""]), st.text(max_size=3))
DESCRIPTIONS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "C64", "F4", "F99", None, 7]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    },
    optional={"more": NUMBERS},
)
HEADERS = st.dictionaries(
    NAMES, st.one_of(DESCRIPTIONS, st.dictionaries(NAMES, NUMBERS), NUMBERS), max_size=3
)


@st.composite
def consistent(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A sound header and its data."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(
        st.lists(st.text(max_size=3).filter(lambda n: n != "__metadata__"), max_size=4, unique=True)
    ):
        item, dtype = draw(st.sampled_from([(1, "U8"), (2, "BF16"), (4, "F32"), (8, "C64")]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        length = item
        for extent in shape:
            length *= extent
        header[name] = entry(dtype, shape, position, position + length)
        position += length
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3)))
    return header, draw(st.binary(min_size=position, max_size=position))


def _open(path: Path) -> SafetensorsFile | None:
    try:
        return open_safetensors(path)
    except FormatError:
        return None


def assert_never_looser(path: Path) -> None:
    """Nothing but a FormatError comes out, and whatever opens here opens in the library."""
    ours = _open(path)
    if ours is not None:
        assert library_keys(path) == sorted(ours.tensors)
        assert sum(len(raw_bytes(tensor)) for tensor in ours.tensors.values()) <= ours.size


FUZZ = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(made=consistent(), escape=st.booleans())
def test_sound_headers_are_read(
    tmp_path: Path, made: tuple[dict[str, Any], bytes], escape: bool
) -> None:
    """Any sound file, its names escaped or raw, is read as the library reads it."""
    header, data = made
    text = json.dumps(header, ensure_ascii=escape)
    path = put(tmp_path / "a.safetensors", build(text, data))

    assert library_keys(path) == sorted(header.keys() - {"__metadata__"})
    assert sorted(open_safetensors(path).tensors) == library_keys(path)


@FUZZ
@given(header=HEADERS, data=st.binary(max_size=12))
def test_random_headers_never_crash(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    """Fields of the right names with wild values."""
    assert_never_looser(put(tmp_path / "a.safetensors", build(json.dumps(header), data)))


@FUZZ
@given(
    made=consistent(),
    edits=st.lists(
        st.tuples(
            st.integers(0, 400),
            st.sampled_from(["set", "insert", "delete"]),
            st.one_of(st.sampled_from(list(b'{}[]",:0123456789-\\ue. \n')), st.integers(0, 255)),
        ),
        min_size=1,
        max_size=6,
    ),
    fix_length=st.booleans(),
)
def test_mutated_files_never_crash(
    tmp_path: Path,
    made: tuple[dict[str, Any], bytes],
    edits: list[tuple[int, str, int]],
    fix_length: bool,
) -> None:
    """Bytes of a sound file changed, inserted, removed; with and without a matching length."""
    header, data = made
    raw = bytearray(json.dumps(header, ensure_ascii=False).encode())
    if not fix_length:
        raw = bytearray(build(bytes(raw), data))
    for at, what, byte in edits:
        place = at % (len(raw) + 1)
        raw[place : place + (what != "insert")] = b"" if what == "delete" else bytes([byte])

    content = build(bytes(raw), data) if fix_length else bytes(raw)
    assert_never_looser(put(tmp_path / "a.safetensors", content))
