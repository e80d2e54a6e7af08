"""Reading: positions, threads, descriptors, and every dtype."""

from __future__ import annotations

import errno
import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mergebench.checkpoints import descriptors
from mergebench.checkpoints.descriptors import Handle
from mergebench.checkpoints.reader import open_safetensors
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.tensor import DTYPES, ArrayTensor, Tensor, read_all, read_runs

from .helpers import assert_array, assert_as_library, build, entry, put, random_array, save

GOLDEN = bytes.fromhex(
    "5000000000000000"  # 80 bytes of header
    "7b2276223a7b226474797065223a2246313622"  # {"v":{"dtype":"F16"
    "2c227368617065223a5b335d2c22646174615f6f666673657473223a5b302c365d7d"  # ,"shape":[3], …[0,6]}
    "2c225f5f6d657461646174615f5f223a7b2261223a2262227d7d"  # ,"__metadata__":{"a":"b"}}
    "20"
    "003c00c00038"  # 1, -2, 0.5
)


def test_hand_made_file_is_read_byte_by_byte(tmp_path: Path) -> None:
    """A file given as hexadecimal digits has the values worked out by hand."""
    file = open_safetensors(put(tmp_path / "golden.safetensors", GOLDEN))

    assert dict(file.metadata) == {"a": "b"}
    assert list(file.tensors) == ["v"]
    assert file.tensors["v"].dtype == "F16"
    assert file.tensors["v"].shape == (3,)
    assert file.tensors["v"].offset == 88
    assert file.size == 94
    assert file.header_hash == "00fe7e3e3d17a2125462feef38cec44b"
    assert_array(file.tensors["v"].read(0, 3), np.array([1, -2, 0.5], np.float16))
    assert_array(file.tensors["v"].read(1, 2), np.array([-2], np.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path, dtype: str) -> None:
    """Matrices, scalars and empty tensors of every dtype, written by us."""
    arrays = {
        "matrix": random_array(dtype, (3, 5)),
        "scalar": random_array(dtype, ()),
        "empty": random_array(dtype, (0, 4)),
    }
    file = assert_as_library(save(tmp_path / "a.safetensors", arrays))

    for name, array in arrays.items():
        assert isinstance(file.tensors[name], Tensor)
        assert_array(read_all(file.tensors[name]), array)


def test_a_range_lands_in_the_given_buffer(tmp_path: Path) -> None:
    """With ``out`` no memory is allocated for the entries."""
    values = np.arange(10, dtype=np.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors").tensors["a"]
    out = np.full(23, 7, np.uint8)

    got = tensor.read(4, 9, out)

    assert_array(got, values[4:9])
    assert np.shares_memory(got, out)
    assert out[20:].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    "out",
    [
        np.empty(39, np.uint8),
        np.empty(40, np.int8),
        np.empty((2, 40), np.uint8),
        np.empty(80, np.uint8)[::2],
    ],
)
def test_an_unfit_buffer_is_a_mistake(tmp_path: Path, out: np.ndarray) -> None:
    """Too small, of another dtype, not flat, not contiguous."""
    save_file({"a": np.arange(10, dtype=np.float32)}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors").tensors["a"]

    with pytest.raises(ValueError, match="out"):
        tensor.read(0, 10, out)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11), (11, 11)])
