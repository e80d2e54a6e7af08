"""Files of ``torch.save`` that are refused: what would execute code, what is unsound."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergebench.checkpoints.containers import open_weights
from mergebench.checkpoints.layout import open_checkpoint
from mergebench.checkpoints.pickled import open_pickled
from mergebench.checkpoints.torch_files import pickle_globals
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import read_all

from .helpers import build, entry, put
from .torch_support import Attack, assert_refused, dump, state

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


# --- nothing is executed -------------------------------------------------------------------------


def plain_pickle(path: Path, value: Any, protocol: int) -> Path:
    """Without torch."""
    return put(path, pickle.dumps(value, protocol))


ATTACKS: dict[str, Callable[[Path, Any], Path]] = {
    "zip": dump,
    "legacy": lambda path, value: dump(path, value, zipped=False),
    "zip, protocol 4": lambda path, value: dump(path, value, pickle_protocol=4),
    "legacy, protocol 4": lambda path, value: dump(path, value, zipped=False, pickle_protocol=4),
    "pickle, protocol 0": lambda path, value: plain_pickle(path, value, 0),
    "pickle, protocol 1": lambda path, value: plain_pickle(path, value, 1),
    "pickle, protocol 2": lambda path, value: plain_pickle(path, value, 2),
    "pickle, protocol 5": lambda path, value: plain_pickle(path, value, 5),
}


@pytest.mark.parametrize("how", ATTACKS)
def test_code_is_not_run_and_named(tmp_path: Path, how: str) -> None:
    """The attack works on those who load without care, and not on us."""
    attack = Attack(tmp_path / "made")
    path = ATTACKS[how](tmp_path / "a.bin", {"a": [1, 2], "b": attack})
    if how.startswith("pickle"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert attack.path.exists()
    attack.path.rmdir()

    assert_refused(path, "would execute code", f"{os.name}.mkdir", "convert it to safetensors")
    assert_refused(path, "would execute code", open_it=open_checkpoint)
    assert not attack.path.exists()


def test_every_offender_is_listed(tmp_path: Path) -> None:
    """Sorted, as torch names them; what torch allows is not."""
    saved = {
        "w": torch.zeros(2),
        "args": argparse.Namespace(lr=1),
        "path": Path("x"),
        "attack": Attack(tmp_path / "made"),
    }
    for zipped in (True, False):
        path = dump(tmp_path / "a.ckpt", saved, zipped=zipped)
        listed = f"got argparse.Namespace, pathlib.PosixPath, {os.name}.mkdir;"
        assert_refused(path, listed)
    assert sorted(torch.serialization.get_unsafe_globals_in_checkpoint(
        dump(tmp_path / "a.ckpt", saved)
    )) == ["argparse.Namespace", "pathlib.PosixPath", f"{os.name}.mkdir"]  # fmt: skip
    assert not (tmp_path / "made").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    """Its classes are code."""
    assert_refused(dump(tmp_path / "a.pt", torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear")


def test_harmless_pickles_of_a_newer_protocol_say_why(tmp_path: Path) -> None:
    """Nothing is called, but the restricted reader does not know the instructions."""
    path = dump(tmp_path / "a.pt", {"a": b"x" * 300}, pickle_protocol=4)

    assert_refused(path, "restricted reader", "Unsupported operand", "convert it")


def test_globals_are_found_in_every_spelling() -> None:
    """By name, by stack, through the memo; computed ones are told to be."""
    texts = b"\x8c\x02os\x94\x8c\x06system\x94"
    cases = {
        b"cos\nsystem\n.": {("os", "system")},
        b"(ios\nsystem\n.": {("os", "system")},
        b"\x80\x04" + texts + b"\x93.": {("os", "system")},
        b"\x80\x04" + texts + b"N00h\x00h\x01\x93.": {("os", "system")},
        b"\x80\x04" + texts + b"0q\x0500h\x00h\x01\x93.": {("os", "system")},
        b"\x80\x04NN\x93.": {("(computed)", "(computed)")},
        b"\x80\x02]q\x00.": set(),
    }
    for raw, expected in cases.items():
        stream = io.BytesIO(raw + b"rest")
        assert set(pickle_globals(stream)) == expected, raw
        assert stream.read() == b"rest"


def test_an_old_torch_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its restricted reader could be made to execute code."""
    path = dump(tmp_path / "a.pt", state("a"))
    for version in ("2.9.1+cu128", "1.13.1", "unknown"):
        monkeypatch.setattr(torch, "__version__", version)
        assert_refused(path, "CVE-2026-24747", "expected torch 2.10 or later", f"got {version}")
    monkeypatch.setattr(torch, "__version__", "3.0.0a0+git1")
    assert list(open_pickled(path)) == ["a"]


# --- unsound files -------------------------------------------------------------------------------


