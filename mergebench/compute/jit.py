"""Compiling kernels; imported only by modules that hold some, as numba takes half a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """A function compiled when first called, without the interpreter's lock, and kept on disk.

    Where the system lets nothing be kept, it is compiled in every process.
    """
    try:
        compiled: Any = njit(cache=True, nogil=True)(function)
    except RuntimeError:
        compiled = njit(nogil=True)(function)
    made: F = compiled
    return made
