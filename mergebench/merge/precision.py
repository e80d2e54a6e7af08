"""Models that are stored more finely than the output will be."""

from __future__ import annotations

from collections.abc import Mapping

from mergebench.core.delta import Dense, Difference
from mergebench.merge.item import Item
from mergebench.merge.lora_layout import stored_dtype
from mergebench.merge.spaces import Spaces

#: Bits behind the point.
_DIGITS = {"F8_E5M2": 2, "F8_E4M3": 3, "BF16": 7, "F16": 10, "F32": 23, "F64": 52}
_ASKED = {"F16": "f32", "F32": "f32", "F64": "f64"}


def coarser(items: Mapping[str, Item], stored: Mapping[str, str], spaces: Spaces) -> list[str]:
    """Notes on models whose weights have more digits than the output keeps.

    Parameters
    ----------
    items : mapping of name to Item
    stored : mapping of name to dtype
        Of the output, where nobody has asked for a dtype.
    spaces : Spaces
        Displacements that were stored as such are finer than weights by nature and not noted.
    """
    found: dict[tuple[str, str, str], int] = {}
    for name, item in items.items():
        for label, delta in zip(item.labels, item.deltas, strict=True):
            whole = isinstance(delta, Difference) or (
                spaces.at(name) == "weight" and isinstance(delta, Dense)
            )
            if whole and _DIGITS[own := stored_dtype(delta)] > _DIGITS[stored[name]]:
                key = label, own, stored[name]
                found[key] = found.get(key, 0) + 1
    return [
        f"{label}: {count} tensors are stored as {own} and rounded to {kept}, the dtype of the "
        f"base; --dtype {_ASKED.get(own, 'f32')} keeps their digits"
        for (label, own, kept), count in found.items()
    ]
