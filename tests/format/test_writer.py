"""Outputs: whole or absent, in any order, with the modes and the bytes they should have."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mergebench.checkpoints import descriptors, disk, open_files, replacing, staging
from mergebench.checkpoints.destination import check_destination
from mergebench.checkpoints.layout import open_checkpoint
from mergebench.checkpoints.placement import TensorSpec, plan_layout
from mergebench.checkpoints.reader import open_safetensors
from mergebench.checkpoints.writer import Output
from mergebench.core.errors import MergebenchError, ResourceError
from mergebench.core.tensor import DTYPES

from .helpers import assert_absent, assert_tensors, plan_arrays, put, random_array, save

ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": random_array("BF16", (4, 4)),
    "none": np.zeros((0, 2), np.float32),
    "scalar": np.array(7, np.int64),
}
GOLDEN = bytes.fromhex(
    "5800000000000000"  # 88 bytes of header
    "7b225f5f6d657461646174615f5f223a7b22666f726d6174223a227074227d"  # {"__metadata__":{…"pt"}
    "2c2277223a7b226474797065223a22463332222c"  # ,"w":{"dtype":"F32",
    "227368617065223a5b325d2c22646174615f6f666673657473223a5b302c385d7d7d"  # "shape":[2],…[0,8]}}
    "202020"
    "0000803f000000c0"  # 1, -2
)


def test_golden_bytes(tmp_path: Path) -> None:
    """A file of one tensor, byte by byte."""
    path = save(tmp_path / "a.safetensors", {"w": np.array([1, -2], np.float32)})

    assert path.read_bytes() == GOLDEN


def test_a_file_equals_that_of_the_library(tmp_path: Path) -> None:
    """Every dtype, given in an order that is not that of the file."""
    arrays = {f"t{n}": random_array(dtype, (3, n)) for n, dtype in enumerate(DTYPES)} | ARRAYS
    save_file(arrays, tmp_path / "theirs.safetensors", metadata={"format": "pt"})

    ours = save(tmp_path / "ours.safetensors", arrays)

    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("missing", [(), ("_PWRITE",)])
@pytest.mark.parametrize("call", [5, 1 << 30])
def test_tiles_may_come_backwards_from_many_threads_and_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], call: int
) -> None:
    """Three shards through one descriptor, also without positional writes, as on Windows."""
    for name in missing:
        monkeypatch.setattr(descriptors, name, None)
    monkeypatch.setattr(descriptors, "_CALL", call)
    monkeypatch.setattr(descriptors._POOL, "capacity", 1)
    arrays = {f"t{n}": random_array("F16", (7, 5), n) for n in range(6)}
    tiles = [(name, at) for name in arrays for at in range(0, 70, 14)]
    with Output(tmp_path / "out", plan_arrays(arrays, shard_size=140)) as output:

        def write(tile: tuple[str, int]) -> None:
            name, at = tile
            output.write(name, at, arrays[name].tobytes()[at : at + 14])

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, reversed(tiles)))
        write(tiles[3])

    assert_tensors(open_checkpoint(tmp_path / "out").tensors, arrays)
    assert_absent(tmp_path, "out")
    assert_absent(
        tmp_path / "out",
        *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    )


def test_bytes_views_and_arrays_are_taken(tmp_path: Path) -> None:
    """Whatever holds contiguous bytes."""
    values = random_array("BF16", (2, 4))
    with Output(tmp_path / "a.safetensors", plan_arrays({"a": values}), single_file=True) as output:
        output.write("a", 0, values[0])
        output.write("a", 8, memoryview(values[1].view(np.uint16)))
        output.write("a", 4, values[0, 2:].tobytes())
        with pytest.raises(ValueError, match="contiguous"):
            output.write("a", 0, values.T)
        for start, data in ((-1, b"1"), (16, b"1"), (15, b"12")):
            with pytest.raises(ValueError, match="of 16"):
                output.write("a", start, data)
        with pytest.raises(ValueError, match="no tensor of this output"):
            output.write("b", 0, b"")

    assert_tensors(open_safetensors(tmp_path / "a.safetensors").tensors, {"a": values})
    with pytest.raises(ValueError, match="not open"):
        output.write("a", 0, b"1")


def test_an_unfinished_output_never_appears(tmp_path: Path) -> None:
    """A forgotten tile is a bug, not a model with zeros in it."""
    layout = plan_layout([TensorSpec("a", "U8", (10,))])

    def fill(output: Output, spans: list[tuple[int, int]]) -> None:
        for start, stop in spans:
            output.write("a", start, bytes(stop - start))

    for spans in ([], [(0, 9)], [(1, 10)], [(0, 4), (5, 10)]):
        with (
            pytest.raises(RuntimeError, match=r"'a': bytes .* were never written"),
            Output(tmp_path / "out", layout) as output,
        ):
            fill(output, spans)
        assert_absent(tmp_path)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with another file creation mask."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_honour_the_umask(tmp_path: Path, umask: int) -> None:
    """Files, folders, copies of side files; the library's files are private whatever the umask."""
    private = put(tmp_path / "tokenizer.json", b"{}")
    private.chmod(0o600)
    save(tmp_path / "one.safetensors", ARRAYS)
    save(
        tmp_path / "deep" / "out",
        ARRAYS,
        shard_size=30,
        side={"tokenizer.json": private, "1_Pooling/config.json": b"{}"},
    )

    for path in (tmp_path / "one.safetensors", *(tmp_path / "deep").rglob("*"), tmp_path / "deep"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert (path.name, oct(stat.S_IMODE(path.stat().st_mode))) == (path.name, oct(wanted))


def test_side_files_are_written_and_copied(tmp_path: Path) -> None:
    """From bytes, from files, into folders below, and at the very end."""
    source = put(tmp_path / "vocab.txt", b"words")
    layout = plan_arrays({"a": np.zeros(1, np.float32)})
    with Output(
        tmp_path / "out",
        layout,
        side={"config.json": b"{}", "vocab.txt": source, "1_Pooling/config.json": b"[]"},
    ) as output:
        output.write("a", 0, bytes(4))
        output.add_side("manifest.json", b"late")

    out = tmp_path / "out"
    assert (out / "config.json").read_bytes() == b"{}"
    assert (out / "vocab.txt").read_bytes() == b"words"
    assert (out / "1_Pooling" / "config.json").read_bytes() == b"[]"
    assert (out / "manifest.json").read_bytes() == b"late"


@pytest.mark.parametrize("name", ["../x", "/x", "", "a/../../x", "a\\x", "model.safetensors"])
def test_side_files_stay_inside_and_spare_the_weights(tmp_path: Path, name: str) -> None:
    """Neither at the start nor later."""
    layout = plan_arrays({"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="side file"):
        Output(tmp_path / "out", layout, side={name: b""})
    with (
        pytest.raises(ValueError, match="side file"),
        Output(tmp_path / "out", layout) as output,
    ):
        output.add_side(name, b"")
    assert_absent(tmp_path)


def test_a_missing_side_file_leaves_nothing(tmp_path: Path) -> None:
    """Found on entry, before any work."""
    layout = plan_arrays({"a": np.zeros(1, np.float32)})
    with (
        pytest.raises(MergebenchError, match=r"gone\.json: cannot be copied"),
        Output(tmp_path / "out", layout, side={"config.json": tmp_path / "gone.json"}),
    ):
        pytest.fail("the output was opened")
    assert_absent(tmp_path)


def test_a_header_may_leave_text_open_until_the_end(tmp_path: Path) -> None:
    """Also where a name or another entry looks like the one left open."""
    metadata = {"a": '"late":"ab', "late": "0000", "z": '"late":"0000"'}
    specs = [TensorSpec('"late":"', "F32", (2,)), TensorSpec("x", "F32", (1,))]
    layout = plan_layout(specs, metadata=metadata, late="late")
    path = tmp_path / "out.safetensors"
    with Output(path, layout, single_file=True) as output:
        for spec in specs:
            output.write(spec.name, 0, bytes(spec.nbytes))
        for wrong in ("", "abc", "abcde", "äbcd"):
            with pytest.raises(ValueError, match="of the header"):
                output.fill(wrong)
        output.fill("done")

    assert open_safetensors(path).metadata == {**metadata, "late": "done"}
    assert sorted(open_safetensors(path).tensors) == sorted(spec.name for spec in specs)
    with pytest.raises(ValueError, match="of the header"):
        output.fill("over")


def test_single_files_have_one_shard_and_no_sides(tmp_path: Path) -> None:
    """Both are told at once."""
    layout = plan_arrays(ARRAYS, shard_size=10)
    with pytest.raises(MergebenchError, match="several shards cannot be written into one file"):
        Output(tmp_path / "a.safetensors", layout, single_file=True)
    with pytest.raises(ValueError, match="no side files"):
        Output(tmp_path / "a", plan_arrays({}), single_file=True, side={"config.json": b""})
    with (
        Output(tmp_path / "a.safetensors", plan_arrays({}), single_file=True) as output,
        pytest.raises(ValueError, match="folder"),
    ):
        output.add_side("config.json", b"")


# --- errors and interruptions --------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MergebenchError("stop")])
@pytest.mark.parametrize("name", ["out", "out.safetensors", "deep/er/out", "deep/out.safetensors"])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: Any, name: str) -> None:
    """Neither the output, nor what was staged, nor the folders made for it."""
    destination = tmp_path / name
    single = name.endswith(".safetensors")
    seen: list[str] = []

    def work(output: Output) -> None:
        output.write("b", 0, ARRAYS["b"])
        seen.extend(path.name for path in destination.parent.iterdir())
        raise error

    with (
        pytest.raises(error if isinstance(error, type) else type(error)),
        Output(destination, plan_arrays(ARRAYS), single_file=single) as output,
    ):
        work(output)

    assert sorted(seen) == [f".{destination.name}.mergebench-{end}" for end in ("lock", "part")]
    assert_absent(tmp_path)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
@pytest.mark.parametrize("step", ["sync", "swap"])
def test_a_failure_at_the_end_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    """A failing sync or an interrupt between all bytes written and the rename."""
    old = {"old": np.arange(3)}
    destination = save(tmp_path / name, old)

    def broken(*_: Any) -> None:
        if step == "sync":
            raise OSError(errno.EIO, "Input/output error")
        raise KeyboardInterrupt

    if step == "sync":
        monkeypatch.setattr(open_files, "flush", broken)
    else:
        monkeypatch.setattr(staging, "swap_in", broken)
    with pytest.raises(MergebenchError if step == "sync" else KeyboardInterrupt):
        save(destination, ARRAYS, force=True)

    assert_absent(tmp_path, name)
    monkeypatch.undo()
    assert_tensors(open_checkpoint(destination).tensors, old)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_disk_too_small_is_told_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Needed and free bytes are named; nothing is made."""
    usage = type(disk.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(1000, 999, 1))
    layout = plan_arrays({"a": np.zeros(100, np.float32)})

    with (
        pytest.raises(
            ResourceError, match=f"expected {layout.total_bytes} bytes, got 1 bytes free"
        ),
        Output(tmp_path / name, layout, single_file=name.endswith("s")),
    ):
        pytest.fail("the output was opened")
    assert_absent(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_space_that_cannot_be_reserved_is_told_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A quota that the free space does not show."""

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with (
        pytest.raises(ResourceError, match=r"not enough space.*got a full disk or quota"),
        Output(tmp_path / "out", plan_arrays(ARRAYS)),
    ):
        pytest.fail("the output was opened")
    assert_absent(tmp_path)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_disk_that_cannot_reserve_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    """Some file systems cannot, some systems have no such call."""

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(number, "Operation not supported")

    if number is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)

    assert_tensors(open_checkpoint(save(tmp_path / "out", ARRAYS)).tensors, ARRAYS)


def test_a_disk_that_fills_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old output survives."""
    old = {"old": np.arange(3)}
    save(tmp_path / "out", old)

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(descriptors, "_PWRITE", refuse)
    with pytest.raises(ResourceError, match="not enough space on the disk"):
        save(tmp_path / "out", ARRAYS, force=True)
    assert_absent(tmp_path, "out")
    assert_tensors(open_checkpoint(tmp_path / "out").tensors, old)


def test_a_parent_that_is_a_file_is_told(tmp_path: Path) -> None:
    """The system's own words."""
    put(tmp_path / "file", b"")
    with pytest.raises(MergebenchError, match="cannot be made"):
        save(tmp_path / "file" / "out", ARRAYS)
    assert_absent(tmp_path, "file")


def test_long_names_are_staged(tmp_path: Path) -> None:
    """A name may have 255 bytes, and the hidden one is longer."""
    name = "日" * 81 + ".safetensors"

    assert_tensors(open_safetensors(save(tmp_path / name, ARRAYS)).tensors, ARRAYS)
    assert_absent(tmp_path, name)


# --- replacing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_what_exists_is_kept_without_force(tmp_path: Path, name: str) -> None:
    """Told on entry and, for the plan, before."""
    old = {"old": np.arange(3)}
    destination = save(tmp_path / name, old)

    with pytest.raises(MergebenchError, match=r"exists already; .*--force"):
        save(destination, ARRAYS)
    with pytest.raises(MergebenchError, match="exists already"):
        check_destination(destination, single_file=name.endswith("s"), force=False)
    assert_absent(tmp_path, name)
    assert_tensors(open_checkpoint(destination).tensors, old)


def test_what_appears_meanwhile_is_kept_without_force(tmp_path: Path) -> None:
    """Another process was quicker."""
    with (
        pytest.raises(MergebenchError, match="exists already"),
        Output(tmp_path / "out", plan_arrays({})),
    ):
        put(tmp_path / "out" / "model.safetensors", b"theirs")
    assert_absent(tmp_path, "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"theirs"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """No old shard remains, whether the system can exchange two folders or not."""
    save(tmp_path / "out", {f"t{n}": np.arange(9) for n in range(5)}, shard_size=80)
    if not exchange:
        monkeypatch.setattr(replacing, "_exchange", lambda *_: False)

    save(tmp_path / "out", ARRAYS, force=True)

    assert_absent(tmp_path, "out")
    assert_absent(tmp_path / "out", "model.safetensors")
    assert_tensors(open_checkpoint(tmp_path / "out").tensors, ARRAYS)


def test_the_old_folder_comes_back_if_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an exchange there is a moment without destination."""
    old = {"old": np.arange(3)}
    save(tmp_path / "out", old)
    monkeypatch.setattr(replacing, "_exchange", lambda *_: False)
    true_rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true_rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", ARRAYS, force=True)

    assert len(calls) == 3
    assert_absent(tmp_path, "out")
    assert_tensors(open_checkpoint(tmp_path / "out").tensors, old)


def test_an_old_folder_that_cannot_be_deleted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new output is whole, and the message says so."""
    save(tmp_path / "out", {"old": np.arange(3)})

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(staging.shutil, "rmtree", refuse)
    with pytest.raises(MergebenchError, match="is complete, but what it replaced is still there"):
        save(tmp_path / "out", ARRAYS, force=True)
    assert_tensors(open_checkpoint(tmp_path / "out").tensors, ARRAYS)


def test_a_file_is_replaced(tmp_path: Path) -> None:
    """And a link to a file is replaced, not the file it leads to."""
    target = save(tmp_path / "target.safetensors", {"old": np.arange(3)})
    link = tmp_path / "link.safetensors"
    link.symlink_to(target)

    save(link, ARRAYS, force=True)
    assert not link.is_symlink()
    assert_tensors(open_safetensors(link).tensors, ARRAYS)
    assert_tensors(open_safetensors(target).tensors, {"old": np.arange(3)})

    save(target, ARRAYS, force=True)
    assert_tensors(open_safetensors(target).tensors, ARRAYS)


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    """The output goes where the link leads, and the link stays."""
    save(tmp_path / "disk" / "old", {"old": np.arange(3)})
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "old")

    save(tmp_path / "out", ARRAYS, force=True)

    assert (tmp_path / "out").is_symlink()
    assert_absent(tmp_path / "disk", "old")
    assert_tensors(open_checkpoint(tmp_path / "out").tensors, ARRAYS)


def test_a_broken_link_exists(tmp_path: Path) -> None:
    """A file is not written through a link that leads nowhere."""
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nowhere")

    with pytest.raises(MergebenchError, match="exists already"):
        save(tmp_path / "a.safetensors", ARRAYS)


@pytest.mark.parametrize("force", [True, False])
def test_files_and_folders_do_not_replace_each_other(tmp_path: Path, force: bool) -> None:
    """Whatever the user forces."""
    (tmp_path / "a.safetensors").mkdir()
    put(tmp_path / "out", b"")

    with pytest.raises(MergebenchError, match="is a folder, and a file is to be written"):
        save(tmp_path / "a.safetensors", ARRAYS, force=force)
    with pytest.raises(MergebenchError, match="is a file, and a folder is to be written"):
        save(tmp_path / "out", ARRAYS, force=force)


@pytest.mark.parametrize(
    "names",
    [
        ["thesis.docx"],
        ["model.safetensors", "config.json", "photos/cat.jpg"],
        ["model.safetensors", ".bashrc"],
        ["model.safetensors", "modeling.py"],
        ["model.safetensors", ".git/HEAD"],
        ["README.md"],
        ["config.json", "LICENSE"],
        ["sub/README.md"],
    ],
)
def test_a_folder_with_anything_else_is_not_replaced(tmp_path: Path, names: list[str]) -> None:
    """A home folder, a repository, documents: not even with force."""
    for name in names:
        put(tmp_path / "out" / name, b"mine")

    with pytest.raises(MergebenchError, match=r"holds more than a model or an adapter, got .*out/"):
        save(tmp_path / "out", ARRAYS, force=True)
    assert all((tmp_path / "out" / name).read_bytes() == b"mine" for name in names)
    assert_absent(tmp_path, "out")


def test_a_folder_that_cannot_be_looked_through_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds is unknown."""
    save(tmp_path / "out", ARRAYS)

    def refuse(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(MergebenchError, match="cannot be listed, got Permission denied"):
        save(tmp_path / "out", ARRAYS, force=True)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["adapter_config.json", "adapter_model.safetensors", "README.md"],
        ["pytorch_model.bin", "config.json", "tokenizer.json", "vocab.txt", ".gitattributes"],
        ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "unet/config.json"],
        ["model.safetensors", "1_Pooling/config.json", "modules.json", "mergebench.json"],
    ],
)
def test_models_and_adapters_are_replaced(tmp_path: Path, names: list[str]) -> None:
    """And an empty folder."""
    (tmp_path / "out").mkdir()
    for name in names:
        put(tmp_path / "out" / name, b"old")

    save(tmp_path / "out", ARRAYS, force=True)

    assert_absent(tmp_path, "out")
    assert_absent(tmp_path / "out", "model.safetensors")


