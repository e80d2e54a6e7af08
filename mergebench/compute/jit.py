"""Compiling kernels; imported only by modules that hold some, as numba takes half a second."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """A function compiled when first called, without the interpreter's lock, and kept on disk.

    Where the system lets nothing be kept, it is compiled in every process.
    """
    return _compiled(function, error_model="python")


def float_kernel(function: F) -> F:
    """As :func:`kernel`; divisions by zero give what numpy gives, so that loops stay simple."""
    return _compiled(function, error_model="numpy")


def _compiled(function: F, **options: Any) -> F:
    # Nothing written in C calls them, and what would let it takes a tenth of the time.
    options["no_cfunc_wrapper"] = True
    try:
        compiled: Any = njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:
        compiled = njit(nogil=True, **options)(function)
    _keep_carefully(compiled, Path(function.__code__.co_filename))
    made: F = compiled
    return made


def _keep_carefully(compiled: Any, file: Path) -> None:
    """Let what was kept hold for the code that it was made of, and let keeping fail.

    numba looks at the file of a function alone, and kernels call those of files beside theirs. A
    full or damaged cache is no reason to stop.
    """
    cache = getattr(compiled, "_cache", None)
    index: Any = getattr(cache, "_cache_file", None)
    if cache is None or not hasattr(index, "_source_stamp"):
        return
    with suppress(OSError):
        beside = sorted({*file.parent.glob("*.py"), Path(__file__)})
        about = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in beside]
        index._source_stamp = tuple(about)
    cache.load_overload = _forgiving(cache.load_overload)
    cache.save_overload = _forgiving(cache.save_overload)


def _forgiving(use: Callable[..., Any]) -> Callable[..., Any]:
    def used(*given: Any) -> Any:
        with suppress(OSError, EOFError, ValueError, UnpicklingError):
            return use(*given)
        return None

    return used


def _as_float(context: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


def _as_bits(context: Any, value: Any) -> Any:
    """The bits of a float32, as an integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


as_float: Any = intrinsic(_as_float)
as_bits: Any = intrinsic(_as_bits)
