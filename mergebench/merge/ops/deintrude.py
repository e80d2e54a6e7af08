"""Scale down intruder dimensions of every matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval

from mergebench.compute.intruders import Side
from mergebench.compute.matrices import as_matrices, as_stack, is_matrix
from mergebench.compute.namespace import as_numpy, namespace
from mergebench.compute.removal import Control, Removal, removal
from mergebench.compute.spectra import TOLERANCE, svd_bytes
from mergebench.core.errors import ParameterError
from mergebench.core.params import Examples
from mergebench.core.site import Site
from mergebench.merge.at import At, Corrected, Reading, Stack, Statistic, Sweep
from mergebench.merge.op import op

Kinds = Literal["linear", "every"]
#: What is a linear layer or a kernel, as the papers look at them.
_LAYERS = frozenset({"linear", "conv"})


def parse_top(text: str) -> int | None:
    """How many intruders of a matrix: a number, or ``None`` for ``all``.

    Raises
    ------
    ParameterError
    """
    if text == "all":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ParameterError("deintrude: `top` must be a number from 1 on, or all", got=text)


def _check(site: Site, top: str = "1", **_: object) -> None:
    del site
    parse_top(top)


def _is_looked_at(site: Site, kinds: Kinds) -> bool:
    return is_matrix(site, "matrix") and (kinds == "every" or site.kind in _LAYERS)


def _measure(
    sweep: Sweep,
    *,
    lam: float,
    top: str,
    k: int,
    epsilon: float,
    side: Side,
    control: Control,
    kinds: Kinds,
) -> list[Removal]:
    """What is to become of each model's update of one tensor; empty where nothing is looked at."""

    def look(stack: Stack, at: At) -> list[Removal]:
        if not _is_looked_at(at.site, kinds):
            return []
        dtype = np.float64 if stack.dtype.itemsize > 4 else np.float32
        # In float32, so that bounds are of use; they allow for its rounding.
        base, *updates = (
            as_matrices(as_numpy(each)[None, :], at.site)[0].astype(dtype)
            for each in (at.base, *stack)
        )
        return [
            removal(base, each, lam=lam, top=parse_top(top), k=k, epsilon=epsilon, side=side,
                    control=control)
            for each in updates
        ]  # fmt: skip

    # Of a tensor without entries nothing is shown.
    return next((found for _, found in sweep(look)), [])


def _statistic(lam: float = 0.7, **params: object) -> Statistic | None:
    if lam == 1.0:
        return None
    return Statistic("tensor", lambda sweep: _measure(sweep, lam=lam, **params))  # type: ignore[arg-type]


def _report(before: Stack, after: Stack, at: At, **_: object) -> tuple[Reading, ...]:
    del before, after
    rows = []
    for row, each in enumerate(at.value or ()):
        rows.append(Reading("intruders", (row,), float(each.found)))
        for direction, share in zip(each.directions, each.shares, strict=True):
            for what, value in (
                ("index", direction.index),
                ("cosine", direction.cosine),
                ("bound", direction.bound),
                ("exact", direction.status == "exact"),
                ("singular value", direction.sigma),
                ("energy", share),
            ):
                rows.append(Reading(what, (row,), float(value)))
        rows.append(Reading("removed of the update", (row,), each.removed))
        rows.append(Reading("norm left", (row,), each.kept))
        rows.append(Reading("energy removed", (row,), each.energy))
    return tuple(rows)


def _correction(value: Sequence[Removal] | None, **_: object) -> Corrected:
    if not value:
        return Corrected(1.0, None, None)
    (only,) = value
    return Corrected(only.scale, only.left, only.right)


def _added(
    shape: tuple[int, int], top: str = "1", k: int = 10, lam: float = 0.7, **params: object
) -> int:
    if lam == 1.0 or params.get("control", "none") != "none":
        return 0
    return min(parse_top(top) or k or min(shape), k or min(shape), *shape)


def _workspace(models: int, rows: int, columns: int) -> int:
    least = min(rows, columns)
    # Vectors of the base stay while the tuned matrix is decomposed.
    held = 4 * (rows + columns) * least + 8 * (models + 4) * rows * columns
    return svd_bytes(rows, columns) + held


@op(
    granularity="tensor",
    statistic=_statistic,
    linear=lambda lam=0.7, **_: lam == 1.0,
    check=_check,
    needs_base=True,
    workspace=_workspace,
    tolerance=TOLERANCE,
    report=_report,
    alone=True,
    of_updates=True,
    correction=_correction,
    added_rank=_added,
)
def deintrude(
    stack: Stack,
    at: At,
    lam: Annotated[float, Interval(ge=0)] = 0.7,
    top: Annotated[str, Examples(("1", "all"))] = "1",
    k: Annotated[int, Interval(ge=0)] = 10,
    epsilon: Annotated[float, Interval(gt=0, le=1)] = 0.5,
    side: Side = "left",
    control: Control = "none",
    kinds: Kinds = "linear",
) -> Stack:
    """Scale down what a fine-tune has added as new leading directions (intruder dimensions).

    For each of the ``k`` leading singular vectors of W = W0 + ΔW, the largest |cos| with any
    singular vector of W0; an intruder is below ε. ΔW becomes ΔW + (λ - 1) Σ σ u vᵀ over the
    intruders with the largest σ (arXiv:2410.21228, section 5). Matrices whose intruders are settled
    by bounds are not decomposed. Tensors that are no matrices are left as they are, and so are
    updates without an intruder.

    Parameters
    ----------
    lam : float, default 0.7
        What is kept of each intruder: 0 removes it, and 1 leaves everything as it is.
    top : text, default 1
        How many intruders of each matrix, or all.
    k : int, default 10
        Leading directions that are looked at; 0 for all.
    epsilon : float in (0, 1], default 0.5
    side : left (default, the output side) or right
    control : none, removed or norm
        Shrink updates that have intruders as a whole instead: by as much as would be removed, or to
        the norm that would be left. What intruders are worth is what is better than this.
    kinds : linear or every
        Linear layers and kernels, taken as out × (in · ∏ kernel); or every matrix, embeddings and
        heads too.
    """
    del lam, top, k, epsilon, side, control, kinds
    if not at.value or all(each.scale == 1.0 and not each.left.size for each in at.value):
        return stack
    xp = namespace(stack)
    matrices = as_matrices(stack, at.site)
    made = []
    for row, each in enumerate(at.value):
        matrix = matrices[row, :, :]
        left, right = (
            xp.asarray(part, dtype=matrix.dtype, device=matrix.device)
            for part in (each.left, each.right)
        )
        made.append(each.scale * matrix + left @ right)
    return as_stack(xp.stack(made), at.site, stack)
