"""Families that PEFT's layers compute: the same as when PEFT merges them into the whole model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import mergebench
from mergebench.adapters_zoo import peft_bridge
from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, ReadOptions, read_adapter
from mergebench.core.delta import tile
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array, ArrayTensor
from mergebench.sources.opening import open_source

from .support import assert_close, load_folder, values_of
from .test_adapters_peft import randomised, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not save .* within the state dict:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning"),
    pytest.mark.filterwarnings("ignore:save_precomputed_indices=False:UserWarning"),
    # OSF searches paths for its patterns, and the warning looks at their ends.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly:UserWarning"),
]


class Block(nn.Module):
    """Layers of odd and uneven sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    """More than ten blocks, so that the order of names is not that of the model."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.odd = nn.Linear(7, 9)
        self.conv = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(8, 5)


class Transposed(nn.Module):
    """GPT-2's layers, one of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(12, 8)
        self.second = Conv1D(8, 8)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.bias)


LINEAR = ["up", "down"]
CASES: dict[str, Callable[[], peft.PeftConfig]] = {
    "fourierft": lambda: peft.FourierFTConfig(
        target_modules=[*LINEAR, "odd"], n_frequency=20, n_frequency_pattern={"0.up": 30, "odd": 9}
    ),
    "fourierft seed": lambda: peft.FourierFTConfig(
        target_modules=LINEAR, n_frequency=7, random_loc_seed=3
    ),
    "waveft": lambda: peft.WaveFTConfig(target_modules=[*LINEAR, "odd"], n_frequency=20),
    "waveft db2": lambda: peft.WaveFTConfig(
        target_modules=LINEAR, n_frequency=20, wavelet_family="db2", random_loc_seed=5
    ),
    "waveft proportional": lambda: peft.WaveFTConfig(
        target_modules=LINEAR, n_frequency=20, proportional_parameters=True
    ),
    "randlora": lambda: peft.RandLoraConfig(target_modules=[*LINEAR, "odd"], r=2),
    "randlora drawn": lambda: peft.RandLoraConfig(
        target_modules=LINEAR, r=2, save_projection=False, projection_prng_key=4
    ),
    "randlora sparse": lambda: peft.RandLoraConfig(target_modules=LINEAR, r=2, sparse=True),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=LINEAR, r=2, num_vectors=8, vector_length=4),
    "vblora likeliest": lambda: peft.VBLoRAConfig(
        target_modules=LINEAR, r=3, num_vectors=8, vector_length=2, topk=3,
        save_only_topk_weights=True,
    ),
    "unilora": lambda: peft.UniLoraConfig(
        target_modules=LINEAR, r=2, theta_d_length=16, save_indices=True
    ),
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=[*LINEAR, "embed"], r=2, u=5),
    "tinylora tied": lambda: peft.TinyLoraConfig(target_modules=LINEAR, r=2, u=5, weight_tying=0.5),
    "tinylora one": lambda: peft.TinyLoraConfig(target_modules=LINEAR, r=2, u=5, weight_tying=1.0),
    "pvera": lambda: peft.PveraConfig(target_modules=[*LINEAR, "odd"], r=4),
    "pvera drawn": lambda: peft.PveraConfig(
        target_modules=LINEAR, r=4, save_projection=False, projection_prng_key=9
    ),
    "vera_drawn": lambda: peft.VeraConfig(
        target_modules=[*LINEAR, "odd"], r=4, save_projection=False, projection_prng_key=9
    ),
    "delora": lambda: peft.DeloraConfig(
        target_modules=[*LINEAR, "odd"], r=2, rank_pattern={r"blocks\.1\.up": 3}
    ),
    "gralora": lambda: peft.GraloraConfig(target_modules=LINEAR, r=4),
    "gralora hybrid": lambda: peft.GraloraConfig(target_modules=LINEAR, r=4, hybrid_r=2, alpha=5),
    "supertuning": lambda: peft.SupertuningConfig(target_modules=[*LINEAR, "odd"], sparsity=0.8),
    "supertuning hybrid": lambda: peft.SupertuningConfig(
        target_modules=LINEAR, sparsity=0.8, r=2, lora_alpha=3.0
    ),
    "adamss": lambda: peft.AdamssConfig(target_modules=[*LINEAR, "odd"], r=4, num_subspaces=2),
    "hira": lambda: peft.HiraConfig(
        target_modules=[*LINEAR, "odd", "embed", "conv"], r=2, rank_pattern={"odd": 3}
    ),
    "psoft": lambda: peft.PsoftConfig(target_modules=[*LINEAR, "odd"], r=4),
    "psoft other": lambda: peft.PsoftConfig(
        target_modules=LINEAR, r=3, ab_svd_init="pissa_init", use_cayley_neumann=True,
        psoft_alpha=7,
    ),
    "osf": lambda: peft.OSFConfig(target_modules=[*LINEAR, "odd"], effective_rank=3),
    "osf patterns": lambda: peft.OSFConfig(
        target_modules=LINEAR, rank_pattern={r"s\.\d+\.u": 2, r"1\.d": 5}
    ),
    "deft": lambda: peft.DeftConfig(target_modules=[*LINEAR, "odd"], r=2, alpha=3),
    "deft qr": lambda: peft.DeftConfig(target_modules=LINEAR, r=2, decomposition_method="qr"),
    "deft para": lambda: peft.DeftConfig(target_modules=LINEAR, r=2, para=True),
    "peanut": lambda: peft.PeanutConfig(target_modules=[*LINEAR, "odd"], r=2),
    "peanut deep": lambda: peft.PeanutConfig(target_modules=LINEAR, r=2, depth=2, act_fn="silu"),
    "glora": lambda: peft.GloraConfig(target_modules=[*LINEAR, "odd"], r=2),
    "glora vectors": lambda: peft.GloraConfig(
        target_modules=LINEAR, r=2, config_A_B="vector", config_C="vector", config_D_E="vector"
    ),
    "road": lambda: peft.RoadConfig(target_modules=LINEAR, group_size=4),
    "road 4": lambda: peft.RoadConfig(target_modules=LINEAR, group_size=4, variant="road_4"),
    "beft": lambda: peft.BeftConfig(target_modules=["up", "odd"]),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "frod": lambda: peft.FrodConfig(
        target_modules=[*LINEAR, "odd"], sparse_rate=0.2, progressbar=False
    ),
    "modules_to_save": lambda: peft.FourierFTConfig(
        target_modules=LINEAR, n_frequency=20, modules_to_save=["head"]
    ),
    "bias": lambda: peft.FourierFTConfig(target_modules=LINEAR, n_frequency=20, bias="all"),
}  # fmt: skip
#: Families that PEFT computes in single precision.
SINGLE = ("adamss", "psoft", "deft", "osf")
TRANSPOSED: dict[str, Callable[[], peft.PeftConfig]] = {
    "fourierft": lambda: peft.FourierFTConfig(target_modules=["first", "second"], n_frequency=9),
    "waveft": lambda: peft.WaveFTConfig(target_modules=["first", "second"], n_frequency=9),
    "randlora": lambda: peft.RandLoraConfig(target_modules=["first", "second"], r=2),
    "vblora": lambda: peft.VBLoRAConfig(
        target_modules=["first", "second"], r=2, num_vectors=8, vector_length=4
    ),
    "unilora": lambda: peft.UniLoraConfig(
        target_modules=["first", "second"], r=2, theta_d_length=16, save_indices=True
    ),
    "tinylora": lambda: peft.TinyLoraConfig(target_modules=["first", "second"], r=2, u=5),
    "pvera": lambda: peft.PveraConfig(target_modules=["first", "second"], r=4),
    "gralora": lambda: peft.GraloraConfig(target_modules=["first", "second"], r=4),
    "hira": lambda: peft.HiraConfig(target_modules=["first", "second"], r=2),
    "deft": lambda: peft.DeftConfig(target_modules=["first", "second"], r=2),
    "frod": lambda: peft.FrodConfig(
        target_modules=["first", "second"], sparse_rate=0.2, progressbar=False
    ),
}


