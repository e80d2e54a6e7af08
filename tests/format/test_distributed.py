"""Folders of ``torch.distributed.checkpoint``, written by torch in one process."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mergebench.checkpoints.distributed import open_dcp
from mergebench.checkpoints.layout import open_checkpoint
from mergebench.checkpoints.metadata import parse_metadata
from mergebench.checkpoints.torch_files import pickle_globals
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.tensor import DTYPES, Array, Tensor, read_all
from tests.helpers.running import assert_done, python

from .helpers import assert_array, put, random_array, save
from .torch_support import ANONYMOUS, Attack, as_torch

Box = tuple[tuple[int, ...], torch.Tensor]


def write(folder: Path, saved: dict[str, Any]) -> Path:
    """A folder as torch writes it without a process group."""
    with warnings.catch_warnings():
        # It says so on every call, and that is what is wanted.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save(saved, checkpoint_id=folder, no_dist=True)
    return folder


def write_chunks(folder: Path, shape: tuple[int, ...], boxes: list[Box], name: str = "w") -> Path:
    """A folder as several ranks write it: one tensor, every box in a file with others."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks, where = [], {}
    for at, (start, value) in enumerate(boxes):
        path = folder / f"__{at % 2}_0.distcp"
        with path.open("ab") as file:
            offset = file.tell()
            torch.save(value, file)
            length = file.tell() - offset
        chunks.append(ChunkStorageMetadata(torch.Size(start), value.shape))
        where[MetadataIndex(name, torch.Size(start), at)] = _StorageInfo(path.name, offset, length)
    properties = TensorProperties(dtype=boxes[0][1].dtype)
    entry = TensorStorageMetadata(properties, torch.Size(shape), chunks)
    put_metadata(folder, Metadata({name: entry}, None, where))
    return folder


def put_metadata(folder: Path, value: Any) -> Path:
    """Write ``.metadata``."""
    return put(folder / ".metadata", pickle.dumps(value))


def get_metadata(folder: Path) -> Metadata:
    """Read ``.metadata`` of our own making."""
    return pickle.loads((folder / ".metadata").read_bytes())


def assert_every_range(tensor: Tensor, expected: Array) -> None:
    """Every start and stop, with and without a buffer."""
    flat = expected.flatten()
    assert tensor.shape == expected.shape
    assert_array(read_all(tensor), np.ascontiguousarray(expected))
    for start in range(flat.size + 1):
        for stop in range(start, flat.size + 1):
            assert_array(tensor.read(start, stop), flat[start:stop])
            out = np.full((stop - start) * flat.itemsize + 1, 7, np.uint8)
            got = tensor.read(start, stop, out)
            assert_array(got, flat[start:stop])
            assert out[-1] == 7
            assert start == stop or np.shares_memory(got, out)


def assert_refused(folder: Path, *words: str) -> None:
    """Refused in one message that names the folder, holds the words, and says what to do."""
    with pytest.raises(MergebenchError) as caught:
        open_checkpoint(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value), (word, str(caught.value))
    assert caught.value.fix


# --- values --------------------------------------------------------------------------------------


def test_every_dtype_is_read_bit_for_bit(tmp_path: Path) -> None:
    """Matrices, scalars and empty tensors, as torch writes them."""
    arrays = {
        f"{dtype}.{kind}": (dtype, random_array(dtype, shape))
        for dtype in DTYPES
        for kind, shape in {"matrix": (3, 5), "scalar": (), "empty": (0, 4)}.items()
    }
    write(tmp_path / "d", {name: as_torch(array) for name, (_, array) in arrays.items()})

    checkpoint = open_checkpoint(tmp_path / "d")

    assert sorted(checkpoint.tensors) == sorted(arrays)
    for name, (dtype, array) in arrays.items():
        assert isinstance(checkpoint.tensors[name], Tensor)
        assert checkpoint.tensors[name].dtype == dtype
        assert_array(read_all(checkpoint.tensors[name]), array)
    assert checkpoint.notes == ()


def test_strided_tensors_have_their_values(tmp_path: Path) -> None:
    """Torch keeps the strides of what it saves."""
    cube = torch.arange(24.0).reshape(2, 3, 4)
    saved = {"turned": cube.permute(2, 0, 1), "part": cube[:, 1:, ::2], "row": cube[1, :, 2]}
    tensors = open_dcp(write(tmp_path / "d", saved)).tensors

    for name, value in saved.items():
        assert_every_range(tensors[name], value.numpy())


