"""Add difference: A + (B - C), as users of diffusion models write it."""

from __future__ import annotations

import re
from typing import Annotated

from mergebench.core.errors import ParameterError
from mergebench.core.params import Examples
from mergebench.core.unet import Net
from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.block_weights import block_weights
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh

#: How many numbers say that it is SDXL: its blocks, or those and one for what lies outside.
_SDXL = (19, 20)


@merge_method(paper="arXiv:2212.04089", models=(1, 2))
def add_difference(
    blocks: Annotated[str, Examples(("", "ALL_B"))] = "",
) -> Chain:
    """Add to model A what model B has learnt since base C: θ = A + m (B - C).

    ``merge A B:0.8 --base C --method add_difference`` gives A + 0.8 (B - C): the multiplier m is
    the weight of B, and A has weight 1. With block weights A + w_block m (B - C).

    Parameters
    ----------
    blocks : text, default none
        Weights w of a diffusion U-Net's blocks: a preset of op `block_weights` (for SD 1.5 and
        2.x), or 25 (SDXL: 19) numbers separated by ``/``. Outside of the U-Net w is 1, or one more
        number in front.

    Deviations
    ----------
    None. It is computed as C + (A - C) + m (B - C), which is task arithmetic with the weights of
    A and B; a weight of A other than 1 scales A - C. ``--then block_weights`` would weigh A - C as
    well, which `blocks` leave whole.
    """
    if not blocks:
        return chain(weigh(), sum_())
    count = len(re.findall(r"[^\s,/;\[\]]+", blocks))
    net: Net = "sdxl" if count in _SDXL else "sd15"
    try:
        return chain(block_weights(blocks, 1.0, net, "last"), weigh(), sum_())
    except ParameterError as error:
        raise ParameterError("add_difference: `blocks`", got=blocks[:200], fix=str(error)) from None