def trained(
    net: nn.Module, config: peft.PeftConfig, folder: Path, *, double: bool
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The base, and what PEFT merges into it; the adapter is saved with random parameters."""
    dtype = torch.float64 if double else torch.float32
    net = net.to(dtype)
    base = state_of(net)
    model = peft.get_peft_model(net, config)
    randomised(model, seed=1).to(dtype)
    model.save_pretrained(folder)
    return base, state_of(model.merge_and_unload())


def assert_same(folder: Path, base: dict[str, Array], merged: dict[str, Array]) -> None:
    """Base plus our displacement is what PEFT merged; every other tensor stays."""
    tensors = {key: ArrayTensor(array) for key, array in base.items()}
    options = ReadOptions(
        base_shapes={key: array.shape for key, array in base.items()}, base=tensors
    )
    deltas = read_adapter(load_folder(folder), options)
    assert set(deltas) <= set(base)
    for name, expected in merged.items():
        change = expected - base[name]
        if name not in deltas:
            assert not change.any(), f"{name} changed, but has no delta"
            continue
        got = values_of(deltas[name])
        if type(deltas[name]).__name__ == "Replacement":
            got = got - base[name]
        assert_close(got, change, 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_reads_what_peft_merges(name: str, tmp_path: Path) -> None:
    """Every family, in the versions of its config that change the mathematics."""
    torch.manual_seed(0)
    double = name.split(maxsplit=1)[0] not in SINGLE
    assert_same(tmp_path, *trained(Net(), CASES[name](), tmp_path, double=double))


@pytest.mark.parametrize("name", TRANSPOSED)
def test_reads_weights_stored_input_by_output(name: str, tmp_path: Path) -> None:
    """GPT-2's layers, one of them square."""
    torch.manual_seed(0)
    assert_same(
        tmp_path, *trained(Transposed(), TRANSPOSED[name](), tmp_path, double=name not in SINGLE)
    )


@pytest.mark.parametrize("name", ["tinylora", "tinylora tied", "osf patterns", "hira"])
def test_order_of_the_modules(name: str, tmp_path: Path) -> None:
    """In the model block 10 comes after block 2; and no module's name is a part of another's."""
    torch.manual_seed(0)
    assert_same(
        tmp_path, *trained(Net(blocks=11), CASES[name](), tmp_path, double="osf" not in name)
    )


def saved(name: str, folder: Path) -> tuple[AdapterSource, ReadOptions]:
    """An adapter, and the base that it was made on."""
    torch.manual_seed(0)
    double = name.split(maxsplit=1)[0] not in SINGLE
    base, _ = trained(Net(), CASES[name](), folder, double=double)
    tensors = {key: ArrayTensor(array) for key, array in base.items()}
    shapes = {key: array.shape for key, array in base.items()}
    return load_folder(folder), ReadOptions(base_shapes=shapes, base=tensors)


def test_every_family_is_tried() -> None:
    """A family without a case would be a promise that nobody has looked at."""
    tried = {name.split(maxsplit=1)[0] for name in CASES}
    assert tried >= {name for name in KINDS if KINDS[name].support == "PEFT"}


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("fourierft", "no places"),
        ("waveft", "no places"),
        ("randlora drawn", "no shared bases"),
        ("pvera drawn", "no shared factors"),
        ("vera_drawn", "no shared factors"),
        ("adamss", "no clusters of rows"),
        ("randlora", ""),
        ("pvera", ""),
        ("tinylora", ""),
    ],
)
def test_what_is_drawn_again_is_said(name: str, note: str, tmp_path: Path) -> None:
    """Numbers that only a seed gives are noted."""
    source, options = saved(name, tmp_path)
    notes = read_adapter(source, options).notes
    assert len(notes) == bool(note)
    assert all(f"stores {note}: they are drawn again from its seed" in each for each in notes)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names what to install, before anything is read; an old PEFT is named too."""
    source, options = saved("fourierft", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            peft_bridge.importlib.util, "find_spec", lambda name: None if name == "peft" else name
        )
        with pytest.raises(FormatError, match=r"fourierft .* peft is not .*'mergebench\[peft\]'"):
            read_adapter(source, options)
    old = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(peft_bridge.importlib.util, "find_spec", lambda _: old)
    with pytest.raises(FormatError, match=r"peft 0\.\d+\.\d+ does not have fourierft"):
        read_adapter(source, options)


def test_peft_is_imported_by_the_first_read(tmp_path: Path) -> None:
    """Neither listing the kinds nor opening an adapter of them imports PEFT or torch."""
    _, options = saved("fourierft", tmp_path)
    shapes = repr(dict(options.base_shapes or {}))
    script = f"""
