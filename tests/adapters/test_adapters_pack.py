"""Adapters that we lay out load in PEFT and mean there what they meant before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergebench.adapters_zoo.adapter import AdapterSource, read_adapter
from mergebench.adapters_zoo.pack import Factor, PackedLayout, pack_lora
from mergebench.core.delta import LowRank, Replacement
from mergebench.core.errors import FormatError, MismatchError, ParameterError
from mergebench.core.tensor import Array, read_all

from .support import assert_close, read_values, source_of, to_numpy, values_of


class Net(nn.Module):
    """What adapters can adapt, twice the same name at different depths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 10)
        self.inner = nn.ModuleDict({"lin": nn.Linear(10, 4), "conv": nn.Conv2d(3, 4, 3)})
        self.point = nn.Conv2d(4, 5, 1)
        self.seq = nn.Conv1d(3, 4, 5)
        self.head = nn.Linear(4, 2)


class TransposedNet(nn.Module):
    """Layers stored input x output, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 5)
        self.first = Conv1D(7, 5)
        self.second = Conv1D(5, 7)


def drawn(deltas: Mapping[str, tuple[tuple[int, ...], int, bool]]) -> dict[str, LowRank]:
    """Random low-rank deltas from (shape, rank, transposed)."""
    random = np.random.default_rng(0)
    made = {}
    for name, (shape, rank, transposed) in deltas.items():
        out, into, *kernel = shape[::-1] if transposed else shape
        a = random.standard_normal((rank, into, *kernel)).astype(np.float32)
        b = random.standard_normal((out, rank, *(1 for _ in kernel))).astype(np.float32)
        tensors = source_of({"A": a, "B": b}).tensors
        made[name] = LowRank(tensors["B"], tensors["A"], 1.0, shape, transposed)
    return made


def factors_of(deltas: Mapping[str, LowRank]) -> dict[str, Factor]:
    """What the layout needs to know of each delta."""
    return {
        name: Factor(delta.rank, delta.shape, delta.transposed, "F32")
        for name, delta in deltas.items()
    }


def filled(
    layout: PackedLayout, deltas: Mapping[str, LowRank], values: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """The arrays of a layout: factors zero-padded to its shapes."""
    arrays: dict[str, Array] = {}
    for tensor in layout.tensors:
        array = np.zeros(tensor.shape, np.float32)
        if tensor.role == "alpha":
            array[...] = tensor.constant
        elif tensor.role == "value":
            array[...] = (values or {})[tensor.source]
        else:
            delta = deltas[tensor.source]
            stored = read_all(delta.A if tensor.role == "A" else delta.B)
            array[tuple(slice(size) for size in stored.shape)] = stored
        arrays[tensor.name] = array
    return arrays


def written(layout: PackedLayout, arrays: Mapping[str, Array], folder: Path) -> Path:
    """The folder that PEFT opens."""
    save_file(dict(arrays), folder / "adapter_model.safetensors", dict(layout.metadata))
    (folder / "adapter_config.json").write_text(json.dumps(dict(layout.config)))
    return folder


def assert_loads(
    net: nn.Module, folder: Path, deltas: Mapping[str, LowRank], values: Mapping[str, Array]
) -> None:
    """PEFT merges exactly these deltas and values into the net, and adapts nothing else."""
    base = {name: to_numpy(value) for name, value in net.double().state_dict().items()}
    base = {name: value.copy() for name, value in base.items()}
    model = peft.PeftModel.from_pretrained(net, str(folder))
    layers = [
        name
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    ]
    merged = {k: to_numpy(v) for k, v in model.double().merge_and_unload().state_dict().items()}

    assert sorted(f"{layer}.weight" for layer in layers) == sorted(deltas)
    for name, expected in base.items():
        if name in deltas:
            assert_close(merged[name] - expected, values_of(deltas[name]))
        else:
            assert np.array_equal(merged[name], values.get(name, expected))


DELTAS = {
    "embed.weight": ((11, 6), 2, True),
    "lin.weight": ((10, 6), 3, False),
    "inner.lin.weight": ((4, 10), 1, False),
    "inner.conv.weight": ((4, 3, 3, 3), 4, False),
    "point.weight": ((5, 4, 1, 1), 2, False),
    "seq.weight": ((4, 3, 5), 2, False),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
def test_loads_in_peft(known: bool, rank: int | None, tmp_path: Path) -> None:
    """Every layer type, ranks padded to one, a head in full; with the base's names or without."""
    net, deltas = Net(), drawn(DELTAS)
    values = {"head.weight": np.ones((2, 4)), "head.bias": np.full(2, 0.5)}
    layout = pack_lora(
        factors_of(deltas),
        dialect="peft",
        base_name="org/base",
        replacements={name: ("F32", value.shape) for name, value in values.items()},
        known_names=net.state_dict().keys() if known else None,
        rank=rank,
    )
    written(layout, filled(layout, deltas, values), tmp_path)

    assert {one.shape[0] for one in layout.tensors if one.role == "A"} == {rank or 4}
    assert_loads(net, tmp_path, deltas, values)


