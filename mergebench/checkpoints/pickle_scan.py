"""What a pickle would cost, found by walking its instructions before they are obeyed.

A restricted unpickler calls nothing that is not on its list, but a few hundred bytes can still
ask it for any amount of time or memory: a tuple of two references to a tuple of two references …
is hashed and printed in 2ⁿ steps, one that is nested deep enough ends the process, ``bytearray(n)``
fills n bytes, a place of 2³¹ in the memo a table of that length. All of it shows in the
instructions, each of which is looked at once.
"""

from __future__ import annotations

import pickletools
from typing import Any, BinaryIO

#: Most entries of a tuple, those of tuples in it and 16 letters of a text counting as one each;
#: and deepest nesting of tuples.
ENTRIES, DEPTH = 100_000, 64
_LETTERS = 16
# Fill as many bytes as they are told to.
_GREEDY = frozenset({"builtins.bytearray", "__builtin__.bytearray"})
# The other encodings may take time that grows with the square of a text.
_ENCODE, _ENCODINGS = "_codecs.encode", frozenset({"latin1", "latin-1", "utf-8", "ascii"})
# Hashed by their fields, so that one of them in a field of another would be hashed again.
_KEYS = frozenset({"torch.distributed.checkpoint.metadata.MetadataIndex"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_TO_MARK = frozenset({"LIST", "DICT", "FROZENSET"})
_POPS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1, "STOP": 1, "POP": 1}
_NOTHING = frozenset({"PROTO", "FRAME", "READONLY_BUFFER"})


class HostileError(ValueError):
    """A pickle that would take more than any program's, whatever its size."""


class _Value:
    """A value on the stack: how far it reaches as a tuple; a text, or a global's name."""

    __slots__ = ("depth", "entries", "is_global", "is_key", "text")

    def __init__(self, text: str = "", entries: int = 1, depth: int = 0) -> None:
        self.text, self.entries, self.depth = text, entries, depth
        self.is_global = self.is_key = False


_MARK, _LEAF = _Value(), _Value()


def check_pickle(stream: BinaryIO) -> None:
    """Walk through one pickle, up to its end or to where it is damaged.

    Raises
    ------
    HostileError
        If obeying it would take too long, too much memory, or change a class.
    ValueError
        Where it is no pickle, or no longer.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode.name, argument)
    except (IndexError, KeyError):
        # It takes what is not there: whoever obeys it comes no further either.
        return


class _Machine:
    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self.memo: dict[int, _Value] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _TUPLES:
            stack.append(_tuple(self._take(_TUPLES[name])))
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self._remember(len(self.memo) if argument is None else argument)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(_tuple(self._to_mark()))
        elif name in ("APPENDS", "ADDITEMS", "SETITEMS", "POP_MARK") or name in _TO_MARK:
            items = self._to_mark()
            _no_keys(items[1::2] if name in ("SETITEMS", "DICT") else items)
            if name == "FROZENSET":
                stack.append(_tuple(items))
            elif name in _TO_MARK:
                stack.append(_LEAF)
        elif name in _POPS:
            items = self._take(_POPS[name])
            if name in ("APPEND", "SETITEM", "BUILD"):
                _no_keys(items[-1:])
            if name == "BUILD" and stack[-1].is_global:
                raise HostileError(f"it changes {stack[-1].text}")
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if argument else [v.text for v in self._take(2)]
            stack.append(_global(".".join(parts)))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            items = self._take(3 if name == "NEWOBJ_EX" else 2)
            stack.append(_called(items[0], items[1:]))
        elif name in ("OBJ", "INST"):
            items = self._to_mark()
            function = _global(argument.replace(" ", ".")) if name == "INST" else items.pop(0)
            stack.append(_called(function, [_tuple(items)]))
        elif name == "BINPERSID":
            stack[-1] = _LEAF
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in _NOTHING:
            text = argument if isinstance(argument, str) else ""
            stack.append(_Value(text, 1 + len(text) // _LETTERS) if text else _LEAF)

    def _take(self, count: int) -> list[_Value]:
        if len(self.stack) < count:
            raise IndexError
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _to_mark(self) -> list[_Value]:
        items: list[_Value] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def _remember(self, place: int) -> None:
        # Programs count up; some leave out places, none leaves out most of them.
        if place > 2 * len(self.memo) + 1000:
            raise HostileError(f"it uses place {place} of a memo of {len(self.memo)}")
        self.memo[place] = self.stack[-1]


def _global(name: str) -> _Value:
    if name in _GREEDY:
        raise HostileError(f"it names {name}, which takes any amount of memory")
    value = _Value(name)
    value.is_global = True
    return value


def _tuple(items: list[_Value]) -> _Value:
    _no_keys(items)
    entries = 1 + sum(item.entries for item in items)
    depth = 1 + max((item.depth for item in items), default=0)
    if entries > ENTRIES or depth > DEPTH:
        raise HostileError("it nests tuples in tuples without end")
    return _Value(items[-1].text if items else "", entries, depth)


def _called(function: _Value, arguments: list[_Value]) -> _Value:
    if function.text == _ENCODE and arguments[0].text not in _ENCODINGS:
        raise HostileError(f"it encodes a text as {arguments[0].text[:40]!r}")
    made = _tuple(arguments)
    made.text, made.is_key = "", function.text in _KEYS
    return made


def _no_keys(items: list[_Value]) -> None:
    if any(item.is_key for item in items):
        raise HostileError("it nests keys of its table in each other")
