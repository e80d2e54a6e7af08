"""Compiling kernels; imported only by modules that hold some, as numba takes half a second."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, typeof, types
from numba.extending import intrinsic

from mergebench.compute.linking import Code

F = TypeVar("F", bound=Callable[..., object])

#: What LLVM turns into instructions wherever it is; others may become calls of a library.
_PLAIN = re.compile(
    r"llvm\.([su](min|max|add|sub|mul)|abs|fabs|ct(pop|tz|lz)|bswap|fsh[lr]|assume|lifetime|expect"
    r"|masked|x86|aarch64|experimental\.noalias|vector\.(extract|insert|reverse)"
    r"|vector\.reduce\.(f?add|f?mul|and|or|xor|[su]min|[su]max))\b"
)
_MEMORY = re.compile(r"llvm\.(mem(set|cpy|move))\..*")


def kernel(function: F) -> F:
    """A function compiled when first called, without the interpreter's lock, and kept on disk.

    Where the system lets nothing be kept, it is compiled in every process.
    """
    return _compiled(function, error_model="python")


def float_kernel(function: F) -> F:
    """As :func:`kernel`; divisions by zero give what numpy gives, so that loops stay simple."""
    return _compiled(function, error_model="numpy")


def inner(function: F) -> F:
    """A part of kernels, as :func:`float_kernel`, compiled into each that calls it; no entry."""
    options: Any = {"error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}
    made: Any = njit(nogil=True, **options)(function)
    found: F = made
    return found


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


def machine_code(function: Any, given: Sequence[Any]) -> tuple[Code, bytes]:
    """A kernel for arguments like these, compiled anew, as an object file.

    Parameters
    ----------
    function : kernel
    given : sequence
    """
    options: dict[str, Any] = {**function.targetoptions, "no_cpython_wrapper": True}
    del options["nopython"]
    again: Any = njit(**options)(function.py_func)
    again.compile(tuple(map(typeof, given)))
    (made,) = again.overloads.values()
    library: Any = made.library
    symbol = made.fndesc.llvm_func_name
    module = library._final_module
    types = str(module.get_function(symbol).global_value_type).partition("(")[2].removesuffix(")")
    outside = {each.name for each in module.functions if each.is_declaration}
    if " frem " in str(module):
        outside.add("fmod")
    code = Code(
        function.py_func.__name__,
        symbol,
        str(made.signature.return_type),
        # Older versions say what pointers point to, such as a structure in braces.
        tuple(
            "ptr" if each.endswith("*") else each
            for each in re.sub(r"\{[^{}]*\}", "", types).split(", ")
        ),
        tuple(sorted({_MEMORY.sub(r"\1", name) for name in outside if not _PLAIN.match(name)})),
    )
    return code, library._get_compiled_object()


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


def _reaching(context: Any, x: Any, first: Any, pivot: Any) -> Any:
    """Which of the next 64 float32 have a magnitude that reaches a pivot, as bits of a number.

    A loop that gives one number for many entries is not vectorised by itself. All 64 are read.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        many = ir.VectorType(ir.IntType(32), 64)
        place = builder.gep(array.data, [arguments[1]])
        found = builder.load(builder.bitcast(place, many.as_pointer()))
        found.align = 4
        sizes = builder.and_(found, ir.Constant(many, [0x7FFFFFFF] * 64))
        one = builder.insert_element(
            ir.Constant(many, ir.Undefined), arguments[2], ir.Constant(ir.IntType(32), 0)
        )
        all_ = ir.Constant(many, [0] * 64)
        pivots = builder.shuffle_vector(one, ir.Constant(many, ir.Undefined), all_)
        reach = builder.icmp_unsigned(">=", sizes, pivots)
        return builder.bitcast(reach, ir.IntType(64))

    return types.uint64(x, types.int64, types.uint32), generate


def _ones(context: Any, bits: Any) -> Any:
    """How many bits of a number are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


def _lowest(context: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set, of a number that is not zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate


as_float: Any = intrinsic(_as_float)
as_bits: Any = intrinsic(_as_bits)
reaching: Any = intrinsic(_reaching)
ones: Any = intrinsic(_ones)
lowest: Any = intrinsic(_lowest)
