"""Contents, coded by a scheme, as packed tensors in a spool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from math import log2
from typing import Any

from mergebench.adapters_zoo.packing import Head, blocks_of, pack_block
from mergebench.core.tensor import Array
from mergebench.ship.measure import Sums, cut_of, in_order
from mergebench.ship.pieces import Contents, Piece
from mergebench.ship.schemes import Coder, Scheme, Tally, tally_of
from mergebench.ship.spool import Spool, Spooled, spooled

_CODES = frozenset({"ternary", "one_bit", "two_bit"})


@dataclass
class _Blocks:
    """The blocks of a tensor in a spool."""

    at: int
    length: int
    rows: list[Any]


def pack(
    contents: Contents,
    scheme: Scheme,
    params: Mapping[str, Any],
    sums: Mapping[str, Sums],
    pool: Executor,
    spool: Spool,
    step: Callable[[int], None],
) -> dict[str, Spooled]:
    """Code every tensor; the result does not depend on the number of threads.

    Parameters
    ----------
    contents : Contents
    scheme : Scheme
    params : mapping
        All parameters of the scheme.
    sums : mapping of name to Sums
        Of the tensors that may lose.
    pool : Executor
    spool : Spool
    step : callable
        Told how many entries have been read.
    """
    loses = [piece for piece in contents.pieces.values() if not piece.exact]
    coders = scheme.settle(
        loses, sums, lambda pieces, rank: cut_of(pieces, rank, pool, step), **params
    )
    blocks: dict[str, _Blocks] = {}
    tallies: dict[str, Tally] = {}
    for piece, (data, row), tally in in_order(pool, _jobs(contents, coders)):
        at = spool.add(data)
        own = blocks.setdefault(piece.name, _Blocks(at, 0, []))
        own.length += len(data)
        own.rows.append(row)
        if tally is not None:
            tallies.setdefault(coders[piece.name].group, Tally()).add(tally)
        step(0)
    made = {}
    for name, piece in contents.pieces.items():
        coder = coders.get(name)
        if coder is None:
            head = Head("raw", piece.dtype, piece.shape)
        else:
            numbers = coder.numbers(tallies.get(coder.group, Tally()))
            head = Head(coder.codec, piece.dtype, piece.shape, numbers, coder.stored)
        own = blocks.get(name, _Blocks(0, 0, []))
        made[name] = spooled(name, head, own.rows, spool, own.at, own.length)
    return made


def _jobs(
    contents: Contents, coders: Mapping[str, Coder]
) -> Iterator[Callable[[], tuple[Piece, tuple[bytes, Any], Tally | None]]]:
    def job(piece: Piece, start: int, stop: int) -> tuple[Piece, Any, Tally | None]:
        values: Array = piece.read(start, stop)
        coder = coders.get(piece.name)
        if coder is None:
            return piece, pack_block("raw", values), None
        if coder.mean:
            values = values - values.dtype.type(coder.mean)
        coded = coder.code(values, start)
        tally = tally_of(coded, values) if coder.codec in _CODES else None
        return piece, pack_block(coder.codec, coded), tally

    for piece in contents.pieces.values():
        for start, stop in blocks_of(piece.size):
            yield partial(job, piece, start, stop)


def entropy(share: float) -> float:
    """Bits for whether an entry is one of a share of all."""
    if not 0 < share < 1:
        return 0.0
    return -share * log2(share) - (1 - share) * log2(1 - share)
