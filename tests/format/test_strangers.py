"""Files that no program writes: endless names, pipes in place of files, impossible shapes."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mergebench.checkpoints.containers import open_weights
from mergebench.checkpoints.journal import read_journal
from mergebench.checkpoints.layout import open_checkpoint
from mergebench.core.errors import FormatError, MergebenchError
from tests.helpers.files import write


def test_names_of_tensors_have_a_longest_length(tmp_path: Path) -> None:
    """In every format, as names are taken apart at their dots."""
    for name, sound in (("a" * 1024, True), ("a" * 1025, False), ("a." * 129, False)):
        path = tmp_path / "a.safetensors"
        write(path, {name: np.zeros(1, np.float32)})
        if sound:
            assert list(open_weights(path).tensors) == [name]
        else:
            with pytest.raises(FormatError, match=r"a\.safetensors: the name of a tensor is too"):
                open_weights(path)
        torch.save({name: torch.ones(1)}, tmp_path / "a.pt")
        if not sound:
            with pytest.raises(FormatError, match=r"a\.pt: the name of a tensor is too"):
                open_weights(tmp_path / "a.pt")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    """A journal or a config that is a pipe would never end."""
    os.mkfifo(tmp_path / "journal")
    assert read_journal(tmp_path / "journal") is None
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(MergebenchError, match="not a regular file"):
        open_checkpoint(tmp_path / "model.safetensors.index.json")


def test_empty_tensors_of_any_shape(tmp_path: Path) -> None:
    """No array has a dimension of 2⁶³, not even an empty one."""
    path = tmp_path / "model.gguf"
    name = struct.pack("<Q", 1) + b"w"
    entry = name + struct.pack("<IQQIQ", 2, 2**63, 0, 0, 0)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + entry + bytes(64))

    with pytest.raises(FormatError, match=r"model\.gguf: tensor 'w' is larger than any array"):
        open_weights(path)
