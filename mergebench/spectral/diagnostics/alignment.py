"""How much of each task lies where the merge is (Iso, arXiv:2502.04959)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval

from mergebench.compute.decomposition import Decomposition, decompose, decompose_product
from mergebench.core.site import Site
from mergebench.spectral.diagnostic import Row, Values, diagnostic, mean
from mergebench.spectral.pairs import alignment_ratio
from mergebench.spectral.spectrum import SiteSpectrum


def summed(at: SiteSpectrum) -> Decomposition:
    """The decomposition of the sum of the tasks; in their factors where all of them have some."""
    products = [at.delta_factors(model) for model in at.tasks]
    known = [each for each in products if each is not None]
    if len(known) == len(products) and sum(left.shape[1] for left, _ in known) < min(at.shape):
        lefts, rights = zip(*known, strict=True)
        return decompose_product(np.concatenate(lefts, axis=1), np.concatenate(rights, axis=0))
    whole = at.delta_matrix(at.tasks[0])
    for model in at.tasks[1:]:
        whole += at.delta_matrix(model)
    return decompose(whole)


def _combine(rows: Sequence[Values]) -> Values:
    return {
        "matrices": len(rows),
        "ratio": mean(rows, "ratio"),
        "dimension": mean(rows, "dimension"),
        "merge": rows[0]["merge"],
    }


def _headline(values: Values) -> dict[str, Any]:
    return {"SAR": values["ratio"], "dimension": values["dimension"]}


def _say(values: Values) -> str:
    if values["ratio"] is None:
        return ""
    what = "the merge" if values["merge"] == "given" else "the sum of the task vectors"
    return f"its subspace alignment ratio with {what} is {values['ratio']:.3f} on average"


@diagnostic(
    combine=_combine,
    headline=_headline,
    say=_say,
    per="site",
    base=False,
    least=2,
    uses=("delta.svd",),
    work=lambda rows, columns, _: 8 * 3 * rows * columns,
)
def alignment(
    at: SiteSpectrum, site: Site, *, residual: Annotated[float, Interval(gt=0, lt=1)] = 0.05
) -> Iterator[Row]:
    """Subspace alignment ratio of each task with the merge (Iso, arXiv:2502.04959).

    ‖Π_k ΔWₜ‖ / ‖ΔWₜ‖, where Π_k projects on the fewest leading left vectors of the merged update
    that leave at most ``residual`` of its norm. The merge is the one given with ``--merged``, else
    the sum of the task vectors.

    Parameters
    ----------
    residual : float in (0, 1), default 0.05
    """
    del site
    if not at.tasks:
        return
    merge = at.delta_svd(at.merged[0]) if at.merged else summed(at)
    for model in at.tasks:
        ratio, dimension = alignment_ratio(at.delta_svd(model), merge, residual).tolist()
        values = {
            "ratio": None if isnan(ratio) else ratio,
            "dimension": int(dimension),
            "merge": "given" if at.merged else "sum",
        }
        yield Row(values, model)
