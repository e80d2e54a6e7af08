"""Files of ``torch.save``: their values, and the layouts around them."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergebench.checkpoints.containers import Container, open_weights
from mergebench.checkpoints.layout import open_checkpoint
from mergebench.checkpoints.pickled import flat_range, open_pickled, open_torch_file
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.tensor import DTYPES, Array, Tensor, read_all
from tests.helpers.running import assert_done, python

from .helpers import assert_array, assert_tensors, put, random_array, save
from .torch_support import ANONYMOUS, FORMATS, as_torch, assert_refused, dump, state

# Dtypes younger than the old format: torch writes them into it and cannot read them back.
NEW = ("U16", "U32", "U64", "F8_E4M3", "F8_E5M2")
LOADED = "so it is loaded into memory as a whole"


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "zipped"),
    [(dtype, zipped) for dtype in DTYPES for zipped in (True, False) if zipped or dtype not in NEW],
)
def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, dtype: str, zipped: bool) -> None:
    """Matrices, scalars, empty and strided tensors, and a parameter."""
    arrays = {
        "matrix": random_array(dtype, (3, 5), 1),
        "scalar": random_array(dtype, (), 2),
        "empty": random_array(dtype, (0, 4), 3),
        "cube": random_array(dtype, (2, 3, 4), 4),
    }
    tensors: dict[str, Any] = {name: as_torch(array) for name, array in arrays.items()}
    tensors["turned"] = tensors["cube"].permute(2, 0, 1)
    arrays["turned"] = np.ascontiguousarray(arrays["cube"].transpose(2, 0, 1))
    tensors["part"] = tensors["matrix"][1:, ::2]
    arrays["part"] = np.ascontiguousarray(arrays["matrix"][1:, ::2])

    found = open_pickled(dump(tmp_path / "a.pt", tensors, zipped=zipped))

    assert list(found) == list(tensors)
    for name in found:
        assert isinstance(found[name], Tensor)
        assert found[name].dtype == dtype
    assert_tensors(found, arrays)


@FORMATS
def test_parameters_are_tensors(tmp_path: Path, zipped: bool) -> None:
    """As a module's own dict of parameters holds them, with and without gradients."""
    weight = torch.nn.Parameter(torch.arange(3.0))
    path = dump(tmp_path / "a.pt", {"w": weight, "v": weight * 2}, zipped=zipped)

    found = open_pickled(path)

    assert found["w"].read(0, 3).tolist() == [0, 1, 2]
    assert found["v"].read(0, 3).tolist() == [0, 2, 4]


def test_conjugate_and_negative_views_have_their_values(tmp_path: Path) -> None:
    """Torch saves the bits and a flag."""
    value = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    conjugate = dump(tmp_path / "c.pt", {"a": value.conj()})
    negative = dump(tmp_path / "i.pt", {"a": value.conj().imag})

    assert open_pickled(conjugate)["a"].read(0, 2).tolist() == [1 - 2j, 3 + 4j]
    assert open_pickled(negative)["a"].read(0, 2).tolist() == [-2, 4]


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a.transpose(2, 1, 0),
        lambda a: a.transpose(1, 2, 0)[:, ::2],
        lambda a: a[:, 1:2],
        lambda a: a[1:, :, ::3],
        lambda a: a[:1].transpose(0, 2, 1),
        lambda a: a[0, 0, ::2],
        lambda a: np.broadcast_to(a[:, :1], (3, 4, 5)),
    ],
)
def test_any_range_of_any_strides_is_the_flattened_one(view: Callable[[Array], Array]) -> None:
    """Every start and stop, against a copy."""
    array = view(np.arange(60).reshape(3, 4, 5))
    flat = array.flatten()

    for start in range(flat.size + 1):
        for stop in range(start, flat.size + 1):
            assert_array(flat_range(array, start, stop), flat[start:stop])


