"""Saved task vectors, and telling adapters from checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from mergebench.adapters_zoo import adapter
from mergebench.adapters_zoo.adapter import (
    CONFIG_KEY,
    KINDS,
    Kind,
    is_adapter,
    read_adapter,
)
from mergebench.adapters_zoo.kinds.delta import delta_metadata
from mergebench.core.delta import Dense, Replacement
from mergebench.core.errors import FormatError

from .support import assert_close, source_of, values_of

ARRAYS = {
    "layer.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "layer.bias": np.array([0.5, -1], np.float32),
}


def test_round_trip() -> None:
    """Every tensor comes back under its name as it was, with the base's identity."""
    base = {"path": "org/model", "size": 12}
    vector = read_adapter(source_of(ARRAYS, metadata=delta_metadata(base)))

    assert all(isinstance(delta, Dense) for delta in vector.values())
    assert list(vector) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert_close(values_of(vector[name]), array.astype(np.float64), 0)
    assert json.loads(vector.metadata["mergebench"])["base"] == base
    assert vector.metadata["kind"] == "delta"


def test_replaced_tensors_stay_values() -> None:
    """What was no difference when it was saved is none when it is read, whatever its dtype."""
    arrays = ARRAYS | {"head.steps": np.array([3], np.int64)}
    metadata = delta_metadata(None, replaced=["head.steps"])
    vector = read_adapter(source_of(arrays, metadata=metadata))

    assert isinstance(vector["head.steps"], Replacement)
    assert isinstance(vector["layer.bias"], Dense)
    assert json.loads(metadata["mergebench"]) == {
        "kind": "delta",
        "version": 1,
        "base": None,
        "replaced": ["head.steps"],
    }


def test_names_like_factors_are_no_factors() -> None:
    """A saved task vector of an adapter's own tensors is not multiplied out."""
    arrays = {"x.lora_A.weight": np.ones((1, 2)), "x.lora_B.weight": np.ones((2, 1))}
    vector = read_adapter(source_of(arrays, metadata=delta_metadata(None)))

    assert list(vector) == list(arrays)


def test_integer_differences() -> None:
    """A difference is a floating-point tensor."""
    arrays = {"steps": np.array([3], np.int64)}
    with pytest.raises(FormatError, match=r"steps is no difference.*got I64"):
        read_adapter(source_of(arrays, metadata=delta_metadata(None)))


def test_listed_but_missing() -> None:
    """The list of replaced tensors names stored ones only."""
    with pytest.raises(FormatError, match="gone is listed as replaced"):
        read_adapter(source_of(ARRAYS, metadata=delta_metadata(None, replaced=["gone"])))


def test_other_versions() -> None:
    """A file of a later format is refused with the way out."""
    about = json.dumps({"kind": "delta", "version": 2})
    with pytest.raises(FormatError, match=r"unknown version, expected 1, got 2; open it with"):
        read_adapter(source_of(ARRAYS, metadata={"mergebench": about}))


@pytest.mark.parametrize(
    ("names", "config", "metadata", "expected"),
    [
        (["x.weight"], {"peft_type": "XLORA"}, {}, True),
        (["x.weight"], {"model_type": "llama"}, {}, False),
        (["x.weight"], None, delta_metadata(None), True),
        (["x.weight"], None, {CONFIG_KEY: "{}"}, True),
        (["x.weight"], None, {"mergebench": '{"kind": "merge"}'}, False),
        (["x.weight"], None, {"mergebench": "no json"}, False),
        (["base_model.model.x.lora_A.weight"], None, {}, True),
        (["x.lora_A.default.weight", "score.weight"], None, {}, True),
        (["x.lora_embedding_B"], None, {}, True),
        (["lora_unet_x.lora_down.weight"], None, {}, True),
        (["lora_unet_x.dora_scale"], None, {}, True),
        (["lora_unet_x.hada_w1_a"], None, {}, True),
        (["x.lora_magnitude_vector"], None, {}, True),
        (["lora_unet_x.diff_b"], None, {}, True),
        (["prompt_embeddings"], None, {}, True),
        (["x.ia3_l"], None, {}, True),
        (["unet.x.to_q.lora.down.weight"], None, {}, True),
        (["model.layers.0.q.weight", "model.layers.0.q.bias"], None, {}, False),
        (["b1.weight", "loss.diff", "beta.alpha", "flora.weight"], None, {}, False),
        (["q.base_layer.weight", "q.lora_A.speech.weight"], None, {}, False),
        (["q.weight", "q.lora_A.weight"], None, {}, False),
        ([], None, {}, False),
    ],
)
def test_is_adapter(
    names: list[str], config: dict[str, str] | None, metadata: dict[str, str], expected: bool
) -> None:
    """Names, config and metadata tell; a model with adapters inside is a model."""
    assert is_adapter(names, config, metadata) is expected


@pytest.fixture
def greedy() -> Iterator[Kind]:
    """A registered kind that claims everything, for one test."""
    kind = Kind("greedy", "", lambda source: frozenset(source.tensors), lambda *_: {})
    assert {"delta", "lora"} <= set(KINDS)
    KINDS._entries["greedy"] = kind
    yield kind
    del KINDS._entries["greedy"]


def test_two_kinds_claim_all(greedy: Kind) -> None:
    """An adapter that two kinds understand is read by neither."""
    source = source_of(ARRAYS, metadata=delta_metadata(None))
    with pytest.raises(FormatError, match=f"more than one adapter kind.*delta, {greedy.name}"):
        read_adapter(source)


def test_every_kind_is_described() -> None:
    """Help and docs print each kind's formula."""
    for name in KINDS:
        assert KINDS[name].name == name
        assert KINDS[name].formula
    assert adapter.KINDS.noun == "adapter kind"
