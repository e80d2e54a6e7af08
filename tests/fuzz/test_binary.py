"""Binary files: safetensors, GGUF, PyTorch, DCP, journals."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from mergebench.checkpoints.header import UNREADABLE
from mergebench.checkpoints.reader import open_safetensors
from mergebench.core.errors import FormatError

from .support import CHECKED, assert_holds, broken_bytes, broken_json, documents, files


@pytest.mark.parametrize(
    "target",
    ["whole", "header", "gguf", "pickled", "sparse", "archive", "dcp", "journal", "packed"],
)
@CHECKED
@given(data=st.data())
def test_files_with_other_bytes(target: str, data: st.DataObject) -> None:
    """Cut, changed, repeated: taken or refused, in bounded memory."""
    assert_holds(target, data.draw(broken_bytes(files(target))))


@CHECKED
@given(data=broken_json(documents("header", skip=2)), available=st.integers(0, 12))
def test_headers_broken_field_by_field(data: bytes, available: int) -> None:
    """What is taken, the safetensors library takes too, with the same content."""
    assert_holds("header", struct.pack("<H", available) + data)


# Where the reader is stricter than the library: see docs/safety.md.
_STRICTER = (
    " twice", "not described by the fields", "has an unknown dtype", "mergebench cannot read",
    "larger than any array",
)  # fmt: skip


@CHECKED
@given(data=broken_json(documents("header", skip=2)), available=st.integers(0, 12))
def test_what_the_library_takes_is_taken(tmp_path: Path, data: bytes, available: int) -> None:
    """But for what is stated."""
    content = struct.pack("<Q", len(data)) + data + bytes(available)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    try:
        theirs = dict(deserialize(content))
    except SafetensorError:
        with pytest.raises(FormatError):
            open_safetensors(path)
        return
    try:
        ours = open_safetensors(path)
    except FormatError as error:
        assert any(words in str(error) for words in _STRICTER), str(error)  # noqa: PT017
        return
    assert ours.tensors.keys() == theirs.keys()


# Section "Rejected by the library" of the format's own rules, each as one file.
FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
RULES: dict[str, tuple[str, int]] = {
    "trailing hole": (json.dumps({"a": FOUR}), 8),
    "gap": (json.dumps({"a": FOUR, "b": NEXT | {"data_offsets": [8, 12]}}), 12),
    "overlap": (json.dumps({"a": FOUR, "b": NEXT | {"data_offsets": [2, 6]}}), 6),
    "two names on one range": (json.dumps({"a": FOUR, "b": FOUR}), 4),
    "duplicate key": ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    "metadata that is no text": (json.dumps({"__metadata__": {"a": 1}, "a": FOUR}), 4),
    "truncation": (json.dumps({"a": FOUR}), 3),
    "size overflow": (json.dumps({"a": FOUR | {"shape": [2**62, 2**62]}}), 4),
    "unknown dtype": (json.dumps({"a": FOUR | {"dtype": "F33"}}), 4),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_of_the_library_are_ours(tmp_path: Path, rule: str) -> None:
    """Refused here and there."""
    text, available = RULES[rule]
    content = struct.pack("<Q", len(text)) + text.encode() + bytes(available)
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(SafetensorError):
        deserialize(content)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        open_safetensors(path)


def test_a_header_larger_than_100_mb_is_not_read(tmp_path: Path) -> None:
    """Its length alone refuses it, here and there."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(100_000_100)

    with pytest.raises(SafetensorError, match="header too large"):
        deserialize(path.read_bytes())
    with pytest.raises(FormatError, match="at most 100000000"):
        open_safetensors(path)


def test_dtypes_that_the_library_knows_and_we_do_not(tmp_path: Path) -> None:
    """They are listed, and refused with the way out."""
    sizes = {"F4": (2, 1), "F6_E2M3": (4, 3), "F6_E3M2": (4, 3)}
    for dtype in UNREADABLE:
        entries, size = sizes.get(dtype, (1, 1))
        about = {"dtype": dtype, "shape": [entries], "data_offsets": [0, size]}
        text = json.dumps({"a": about}).encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
        assert [name for name, _ in deserialize(path.read_bytes())] == ["a"]
        with pytest.raises(FormatError, match="mergebench cannot read"):
            open_safetensors(path)