WHOLE = torch.arange(60.0).reshape(5, 4, 3)
BOXES: dict[str, list[Box]] = {
    "one": [((0, 0, 0), WHOLE)],
    "rows": [((0, 0, 0), WHOLE[:2].clone()), ((2, 0, 0), WHOLE[2:3].clone()),
             ((3, 0, 0), WHOLE[3:].clone())],
    "rows, last first": [((3, 0, 0), WHOLE[3:].clone()), ((0, 0, 0), WHOLE[:3].clone())],
    "an empty rank": [((0, 0, 0), WHOLE.clone()), ((5, 0, 0), WHOLE[5:].clone())],
    "columns": [((0, 0, 0), WHOLE[:, :1].clone()), ((0, 1, 0), WHOLE[:, 1:].clone())],
    "grid": [((0, 0, 0), WHOLE[:2, :3].clone()), ((0, 3, 0), WHOLE[:2, 3:].clone()),
             ((2, 0, 0), WHOLE[2:, :3].clone()), ((2, 3, 0), WHOLE[2:, 3:].clone())],
    "last dimension": [((0, 0, at), WHOLE[..., at : at + 1].clone()) for at in range(3)],
    "strided rows": [((0, 0, 0), WHOLE[:3].permute(2, 1, 0).contiguous().permute(2, 1, 0)),
                     ((3, 0, 0), WHOLE[3:].clone())],
    "mixed": [((0, 0, 0), WHOLE[:1].clone()), ((1, 0, 0), WHOLE[1:, :2].clone()),
              ((1, 2, 0), WHOLE[1:, 2:].clone())],
}  # fmt: skip


@pytest.mark.parametrize("how", BOXES)
def test_chunks_of_several_ranks_are_put_together(tmp_path: Path, how: str) -> None:
    """However the tensor was cut, every range is that of the whole."""
    tensors = open_dcp(write_chunks(tmp_path, (5, 4, 3), BOXES[how])).tensors

    assert_every_range(tensors["w"], WHOLE.numpy())


def test_torch_reads_the_chunks_made_here_alike(tmp_path: Path) -> None:
    """So the folders above are what torch writes and not only what we read."""
    folder = write_chunks(tmp_path, (5, 4, 3), BOXES["grid"])
    target = {"w": torch.zeros(5, 4, 3)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(target, checkpoint_id=folder, no_dist=True)

    assert torch.equal(target["w"], WHOLE)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7), (7, 7)])
def test_a_range_outside_of_the_tensor_is_a_mistake(tmp_path: Path, start: int, stop: int) -> None:
    """Never the bytes of a neighbour."""
    tensor = open_dcp(write(tmp_path / "d", {"a": torch.zeros(6), "b": torch.zeros(6)})).tensors[
        "a"
    ]

    with pytest.raises(IndexError, match="of 6"):
        tensor.read(start, stop)


def test_only_the_metadata_are_read_on_opening(tmp_path: Path) -> None:
    """And of the files, only the bytes that are asked for."""
    folder = write_chunks(tmp_path, (5, 4, 3), BOXES["rows"])
    data = folder / "__1_0.distcp"
    data.write_bytes(b"\xff" * data.stat().st_size)

    tensor = open_dcp(folder).tensors["w"]

    assert tensor.read(0, 24).tolist() == list(range(24))
    with pytest.raises(FormatError, match=r"__1_0.distcp: chunk of 'w' at byte 0: is damaged"):
        tensor.read(20, 30)


MEASURE = (
    ANONYMOUS
    + """
from mergebench.checkpoints.layout import open_checkpoint

small, large = sys.argv[1:]
open_checkpoint(Path(small)).tensors["a"].read(0, 3)
before = anonymous()
tensor = open_checkpoint(Path(large)).tensors["a"]
total = sum(float(tensor.read(at, at + 1000).sum()) for at in range(0, 50_000_000, 5_000_000))
print(anonymous() - before, total)
"""
)


def test_ranges_of_a_large_tensor_take_no_memory(tmp_path: Path) -> None:
    """200 MB on disk, a few numbers in memory."""
    write(tmp_path / "small", {"a": torch.ones(3)})
    write(tmp_path / "large", {"a": torch.ones(50_000_000)})

    ran = assert_done(python(MEASURE, tmp_path / "small", tmp_path / "large", cwd=tmp_path))
    grown, total = ran.out.split()

    assert float(total) == 10_000
    assert int(grown) < 20_000_000


