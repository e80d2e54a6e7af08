"""Names as PEFT saves them: ``base_model.model.<module>.lora_A.weight``.

Also read: names without the ``base_model.model.`` prefix (diffusers), and names that still hold
the adapter's name (``lora_A.default.weight``), as raw state dicts do.
"""

from __future__ import annotations

import re

from mergebench.adapters_zoo.dialects import Part, Role

PREFIX = "base_model.model."
_NAME = r"(?:\.(?P<adapter>[^.]+))?"
_FORMS: tuple[tuple[re.Pattern[str], dict[str, Role]], ...] = (
    (re.compile(rf"(?P<module>.+)\.lora_(?P<side>A|B){_NAME}\.weight"), {"A": "A", "B": "B"}),
    (re.compile(rf"(?P<module>.+)\.lora_(?P<side>B){_NAME}\.bias"), {"B": "bias"}),
    (
        re.compile(rf"(?P<module>.+)\.lora_embedding_(?P<side>A|B){_NAME}"),
        {"A": "embedding_A", "B": "embedding_B"},
    ),
    (re.compile(r"(?P<module>.+)\.(?P<side>alpha)(?P<adapter>)"), {"alpha": "alpha"}),
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<adapter>[^.]+))?\.(?P<param>.+)")
_ORIGINAL = re.compile(r"(?P<module>.+)\.original_module\.(?P<param>.+)")
_FROZEN = re.compile(r"(?P<module>.+)\.base_layer\.(?P<param>[^.]+)")


def strip(key: str) -> str:
    """The name without PEFT's prefix."""
    return key.removeprefix(PREFIX)


def parse(key: str) -> Part | None:
    """What a tensor is, from its name alone; None for another kind's tensor.

    A name of no adapter form is read as a ``value``: only the config can tell whether the
    adapter was meant to hold it.
    """
    name = strip(key)
    for pattern, roles in _FORMS:
        if match := pattern.fullmatch(name):
            module = match["module"]
            # Factors within a base_layer belong to layers of several matrices (stacked experts,
            # multi-head attention), which the name alone does not tell apart.
            if ".base_layer" in module:
                return None
            return Part(module, roles[match["side"]], adapter=match["adapter"] or "")
    if re.search(r"(^|\.)lora_[^.]+(\.|$)", name):
        return None
    if match := _SAVED.fullmatch(name):
        return Part(match["module"], "wrapped", match["param"], match["adapter"] or "")
    if match := _ORIGINAL.fullmatch(name):
        return Part(match["module"], "original", match["param"])
    if match := _FROZEN.fullmatch(name):
        return Part(match["module"], "saved_base", match["param"])
    module, _, param = name.rpartition(".")
    return Part(module, "value", param)


def spell(module: str, role: Role, param: str = "weight") -> str:
    """The name under which PEFT saves a tensor, without an adapter name.

    Raises
    ------
    ValueError
        For a role that PEFT has no name for (a programming error).
    """
    suffixes: dict[Role, str] = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "embedding_A": "lora_embedding_A",
        "embedding_B": "lora_embedding_B",
        "value": param,
        "saved_base": f"base_layer.{param}",
    }
    if role not in suffixes:
        raise ValueError(f"PEFT has no name for {role!r}")
    return f"{PREFIX}{module}.{suffixes[role]}"
