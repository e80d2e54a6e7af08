"""RegMean++: RegMean whose inputs come through the blocks that are merged already."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.gram_mean import gram_mean


@merge_method(paper="arXiv:2508.03121", space="either")
def regmean_pp(alpha: Annotated[float, Interval(ge=0, le=1)] = 0.95) -> Chain:
    """RegMean on inputs that each block gets from the merged blocks before it.

    The equations are those of ``regmean``. Statistics are collected of all models together:
    ``mergebench fit statistics MODEL MODEL --kind gram_pp --task … --task … -o FOLDER``; they hold
    for these models, weights and alpha alone.

    Parameters
    ----------
    alpha : float in [0, 1], default 0.95
        Factor of the entries of G beside its diagonal.

    Deviations
    ----------
    As of ``regmean``.
    """
    return chain(gram_mean(alpha, "gram_pp"))
