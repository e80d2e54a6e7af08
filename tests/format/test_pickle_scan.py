"""Pickles that would cost more than any program's, and those that would not."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from mergebench.checkpoints.containers import open_weights
from mergebench.checkpoints.pickle_scan import DEPTH, HostileError, check_pickle
from mergebench.core.errors import FormatError


def tuples(levels: int) -> Any:
    """A tuple that holds a tuple twice, and so on."""
    made: Any = ()
    for _ in range(levels):
        made = (made, made)
    return made


def nested(levels: int) -> Any:
    """A tuple in a tuple, and so on."""
    made: Any = ()
    for _ in range(levels):
        made = (made,)
    return made


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_ordinary_pickles_pass(protocol: int) -> None:
    """Of every protocol, with everything that state dicts hold."""
    value = {
        "state": OrderedDict(a=[1, 2.5, None, True], b=(1, (2, "x")), c={"d": b"bytes"}),
        "size": torch.Size([1, 2]),
        ("key", 1): {1, 2},
        "same": [[1]] * 3,
        "long": 2**70,
        "text": "x" * 10_000,
    }

    check_pickle(io.BytesIO(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("protocol", [2, 4])
def test_tuples_without_end(protocol: int) -> None:
    """A few hundred bytes for 2⁶⁰ steps, or for the end of the process."""
    for bomb in (tuples(60), {"a": [tuples(40)]}, nested(DEPTH + 1)):
        with pytest.raises(HostileError, match="tuples in tuples"):
            check_pickle(io.BytesIO(pickle.dumps(bomb, protocol)))
    check_pickle(io.BytesIO(pickle.dumps((tuples(10), nested(DEPTH - 2)), protocol)))


def test_memo_places_far_away() -> None:
    """Python's own reader fills a table up to there."""
    check_pickle(io.BytesIO(b"\x80\x04Nr\xe7\x03\0\0."))
    with pytest.raises(HostileError, match="memo"):
        check_pickle(io.BytesIO(b"\x80\x04Nr\xff\xff\xff\x7f."))


def test_classes_are_not_changed() -> None:
    """BUILD gives an object its attributes; on a class it would change all objects."""
    with pytest.raises(HostileError, match=r"changes collections\.OrderedDict"):
        check_pickle(io.BytesIO(b"\x80\x02ccollections\nOrderedDict\n}b."))
    check_pickle(io.BytesIO(b"\x80\x02ccollections\nOrderedDict\n)R}b."))


def test_a_large_state_dict_passes_and_opens(tmp_path: Path) -> None:
    """Names, parameters, tied tensors, what trainers keep beside them."""
    state: dict[str, Any] = {f"layers.{at}.weight": torch.ones(2, 2) for at in range(2000)}
    state["head"] = state["layers.0.weight"]
    state["parameter"] = torch.nn.Parameter(torch.ones(3))
    path = tmp_path / "model.pt"
    for zipped in (True, False):
        torch.save(
            {"state_dict": state, "epoch": 3, "args": {"lr": (1e-3, [2])}},
            path,
            _use_new_zipfile_serialization=zipped,
        )
        assert len(open_weights(path).tensors) == 2002


@pytest.mark.parametrize("packed", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_archives_that_unpack_to_far_more(tmp_path: Path, packed: int) -> None:
    """Refused by their directory; nothing is unpacked."""
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(8 << 20))

    with pytest.raises(FormatError, match=r"model\.pt: would unpack to far more.*8388612 bytes"):
        open_weights(path)


def test_texts_longer_than_their_file(tmp_path: Path) -> None:
    """Two gigabytes announced by nine bytes."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02X\xff\xff\xff\x7fa.")

    with pytest.raises(FormatError, match=r"model\.pt: is damaged"):
        open_weights(path)


def test_lists_deeper_than_calls_can_go(tmp_path: Path) -> None:
    """Beside the weights they are left out and counted."""
    lists: Any = [torch.ones(1)]
    for _ in range(20_000):
        lists = [lists]
    inner = io.BytesIO()
    torch.save({"a": torch.ones(2)}, inner)
    raw = zipfile.ZipFile(inner).read("archive/data.pkl")
    deep = raw[:-1] + b"X\4\0\0\0deep" + b"]" * 20_000 + b"a" * 19_999 + b"s."
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(inner) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, deep if name.endswith("data.pkl") else old.read(name))

    assert list(open_weights(path).tensors) == ["a"]
