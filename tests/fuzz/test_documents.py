"""JSON that strangers write: indexes, configs, tokenizers, adapter configs, metadata, manifests."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .support import CHECKED, assert_holds, broken_bytes, broken_json, documents, files

TARGETS = {"index": 0, "config": 0, "tokenizer": 0, "manifest": 0, "made": 0, "metadata": 0}


@pytest.mark.parametrize("target", TARGETS)
@CHECKED
@given(data=st.data())
def test_documents_broken_field_by_field(target: str, data: st.DataObject) -> None:
    """Taken or refused by name of the file, whatever one field of them is."""
    assert_holds(target, data.draw(broken_json(documents(target, skip=TARGETS[target]))))


@pytest.mark.parametrize("target", [*TARGETS, "adapter", "keys"])
@CHECKED
@given(data=st.data())
def test_documents_with_other_bytes(target: str, data: st.DataObject) -> None:
    """Cut, changed, repeated."""
    assert_holds(target, data.draw(broken_bytes(files(target))))


@pytest.mark.parametrize("kind", range(8))
@CHECKED
@given(data=st.data())
def test_adapter_configs_of_every_kind(kind: int, data: st.DataObject) -> None:
    """Beside tensors of the kind, on a base that fits."""
    assert_holds("adapter", bytes([kind]) + data.draw(broken_json(documents("adapter", skip=1))))


@pytest.mark.parametrize("entry", [b"\1", b"\2"])
@CHECKED
@given(data=st.data())
def test_configs_in_metadata(entry: bytes, data: st.DataObject) -> None:
    """Those of diffusers, and those that mergebench copies there."""
    document: list[Any] = [json.loads(each[1:]) for each in files("metadata") if each[:1] == entry]
    assert_holds("metadata", entry + data.draw(broken_json(document)))


PARTS = st.sampled_from(
    ["base_model.model.", "layers.0.", "q", ".lora_A", ".lora_B", ".weight", ".default", ".alpha",
     "lora_unet_a", ".lora_down", ".lora_up", ".hada_w1_a", ".hada_w1_b", ".lokr_w1", ".lokr_w2",
     ".modules_to_save", ".base_layer", ".ia3_l", ".oft_R", ".bias", ".", "..", "\u202e", "\x1b[2J",
     ".lora_magnitude_vector", ".lora_embedding_A", ".lora_embedding_B", ".diff", "a." * 200,
     "layers." + "9" * 900 + ".q"]
)  # fmt: skip


@CHECKED
@given(names=st.lists(st.lists(PARTS, max_size=6).map("".join), max_size=6, unique=True))
def test_names_of_adapter_tensors(names: list[str]) -> None:
    """Any names made of the parts that kinds look for."""
    assert_holds("keys", "\n".join(names).encode())