def _archive(records: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, raw in records.items():
            archive.writestr(name, raw)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    return buffer.getvalue()


def _saved(**options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state("a"), buffer, **options)
    return buffer.getvalue()


def _record(name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(_saved())) as archive:
        return archive.read(name)


OLD = _saved(_use_new_zipfile_serialization=False)
UNSOUND: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("is empty", "again")),
    "LFS pointer": (LFS, ("is a Git-LFS pointer", "run `git lfs pull`")),
    "web page": (b"<!DOCTYPE html><html></html>", ("web page", "with the access it needs")),
    "object store error": (b'\n <?xml version="1.0"?><Error/>', ("web page",)),
    "JSON": (b'{"weight_map": {}}', ("is a JSON file",)),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(16), ("is a GGUF file", "name it .gguf")),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(16), ("HDF5",)),
    "safetensors": (
        build({"a": entry("F32", [1], 0, 4)}, b"1234"),
        ("looks like a safetensors file", "name it .safetensors"),
    ),
    "text": (b"Once upon a time", ("of another format", "b'Once upon a time'")),
    "one byte": (b"x", ("of another format", "a PyTorch file")),
    "tar": (_tar(), ("of another format",)),
    "cut zip": (_saved()[:-100], ("zip archive", "cut or damaged", "again")),
    "start of a zip": (b"PK\x03\x04", ("cut or damaged",)),
    "other zip": (_archive({"x/readme.txt": b"x"}), ("torch.save did not write", "x/readme.txt")),
    "TorchScript": (
        _archive({"m/data.pkl": b"\x80\x02N.", "m/constants.pkl": b"\x80\x02N."}),
        ("TorchScript", "state_dict()"),
    ),
    "no version": (_archive({"a/data.pkl": b"\x80\x02}."}), ("is damaged", "again")),
    "cut pickle": (
        _archive({"a/data.pkl": b"\x80\x02}q\x00X", "a/version": b"3\n"}),
        ("is damaged",),
    ),
    "no numbers": (
        _archive({"a/data.pkl": _record("archive/data.pkl"), "a/version": b"3\n"}),
        ("is damaged", "data/0"),
    ),
    "cut pickle of old": (OLD[:300], ("is damaged",)),
    "cut numbers of old": (OLD[:-4], ("is damaged",)),
    "no numbers of old": (OLD[:-24], ("is damaged",)),
    "plain pickle": (pickle.dumps({"a": 1}, 2), ("is damaged", "magic number")),
    "start of a pickle": (b"\x80", ("is damaged",)),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_files_are_refused(tmp_path: Path, case: str) -> None:
    """One clear message each."""
    content, words = UNSOUND[case]

    assert_refused(put(tmp_path / "a.bin", content), *words)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """Folders, pipes (without waiting for a writer), missing and impossible paths."""
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()

    assert_refused(tmp_path / "pipe.pt", "not a regular file")
    assert_refused(tmp_path / "folder.pt", "not a regular file")
    assert_refused(tmp_path / "none.pt", "No such file")
    with pytest.raises(MergebenchError, match="null"):
        open_pickled(Path("a\0.pt"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(2, dtype=torch.complex128), ("complex128", "complex64")),
        (lambda: torch.zeros(2, dtype=torch.float8_e4m3fnuz), ("float8_e4m3fnuz",)),
        (lambda: torch.zeros(2, 2).to_sparse(), ("of layout torch.sparse_coo",)),
        (lambda: torch.zeros(2, device="meta"), ("without data",)),
    ],
)  # fmt: skip
def test_tensors_without_a_counterpart_are_refused(
    tmp_path: Path, make: Callable[[], torch.Tensor], words: tuple[str, ...]
) -> None:
    """By name, and whatever else the file holds."""
    path = dump(tmp_path / "a.pt", state("a") | {"odd": make()})

    assert_refused(path, "tensor 'odd'", *words)


# Torch says that it will no longer make quantized tensors; files that hold them stay.
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_quantized_tensors_are_refused(tmp_path: Path) -> None:
    """Their integers mean nothing without their scales."""
    value = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)

    assert_refused(dump(tmp_path / "a.pt", {"odd": value}), "tensor 'odd' is quantized")


FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(
    zipped=st.booleans(),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    keep=st.floats(0, 1),
    cut=st.booleans(),
)
def test_damaged_files_open_or_are_refused(
    tmp_path: Path, zipped: bool, edits: list[tuple[int, int]], keep: float, cut: bool
) -> None:
    """Any bytes changed, any end missing: nothing but our own errors, and no crash."""
    raw = bytearray(_saved() if zipped else OLD)
    for at, byte in edits:
        raw[at % len(raw)] = byte
    content = bytes(raw[: int(keep * len(raw))] if cut else raw)
    try:
        found = open_weights(put(tmp_path / "a.pt", content))
    except MergebenchError:
        return
    for tensor in found.tensors.values():
        assert read_all(tensor).shape == tensor.shape
