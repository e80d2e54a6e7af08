"""Machine code linked by llvmlite, and called as numba calls what it has compiled."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from threading import Lock, local
from typing import Any, NamedTuple
from weakref import ref

import numpy as np

from mergebench.core.tensor import Array, address

#: Calls a function with what it was given, or with that as numba hands it over.
Call = Callable[[Sequence[Any], Sequence[Any]], int]
#: What LLVM calls the types of arguments, and what C does.
_TYPES = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64, "i8": ctypes.c_int8}
#: Functions that code may call: the system's, and numba's destructor of arrays that a kernel
#: allocates, which is never called where none does.
_FUNCTIONS: Mapping[str, Any] = {
    "memset": ctypes.memset,
    "memmove": ctypes.memmove,
    "memcpy": ctypes.memmove,
    "NRT_MemInfo_call_dtor": ctypes.CFUNCTYPE(None)(os.abort),
}
_NAMING = Lock()
#: Bits of the flags of an array.
_C, _F, _ALIGNED, _WRITEABLE = 0x1, 0x2, 0x100, 0x400


@dataclass(frozen=True)
class Code:
    """A compiled function.

    Attributes
    ----------
    name : str
        In Python.
    symbol : str
        Its name in the object file.
    result : str
        What it gives, as numba calls it.
    types : tuple of str
        Of its arguments: ``ptr``, ``i64`` or ``i8``.
    outside : tuple of str
        Functions of others that it calls.
    """

    name: str
    symbol: str
    result: str
    types: tuple[str, ...]
    outside: tuple[str, ...]

    def fits(self, given: Sequence[Any]) -> bool:
        """Whether it is called as here, gives a number or nothing, and calls nothing unknown."""
        handed = ("ptr", "ptr", *types_of(given))
        return (
            self.types == handed
            and self.result in {"int64", "none"}
            and _FUNCTIONS.keys() >= set(self.outside)
        )


def linked(code: Code, data: bytes) -> Call:
    """Link an object file, and find a function in it that fits what it is given.

    Raises
    ------
    ValueError
        If there is none.
    """
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    with _NAMING:
        for name in code.outside:
            if binding.address_of_symbol(name) is None:
                binding.add_symbol(name, ctypes.cast(_FUNCTIONS[name], ctypes.c_void_p).value)
    machine = binding.Target.from_default_triple().create_target_machine()
    engine: Any = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(data))
    engine.finalize_object()
    address = engine.get_function_address(code.symbol)
    if not address:
        raise ValueError(code.symbol)
    types = [_TYPES[each] for each in code.types]
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *types)(address)

    def call(given: Sequence[Any], values: Sequence[Any]) -> int:
        del given
        result, raised = ctypes.c_int64(), ctypes.c_void_p()
        status = function(ctypes.addressof(result), ctypes.addressof(raised), *values)
        if status:
            raise RuntimeError(f"{code.name}: ended with error {status}")
        return result.value

    # The code lives as long as its engine.
    call.engine = engine  # type: ignore[attr-defined]
    return call


class Held:
    """Arguments of many calls, side by side, taken apart once.

    Nothing about its arrays may change but what they hold.
    """

    __slots__ = ("given", "kinds", "nested", "values")

    def __init__(self, *given: Any) -> None:
        leaves = list(_leaves(given))
        self.given = given
        self.nested, self.kinds = _nested(given), [_kind(each) for each in leaves]
        self.values = [value for each in leaves for _, value in _flat(each)]

    def __reduce__(self) -> Any:
        # Arrays stand elsewhere in a copy.
        return Held, self.given


def plain(given: Sequence[Any]) -> list[Any]:
    """Arguments as a function in Python takes them."""
    found: list[Any] = []
    for each in given:
        found += each.given if isinstance(each, Held) else (each,)
    return found


class Arguments(local):
    """Remembers how the arguments of a thread's last call were handed over: most come again."""

    def __init__(self) -> None:
        self._last: list[_Leaf] = []

    def of(self, given: Sequence[Any]) -> tuple[tuple[str, ...], list[Any]]:
        """What they are, and as numba hands them over.

        Raises
        ------
        TypeError, OverflowError
            If one is of another type, or no integer of 64 bits.
        """
        kinds, values, place = [""], [], 0
        for each in given:
            if isinstance(each, Held):
                kinds[0] += each.nested
                kinds += each.kinds
                values += each.values
                continue
            alone = not isinstance(each, tuple)
            kinds[0] += "." if alone else _nested((each,))
            for leaf in (each,) if alone else _leaves(each):
                if isinstance(leaf, np.ndarray):
                    known = self._of(leaf, place)
                    place += 1
                    kinds.append(known.kind)
                    values += known.values
                else:
                    kinds.append(type(leaf).__name__)
                    values.append(_number(leaf)[1])
        return tuple(kinds), values

    def _of(self, array: Array, place: int) -> _Leaf:
        if place == len(self._last):
            self._last.append(_Leaf(_nothing, None, "", []))
        last = self._last[place]
        # What may change in an array while it is the same.
        about = array.shape, array.strides, array.dtype, array.flags.num
        if last.held() is not array or last.about != about:
            # A reference that counted would keep the room of a merge that has ended.
            last = _Leaf(ref(array), about, _kind(array), _numbers(array))
            self._last[place] = last
        return last


class _Leaf(NamedTuple):
    held: Callable[[], Any]
    about: Any
    kind: str
    values: list[Any]


def _nothing() -> Any:
    return None


def types_of(given: Sequence[Any]) -> tuple[str, ...]:
    """Types of what numba hands over for arguments, as LLVM writes them."""
    return tuple(each for each, _ in chain.from_iterable(map(_flat, _leaves(given))))


def _leaves(given: Sequence[Any]) -> Iterator[Any]:
    for each in given:
        if isinstance(each, tuple):
            yield from _leaves(each)
        else:
            yield each


def _nested(given: Sequence[Any]) -> str:
    """How arguments stand in tuples, of which each kind is another type."""
    return "".join(
        f"{type(each).__name__}({_nested(each)})" if isinstance(each, tuple) else "."
        for each in given
    )


def _kind(each: Any) -> str:
    if not isinstance(each, np.ndarray):
        return type(each).__name__
    return _array_kind(each.dtype, each.ndim, each.flags.num)


@cache
def _array_kind(dtype: np.dtype[Any], sides: int, flags: int) -> str:
    layout = "C" if flags & _C else "F" if flags & _F else "A"
    return f"{dtype.str}{sides}{layout}{bool(flags & _ALIGNED):d}{bool(flags & _WRITEABLE):d}"


def _numbers(array: Array) -> list[Any]:
    """An array as numba hands it over: by owner, size, place, shape and strides."""
    sizes = None, None, array.size, array.itemsize, address(array)
    return [*sizes, *array.shape, *array.strides]


def _number(each: Any) -> tuple[str, Any]:
    if each is None:
        return "ptr", None
    if not isinstance(each, (bool, int)):
        raise TypeError(f"a kernel takes arrays, integers and None, not {each!r:.50}")
    if not -(1 << 63) <= each < 1 << 63:
        raise OverflowError(f"{each} has more than 64 bits")
    return "i8" if isinstance(each, bool) else "i64", int(each)


def _flat(each: Any) -> list[tuple[str, Any]]:
    """An argument as numba hands it over, and types of that."""
    if not isinstance(each, np.ndarray):
        return [_number(each)]
    types = ["ptr", "ptr", "i64", "i64", "ptr"] + 2 * each.ndim * ["i64"]
    return list(zip(types, _numbers(each), strict=True))