import json, sys
from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, ReadOptions, read_adapter
from mergebench.checkpoints.containers import open_weights
from pathlib import Path
folder = Path({str(tmp_path)!r})
opened = open_weights(folder / "adapter_model.safetensors")
config = json.loads((folder / "adapter_config.json").read_text())
source = AdapterSource("toy", opened.tensors, config, {{}})
deltas = read_adapter(source, ReadOptions(base_shapes={shapes}))
assert not {{"peft", "torch"}} & set(sys.modules), "imported"
deltas["odd.weight"].values.read(0, 3)
assert {{"peft", "torch"}} <= set(sys.modules), "not imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_random_numbers_of_the_process_stay(tmp_path: Path) -> None:
    """Layers start with random numbers, drawn from a generator that is put back."""
    source, options = saved("gralora", tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    for delta in read_adapter(source, options).values():
        values_of(delta)
    assert torch.rand(1) == expected


def test_tiles_and_threads(tmp_path: Path) -> None:
    """Any range, in any order and from any thread, reads the same entries."""
    source, options = saved("hira", tmp_path)
    deltas = read_adapter(source, options)
    whole = {name: values_of(delta).reshape(-1) for name, delta in deltas.items()}
    ranges = [(name, start) for start in range(0, 60, 7) for name in deltas]
    fresh = read_adapter(source, options)
    with ThreadPoolExecutor(4) as pool:
        parts = list(
            pool.map(lambda at: tile(fresh[at[0]], at[1], at[1] + 5, np.dtype(np.float64)), ranges)
        )
    for (name, start), part in zip(ranges, parts, strict=True):
        assert np.array_equal(part, whole[name][start : start + 5])


@pytest.mark.parametrize(
    ("name", "entries", "pattern"),
    [
        ("fourierft", {"n_frequency": "20"}, r"n_frequency in .*whole number.*got '20'"),
        ("fourierft", {"n_frequency": -1}, "n_frequency in .*whole number"),
        ("fourierft", {"n_frequency": 10**9}, "n_frequency in .*from 0 to 1000, got 1000000000"),
        ("fourierft", {"n_frequency_pattern": {"up": 2000}}, "from 0 to 1000, got 2000"),
        ("peanut", {"depth": 101}, "depth in .*from 0 to 100, got 101"),
        ("fourierft", {"n_frequency": True}, "n_frequency in .*whole number"),
        ("fourierft", {"scaling": float("nan")}, "scaling in .*finite number"),
        ("fourierft", {"random_loc_seed": 2**70}, "random_loc_seed in .*63 bits"),
        ("fourierft", {"n_frequency_pattern": [1]}, "n_frequency_pattern in .*an object"),
        ("fourierft", {"n_frequency_pattern": {"up": "9"}}, r"n_frequency_pattern\['up'\]"),
        ("fourierft", {"n_frequency_pattern": {"(": 9}}, "no regular expression"),
        ("fourierft", {"n_frequency_pattern": {f"{i}+": 9 for i in range(300)}}, "at most 256"),
        ("fourierft", {"shiny": True}, "sets shiny, a feature that this version does not know"),
        ("waveft", {"wavelet_family": "../x"}, "wavelet_family in .*short name"),
        ("peanut", {"act_fn": "os.system"}, "act_fn in .*short name"),
        ("psoft", {"psoft_svd": "other"}, "psoft_svd in .*one of full, lowrank"),
        ("glora", {"config_C": 3}, "config_C in .*one of lora"),
    ],
)
def test_configs(name: str, entries: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    """Every entry that reaches PEFT is looked at first, and unknown ones are not ignored."""
    source, options = saved(name, tmp_path)
    changed = replace(source, config={**(source.config or {}), **entries})
    with pytest.raises(FormatError, match=pattern):
        read_adapter(changed, options)


def test_patterns_do_not_reach_peft(tmp_path: Path) -> None:
    """A pattern that a backtracking matcher would never finish is matched by our own."""
    source, options = saved("fourierft", tmp_path)
    patterns = {"(a+)+b": 3, **(source.config or {})["n_frequency_pattern"]}
    config = {**(source.config or {}), "n_frequency_pattern": patterns}
    tensors = {key.replace("odd", "a" * 60): each for key, each in source.tensors.items()}
    shapes = {key.replace("odd", "a" * 60): s for key, s in (options.base_shapes or {}).items()}
    config["n_frequency_pattern"]["a{60}"] = 9
    changed = replace(source, tensors=tensors, config=config)
    deltas = read_adapter(changed, ReadOptions(base_shapes=shapes))
    expected = read_adapter(source, options)
    assert_close(values_of(deltas[f"{'a' * 60}.weight"]), values_of(expected["odd.weight"]), 0)


def test_what_the_file_lacks(tmp_path: Path) -> None:
    """Indices, places and orders that a file does not hold, and tensors that it holds twice."""
    unilora = peft.UniLoraConfig(target_modules=LINEAR, r=2, theta_d_length=16)
    tiny = peft.TinyLoraConfig(target_modules=LINEAR, r=2, u=5, save_projection=False)
    places = peft.SupertuningConfig(
        target_modules=LINEAR, sparsity=0.8, save_precomputed_indices=False
    )
    for config, pattern in (
        (unilora, "does not tell which modules it adapts.*save_indices=True"),
        (tiny, "place in the model.*save_projection"),
        (places, "has no supertuning_indices.*save_precomputed_indices=True"),
    ):
        base, _ = trained(Net(), config, tmp_path, double=True)
        options = ReadOptions(base_shapes={key: array.shape for key, array in base.items()})
        with pytest.raises(FormatError, match=pattern):
            read_adapter(load_folder(tmp_path), options)

    source, options = saved("tinylora", tmp_path)
    other = replace(source, config={**(source.config or {}), "projection_seed": 43})
    with pytest.raises(FormatError, match=r"not those of its seed.*none for place"):
        read_adapter(other, options)


def test_bases_that_do_not_fit(tmp_path: Path) -> None:
    """No base, a base of other shapes or forms, and tensors of other sizes are named."""
    source, options = saved("fourierft", tmp_path)
    with pytest.raises(FormatError, match=r"does not say how large.*--base"):
        read_adapter(source)
    hira, with_values = saved("hira", tmp_path)
    with pytest.raises(FormatError, match=r"depends on the base weights.*--base"):
        read_adapter(hira, ReadOptions(base_shapes=with_values.base_shapes))
    shapes = {**(options.base_shapes or {}), "odd.weight": (9, 7, 3)}
    with pytest.raises(MismatchError, match=r"fourierft cannot, expected conv1d, linear, got conv"):
        read_adapter(source, ReadOptions(base_shapes=shapes))

    gralora, fitting = saved("gralora", tmp_path)
    deltas = read_adapter(replace(gralora, config={**(gralora.config or {}), "r": 8}), fitting)
    with pytest.raises(MismatchError, match=r"PEFT cannot compute blocks\.0\.\w+.*size mismatch"):
        values_of(deltas["blocks.0.up.weight"])
    tensors = {key: each for key, each in gralora.tensors.items() if "0.up.gralora_A" not in key}
    deltas = read_adapter(replace(gralora, tensors=tensors), fitting)
    with pytest.raises(MismatchError, match=r"not those that PEFT expects.*up\.gralora_A"):
        values_of(deltas["blocks.0.up.weight"])
    strange = {**gralora.tensors, "base_model.model.blocks.0.up.gralora_Z": ArrayTensor(np.ones(2))}
    deltas = read_adapter(replace(gralora, tensors=strange), fitting)
    with pytest.raises(MismatchError, match=r"not those that PEFT expects.*up\.gralora_Z"):
        values_of(deltas["blocks.0.up.weight"])


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """A broken adapter is named when it is read."""
    source, options = saved("gralora", tmp_path)
    key = "base_model.model.blocks.0.up.gralora_B"
    broken = np.full(source.tensors[key].shape, np.nan)
    changed = replace(source, tensors={**source.tensors, key: ArrayTensor(broken)})
    with pytest.raises(FormatError, match=r"blocks\.0\.up has values that are not finite"):
        values_of(read_adapter(changed, options)["blocks.0.up.weight"])


def test_basis_that_is_not_stored(tmp_path: Path) -> None:
    """FRoD's directions come from the stored basis, which must be there and fit."""
    source, options = saved("frod", tmp_path)
    tensors = {key: each for key, each in source.tensors.items() if "frod_V.up" not in key}
    with pytest.raises(FormatError, match=r"frod_V\.up, .*not stored.*save_projection=True"):
        read_adapter(replace(source, tensors=tensors), options)
    tensors["base_model.frod_V.up"] = ArrayTensor(np.eye(3))
    with pytest.raises(FormatError, match="does not fit its core"):
        read_adapter(replace(source, tensors=tensors), options)


def test_merged_files(tmp_path: Path) -> None:
    """Two families on one base, from folder to file, with a note about the drawn places."""
    torch.manual_seed(0)
    changes: dict[str, Array] = {}
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    base = state_of(net)
    for name in ("fourierft", "hira"):
        _, merged = trained(deepcopy(net), CASES[name](), tmp_path / name, double=False)
        for key, array in merged.items():
            changes[key] = changes.get(key, 0) + array - base[key]
    mergebench.merge_models(
        [str(tmp_path / "fourierft"), str(tmp_path / "hira")],
        base=str(tmp_path / "base.safetensors"), method="task_arithmetic",
        out=str(tmp_path / "out.safetensors"),
    )  # fmt: skip
    out = load_file(tmp_path / "out.safetensors")
    for key, change in changes.items():
        assert_close(out[key].double().numpy(), base[key] + change, 1e-6)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert "drawn again from its seed" in str(file.metadata())


def test_pickled_adapters(tmp_path: Path) -> None:
    """A `.bin` is read by our own reader, and means the same."""
    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    model = peft.get_peft_model(net, CASES["hira"]())
    randomised(model, seed=1)
    for place, safe in (("safe", True), ("pickled", False)):
        model.save_pretrained(tmp_path / place, safe_serialization=safe)
    assert (tmp_path / "pickled" / "adapter_model.bin").exists()
    one, other = (
        open_source(f"{tmp_path / 'base.safetensors'}+{tmp_path / place}", ReadOptions()).deltas
        for place in ("safe", "pickled")
    )
    assert one is not None
    assert other is not None
    for name, delta in one.items():
        assert np.array_equal(values_of(delta), values_of(other[name]))
