"""Sparse differences: read, written, and everything wrong in them refused."""

from __future__ import annotations

import io
import json
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergebench.adapters_zoo.adapter import ReadOptions, read_adapter
from mergebench.adapters_zoo.kinds.sparse import sparse_metadata
from mergebench.adapters_zoo.scattered import scattered
from mergebench.checkpoints.containers import open_weights
from mergebench.checkpoints.sft import sft_bytes
from mergebench.core.errors import FormatError, MergebenchError, MismatchError
from mergebench.core.tensor import Array, ArrayTensor
from mergebench.sources import Source
from mergebench.sources.opening import open_source
from tests.contract.support import FEW

from .support import read_values, source_of

VALUES = torch.tensor([1.5, -2.0])


def entry(steps: Any = (2, 3), size: Any = (2, 3), values: Any = VALUES) -> dict[str, Any]:
    """One tensor as it is published."""
    return {"size": torch.Size(size), "index_steps": list(steps), "values": values}


def published(folder: Path, diffs: Any, whole: Any = None, **beside: Any) -> Path:
    """A folder with ``pytorch_diff.bin``."""
    folder.mkdir(exist_ok=True)
    torch.save({"diffs": diffs, "abs": whole or {}, **beside}, folder / "pytorch_diff.bin")
    return folder


def opened(path: Path, **options: Any) -> Source:
    """As every command opens it."""
    return open_source(str(path), ReadOptions(**options))


def dense(path: Path) -> dict[str, Array]:
    """Every tensor of an adapter in full."""
    deltas = opened(path).deltas
    assert deltas is not None
    return {
        name: delta.values.read(0, int(np.prod(delta.shape))).reshape(delta.shape)
        for name, delta in deltas.items()
    }


def assert_refused(path: Path, *words: str) -> None:
    """Opening it is an error that names the file and says these words."""
    with pytest.raises(MergebenchError) as caught:
        dense(path)
    for word in (path.name, *words):
        assert word in str(caught.value), (word, str(caught.value))


# Published files


@pytest.mark.parametrize("first", [2, np.int64(2), np.int32(2)], ids=["int", "int64", "int32"])
def test_steps_run_down_the_columns(tmp_path: Path, first: Any) -> None:
    """Of (2, 3) the entries (0, 1) and (1, 2) are at 2 and 5: steps of 2 and 3."""
    path = published(tmp_path / "sft", {"w": entry([first, 3])})
    assert np.array_equal(dense(path)["w"], [[0, 1.5, 0], [0, 0, -2.0]])
    # numpy 1 called its module otherwise.
    data = (path / "pytorch_diff.bin").read_bytes()
    assert (b"numpy._core" in data) is not isinstance(first, int)


def test_the_module_of_numpy_1_is_known(tmp_path: Path) -> None:
    """Files from before numpy 2 name ``numpy.core.multiarray``."""
    path = published(tmp_path / "sft", {"w": entry([np.int64(2), 3])}) / "pytorch_diff.bin"
    raw = io.BytesIO()
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(raw, "w") as after:
        for name in before.namelist():
            data = before.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
                assert b"numpy._core" not in data
            after.writestr(name, data)
    path.write_bytes(raw.getvalue())
    assert np.array_equal(dense(tmp_path / "sft")["w"], [[0, 1.5, 0], [0, 0, -2.0]])


def test_heads_are_replaced_whole(tmp_path: Path) -> None:
    """``abs`` holds new values, of any strides and dtype; storages may be shared."""
    both = torch.arange(12.0).reshape(3, 4)
    whole = {"head.weight": both.T, "head.bias": both[1], "half": both.bfloat16()}
    path = published(tmp_path / "sft", {"w": entry()}, whole)
    got = dense(path)
    assert np.array_equal(got["head.weight"], both.T.numpy())
    assert np.array_equal(got["head.bias"], [4, 5, 6, 7])
    assert got["half"].dtype.name == "bfloat16"
    assert type(opened(path).deltas["head.bias"]).__name__ == "Replacement"  # type: ignore[index]
    assert type(opened(path).deltas["w"]).__name__ == "Dense"  # type: ignore[index]


@given(data=st.data())
@FEW
def test_files_of_any_shape_come_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is written for composable-sft decodes by its rule, and is read again as it was."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shapes = [(7,), (4, 5), (3, 2, 2), (1, 6), (5, 1), (2, 0)]
    diffs, expected = {}, {}
    for index, shape in enumerate(shapes):
        array = random.normal(size=shape).astype(np.float32) * (random.random(shape) < 0.4)
        places = np.flatnonzero(array)
        diffs[f"t{index}"] = (shape, places, array.reshape(-1)[places])
        expected[f"t{index}"] = array
    folder = tmp_path_factory.mktemp("sft")
    (folder / "pytorch_diff.bin").write_bytes(sft_bytes(diffs, {"head": np.ones((2, 2))}))
    # Their rule, in Python's integers.
    loaded = torch.load(folder / "pytorch_diff.bin", weights_only=True)
    for name, each in loaded["diffs"].items():
        array, at = np.zeros(each["size"]), 0
        for step, value in zip(each["index_steps"], each["values"].tolist(), strict=True):
            at += step
            place, left = [], at
            for n in each["size"]:
                place.append(left % n)
                left //= n
            array[tuple(place)] += value
        assert np.array_equal(array, expected[name])
    got = dense(folder)
    assert set(got) == {*expected, "head"}
    for name, array in expected.items():
        assert np.array_equal(got[name], array)


