"""RegMean: linear layers whose outputs are nearest to those of all models."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

from mergebench.merge.chains import chain
from mergebench.merge.method import merge_method
from mergebench.merge.op import Chain
from mergebench.merge.ops.gram_mean import gram_mean


@merge_method(
    paper="arXiv:2212.09849",
    space="either",
    compat={"mergelm": {"alpha": 1.0}, "fusionbench": {"alpha": 0.95}},
)
def regmean(alpha: Annotated[float, Interval(ge=0, le=1)] = 0.9) -> Chain:
    """Merge linear layers by least squares on the inputs that each model's data give them.

    W = (Σ w_i W_i Ĝ_i)(Σ w_i Ĝ_i)⁻¹ for weights out × in, G_i = XᵀX per token; everything else is
    averaged. Needs a statistics file of every model: ``mergebench fit statistics MODEL --kind gram
    --task … -o FILE``, then ``--statistics FILE``. Inputs need no labels.

    Parameters
    ----------
    alpha : float in [0, 1], default 0.9
        Factor of the entries of G beside its diagonal. To be searched: the paper's prose suggests
        0.9, its configurations hold values from 0.1 to 1.

    Deviations
    ----------
    Where the sum of the G is singular (fewer tokens than inputs, inputs that are always zero), the
    result is the solution nearest to the weighted mean, columns measured by their inputs, not the
    pseudo-inverse's, which is zero on what no data reach. G is per token, so that a larger corpus
    does not weigh more; weights of models do that where it is wanted. Kernels of convolutions (as
    matrices) and ``Conv1D`` count as linear layers too. Tensors that no statistics file has are
    averaged, which the plan says.
    """
    return chain(gram_mean(alpha, "gram"))
