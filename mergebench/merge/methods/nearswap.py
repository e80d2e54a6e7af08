"""NearSwap: take over what hardly differs."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.clip import clip
from mergebench.merge.ops.sum import sum_
from mergebench.merge.ops.weigh import weigh


@merge_method(
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    compat={"mergekit-0.1.5": {}},
    models=(1, 1),
    checked={"mergekit 0.1.5": "8 roundings"},
)
def nearswap(t: Annotated[float, Ge(0)] = 1e-4) -> Chain:
    """Move every weight of the base towards another model's, by at most t.

    θ = θ0 + clamp(t / |θ1 - θ0|, 0, 1) · (θ1 - θ0): weights that differ by up to t are replaced,
    the others move by t.

    Parameters
    ----------
    t : float >= 0, default 0.0001
        The longest way, in the units of the weights.

    Deviations
    ----------
    None. mergekit has no default for ``t``; its base model is the base here.
    """
    return chain(clip(t), weigh(), sum_())