def test_tensors_too_large_for_published_readers() -> None:
    """They count places in 32 bits, so that nothing larger is written for them."""
    places = np.array([2**31], np.int64)
    with pytest.raises(FormatError, match="more entries than readers"):
        sft_bytes({"w": ((2**31 + 1,), places, np.ones(1, np.float32))}, {})


def test_nothing_is_executed(tmp_path: Path) -> None:
    """A name that is not on the list is refused before anything happens."""

    class Call:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "called",))

    path = published(tmp_path / "sft", {"w": entry()}, payload=Call())
    assert_refused(path, "would execute code")
    assert not (tmp_path / "called").exists()
    for name in (b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n"):
        raw = io.BytesIO()
        with zipfile.ZipFile(raw, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + name + b".")
        (path / "pytorch_diff.bin").write_bytes(raw.getvalue())
        assert_refused(path, "would execute code", name.split()[1].decode())


@pytest.mark.parametrize(
    ("diffs", "words"),
    [
        ({"w": entry([2, 0])}, "comes twice"),
        ({"w": entry([2, -1])}, "lies before the one before it"),
        ({"w": entry([-1, 2])}, "lies before"),
        ({"w": entry([2, 4])}, "places from 0 to 5, got 6"),
        ({"w": entry([2, 2**70])}, "lies outside of the tensor"),
        ({"w": entry([2.0, 3])}, "has no index_steps"),
        ({"w": entry([True, 3])}, "has no index_steps"),
        ({"w": entry([2])}, "another number of values than of places"),
        ({"w": entry(values=torch.tensor([1, 2]))}, "do not go with its places"),
        ({"w": entry(values=torch.ones(2, 1))}, "another number of values"),
        ({"w": {"size": (2, 3), "index_steps": [1]}}, "is not made of size, index_steps"),
        ({"w": {**entry(), "size": [2, "3"]}}, "has no shape"),
        ({"w": {**entry(), "size": (2**40, 2**40)}}, "has no shape"),
        ({"w": {**entry(), "size": (0, 2**80)}}, "has no shape"),
        ({"w": {**entry(), "size": (1,) * 9}}, "has no shape"),
        ({3: entry()}, "are no tensors by name"),
        ([], "are no tensors by name"),
        ({"w": 1}, "is not made of"),
        ({"w": {**entry(), "values": [1.0, 2.0]}}, "has no values"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, diffs: Any, words: str) -> None:
    """Places out of order, twice or outside; numbers and shapes that do not fit."""
    assert_refused(published(tmp_path / "sft", diffs), words)


def test_layouts_that_are_not_these(tmp_path: Path) -> None:
    """An earlier layout, an overlap of both parts, files that are cut or no archive."""
    path = published(tmp_path / "sft", {"w": entry()}, body={})
    assert_refused(path, "of another layout", "'body'")
    assert_refused(published(tmp_path / "sft", {"w": entry()}, {"w": VALUES}), "sparse and whole")
    assert_refused(published(tmp_path / "sft", {"w": entry()}, {"v": torch.ones(2).long()}))
    file = published(tmp_path / "sft", {"w": entry()}) / "pytorch_diff.bin"
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], b"\x80\x02}.", b"PK\x03\x04", b"text"):
        file.write_bytes(broken)
        assert_refused(path, "damaged")
    torch.save({"diffs": {"w": entry()}}, file, _use_new_zipfile_serialization=False)
    assert_refused(path, "1.6")
    file.write_bytes(b"")
    assert_refused(path, "is empty")


@pytest.mark.parametrize("values", [VALUES, torch.arange(12.0)[1::8]], ids=["short", "strided"])
def test_numbers_that_are_not_there(tmp_path: Path, values: torch.Tensor) -> None:
    """A storage shorter than its tensor reaches is refused before room is made for it."""
    path = published(tmp_path / "sft", {"w": entry(values=values)}) / "pytorch_diff.bin"
    raw = io.BytesIO()
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(raw, "w") as after:
        for name in before.namelist():
            short = (
                before.read(name)[: 4 * len(values) - 4 * values.is_contiguous()]
                if "/data/" in name
                else before.read(name)
            )
            after.writestr(name, short)
    path.write_bytes(raw.getvalue())
    assert_refused(tmp_path / "sft", "has a shape that its numbers do not fill")


# Files of mergebench


def parts(places: Any, values: Any, shape: Any = (2, 3), **about: Any) -> tuple[Any, Any]:
    """Arrays and metadata of a file with one tensor."""
    arrays = {"w.sparse_indices": np.asarray(places), "w.sparse_values": np.asarray(values)}
    metadata = json.loads(sparse_metadata({"w": shape}, None)["mergebench"])
    return arrays, {"mergebench": json.dumps({**metadata, **about})}


ONES = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("places", "values", "about", "words"),
    [
        ([1, 1], ONES, {}, "comes twice"),
        ([3, 1], ONES, {}, "stands before a smaller one"),
        ([1, 6], ONES, {}, "places from 0 to 5, got 6"),
        ([-1, 2], ONES, {}, "got -1"),
        ([1.0, 2.0], ONES, {}, "no list of whole numbers"),
        ([[1, 2]], ONES[None], {}, "no list of whole numbers"),
        ([1, 2], np.ones(3, np.float32), {}, "do not go with its places"),
        ([1, 2], np.array([1, 2]), {}, "do not go with its places"),
        ([1, 2], ONES, {"version": 2}, "unknown version"),
        ([1, 2], ONES, {"shapes": []}, "names and shapes"),
        ([1, 2], ONES, {"shapes": {"w": [-1]}}, "is no shape"),
        ([1, 2], ONES, {"shapes": {"w": [2**40, 2**40]}}, "is no shape"),
        ([1, 2], ONES, {"shapes": {"w": [0, 2**80]}}, "is no shape"),
        ([1, 2], ONES, {"shapes": {}}, "is in no list"),
        ([1, 2], ONES, {"replaced": ["v"]}, "v is not stored"),
        ([1, 2], ONES, {"replaced": ["w"]}, "both sparse and whole"),
        ([1, 2], ONES, {"replaced": 3}, "`replaced`"),
    ],
)
def test_saved_files_are_checked(places: Any, values: Any, about: Any, words: str) -> None:
    """The same of files in safetensors."""
    arrays, metadata = parts(places, values, **about)
    with pytest.raises(FormatError, match=words):
        read_adapter(source_of(arrays, None, metadata))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@given(data=st.data())
