"""Every kind of adapter on every kind of module: what is read is what PEFT merges."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, ReadOptions, read_adapter
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import Array, ArrayTensor

from . import test_adapters_families as own
from . import test_adapters_through_peft as through
from .support import assert_same_update, load_folder

pytestmark = own.pytestmark + through.pytestmark

Trained = tuple[AdapterSource, dict[str, Array], dict[str, Array]]
TABLE = Path(__file__).parent / "README.md"
#: Kinds that are not made by adapting modules with PEFT; each has a file of tests of its own.
ELSEWHERE = {"beft", "delta", "experts", "full", "ln_tuning", "sparse", "tasks", "tokens"}
YES, NONE, REFUSED = "yes", "–", "refused"
#: Column of the table -> the modules that are adapted.
LAYERS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "square": lambda: {"proj": nn.Linear(6, 6)},
    "non-square": lambda: {"proj": nn.Linear(6, 8)},
    "odd": lambda: {"proj": nn.Linear(9, 15, bias=False)},
    "conv 1×1": lambda: {"proj": nn.Conv2d(4, 6, 1)},
    "conv 3×3": lambda: {"proj": nn.Conv2d(4, 6, 3)},
    "embedding": lambda: {"embed": nn.Embedding(10, 6)},
    "Conv1D": lambda: {"proj": Conv1D(12, 6), "other": Conv1D(6, 6)},
    "patterns": lambda: {"proj": nn.Linear(6, 12), "other": nn.Linear(12, 6)},
    "modules_to_save": lambda: {"proj": nn.Linear(6, 8)},
}
#: Kind -> its configuration; the number divides every size of the modules.
CONFIGS: dict[str, Callable[[int], dict[str, Any]]] = {
    "adalora": lambda n: {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 3},
    "adamss": lambda n: {"r": 4, "num_subspaces": 2},
    "boft": lambda n: {"boft_block_size": n},
    "c3a": lambda n: {"block_size": n},
    "deft": lambda n: {"r": 2, "alpha": 3},
    "delora": lambda n: {"r": 2},
    "dora": lambda n: {"r": 2, "lora_alpha": 5, "use_dora": True},
    "fourierft": lambda n: {"n_frequency": 9},
    "frod": lambda n: {"sparse_rate": 0.2, "progressbar": False},
    "glora": lambda n: {"r": 2},
    "gralora": lambda n: {"r": 6, "gralora_k": n},
    "hira": lambda n: {"r": 2},
    "hra": lambda n: {"r": 2},
    "ia3": lambda n: {"feedforward_modules": []},
    "loha": lambda n: {"r": 2, "alpha": 3},
    "lokr": lambda n: {"r": 2, "alpha": 3},
    "lora": lambda n: {"r": 2, "lora_alpha": 5},
    "miss": lambda n: {"r": 2},
    "oft": lambda n: {"oft_block_size": n},
    "osf": lambda n: {"effective_rank": 3},
    "peanut": lambda n: {"r": 2},
    "psoft": lambda n: {"r": 4},
    "pvera": lambda n: {"r": 4},
    "randlora": lambda n: {"r": 2},
    "road": lambda n: {"group_size": n},
    "shira": lambda n: {"r": 2},
    "supertuning": lambda n: {"sparsity": 0.8},
    "tinylora": lambda n: {"r": 2, "u": 5},
    "unilora": lambda n: {"r": 2, "theta_d_length": 16, "save_indices": True},
    "vblora": lambda n: {"r": 2, "num_vectors": 8, "vector_length": n},
    "vera": lambda n: {"r": 4},
    "vera_drawn": lambda n: {"r": 4, "save_projection": False},
    "waveft": lambda n: {"n_frequency": 9},
}
#: Kinds that are read as another one's type.
TYPES = {"dora": "lora", "vera_drawn": "vera"}
#: AdaLoRA's is the mask of ranks that its own training writes; layers say which, not how.
NO_PATTERNS = {("adalora", "rank_pattern"), *((kind, "layers_pattern") for kind in CONFIGS)}


@pytest.fixture(autouse=True)
def _no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """BOFT without the extension for several factors, which takes a compiler for CUDA."""
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: None)


def config_of(kind: str, column: str, targets: list[str]) -> peft.PeftConfig | None:
    """A configuration for a column, None where the kind has no such entries."""
    made = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(TYPES.get(kind, kind).upper())]
    known = {field.name for field in fields(made)}
    entries = CONFIGS[kind](3 if column == "odd" else 2)
    if column == "patterns":
        found = {name for name in known if name.endswith("_pattern")}
        patterns = {name for name in found if (kind, name) not in NO_PATTERNS}
        if not patterns:
            return None
        entries |= {name: {"proj": 5 if "alpha" in name else 3} for name in patterns}
    if column == "modules_to_save":
        if "modules_to_save" not in known:
            return None
        entries["modules_to_save"] = ["head"]
    return made(target_modules=targets, **entries)


def trained(kind: str, column: str, folder: Path) -> Trained | None:
    """An adapter as PEFT saves it, the base and PEFT's merge; None where PEFT makes none."""
    torch.manual_seed(0)
    net = nn.Module()
    for name, layer in {**LAYERS[column](), "head": nn.Linear(6, 3)}.items():
        net.add_module(name, layer)
        if isinstance(layer, Conv1D):
            nn.init.normal_(layer.bias)
    try:
        config = config_of(kind, column, list(LAYERS[column]()))
        if config is None:
            return None
        if KINDS[kind].support == "PEFT":
            made = through.trained(net, config, folder, double=kind not in through.SINGLE)
            found = (load_folder(folder), *made)
        else:
            found = own.trained(net, config, folder)
    except (ValueError, TypeError, NotImplementedError, KeyError):
        return None
    # OSF passes over what it cannot adapt, and saves a file with nothing in it.
    return found if found[0].tensors else None


def cell(kind: str, column: str, folder: Path) -> str:
    """What the table has to say, after a comparison where there is something to compare."""
    found = trained(kind, column, folder)
    if found is None:
        return NONE
    source, base, merged = found
    tensors = {name: ArrayTensor(array) for name, array in base.items()}
    options = ReadOptions(base_shapes={n: a.shape for n, a in base.items()}, base=tensors)
    try:
        deltas = read_adapter(source, options)
    except MergebenchError:
        return REFUSED
    if KINDS[kind].support == "PEFT":
        through.assert_same(folder, base, merged)
    else:
        assert_same_update(deltas, base, merged)
    assert set(deltas) & {"proj.weight", "embed.weight"}
    assert ("head.weight" in deltas) is (column == "modules_to_save")
    return YES


def table() -> dict[str, dict[str, str]]:
    """The cells of the table by kind and column."""
    rows = re.findall(r"^\| (.+) \|$", TABLE.read_text(), re.MULTILINE)
    split = [row.split(" | ") for row in rows]
    columns = next(row for row in split if row[0] == "kind")[1:]
    found = {row[0].strip("`"): row[1:] for row in split if len(row) == len(columns) + 1}
    del found["kind"]
    return {kind: dict(zip(columns, row, strict=True)) for kind, row in found.items()}


def test_every_kind_has_a_row() -> None:
    """And every column a kind of module."""
    rows = table()
    assert set(rows) == set(CONFIGS) == set(KINDS) - ELSEWHERE
    assert all(list(row) == list(LAYERS) for row in rows.values())


@pytest.mark.parametrize("column", LAYERS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_cells(kind: str, column: str, tmp_path: Path) -> None:
    """``yes`` is a comparison with PEFT's merge, the others are looked at as well."""
    assert cell(kind, column, tmp_path) == table()[kind][column]
