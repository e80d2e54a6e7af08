"""How programs spell the names of adapter tensors: ``name <-> (module, role)``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal[
    "A",
    "B",
    "embedding_A",
    "embedding_B",
    "bias",
    "mid",
    "alpha",
    "value",
    "wrapped",
    "original",
    "saved_base",
]
#: Roles of whole parameters, which belong to no pair of factors.
WHOLE: frozenset[Role] = frozenset({"value", "wrapped", "original", "saved_base"})


@dataclass(frozen=True)
class Part:
    """What one tensor of an adapter file is.

    Attributes
    ----------
    module : str
        Dotted path of the adapted module as the dialect spells it, without any wrapper.
    role : str
        ``A`` and ``B``: factors of a weight; ``embedding_A`` and ``embedding_B``: factors of an
        embedding; ``mid``: the core between the factors of a convolution; ``bias``: a displacement
        of the module's bias before scaling; ``alpha``: the scale's numerator; ``value``: a
        parameter trained in full, ``wrapped``: the same under its training wrapper, ``original``:
        what it replaced; ``saved_base``: a copy of a frozen parameter of the base.
    param : str
        Name of the parameter within the module.
    adapter : str
        Adapter name found inside the tensor name, ``""`` where there is none.
    dialect : str, default "PEFT"
        The program whose spelling it is.
    """

    module: str
    role: Role
    param: str = "weight"
    adapter: str = ""
    dialect: str = "PEFT"