@FEW
def test_any_range_is_read(dtype: Any, data: st.DataObject) -> None:
    """Reading a range gives that range of the dense tensor, across blocks of places."""
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.sampled_from([1, 30, 20_000]))
    array = random.normal(size=size).astype(np.float32) * (random.random(size) < 0.5)
    places = np.flatnonzero(array)
    tensor = scattered("t", (size,), ArrayTensor(places.astype(dtype)), ArrayTensor(array[places]))
    assert tensor.stored == places.size
    for _ in range(10):
        start, stop = sorted(int(n) for n in random.integers(0, size + 1, 2))
        assert np.array_equal(tensor.read(start, stop), array[start:stop])
        room = np.full(4 * (stop - start), 255, np.uint8)
        assert np.array_equal(tensor.read(start, stop, room), array[start:stop])


def test_huge_tensors_cost_what_is_stored() -> None:
    """Two entries of a tensor of 2^50 are read in a few kilobytes, at the ends of int64 too."""
    arrays, metadata = parts([5, 2**50 - 1], ONES, shape=(2**25, 2**25))
    tracemalloc.start()
    delta = read_adapter(source_of(arrays, None, metadata))["w"]
    assert delta.values.read(2**50 - 3, 2**50).tolist() == [0, 0, 1]  # type: ignore[union-attr]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_names_of_the_base() -> None:
    """A prefix more or less is found; two names of one tensor and other shapes are refused."""
    arrays, metadata = parts([1, 4], np.array([0.5, -1], np.float32))
    options = ReadOptions(base_shapes={"model.w": (2, 3), "v": (2,)})
    got = read_values(source_of(arrays, None, metadata), options)
    assert np.array_equal(got["model.w"], [[0, 0.5, 0], [0, -1, 0]])
    with pytest.raises(MismatchError, match="another shape than the base's"):
        read_adapter(source_of(arrays, None, metadata), ReadOptions(base_shapes={"w": (3, 2)}))
    with pytest.raises(MismatchError, match="fits no tensor of the base"):
        read_adapter(source_of(arrays, None, metadata), ReadOptions(base_shapes={"x": (2, 3)}))
    more = {f"model.{name}": array for name, array in arrays.items()}
    both = json.loads(metadata["mergebench"]) | {"shapes": {"w": [2, 3], "model.w": [2, 3]}}
    with pytest.raises(MismatchError, match="second update"):
        read_adapter(source_of({**arrays, **more}, None, {"mergebench": json.dumps(both)}), options)


def test_pickles_are_no_state_dicts(tmp_path: Path) -> None:
    """Only the published name is read so; the same file under another name stays refused."""
    path = published(tmp_path / "sft", {"w": entry([np.int64(2), 3])}) / "pytorch_diff.bin"
    other = path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="would execute code"):
        open_weights(other)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(other, weights_only=True)


def test_saved_file_is_an_adapter(tmp_path: Path) -> None:
    """Recognised by its metadata, whatever it is called."""
    arrays, metadata = parts([1, 4], ONES)
    save_file(arrays, tmp_path / "x.safetensors", metadata)
    source = opened(tmp_path / "x.safetensors")
    assert source.checkpoint is None
    assert source.deltas is not None
    assert source.deltas.metadata["kind"] == "sparse"