@FORMATS
def test_a_range_lands_in_the_given_buffer(tmp_path: Path, zipped: bool) -> None:
    """Without one, what is read cannot be written to."""
    path = dump(tmp_path / "a.bin", {"a": torch.arange(10.0).reshape(5, 2).t()}, zipped=zipped)
    tensor = open_pickled(path)["a"]
    out = np.full(23, 7, np.uint8)

    got = tensor.read(4, 9, out)

    assert got.tolist() == [8, 1, 3, 5, 7]
    assert np.shares_memory(got, out)
    assert out[20:].tolist() == [7, 7, 7]
    assert tensor.read(4, 9).tolist() == [8, 1, 3, 5, 7]
    assert not tensor.read(4, 9).flags.writeable


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 7), (7, 7)])
def test_a_range_outside_of_the_tensor_is_a_mistake(tmp_path: Path, start: int, stop: int) -> None:
    """Never the bytes of a neighbour."""
    tensor = open_pickled(dump(tmp_path / "a.bin", state("a", "b")))["a"]

    with pytest.raises(IndexError, match="of 6"):
        tensor.read(start, stop)


@FORMATS
def test_tensors_saved_from_a_gpu_come_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    """The tag says cuda:1; this machine need not have one."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    path = dump(tmp_path / "a.bin", state("a"), zipped=zipped)
    monkeypatch.undo()
    assert b"cuda:1" in path.read_bytes()

    assert open_pickled(path)["a"].read(0, 6).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("protocol", [2, 3])
@FORMATS
def test_other_pickle_protocols_are_taken(tmp_path: Path, zipped: bool, protocol: int) -> None:
    """As far as the restricted reader knows them, without a warning."""
    path = dump(tmp_path / "a.bin", state("a"), zipped=zipped, pickle_protocol=protocol)

    assert open_pickled(path)["a"].read(4, 6).tolist() == [4, 5]


def repack(
    path: Path, change: Callable[[str, bytes], bytes] = lambda _, raw: raw, **how: Any
) -> Path:
    """The same archive with its records written anew, in place."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, raw in records.items():
            archive.writestr(name, change(name, raw))
    return path