# --- loaders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", [None, 2000])
def test_transformers_loads_what_we_write(tmp_path: Path, shard_size: int | None) -> None:
    """A folder written by us, whole and in shards, gives back every parameter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    arrays = {name: values.numpy() for name, values in model.state_dict().items()}
    side = {"config.json": json.dumps(config.to_dict()).encode()}

    save(tmp_path / "out", arrays, shard_size=shard_size, side=side)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert sorted(loaded) == sorted(arrays)
    for name, values in loaded.items():
        assert torch.equal(values, torch.from_numpy(arrays[name])), name
    files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert (files == 1) == (shard_size is None)
    assert open_checkpoint(tmp_path / "out").notes == ()


def test_a_shelf_of_models_is_not_replaced(tmp_path: Path) -> None:
    """A folder that holds other model folders is kept, also with force."""
    shelf = tmp_path / "zoo"
    for name in ("one", "two"):
        (shelf / name).mkdir(parents=True)
        (shelf / name / "config.json").write_text("{}")
        (shelf / name / "model.safetensors").write_bytes(b"weights")

    with pytest.raises(MergebenchError, match=r"model\.safetensors"):
        check_destination(shelf, single_file=False, force=True)

    assert (shelf / "one" / "model.safetensors").read_bytes() == b"weights"
