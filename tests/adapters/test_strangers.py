"""Configs and metadata that no program writes, each once read badly: refused, naming the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.checkpoints.tokenizers import read_vocabulary
from mergebench.core.errors import FormatError
from mergebench.describe import describe
from mergebench.sources.opening import open_source
from tests.helpers.files import write
from tests.helpers.running import assert_done, call

Q = "base_model.model.layers.0.q"
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "LORA": {f"{Q}.lora_A.weight": (2, 4), f"{Q}.lora_B.weight": (4, 2)},
    "LOKR": {f"{Q}.lokr_w1": (2, 2), f"{Q}.lokr_w2": (2, 2)},
    "ADALORA": {f"{Q}.lora_A": (2, 4), f"{Q}.lora_B": (4, 2), f"{Q}.lora_E": (2, 1)},
}
SOUND: dict[str, dict[str, Any]] = {
    "LORA": {"peft_type": "LORA", "r": 2, "lora_alpha": 4},
    "LOKR": {"peft_type": "LOKR", "r": 2, "alpha": 4},
    "ADALORA": {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 4},
}
DEEP: Any = json.loads("[" * 500 + "]" * 500)


def adapter(folder: Path, kind: str, **entries: Any) -> str:
    """A PEFT folder with small tensors of a kind and these entries in its config."""
    arrays = {name: np.ones(shape, np.float32) for name, shape in SHAPES[kind].items()}
    write(folder / "adapter_model.safetensors", arrays)
    config = json.dumps(SOUND[kind] | entries)
    (folder / "adapter_config.json").write_text(config)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "entries", "words"),
    [
        ("LORA", {"peft_type": ["LORA"]}, "peft_type"),
        ("LORA", {"peft_type": {}}, "peft_type"),
        ("LORA", {"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
        ("LORA", {"target_modules": DEEP}, "nested"),
        ("LORA", {"rank_pattern": {"(?=(a*)*)b*": 4}}, "bounded time"),
        ("LORA", {"rank_pattern": {f"{at}*": 4 for at in range(257)}}, "at most 256 patterns"),
        ("LOKR", {"r": 0}, "at least 1"),
        ("ADALORA", {"init_r": -1e-5}, "init_r above 0"),
        ("ADALORA", {"lora_alpha": 10**400}, "a finite number"),
        ("ADALORA", {"init_r": "2"}, "must be numbers"),
    ],
)
def test_configs(tmp_path: Path, kind: str, entries: dict[str, Any], words: str) -> None:
    """Of the wrong type, out of bounds, too deep."""
    assert open_source(adapter(tmp_path / "sound", kind), ReadOptions()).deltas

    with pytest.raises(FormatError) as caught:
        open_source(adapter(tmp_path / "bad", kind, **entries), ReadOptions())
    assert str(tmp_path / "bad") in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 500 + "]" * 500, "[" * 100_000, "9" * 5000, "{"])
def test_metadata_that_are_no_manifest(tmp_path: Path, text: str) -> None:
    """They are another program's, so the file is an ordinary model."""
    path = write(tmp_path / "a.safetensors", {"a": np.ones(2, np.float32)}, {"mergebench": text})

    assert describe(open_source(str(path), ReadOptions()))["kind"] == "checkpoint"


@pytest.mark.parametrize("replaced", [1, "a", {}, [1], [{}], [["a"]], None])
def test_saved_task_vectors(tmp_path: Path, replaced: Any) -> None:
    """What is replaced is a list of names."""
    about = json.dumps({"kind": "delta", "version": 1, "replaced": replaced})
    path = write(tmp_path / "d.safetensors", {"a": np.ones(2, np.float32)}, {"mergebench": about})

    with pytest.raises(FormatError, match=r"d\.safetensors: `replaced`"):
        open_source(str(path), ReadOptions())


@pytest.mark.parametrize("alpha", ["nan", "inf", "1e40"])
def test_numbers_in_metadata(tmp_path: Path, alpha: str) -> None:
    """A scale that is not finite would spoil every weight."""
    arrays = {name: np.ones(shape, np.float32) for name, shape in SHAPES["LORA"].items()}
    path = write(tmp_path / "a.safetensors", arrays, {"r": "2", "lora_alpha": alpha})

    with pytest.raises(FormatError, match="a number that is finite"):
        open_source(str(path), ReadOptions())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": 1}, "1"),
        ({"architectures": [1, None]}, "1, None"),
        ({"architectures": [], "model_type": "llama"}, "llama"),
    ],
)
def test_architectures(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    """Whatever stands there is shown."""
    write(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert describe(open_source(str(tmp_path), ReadOptions()))["architecture"] == expected


@pytest.mark.parametrize("recipe", ["ties", 1, ["a"], {"method": ["a"]}])
def test_manifests_of_others(tmp_path: Path, recipe: Any) -> None:
    """A manifest is shown as far as it can be."""
    write(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    text = json.dumps({"mergebench": [], "recipe": recipe})
    (tmp_path / "mergebench_manifest.json").write_text(text)

    assert "checkpoint" in assert_done(call("inspect", tmp_path, cwd=tmp_path)).out


def test_added_tokens(tmp_path: Path) -> None:
    """They are a list."""
    text = json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": 1})
    (tmp_path / "tokenizer.json").write_text(text)

    with pytest.raises(FormatError, match=r"tokenizer\.json: `added_tokens` is no list"):
        read_vocabulary(tmp_path)