def test_a_range_outside_of_the_tensor_is_a_mistake(tmp_path: Path, start: int, stop: int) -> None:
    """Never the bytes of a neighbour."""
    save_file({"a": np.arange(10), "b": np.arange(10)}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors").tensors["a"]

    with pytest.raises(IndexError, match="of 10"):
        tensor.read(start, stop)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """Whatever the order of the JSON; empty ones stand where their offset is."""
    header = {
        "late": entry("U8", [2], 2, 4),
        "end": entry("F32", [0], 4, 4),
        "early": entry("U8", [2], 0, 2),
        "start": entry("F32", [0, 3], 0, 0),
    }
    file = assert_as_library(put(tmp_path / "a.safetensors", build(header, b"\1\2\3\4")))

    assert list(file.tensors) == ["start", "early", "late", "end"]
    assert file.tensors["late"].read(0, 2).tolist() == [3, 4]


@pytest.mark.parametrize("missing", [(), ("_PREADV",)])
def test_large_reads_are_looped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    """Also without positional reads, as on Windows: one call moves only a few bytes."""
    monkeypatch.setattr(descriptors, "_CALL", 7)
    for name in missing:
        monkeypatch.setattr(descriptors, name, None)
    values = np.arange(100, dtype=np.int32)
    save_file({"a": values}, tmp_path / "a.safetensors")

    tensor = open_safetensors(tmp_path / "a.safetensors").tensors["a"]

    assert_array(tensor.read(3, 99), values[3:99])


@pytest.mark.parametrize("missing", [(), ("_PREADV",)])
def test_threads_read_the_right_bytes_through_few_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    """Thirty files, eight threads, three descriptors: every range is right."""
    gc.collect()
    monkeypatch.setattr(descriptors._POOL, "capacity", 3)
    for name in missing:
        monkeypatch.setattr(descriptors, name, None)
    files = []
    for number in range(30):
        path = tmp_path / f"{number}.safetensors"
        save_file({"a": np.arange(1000, dtype=np.int64) + 1000 * number}, path)
        files.append(open_safetensors(path))

    def look(job: int) -> bool:
        number, start = job * 7 % 30, job * 13 % 990
        got = files[number].tensors["a"].read(start, start + 10)
        return got.tolist() == list(range(1000 * number + start, 1000 * number + start + 10))

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(look, range(2000)))

    assert results == [True] * 2000
    assert descriptors._POOL.open_count() <= 3


def test_a_descriptor_in_use_is_not_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather more descriptors than allowed for a moment than one closed under a reader."""
    monkeypatch.setattr(descriptors._POOL, "capacity", 1)
    first, second = (Handle(put(tmp_path / name, name.encode())) for name in ("one", "two"))

    with first.borrow() as one, second.borrow() as two:
        assert os.pread(one, 3, 0) == b"one"
        assert os.pread(two, 3, 0) == b"two"

    assert descriptors._POOL.open_count() == 1


def test_the_least_recently_used_descriptor_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the oldest: files read in turn keep theirs."""
    monkeypatch.setattr(descriptors._POOL, "capacity", 2)
    one, two, three = (Handle(put(tmp_path / name, b"1")) for name in ("one", "two", "three"))
    for handle in (one, two, one, three):
        handle.stat()

    assert [handle._slot.fd is None for handle in (one, two, three)] == [False, True, False]


