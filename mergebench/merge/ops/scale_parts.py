"""Scale parts: multiply random parts of every tensor by numbers of their own (aTLAS × K)."""

from __future__ import annotations

from functools import lru_cache
from math import isfinite
from typing import Annotated, Any

import numpy as np

from mergebench.compute.namespace import namespace
from mergebench.compute.random import parts, stream_of
from mergebench.core.errors import ParameterError
from mergebench.core.params import Examples, Seed
from mergebench.core.site import Site
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op

#: The most parts of a tensor.
MOST = 1 << 16


def numbers(coefficients: str) -> list[float]:
    """The coefficients of a text.

    Raises
    ------
    ParameterError
        If it is no list of finite numbers.
    """
    try:
        found = [float(each) for each in coefficients.split("/")]
    except ValueError:
        found = []
    if not found or len(found) > MOST or not all(map(isfinite, found)):
        raise ParameterError(
            "scale_parts: `coefficients` must be numbers with slashes between them",
            got=coefficients[:99],
        )
    return found


@lru_cache(maxsize=16)
def _array(coefficients: str) -> Any:
    """The same as an array that is not to be changed, read once for all tiles of a tensor."""
    found = np.asarray(numbers(coefficients))
    found.setflags(write=False)
    return found


def _check(site: Site, coefficients: str, seed: int) -> None:
    numbers(coefficients)


def partition(site: Site, seed: int, start: int, stop: int, count: int) -> Any:
    """Which of ``count`` parts each of the entries ``start:stop`` of a tensor is in, int64.

    The same for every model; it depends on the seed, the tensor's name and the index alone.
    """
    return parts(stream_of(seed, site.key), start, stop, count)


@op(check=_check, alone=True)
def scale_parts(
    stack: Stack,
    at: At,
    coefficients: Annotated[str, Examples(("0.5", "1/0.25", "0.5/-0.25/0/1.5"))],
    seed: Seed = 0,
) -> Stack:
    """Multiply every entry by the coefficient of the part it is in (aTLAS × K).

    As many parts as coefficients split each tensor at random; which part an entry is in depends on
    the seed, the tensor's name and the index, so that nothing but the numbers is stored.

    Parameters
    ----------
    coefficients : text
        K numbers with slashes between them.
    seed : int, default 0
        Another seed draws another partition.
    """
    found = _array(coefficients)
    xp = namespace(stack)
    if len(found) == 1:
        return stack * float(found[0])
    each = found[partition(at.site, seed, at.start, at.stop, len(found))]
    return stack * xp.asarray(each, dtype=stack.dtype, device=stack.device)[None, :]
