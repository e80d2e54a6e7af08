"""Block weights: one factor for every block of a diffusion U-Net."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import cos, isfinite, pi
from typing import Annotated, Literal

from mergebench.compute.namespace import namespace
from mergebench.core.errors import MismatchError, ParameterError, did_you_mean
from mergebench.core.params import Examples
from mergebench.core.site import Site
from mergebench.core.unet import INPUTS, Net, unet_block
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op

_DIFFUSION = re.compile(
    r"^(model\.diffusion_model|model_ema|cond_stage_model|conditioner|first_stage_model|embedder)\."
    r"|^(unet|text_encoder(_\d)?|vae)[./]|^(down_blocks|mid_block|up_blocks|conv_in|conv_out"
    r"|conv_norm_out|time_embedding|add_embedding|class_embedding|text_model|encoder|decoder"
    r"|quant_conv|post_quant_conv|text_projection|logit_scale)\b"
)
#: A preset gives the factor at a block, from its distances to both ends and their sum.
_Shape = Callable[[int, int], float]


def _ends(count: int) -> _Shape:
    return lambda index, last: float(index < count or index > last - count)


def _output(count: int) -> _Shape:
    return lambda index, last: float(index > last - count)


def _flat(value: float) -> _Shape:
    return lambda index, last: value


def _step(x: float) -> float:
    return x * x * (3 - 2 * x)


def _dip(index: int, last: int) -> float:
    return abs(2 * index / last - 1)


#: As people name them. Each is a formula, so that it holds for nets of other lengths too.
PRESETS: dict[str, _Shape] = {
    "GRAD_V": _dip,
    "GRAD_A": lambda index, last: 1 - _dip(index, last),
    "FLAT_25": _flat(0.25),
    "FLAT_75": _flat(0.75),
    "WRAP08": _ends(4),
    "WRAP12": _ends(6),
    "WRAP14": _ends(7),
    "WRAP16": _ends(8),
    "OUT07": _output(7),
    "OUT12": _output(12),
    "SMOOTHSTEP": lambda index, last: _step(index / last),
    "REVERSE_SMOOTHSTEP": lambda index, last: _step(1 - index / last),
    "COSINE": lambda index, last: (1 + cos(pi * index / last)) / 2,
    "REVERSE_COSINE": lambda index, last: (1 - cos(pi * index / last)) / 2,
    "ALL_A": _flat(0.0),
    "ALL_B": _flat(1.0),
}


def factors_of(weights: str, base: float, net: Net) -> tuple[float, list[float]]:
    """The factor outside of the U-Net and those of its blocks, IN00 … MID … OUT.

    Raises
    ------
    ParameterError
        For an unknown preset, or another number of weights than the net has blocks.
    """
    count = 2 * INPUTS[net] + 1
    if weights in PRESETS:
        return base, [PRESETS[weights](index, count - 1) for index in range(count)]
    parts = [part for part in re.split(r"[\s,/;\[\]]+", weights) if part]
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise ParameterError(
            f"block_weights: no preset {weights!r}", fix=did_you_mean(weights, PRESETS)
        ) from None
    if not all(map(isfinite, numbers)) or len(numbers) not in (count, count + 1):
        raise ParameterError(
            f"block_weights: weights of {net}",
            got=f"{len(numbers)}: {weights}"[:200],
            expected=f"{count} finite numbers (IN00 … OUT), or {count + 1} with the text encoder's "
            "first, separated by /",
        )
    return (numbers[0], numbers[1:]) if len(numbers) > count else (base, numbers)


def _factor(site: Site, weights: str, base: float, net: Net) -> float:
    outside, blocks = factors_of(weights, base, net)
    try:
        block = unet_block(site.name, net)
    except IndexError as error:
        raise MismatchError(
            f"{site.name}: {net} has no block {error}", fix="choose the other net=sd15|sdxl"
        ) from None
    return outside if block is None else blocks[block]


def _check(site: Site, weights: str, base: float, net: Net) -> None:
    _factor(site, weights, base, net)
    outside, blocks = factors_of(weights, base, net)
    if {outside, *blocks} == {1.0}:
        return
    if site.name and not _DIFFUSION.search(site.name):
        raise MismatchError(
            f"{site.name}: is no tensor of a Stable Diffusion model, so block weights mean nothing",
            fix="use -p lam=0..1 or --where block=0-3:lam=0.5 for other models",
        )


def _check_op(site: Site, weights: str, base: float, net: Net, of: str) -> None:
    _check(site, weights, base, net)


@op(
    linear=True,
    check=_check_op,
    of_updates=True,
    ordered=lambda of="all", **_: of == "last",
)
def block_weights(
    stack: Stack,
    at: At,
    weights: Annotated[str, Examples(("GRAD_V", "COSINE", "OUT07"))],
    base: float = 0.0,
    net: Net = "sd15",
    of: Literal["all", "last"] = "all",
) -> Stack:
    """Multiply the update of every U-Net block by its own weight (merge block weighted).

    After a merge of B onto the base A this gives ``A + w_block (B - A)``, the weighted sum of
    diffusion tools: ``merge B --base A -m task_arithmetic --then block_weights:weights=GRAD_V``.

    Parameters
    ----------
    weights : str
        A preset (GRAD_V, GRAD_A, FLAT_25, FLAT_75, WRAP08, WRAP12, WRAP14, WRAP16, OUT07, OUT12,
        SMOOTHSTEP, REVERSE_SMOOTHSTEP, COSINE, REVERSE_COSINE, ALL_A, ALL_B), or 25 (sd15) or 19
        (sdxl) numbers separated by ``/``: IN00 …, MID, OUT00 …. One more number in front is the
        weight outside of the U-Net.
    base : float, default 0
        Weight outside of the U-Net: text encoders and VAE.
    net : sd15 or sdxl, default sd15
        Which U-Net; SD 2.x has the blocks of sd15.
    of : all or last, default all
        Multiply all updates that stand side by side, or only that of the last model in the order
        of the user, where there are several.
    """
    factor = _factor(at.site, weights, base, net)
    if of == "all":
        return stack * factor
    order = at.in_order(stack.shape[0])
    if len(order) == 1:
        return stack
    xp = namespace(stack)
    rows = [factor if row == order[-1] else 1.0 for row in range(len(order))]
    return stack * xp.asarray(rows, dtype=stack.dtype, device=stack.device)[:, None]