# --- names ---------------------------------------------------------------------------------------


def values(*names: str) -> dict[str, torch.Tensor]:
    """A vector for every name."""
    return {name: torch.arange(3.0) + 10 * at for at, name in enumerate(names)}


def test_optimizer_states_and_counters_are_left_out(tmp_path: Path) -> None:
    """Nested as trainers nest them; a wrapper around all weights is removed, and told."""
    saved = {
        "model": values("model.norm.weight", "lm_head.weight"),
        "optimizer": {"state": {"w": {"exp_avg": torch.zeros(3)}}, "lr": 0.1},
        "step": 7,
    }
    found = open_dcp(write(tmp_path / "d", saved))

    assert sorted(found.tensors) == ["lm_head.weight", "model.norm.weight"]
    assert found.tensors["lm_head.weight"].read(0, 3).tolist() == [10, 11, 12]
    assert found.notes == (
        "d: left out the optimizer's state, optimizer.state.w.exp_avg and 1 more",
        "d: left out what is no tensor: step",
        "d: the weights are those under 'model'",
    )


@pytest.mark.parametrize("outer", ["module", "state_dict", "model_state_dict"])
def test_other_wrappers_are_removed_too(tmp_path: Path, outer: str) -> None:
    """Where every tensor stands under it."""
    found = open_dcp(write(tmp_path / "d", {outer: {"layers": [values("w"), values("w")]}}))

    assert sorted(found.tensors) == ["layers.0.w", "layers.1.w"]
    assert found.notes == (f"d: the weights are those under {outer!r}",)


def test_the_wrappers_of_a_stateful_app_are_removed(tmp_path: Path) -> None:
    """As torch's recipes save it."""
    saved = {"app": {"model": values("w"), "optim": {"state": {"w": values("exp_avg")}}}}
    found = open_dcp(write(tmp_path / "d", saved))

    assert list(found.tensors) == ["w"]
    assert found.notes == (
        "d: left out the optimizer's state, app.optim.state.w.exp_avg",
        "d: the weights are those under 'app.model'",
    )


@pytest.mark.parametrize(
    "saved",
    [
        # A name that begins so is no nesting: every tensor of a Llama without a head has it.
        values("model.norm.weight", "model.embed_tokens.weight"),
        {"model": values("a"), "teacher": values("a")},
        {"model": values("a"), "step": torch.zeros(())},
        {"encoder": values("a"), "decoder": values("a")},
    ],
)
def test_names_stay_where_no_wrapper_holds_all_tensors(tmp_path: Path, saved: Any) -> None:
    """They are torch's flattened ones."""
    found = open_dcp(write(tmp_path / "d", saved))

    assert found.notes == ()
    assert sorted(found.tensors) == sorted(get_metadata(tmp_path / "d").state_dict_metadata)


def test_metadata_without_a_plan_nest_nothing(tmp_path: Path) -> None:
    """Older writers left it out, and so may others."""
    folder = write_chunks(tmp_path, (3,), [((0,), torch.arange(3.0))], name="model.w")

    assert list(open_dcp(folder).tensors) == ["model.w"]


def test_a_flat_optimizer_state_is_one_too(tmp_path: Path) -> None:
    """Flattened by the trainer before it was saved."""
    found = open_dcp(write(tmp_path / "d", values("w", "optimizer.state.w.exp_avg")))

    assert list(found.tensors) == ["w"]


