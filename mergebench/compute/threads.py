"""One thread for each product and decomposition, as workers share the cores already."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

#: What brings a library of threads along when it is imported.
_BRINGING = ("numpy.linalg", "scipy.linalg", "torch")


def one_thread() -> AbstractContextManager[object]:
    """A context in which BLAS, LAPACK and OpenMP use one thread.

    Looking for their libraries takes longer than a small decomposition, and is done again only
    after something was imported that brings one.
    """
    controller = _controller(tuple(name in sys.modules for name in _BRINGING))
    limited: AbstractContextManager[object] = controller.limit(limits=1)
    return limited


@cache
def _controller(imported: tuple[bool, ...]) -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    del imported
    return ThreadpoolController()