def test_config_is_what_servers_accept() -> None:
    """Plain LoRA, uniform rank, scale 1, nothing special."""
    deltas = drawn({"lin.weight": DELTAS["lin.weight"]})
    layout = pack_lora(factors_of(deltas), dialect="peft", base_name="org/base", replacements={})

    assert layout.config == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "org/base",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 3,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": ["lin"],
    }
    assert [(one.name, one.dtype, one.shape, one.source, one.role) for one in layout.tensors] == [
        ("base_model.model.lin.lora_A.weight", "F32", (3, 6), "lin.weight", "A"),
        ("base_model.model.lin.lora_B.weight", "F32", (10, 3), "lin.weight", "B"),
    ]


def test_transposed_layers_load_in_peft(tmp_path: Path) -> None:
    """fan_in_fan_out is set where every linear weight is stored input x output."""
    deltas = drawn(
        {
            "wte.weight": ((11, 5), 2, True),
            "first.weight": ((5, 7), 3, True),
            "second.weight": ((7, 5), 1, True),
        }
    )
    layout = pack_lora(factors_of(deltas), dialect="peft", base_name=None, replacements={})
    written(layout, filled(layout, deltas), tmp_path)

    assert layout.config["fan_in_fan_out"] is True
    assert "base_model.model.wte.lora_embedding_A" in {one.name for one in layout.tensors}
    assert_loads(TransposedNet(), tmp_path, deltas, {})


@pytest.mark.parametrize("dialect", ["peft", "kohya"])
def test_round_trip_through_a_bare_file(dialect: Any) -> None:
    """What is packed is read back, the config coming from the metadata."""
    deltas = drawn({name: DELTAS[name] for name in DELTAS if name != "embed.weight"})
    layout = pack_lora(factors_of(deltas), dialect=dialect, base_name=None, replacements={})
    source = source_of(filled(layout, deltas), None, layout.metadata)
    got = read_values(source)

    for name, delta in deltas.items():
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_") + ".weight"
        assert_close(got[flat if dialect == "kohya" else name], values_of(delta))
    assert len(got) == len(deltas)


def test_round_trip_of_embeddings_and_values() -> None:
    """An embedding comes back as one, a replaced module as values."""
    deltas = drawn({"embed.weight": DELTAS["embed.weight"]})
    values = {"head.weight": np.ones((2, 4))}
    layout = pack_lora(
        factors_of(deltas),
        dialect="peft",
        base_name=None,
        replacements={"head.weight": ("F32", (2, 4))},
    )
    vector = read_adapter(source_of(filled(layout, deltas, values), None, layout.metadata))

    assert_close(values_of(vector["embed.weight"]), values_of(deltas["embed.weight"]))
    assert isinstance(vector["head.weight"], Replacement)
    assert_close(values_of(vector["head.weight"]), values["head.weight"], 0)


