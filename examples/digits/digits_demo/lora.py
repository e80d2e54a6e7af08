"""Low-rank adapters on linear layers: the few lines of LoRA that this example needs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A frozen linear layer plus ``scaling · B A``.

    ``lora_A`` maps in → rank, ``lora_B`` maps rank → out and starts at zero, so a fresh
    adapter changes nothing. ``scaling`` is ``alpha / rank``.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: int) -> None:
        super().__init__()
        self.linear = linear
        self.scaling = alpha / rank
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        # One product on the adapted weight: for layers this small, cheaper than three on x.
        weight = self.linear.weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return nn.functional.linear(x, weight, self.linear.bias)


def target_names(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """List the linear layers of ``model`` whose last name part is in ``targets``, in order."""
    wanted = set(targets)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    ]


def add_lora(model: nn.Module, targets: Iterable[str], rank: int, alpha: int) -> None:
    """Freeze ``model`` and replace its target layers, in place, by :class:`LoraLinear`."""
    model.requires_grad_(requires_grad=False)
    for name in target_names(model, targets):
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        linear = getattr(parent, child)
        setattr(parent, child, LoraLinear(linear, rank, alpha))


def factors(model: nn.Module) -> dict[str, Tensor]:
    """Collect ``<module>.lora_A.weight`` ``[rank, in]`` and ``lora_B`` ``[out, rank]``."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name.endswith(("lora_A.weight", "lora_B.weight"))
    }


def apply_factors(
    state: dict[str, Tensor], lora: dict[str, Tensor], scaling: float
) -> dict[str, Tensor]:
    """Return ``state`` with ``scaling · B A`` added to every adapted weight."""
    merged = dict(state)
    for name, down in lora.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            up = lora[f"{module}.lora_B.weight"]
            merged[f"{module}.weight"] = state[f"{module}.weight"] + scaling * torch.mm(up, down)
    return merged