def test_a_folder_is_opened_with_its_config(tmp_path: Path) -> None:
    """Side files too; safetensors beside it win."""
    folder = write(tmp_path / "d", {"model": values("lm_head.weight", "embed_tokens.weight")})
    put(folder / "config.json", b'{"model_type": "llama"}')
    put(folder / "tokenizer.json", b"{}")

    for path in (folder, folder / ".metadata"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.config == {"model_type": "llama"}
        assert sorted(checkpoint.sides()) == ["config.json", "tokenizer.json"]
        (about,) = checkpoint.identity
        assert about["name"] == ".metadata"
        files = [folder / ".metadata", *folder.glob("*.distcp")]
        assert about["size"] == sum(file.stat().st_size for file in files)
    save(folder / "model.safetensors", {"safe": np.zeros(1, np.float32)})
    assert list(open_checkpoint(folder).tensors) == ["safe"]


def test_any_file_that_changes_changes_the_identity(tmp_path: Path) -> None:
    """The metadata alone do not know it."""
    folder = write(tmp_path / "d", values("w"))
    before = open_dcp(folder)
    assert open_dcp(folder).header_hash == before.header_hash
    os.utime(folder / "__0_0.distcp", ns=(0, 10**18))

    after = open_dcp(folder)
    assert after.header_hash != before.header_hash
    assert after.size == before.size


# --- nothing is executed -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("place", ["planner_data", "storage_meta", "state_dict_metadata"])
def test_code_in_the_metadata_is_not_run_and_named(
    tmp_path: Path, protocol: int, place: str
) -> None:
    """The attack works on those who load without care, torch among them, and not on us."""
    folder = write(tmp_path / "d", values("w"))
    metadata = get_metadata(folder)
    attack = Attack(tmp_path / "made")
    value = [attack, Path] if place == "planner_data" else attack
    setattr(metadata, place, {"w": value} if place == "state_dict_metadata" else value)
    put(folder / ".metadata", pickle.dumps(metadata, protocol))
    get_metadata(folder)
    assert attack.path.exists()
    attack.path.rmdir()

    if protocol:
        assert_refused(folder, "would execute code", f"{os.name}.mkdir", "safetensors")
    else:
        assert_refused(folder, "of another format")
    assert not attack.path.exists()


def test_names_that_the_list_misses_are_refused_too(tmp_path: Path) -> None:
    """The list is for the message; the decision is taken where a name is looked up."""
    texts = b"\x8c\x02os\x8c\x06system"
    # Two more texts are put on the stack and taken off again.
    hidden = b"\x80\x04" + texts + b"\x8c\x05torch0\x8c\x04Size0" + b"\x93."
    assert set(pickle_globals(io.BytesIO(hidden))) == {("torch", "Size")}

    with pytest.raises(FormatError, match=r"would execute code.*got os\.system;"):
        parse_metadata(tmp_path / ".metadata", hidden)


@pytest.mark.parametrize(
    "name", ["torch.load", "torch.classes", "torch.float32.__class__", "torch._utils.print",
             "pathlib.Path.unlink", "builtins.eval", "collections.namedtuple", "torch.hub.load",
             "torch.distributed.checkpoint.metadata.os", "pathlib.os"],
)  # fmt: skip
def test_only_records_are_made(tmp_path: Path, name: str) -> None:
    """Neighbours of what is allowed are not."""
    module, _, attribute = name.rpartition(".")
    raw = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    with pytest.raises(FormatError, match="would execute code"):
        parse_metadata(tmp_path / ".metadata", raw)


def test_code_in_a_chunk_is_not_run_and_named(tmp_path: Path) -> None:
    """Chunks are pickles as well."""
    attack = Attack(tmp_path / "made")
    folder = tmp_path / "d"
    write_chunks(folder, (3,), [((0,), torch.arange(3.0))])
    path = folder / "__0_0.distcp"
    torch.save({"a": torch.zeros(3), "b": attack}, path)
    metadata = get_metadata(folder)
    (info,) = metadata.storage_data.values()
    info.length = path.stat().st_size
    put_metadata(folder, metadata)

    tensor = open_dcp(folder).tensors["w"]
    with pytest.raises(FormatError, match=rf"would execute code.*{os.name}\.mkdir"):
        tensor.read(0, 3)
    assert not attack.path.exists()


# --- unsound folders -----------------------------------------------------------------------------


def _change(folder: Path, edit: Callable[[Metadata], Any]) -> None:
    metadata = get_metadata(folder)
    edit(metadata)
    put_metadata(folder, metadata)


def _entry(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["w"]


def _info(metadata: Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


UNSOUND: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no file": (
        lambda d: (d / "__1_0.distcp").unlink(),
        ("__1_0.distcp: cannot be opened", "No such file"),
    ),
    "cut file": (
        lambda d: (d / "__0_0.distcp").write_bytes((d / "__0_0.distcp").read_bytes()[:-9]),
        ("__0_0.distcp: is cut", "expected"),
    ),
    "empty file": (lambda d: (d / "__0_0.distcp").write_bytes(b""), ("__0_0.distcp: is empty",)),
    "a rank missing": (
        lambda d: _change(d, lambda m: _entry(m).chunks.pop()),
        ("tensor 'w' is not stored whole", "hold 36 of 60 entries", "every rank"),
    ),
    "a chunk stored nowhere": (
        lambda d: _change(d, lambda m: m.storage_data.popitem()),
        ("chunk (3, 0, 0) is stored nowhere",),
    ),
    "a chunk outside": (
        lambda d: _change(d, lambda m: setattr(_entry(m), "size", torch.Size((4, 5, 3)))),
        ("lies outside of shape (4, 5, 3)",),
    ),
    "other dimensions": (
        lambda d: _change(d, lambda m: setattr(_entry(m), "size", torch.Size((60,)))),
        ("lies outside of shape (60,)",),
    ),
    "an extension": (
        lambda d: _change(d, lambda m: setattr(_info(m), "transform_descriptors", ["zstd"])),
        ("through an extension", "got zstd"),
    ),
    "a path upwards": (
        lambda d: _change(d, lambda m: setattr(_info(m), "relative_path", "../x.distcp")),
        ("outside of the model folder", "../x.distcp"),
    ),
    "an absolute path": (
        lambda d: _change(d, lambda m: setattr(_info(m), "relative_path", "/etc/passwd")),
        ("outside of the model folder",),
    ),
    "a path that is none": (
        lambda d: _change(d, lambda m: setattr(_info(m), "relative_path", 3)),
        (".metadata: is damaged",),
    ),
    "no state dict": (
        lambda d: _change(d, lambda m: setattr(m, "state_dict_metadata", None)),
        (".metadata: is damaged",),
    ),
    "no chunks": (
        lambda d: _change(d, lambda m: setattr(_entry(m), "chunks", None)),
        (".metadata: is damaged",),
    ),
    "another dtype": (
        lambda d: _change(d, lambda m: setattr(_entry(m).properties, "dtype", torch.complex128)),
        ("'w'", "complex128"),
    ),
    "no tensors": (
        lambda d: _change(d, lambda m: m.state_dict_metadata.clear()),
        ("holds no tensors of a model",),
    ),
    "another pickle": (lambda d: put_metadata(d, {"a": 1}), ("is damaged", "got a dict")),
    "cut metadata": (
        lambda d: put(d / ".metadata", (d / ".metadata").read_bytes()[:-20]),
        ("is damaged",),
    ),
    "empty metadata": (lambda d: put(d / ".metadata", b""), (".metadata: is empty",)),
    "pointer": (
        lambda d: put(d / ".metadata", b"version https://git-lfs.github.com/spec/v1\n"),
        ("is a Git-LFS pointer",),
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_folders_are_refused_on_opening(tmp_path: Path, case: str) -> None:
    """One clear message each, before any number is read."""
    folder = write_chunks(tmp_path / "d", (5, 4, 3), BOXES["rows"])
    change, words = UNSOUND[case]
    change(folder)

    assert_refused(folder, *words)


def test_overlapping_chunks_are_refused(tmp_path: Path) -> None:
    """Their entries may sum up to the right number, and leave a hole elsewhere."""
    one, two = WHOLE[:, :2].clone(), WHOLE[:, 1:3].clone()
    folder = write_chunks(tmp_path, (5, 4, 3), [((0, 0, 0), one), ((0, 1, 0), two)])

    assert_refused(folder, "chunk (0, 0, 0) overlaps another")


@pytest.mark.parametrize(
    "value",
    [torch.arange(4.0), torch.arange(3), torch.arange(3.0).reshape(1, 3), {"a": torch.zeros(3)}, 5],
)
def test_a_chunk_that_is_another_tensor_is_refused(tmp_path: Path, value: Any) -> None:
    """Of another shape or dtype, or none at all."""
    folder = write_chunks(tmp_path, (3,), [((0,), torch.arange(3.0))])
    torch.save(value, folder / "__0_0.distcp")
    _change(folder, lambda m: setattr(_info(m), "length", (folder / "__0_0.distcp").stat().st_size))

    tensor = open_dcp(folder).tensors["w"]
    with pytest.raises(FormatError, match=r"is not what the metadata say|is damaged"):
        tensor.read(0, 3)


def test_only_optimizer_states_are_no_model(tmp_path: Path) -> None:
    """Saying what is there."""
    folder = write(tmp_path / "d", {"optimizer": {"state": values("w")}, "step": 1})

    assert_refused(folder, "holds no tensors of a model", "got optimizer.state.w, step")


def test_other_folders_with_such_names_are_no_checkpoint(tmp_path: Path) -> None:
    """Parquet datasets have a ``.metadata`` too."""
    put(tmp_path / ".metadata", b"x")

    assert_refused(tmp_path, "no safetensors file in the folder")