def test_kohya_layout() -> None:
    """Each module keeps its rank, α is that rank in float32, prefixes are not doubled."""
    factors = {
        "down.0.to_q.weight": Factor(2, (4, 3), False, "BF16"),
        "lora_te_text_model_fc1.weight": Factor(257, (500, 300), False, "BF16"),
    }
    layout = pack_lora(factors, dialect="kohya", base_name=None, replacements={})

    assert [(one.name, one.dtype, one.shape, one.constant) for one in layout.tensors] == [
        ("lora_te_text_model_fc1.alpha", "F32", (), 257),
        ("lora_te_text_model_fc1.lora_down.weight", "BF16", (257, 300), None),
        ("lora_te_text_model_fc1.lora_up.weight", "BF16", (500, 257), None),
        ("lora_unet_down_0_to_q.alpha", "F32", (), 2),
        ("lora_unet_down_0_to_q.lora_down.weight", "BF16", (2, 3), None),
        ("lora_unet_down_0_to_q.lora_up.weight", "BF16", (4, 2), None),
    ]
    assert layout.config == {}


def targets(adapted: list[str], known: list[str] | None) -> dict[str, Any]:
    """The lists of modules that select ``adapted`` in a base with tensors ``known``."""
    factors = {f"{name}.weight": Factor(1, (2, 2), False, "F32") for name in adapted}
    names = None if known is None else [f"{name}.weight" for name in known]
    config = pack_lora(
        factors, dialect="peft", base_name=None, replacements={}, known_names=names
    ).config
    return {key: config[key] for key in ("target_modules", "exclude_modules") if key in config}


def test_target_modules() -> None:
    """Short names only where they select the same modules."""
    every = ["l.0.q", "l.0.k", "l.1.q", "l.1.k"]

    assert targets(["l.0.q", "l.1.q"], every) == {"target_modules": ["q"]}
    assert targets(["l.0.q"], every) == {"target_modules": ["l.0.q"]}
    assert targets(["l.1.q", "l.0.q"], None) == {"target_modules": ["l.0.q", "l.1.q"]}
    assert targets(["lin"], ["lin", "x.lin"]) == {
        "target_modules": ["lin"],
        "exclude_modules": ["x.lin"],
    }
    assert targets(["lin", "y.x.lin"], ["lin", "x.lin", "y.x.lin"]) == {
        "target_modules": ["lin", "y.x.lin"]
    }
    assert targets(["a.mlp"], ["a.mlp", "b.mlp.up"]) == {"target_modules": ["a.mlp"]}


def test_excluded_modules_stay_unadapted(tmp_path: Path) -> None:
    """A name that ends another one adapts only the module that was meant."""
    net, deltas = Net(), drawn({"lin.weight": DELTAS["lin.weight"]})
    layout = pack_lora(
        factors_of(deltas),
        dialect="peft",
        base_name=None,
        replacements={},
        known_names=net.state_dict().keys(),
    )
    written(layout, filled(layout, deltas), tmp_path)

    assert layout.config["exclude_modules"] == ["inner.lin"]
    assert_loads(net, tmp_path, deltas, {})