def test_a_compressed_archive_is_loaded_and_noted(tmp_path: Path) -> None:
    """Torch would map the packed bytes as if they were numbers."""
    path = dump(tmp_path / "a.pt", {"a": torch.zeros(1000) + 3})
    repack(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 4000

    found = open_torch_file(path)

    assert found.notes == (f"a.pt: is compressed, {LOADED}",)
    assert set(found.tensors["a"].read(0, 1000).tolist()) == {3.0}


def test_misaligned_numbers_are_handed_out_aligned(tmp_path: Path) -> None:
    """An archive packed by another tool puts records anywhere."""
    values = np.arange(100.0)
    found = {}
    for size in range(8):
        path = dump(tmp_path / f"{'x' * (size + 1)}.pt", {"a": as_torch(values)})
        found[size] = open_torch_file(repack(path))

    for each in found.values():
        assert each.notes == ()
        got = each.tensors["a"].read(1, 99)
        assert_array(got, values[1:99])
        assert got.flags.aligned


def test_a_file_that_changes_under_us_is_noticed(tmp_path: Path) -> None:
    """Reading the mapped pages of a file that was cut would end the process."""
    path = dump(tmp_path / "a.pt", {"a": torch.zeros(100_000)})
    tensor = open_pickled(path)["a"]
    with path.open("r+b") as file:
        file.truncate(2000)

    with pytest.raises(FormatError, match="changed while it was in use"):
        tensor.read(90_000, 100_000)
    path.unlink()
    with pytest.raises(MergebenchError, match=r"a\.pt: cannot be read"):
        tensor.read(0, 1)


def test_a_relative_path_survives_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for every other input."""
    dump(tmp_path / "a.pt", state("a"))
    monkeypatch.chdir(tmp_path)
    tensor = open_pickled(Path("a.pt"))["a"]
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")

    assert tensor.read(1, 2).tolist() == [1]


MEASURE = (
    ANONYMOUS
    + """
from mergebench.checkpoints.layout import open_checkpoint

small, large = sys.argv[1:]
open_checkpoint(Path(small)).tensors["small"].read(0, 3)
before = anonymous()
checkpoint = open_checkpoint(Path(large))
value = checkpoint.tensors["small"].read(0, 3).tolist()
part = float(checkpoint.tensors["large"].read(10, 20).sum())
print(anonymous() - before, value, part, len(checkpoint.notes))
"""
)


def test_opening_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    """300 MB on disk, a few numbers in memory; a file of the old format is told to be loaded."""
    small = {"small": torch.arange(3.0)}
    large = small | {"large": torch.ones(75_000_000)}
    paths = [dump(tmp_path / "small.bin", small), dump(tmp_path / "large.bin", large)]
    legacy = dump(tmp_path / "legacy.bin", large, zipped=False)

    mapped = assert_done(python(MEASURE, *paths, cwd=tmp_path)).out.split(" ", 1)
    loaded = assert_done(python(MEASURE, paths[0], legacy, cwd=tmp_path)).out.split(" ", 1)

    assert mapped[1] == "[0.0, 1.0, 2.0] 10.0 0\n"
    assert int(mapped[0]) < 50_000_000
    # The same measure sees the numbers where they cannot be mapped.
    assert loaded[1] == "[0.0, 1.0, 2.0] 10.0 1\n"
    assert int(loaded[0]) > 250_000_000


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt", "a.PT"])
@FORMATS
def test_a_single_file_is_a_checkpoint(tmp_path: Path, name: str, zipped: bool) -> None:
    """Of any of the suffixes; it stands alone, and a loaded one is noted."""
    put(tmp_path / "config.json", b"{}")
    path = dump(tmp_path / name, state("a", "b"), zipped=zipped)

    checkpoint = open_checkpoint(path)

    assert checkpoint.shard_of == {"a": name, "b": name}
    assert checkpoint.folder is None
    assert checkpoint.aliases == {}
    (about,) = checkpoint.identity
    assert about["name"] == name
    assert (about["size"], about["mtime_ns"]) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert len(about["header_hash"]) == 32
    assert checkpoint.notes == (
        () if zipped else (f"{name}: is of the format before torch 1.6, {LOADED}",)
    )
    assert checkpoint.tensors["b"].read(0, 3).tolist() == [10, 11, 12]


@FORMATS
def test_a_file_is_identified_by_its_numbers(tmp_path: Path, zipped: bool) -> None:
    """One other number, of the same size, is another header hash; a copy has the same."""
    one = dump(tmp_path / "one" / "a.pt", {"w": torch.full((50,), 1.0)}, zipped=zipped)
    two = dump(tmp_path / "two" / "a.pt", {"w": torch.full((50,), 2.0)}, zipped=zipped)
    copy = put(tmp_path / "copy.bin", one.read_bytes())

    assert open_torch_file(copy).header_hash == open_torch_file(one).header_hash
    assert open_torch_file(two).header_hash != open_torch_file(one).header_hash


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "other.ckpt"])
def test_a_folder_is_opened_with_its_config(tmp_path: Path, name: str) -> None:
    """What trainers leave beside the weights is no second checkpoint."""
    dump(tmp_path / name, state("model.embed_tokens.weight"))
    for other in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "scaler.pt",
    ):
        put(tmp_path / other, b"x")
    put(tmp_path / "config.json", b'{"model_type": "llama"}')
    put(tmp_path / "tokenizer.json", b"{}")

    checkpoint = open_checkpoint(tmp_path)

    assert checkpoint.config == {"model_type": "llama"}
    assert sorted(checkpoint.sides()) == ["config.json", "tokenizer.json"]
    assert list(checkpoint.tensors) == ["model.embed_tokens.weight"]
    assert checkpoint.notes == ()
    if name != "other.ckpt":
        assert open_checkpoint(tmp_path / name).config == {"model_type": "llama"}


def test_safetensors_win_over_pickles_and_the_plain_name_over_others(tmp_path: Path) -> None:
    """As transformers chooses."""
    dump(tmp_path / "old.bin", state("old"))
    assert list(open_checkpoint(tmp_path).tensors) == ["old"]
    dump(tmp_path / "pytorch_model.bin", state("plain"))
    assert list(open_checkpoint(tmp_path).tensors) == ["plain"]
    save(tmp_path / "any.safetensors", {"safe": np.zeros(1, np.float32)})
    assert list(open_checkpoint(tmp_path).tensors) == ["safe"]


def test_several_files_of_a_folder_are_a_question(tmp_path: Path) -> None:
    """And so is one shard without its index."""
    dump(tmp_path / "two" / "a.pt", state("a"))
    dump(tmp_path / "two" / "b.pth", state("a"))
    dump(tmp_path / "part" / "pytorch_model-00001-of-00002.bin", state("a"))

    assert_refused(tmp_path / "two", "a.pt, b.pth", "pass the file", open_it=open_checkpoint)
    assert_refused(tmp_path / "part", "a part of one", open_it=open_checkpoint)
    part = open_checkpoint(tmp_path / "part" / "pytorch_model-00001-of-00002.bin")
    assert part.notes == (
        "pytorch_model-00001-of-00002.bin is one shard of several; the others are not opened",
    )


def shards(folder: Path, total: int, **more: Any) -> Path:
    """Two PyTorch shards, the second with a tensor under two names."""
    shared = torch.arange(4.0)
    dump(folder / "pytorch_model-00001-of-00002.bin", state("a"))
    dump(folder / "pytorch_model-00002-of-00002.bin", {"b": shared, "c": shared, **more})
    where = {"a": 1, "b": 2, "c": 2}
    weight_map = {name: f"pytorch_model-0000{at}-of-00002.bin" for name, at in where.items()}
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return put(folder / "pytorch_model.bin.index.json", json.dumps(document).encode())


@pytest.mark.parametrize("total", [24 + 16, 24 + 32])
def test_shards_are_opened_through_their_index(tmp_path: Path, total: int) -> None:
    """As a folder and as an index; a shared tensor may be counted once or twice."""
    index = shards(tmp_path, total)

    for path in (tmp_path, index):
        checkpoint = open_checkpoint(path)
        assert checkpoint.notes == ()
        assert checkpoint.aliases == {"c": "b"}
        assert [each["name"][-12:-4] for each in checkpoint.identity] == ["of-00002", "of-00002"]
        assert checkpoint.shard_of["c"] == "pytorch_model-00002-of-00002.bin"
        assert checkpoint.tensors["c"].read(0, 4).tolist() == [0, 1, 2, 3]


def test_unsound_shards_are_refused_or_noted(tmp_path: Path) -> None:
    """A size no way of counting gives, a missing shard, tensors the index does not name."""
    index = shards(tmp_path / "sum", 41)
    assert open_checkpoint(index).notes == (
        "pytorch_model.bin.index.json states total_size 41, its tensors take 56 bytes",
    )
    index = shards(tmp_path / "more", 40, d=torch.zeros(1))
    assert_refused(
        index, "holds tensor 'd', which the index does not name", open_it=open_checkpoint
    )
    (tmp_path / "more" / "pytorch_model-00001-of-00002.bin").unlink()
    assert_refused(index, "is missing", "expected 2 shards", open_it=open_checkpoint)
    put(index, b'{"weight_map": {"a": "a.safetensors"}}')
    assert_refused(index, "a.safetensors, which is not a PyTorch file", open_it=open_checkpoint)


def test_notes_of_every_shard_are_told(tmp_path: Path) -> None:
    """Here, of what was left out of the second."""
    checkpoint = open_checkpoint(shards(tmp_path, 40, epoch=3))

    assert checkpoint.notes == ("pytorch_model-00002-of-00002.bin: left out epoch",)


def test_an_adapter_is_a_mapping_of_tensors(tmp_path: Path) -> None:
    """``adapter_model.bin`` of PEFT; a folder that holds it is no checkpoint."""
    names = [f"base_model.model.layers.0.q_proj.lora_{side}.weight" for side in "AB"]
    path = dump(tmp_path / "adapter_model.bin", state(*names))

    found: Mapping[str, Tensor] = open_pickled(path)

    assert list(found) == names
    assert read_all(found[names[1]]).tolist() == [[10, 11, 12], [13, 14, 15]]
    assert isinstance(open_weights(path), Container)
    assert_refused(tmp_path, "is an adapter", open_it=open_checkpoint)
    assert_refused(path, "is an adapter", open_it=open_checkpoint)
    dump(tmp_path / "model.pt", state("a"))
    put(tmp_path / "adapter_config.json", b"{}")
    assert_refused(tmp_path, "is an adapter", open_it=open_checkpoint)


# --- what stands around the tensors --------------------------------------------------------------


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
@FORMATS
def test_one_level_is_unwrapped(tmp_path: Path, key: str, zipped: bool) -> None:
    """Counters, names, optimizer states and random states beside it are left out, and told."""
    saved = {
        "epoch": 3,
        key: OrderedDict(state("a")),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2), "step": torch.zeros(())}}}],
        "rng": torch.zeros(8, dtype=torch.uint8),
        "note": "x",
    }
    found = open_torch_file(dump(tmp_path / "a.ckpt", saved, zipped=zipped))

    assert found.notes[not zipped :] == (
        f"a.ckpt: the weights are those under {key!r}",
        "a.ckpt: left out epoch, optimizer_states (2 tensors), rng (1 tensor), note",
    )
    assert list(found.tensors) == ["a"]
    assert found.tensors["a"].read(4, 6).tolist() == [4, 5]


def test_entries_that_are_no_tensors_are_left_out(tmp_path: Path) -> None:
    """Inside of the state dict too; of many, a few are named."""
    extra = {f"layer.{at}._extra_state": None for at in range(12)}
    found = open_torch_file(dump(tmp_path / "a.pt", {"model": extra | state("a")}))

    assert found.notes[1] == (
        "a.pt: left out " + ", ".join(f"layer.{at}._extra_state" for at in range(8)) + " and 4 more"
    )


def test_only_one_level_is_unwrapped(tmp_path: Path) -> None:
    """Names below would have to be made up."""
    assert_refused(
        dump(tmp_path / "a.pt", {"model": {"encoder": state("a")}, "epoch": 1}),
        "holds no tensors by name",
        "got model, epoch",
        "state_dict, model_state_dict, model, module",
    )


def test_a_list_that_holds_itself_is_counted_once(tmp_path: Path) -> None:
    """Pickles can say that."""
    loop: list[Any] = [torch.zeros(1)]
    loop.append(loop)
    found = open_torch_file(dump(tmp_path / "a.pt", {"model": state("a"), "x": loop}))

    assert found.notes[1] == "a.pt: left out x (1 tensor)"


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"model": state("a"), "state_dict": state("b")}, ("more than one", "state_dict, model")),
        ({"model": state("a"), "w": torch.zeros(2, 2)}, ("more than one", "got model, w")),
        (torch.zeros(3), ("does not hold a state dict", "got a Tensor")),
        ([torch.zeros(3)], ("does not hold a state dict", "got a list")),
        (3, ("does not hold a state dict", "got a int")),
        ({}, ("holds no tensors by name", "got nothing")),
        ({"epoch": 1}, ("holds no tensors by name", "got epoch")),
        ({1: torch.zeros(3)}, ("named by a int", "got 1")),
    ],
)
@FORMATS
def test_what_is_no_state_dict_is_refused(
    tmp_path: Path, saved: Any, words: tuple[str, ...], zipped: bool
) -> None:
    """Saying what it is."""
    assert_refused(dump(tmp_path / "a.pt", saved, zipped=zipped), *words)


@FORMATS
def test_shared_memory_is_an_alias(tmp_path: Path, zipped: bool) -> None:
    """The head is the alias, whichever comes first; parts of one memory stand on their own."""
    table, fused = torch.arange(8.0).reshape(4, 2), torch.arange(12.0).reshape(6, 2)
    saved = {
        "lm_head.weight": table,
        "model.embed_tokens.weight": table,
        "encoder.shared.weight": table.view(4, 2),
        "turned": table.t(),
        "square": table[:2],
        "square.turned": table[:2].t(),
        "flat": table.reshape(-1),
        "first": fused[:3],
        "second": fused[3:],
        "copy": table.clone(),
        "none": torch.zeros(0),
        "none.too": torch.zeros(0),
    }

    checkpoint = open_checkpoint(dump(tmp_path / "pytorch_model.bin", saved, zipped=zipped))

    assert checkpoint.aliases == {
        "lm_head.weight": "model.embed_tokens.weight",
        "encoder.shared.weight": "model.embed_tokens.weight",
    }
    assert checkpoint.tensors["second"].read(0, 2).tolist() == [6, 7]
    assert checkpoint.tensors["turned"].read(0, 3).tolist() == [0, 2, 4]
    assert checkpoint.tensors["lm_head.weight"].read(6, 8).tolist() == [6, 7]


def test_shared_memory_and_a_tied_config_agree(tmp_path: Path) -> None:
    """One table under three names and a head that equals it: all lead to the same name."""
    table = torch.arange(8.0).reshape(4, 2)
    names = ["table", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    dump(
        tmp_path / "pytorch_model.bin",
        dict.fromkeys(names, table) | {"lm_head.weight": table.clone()},
    )
    put(tmp_path / "config.json", b'{"tie_word_embeddings": true}')

    assert open_checkpoint(tmp_path).aliases == {
        "encoder.embed_tokens.weight": "table",
        "decoder.embed_tokens.weight": "table",
        "lm_head.weight": "table",
    }