def test_descriptors_close_with_the_last_tensor(tmp_path: Path) -> None:
    """A tensor keeps its file open; nothing else does."""
    gc.collect()
    before = descriptors._POOL.open_count()
    save_file({"a": np.arange(3), "b": np.arange(3)}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors").tensors["a"]
    gc.collect()

    assert descriptors._POOL.open_count() == before + 1
    assert tensor.read(0, 3).tolist() == [0, 1, 2]
    del tensor
    gc.collect()
    assert descriptors._POOL.open_count() == before


def test_a_handle_collected_under_the_lock_does_not_block(tmp_path: Path) -> None:
    """The collector may run at any line, also while the pool is locked."""
    gc.collect()
    before = descriptors._POOL.open_count()
    handle = Handle(put(tmp_path / "one", b"1"))
    other = Handle(put(tmp_path / "two", b"2"))
    handle.stat()
    with descriptors._POOL._lock:
        del handle
        gc.collect()

    assert other.stat().st_size == 1
    assert descriptors._POOL.open_count() == before + 1


def test_idle_descriptors_are_given_up_when_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refusal is answered by closing our own idle files."""
    idle = Handle(put(tmp_path / "idle", b"1"))
    idle.stat()
    true_open, refusals = os.open, [errno.EMFILE]

    def refuse_once(path: str, flags: int) -> int:
        if refusals:
            raise OSError(refusals.pop(), "Too many open files")
        return true_open(path, flags)

    monkeypatch.setattr(os, "open", refuse_once)
    assert Handle(put(tmp_path / "next", b"12")).stat().st_size == 2
    assert refusals == []
    assert idle._slot.fd is None


def test_a_file_cut_while_open_names_file_and_tensor(tmp_path: Path) -> None:
    """The header was sound; the bytes went away afterwards."""
    path = tmp_path / "a.safetensors"
    save_file({"weights": np.arange(100)}, path)
    tensor = open_safetensors(path).tensors["weights"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)

    assert tensor.read(0, 99).tolist() == list(range(99))
    with pytest.raises(FormatError) as caught:
        tensor.read(90, 100)
    assert str(path) in str(caught.value)
    assert "'weights'" in str(caught.value)
    assert "expected 80 bytes" in str(caught.value)
    assert "got 72" in str(caught.value)


def test_a_file_exchanged_between_reads_is_noticed(tmp_path: Path) -> None:
    """A descriptor closed for want of room must not come back as another file."""
    path = tmp_path / "a.safetensors"
    save_file({"a": np.arange(100)}, path)
    file = open_safetensors(path)
    file.tensors["a"].handle.close()
    save_file({"a": np.arange(200)}, path)

    with pytest.raises(FormatError, match="changed while it was in use"):
        file.tensors["a"].read(0, 1)


def test_a_change_of_directory_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file opened by a relative path can be opened again from elsewhere."""
    save_file({"a": np.arange(3)}, tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    tensor = open_safetensors(Path("a.safetensors")).tensors["a"]
    tensor.handle.close()
    monkeypatch.chdir("/")

    assert tensor.read(0, 3).tolist() == [0, 1, 2]


def test_a_failing_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's own words, with the file."""
    path = tmp_path / "a.safetensors"
    save_file({"a": np.arange(3)}, path)
    tensor = open_safetensors(path).tensors["a"]

    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(descriptors, "_PREADV", broken)
    with pytest.raises(MergebenchError, match=r"a\.safetensors: cannot be read at byte .*Input"):
        tensor.read(0, 3)


def test_advice_is_taken_without_effect_on_values(tmp_path: Path) -> None:
    """Both kinds, also for an empty range; an unknown kind is a mistake."""
    save_file({"a": np.arange(3000)}, tmp_path / "a.safetensors")
    tensor = open_safetensors(tmp_path / "a.safetensors").tensors["a"]

    tensor.advise(0, 3000, "willneed")
    tensor.advise(5, 5, "willneed")
    tensor.advise(0, 3000, "dontneed")

    assert tensor.read(2998, 3000).tolist() == [2998, 2999]
    with pytest.raises(KeyError):
        tensor.advise(0, 1, "soon")
    with pytest.raises(IndexError):
        tensor.advise(0, 3001, "willneed")


def test_runs_of_entries_side_by_side(tmp_path: Path) -> None:
    """As they are read one by one, whatever reads them; of a file that was cut there are none."""
    array = random_array("BF16", (50, 20))
    file = open_safetensors(save(tmp_path / "a.safetensors", {"w": array}))
    tensor = file.tensors["w"]
    spans = [(0, 3), (999, 1000), (40, 40), (7, 500)]
    expected = np.concatenate([array.reshape(-1)[start:stop] for start, stop in spans])
    out = np.zeros(2 * expected.size + 9, np.uint8)

    assert_array(read_runs(tensor, spans, out), expected)
    assert out[-9:].sum() == 0
    assert_array(read_runs(ArrayTensor(array), spans, out), expected)
    assert_array(read_runs(tensor, spans[-1:], out), expected[-493:])
    with pytest.raises(ValueError, match="out holds"):
        read_runs(tensor, spans, out[:100])
    with pytest.raises(IndexError, match="7:1001 of 1000"):
        read_runs(tensor, [(7, 1001), (0, 1)], out)
    os.truncate(file.path, file.path.stat().st_size - 1)
    last = file.path.stat().st_size - 3
    with pytest.raises(FormatError, match="the file ends inside tensor 'w'") as caught:
        read_runs(tensor, [(7, 500), (998, 1000)], out)
    assert f"expected 4 bytes at byte {last}, got 3" in str(caught.value)