@pytest.mark.parametrize(
    ("error", "pattern", "changes"),
    [
        (ParameterError, "at least one", {"modules": {}}),
        (ParameterError, "`rank`, expected at least 3, got 2", {"rank": 2}),
        (
            ParameterError,
            r"a\.weight: rank, expected at least 1",
            {"modules": {"a.weight": Factor(0, (2, 2), False, "F32")}},
        ),
        (
            FormatError,
            r"experts: cannot be written",
            {"modules": {"experts": Factor(1, (2, 2), False, "F32")}},
        ),
        (
            FormatError,
            r"norm\.weight: cannot be written.*--as delta",
            {"modules": {"norm.weight": Factor(1, (2,), False, "F32")}},
        ),
        (
            FormatError,
            r"c\.weight: a convolution",
            {"modules": {"c.weight": Factor(1, (2, 2, 3), True, "F32")}},
        ),
        (
            MismatchError,
            r"e\.weight: factors of an embedding",
            {"modules": {"e.weight": Factor(1, (2, 2), False, "F32", embedding=True)}},
        ),
        (
            MismatchError,
            "one fan_in_fan_out",
            {
                "modules": {
                    "a.weight": Factor(1, (2, 2), False, "F32"),
                    "b.weight": Factor(1, (2, 2), True, "F32"),
                }
            },
        ),
        (FormatError, "^scale: a tensor outside", {"replacements": {"scale": ("F32", ())}}),
        (
            MismatchError,
            r"a is written in full.*covers a too",
            {"replacements": {"a.scale": ("F32", (2,))}},
        ),
        (
            MismatchError,
            r"score is written in full.*covers my_score too",
            {
                "replacements": {"score.weight": ("F32", (2,))},
                "known_names": ["a.weight", "score.weight", "my_score.weight"],
            },
        ),
        (
            MismatchError,
            r"top is written in full.*covers top\.a too",
            {
                "modules": {"top.a.weight": Factor(1, (2, 2), False, "F32")},
                "replacements": {"top.weight": ("F32", (2,))},
            },
        ),
        (
            MismatchError,
            r"score is written in full only with all.*expected score\.bias too",
            {
                "replacements": {"score.weight": ("F32", (2,))},
                "known_names": ["a.weight", "score.weight", "score.bias"],
            },
        ),
        (
            FormatError,
            r"score\.weight: Kohya's format holds no",
            {"dialect": "kohya", "replacements": {"score.weight": ("F32", (2,))}},
        ),
        (
            FormatError,
            r"a\.weight: Kohya's format has no weights",
            {"dialect": "kohya", "modules": {"a.weight": Factor(1, (2, 2), True, "F32")}},
        ),
        (
            FormatError,
            r"a_b\.weight and a\.b\.weight are both lora_unet_a_b",
            {
                "dialect": "kohya",
                "modules": {
                    "a.b.weight": Factor(1, (2, 2), False, "F32"),
                    "a_b.weight": Factor(1, (2, 2), False, "F32"),
                },
            },
        ),
    ],
)
def test_refusals(error: type[Exception], pattern: str, changes: dict[str, Any]) -> None:
    """What a dialect cannot express is refused before anything is written."""
    arguments: dict[str, Any] = {
        "modules": {"a.weight": Factor(3, (4, 5), False, "F32")},
        "dialect": "peft",
        "base_name": None,
        "replacements": {},
    }
    arguments |= changes
    with pytest.raises(error, match=pattern):
        pack_lora(arguments.pop("modules"), **arguments)


def test_biases_of_adapted_layers_are_trained_ones() -> None:
    """They are no module to save: PEFT finds them inside of the layer that it wraps."""
    layout = pack_lora(
        {"a.weight": Factor(3, (4, 5), False, "F32")},
        dialect="peft",
        base_name=None,
        replacements={"a.bias": ("F32", (4,)), "norm.bias": ("F16", (4,))},
        known_names=["a.weight", "a.bias", "norm.bias"],
    )
    values = {one.source: (one.name, one.dtype) for one in layout.tensors if one.role == "value"}
    assert values == {
        "a.bias": ("base_model.model.a.base_layer.bias", "F32"),
        "norm.bias": ("base_model.model.norm.bias", "F16"),
    }
    assert layout.config["bias"] == "lora_only"
    assert layout.config["modules_to_save"] == ["norm"]


def test_half_precision_layout(tmp_path: Path) -> None:
    """Factors written in half precision mean the same up to their rounding."""
    deltas = drawn({"lin.weight": DELTAS["lin.weight"]})
    layout = pack_lora(
        {"lin.weight": Factor(3, (10, 6), False, "F16")},
        dialect="peft",
        base_name=None,
        replacements={},
        known_names=Net().state_dict().keys(),
    )
    arrays = {name: array.astype(np.float16) for name, array in filled(layout, deltas).items()}
    written(layout, arrays, tmp_path)
    model = peft.PeftModel.from_pretrained(Net().to(torch.float16), str(tmp_path)).double()
    layer = model.base_model.model.lin

    assert_close(to_numpy(layer.get_delta_weight("default")), values_of(deltas["lin.weight"]), 2e-3)
    assert_close(
        read_values(AdapterSource("toy", source_of(arrays).tensors, layout.config, {}))[
            "lin.weight"
        ],
        to_numpy(layer.get_delta_weight("default")),
    )
