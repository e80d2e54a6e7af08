"""Layouts: bytes equal to the library's, shards equal to the Hub's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mergebench.checkpoints.placement import TensorSpec, plan_layout
from mergebench.checkpoints.reader import open_safetensors
from mergebench.checkpoints.sizes import parse_size
from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.core.tensor import DTYPES

from .helpers import plan_arrays, put, random_array

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=4).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=300, deadline=None)
@given(
    described=st.dictionaries(
        NAMES,
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=8,
    ),
    metadata=st.one_of(st.none(), st.dictionaries(NAMES, NAMES, min_size=1, max_size=1)),
)
def test_one_file_has_the_bytes_of_the_library(
    described: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None
) -> None:
    """Any names, dtypes and shapes: header, padding, order and offsets."""
    arrays = {name: random_array(dtype, tuple(shape)) for name, (dtype, shape) in described.items()}
    layout = plan_arrays(arrays, metadata=metadata)
    content = bytearray(layout.files[0].size)
    content[: len(layout.files[0].head)] = layout.files[0].head
    for name, place in layout.places.items():
        content[place.offset : place.offset + place.nbytes] = arrays[name].tobytes()

    assert bytes(content) == save(arrays, metadata)


def test_empty_metadata_is_kept_and_absent_metadata_is_not_written() -> None:
    """As the library does; several entries are sorted, so that the bytes do not vary."""
    arrays = {"a": np.zeros(1, np.float32)}

    assert b"__metadata__" not in plan_arrays(arrays, metadata=None).files[0].head
    assert plan_arrays(arrays, metadata={}).files[0].head == save(arrays, {})[:-4]
    assert (
        plan_arrays(arrays, metadata={"b": "1", "a": "2"}).files[0].head
        == plan_arrays(arrays, metadata={"a": "2", "b": "1"}).files[0].head
    )


def test_the_default_metadata_is_what_torch_loaders_want(tmp_path: Path) -> None:
    """``{"format": "pt"}``; a file without tensors is a file too."""
    layout = plan_layout([])

    assert [file.name for file in layout.files] == ["model.safetensors"]
    file = open_safetensors(put(tmp_path / "a.safetensors", layout.files[0].head))
    assert dict(file.metadata) == {"format": "pt"}
    assert layout.index is None


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    limit=st.integers(1, 30),
)
def test_shards_are_those_of_the_hub(sizes: list[int], limit: int) -> None:
    """The same tensors in the same files, larger ones alone."""
    names = [f"t{number}" for number in range(len(sizes))]
    layout = plan_layout(
        [TensorSpec(name, "U8", (size,)) for name, size in zip(names, sizes, strict=True)],
        shard_size=limit,
    )
    state = {
        name: torch.empty(size, dtype=torch.uint8, device="meta")
        for name, size in zip(names, sizes, strict=True)
    }
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=limit)

    assert {name: place.file for name, place in layout.places.items()} == theirs.tensor_to_filename
    assert [file.name for file in layout.files] == sorted(theirs.filename_to_tensors)
    assert layout.tensor_bytes == theirs.metadata["total_size"]
    assert (layout.index is not None) == theirs.is_sharded


def test_places_are_absolute_and_a_layout_is_json() -> None:
    """Two shards, worked out by hand."""
    layout = plan_layout(
        [TensorSpec("b", "F32", (2, 3)), TensorSpec("a", "BF16", (5,)), TensorSpec("c", "F64", ())],
        stem="part",
        shard_size=24,
        metadata=None,
    )
    heads = [len(file.head) for file in layout.files]

    assert heads == [72, 120]
    assert layout.to_json() == {
        "index": "part.safetensors.index.json",
        "metadata": None,
        "files": [
            {"name": "part-00001-of-00002.safetensors", "bytes": 96},
            {"name": "part-00002-of-00002.safetensors", "bytes": 138},
        ],
        "tensors": [
            {"name": "b", "dtype": "F32", "shape": [2, 3],
             "file": "part-00001-of-00002.safetensors", "offset": 72},
            {"name": "c", "dtype": "F64", "shape": [],
             "file": "part-00002-of-00002.safetensors", "offset": 120},
            {"name": "a", "dtype": "BF16", "shape": [5],
             "file": "part-00002-of-00002.safetensors", "offset": 128},
        ],
        "total_bytes": 234,
    }  # fmt: skip
    assert json.loads(json.dumps(layout.to_json())) == layout.to_json()
    assert json.loads(layout.index_bytes()) == {
        "metadata": {"total_parameters": 12, "total_size": 42},
        "weight_map": {
            "a": "part-00002-of-00002.safetensors",
            "b": "part-00001-of-00002.safetensors",
            "c": "part-00002-of-00002.safetensors",
        },
    }
    assert (layout.tensor_bytes, layout.parameters) == (42, 12)


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([("a", "F32"), ("a", "F32")], "'a' would be written twice"),
        ([("__metadata__", "F32")], "named '__metadata__'"),
        ([("a", "F33")], "unknown dtype, got 'F33'; did you mean 'F32'"),
        ([("\ud800", "F32")], "not valid Unicode"),
    ],
)
def test_impossible_tensors_are_refused(specs: list[tuple[str, str]], words: str) -> None:
    """Before anything is written."""
    with pytest.raises(FormatError, match=words):
        plan_layout([TensorSpec(name, dtype, (1,)) for name, dtype in specs])


def test_a_header_that_readers_refuse_is_not_written() -> None:
    """The limit is the library's; the next step is smaller shards."""
    with pytest.raises(MergebenchError, match=r"expected at most 100000000 bytes.*smaller shards"):
        plan_layout([], metadata={"recipe": "x" * 100_000_000})


def test_a_shard_size_of_nothing_is_refused() -> None:
    """Zero and below."""
    with pytest.raises(ParameterError, match="at least 1 byte, got 0"):
        plan_layout([], shard_size=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("5gb", 5_000_000_000), (" 1.5 MB ", 1_500_000), ("2GiB", 2 << 30),
     ("2Gi", 2 << 30), ("300MiB", 300 << 20), ("10K", 10_000), ("1TB", 10**12), ("4096", 4096),
     ("4096B", 4096), (".5KiB", 512), ("9007199254740993", 9007199254740993)],
)  # fmt: skip
def test_sizes_are_parsed(text: str, size: int) -> None:
    """Decimal and binary units, and plain bytes, exactly."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "5XB", "-5GB", "5 G B", "0", "0GB", "0.1", "1e9", "5iB", "nan", "9" * 20, "٥GB"],
)
def test_other_texts_are_no_sizes(text: str) -> None:
    """With examples of what is."""
    with pytest.raises(ParameterError, match="such as 5GB"):
        parse_size(text)
