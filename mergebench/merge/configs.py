"""Configs that contradict each other: models of another architecture or size than the base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergebench.core.errors import MismatchError
from mergebench.sources import Source

#: The next step for whoever gave the wrong base.
FIX = "give the base it was fine-tuned from, or add --allow-base-mismatch to merge all the same"
#: Keys of a config that fine-tuning leaves alone. Sizes of vocabularies, windows and patches are
#: not among them, as shapes say what must be said; nor activations, whose names have changed.
_STRUCTURE = re.compile(
    r"model_type|_class_name|hidden_sizes?|intermediate_size|head_dim"
    r"|num_(hidden_|encoder_|decoder_)?layers"
    r"|num_(attention_|key_value_|encoder_attention_|decoder_attention_)?heads"
    r"|(encoder|decoder)_(layers|attention_heads|ffn_dim)"
    r"|n_(layers?|heads?|embd|inner)|d_(model|ff|kv|inner)"
    r"|dim|hidden_dim|embedding_size|embed_dim|depths?|state_size|kv_lora_rank|q_lora_rank"
    r"|num_(local_|routed_|shared_)?experts|n_(routed|shared)_experts|num_experts_per_tok"
    r"|block_out_channels|cross_attention_dim"
)
#: What transformers appends to the name of a family.
_TASK = re.compile(
    r"(For[A-Z].*|LMHead.*|DoubleHeads.*|(Encoder|Decoder|Text|Vision|PreTrained)?Model.*)$"
)


def check_configs(models: Sequence[Source], base: Source | None, *, allow: bool) -> list[str]:
    """Refuse models whose config contradicts the base's, before shapes are compared.

    Parameters
    ----------
    models : sequence of Source
    base : Source or None
        Without it the first full model takes its place, and contradictions are notes.
    allow : bool
        Make notes of what would be refused.

    Raises
    ------
    MismatchError
        Naming the keys and both values.
    """
    full = [each for each in ([base] if base else []) + list(models) if each.checkpoint is not None]
    if not full:
        return []
    first, notes = full[0], []
    for model in full[1:]:
        assert first.checkpoint is not None
        assert model.checkpoint is not None
        found = list(_contradictions(first.checkpoint.config or {}, model.checkpoint.config or {}))
        if not found:
            continue
        shown = ", ".join(f"{key} {one!r} and {two!r}" for key, one, two in found[:4])
        shown += f" and {len(found) - 4} more" if len(found) > 4 else ""
        text = f"{model.label}: its config contradicts that of {first.label}: {shown}"
        if base is not None and not allow:
            raise MismatchError(text, fix=FIX)
        notes.append(text)
    return notes


def _contradictions(
    base: Mapping[str, Any], own: Mapping[str, Any], where: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key, value in base.items():
        other = own.get(key)
        if value is None or other is None:
            continue
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _contradictions(value, other, f"{where}{key}.")
        elif _STRUCTURE.fullmatch(key) and value != other:
            yield f"{where}{key}", value, other
    one, two = _family(base), _family(own)
    # Names of classes are looser than model_type: they count where one of the two has none.
    known = base.get("model_type") and own.get("model_type")
    if not known and one and two and not (one.startswith(two) or two.startswith(one)):
        yield f"{where}architectures", base["architectures"], own["architectures"]


def _family(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, Sequence) or not named or not isinstance(named[0], str):
        return ""
    return _TASK.sub("", named[0]).lower()
