"""Reset half of the modules of every category to the base."""

from __future__ import annotations

import re

import numpy as np

from mergebench.compute.random import stream_of, words
from mergebench.core.params import Seed
from mergebench.core.site import Site, is_constant, key_of, kind_of
from mergebench.merge.at import At, Stack
from mergebench.merge.op import op

_ATTENTION = re.compile(r"(?i)attn|attention|(^|[._])(q|k|v|o|qkv)(_proj|$)")
#: What no round of half fine-tuning freezes, and so nothing resets; and what is no parameter.
_APART = ("embedding", "head", "buffer")
#: Neighbours are known by their names: what may be a mask is none of the modules.
_MASK = (1, 1, 1, 1)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def category(name: str, block: int | None, shape: tuple[int, ...] = _MASK) -> str:
    """What a tensor of a block counts as: ``norm``, ``attention``, ``feed-forward``, or nothing."""
    if is_constant(name, shape) or (kind := kind_of(name, (1, 1))) in _APART:
        return ""
    if kind == "norm":
        return "norm"
    within = _module(name).partition(f".{block}.")[2]
    return "attention" if _ATTENTION.search(within) else "feed-forward"


def _order(count: int, *parts: int) -> list[int]:
    """A permutation of ``count`` places."""
    return [int(place) for place in np.argsort(words(stream_of(*parts), 0, count), kind="stable")]


def _reset(site: Site, kind: str, seed: int) -> list[str]:
    """The modules of one category and block that are reset."""
    modules = sorted(
        {_module(name) for name in site.beside if category(name, site.block) == kind},
        key=str.encode,
    )
    keys = seed, key_of(site.stack), key_of(kind)
    half, odd = divmod(len(modules), 2)
    if odd and site.block in _order(site.layers, *keys)[: site.layers // 2]:
        half += 1
    chosen = _order(len(modules), *keys, site.block or 0)[:half]
    return [modules[place] for place in chosen]


def is_reset(site: Site, seed: int) -> bool:
    """Whether a tensor goes back to the base."""
    kind = category(site.name, site.block, site.shape) if site.block is not None else ""
    return bool(kind) and _module(site.name) in _reset(site, kind, seed)


@op(linear=True, of_updates=True)
def reset_half(stack: Stack, at: At, seed: Seed = 0) -> Stack:
    """Take half of the modules of every block back to the base (HFT).

    Categories are norms, attention, and what else is in a numbered block. Of n modules of a
    category in a block ⌊n / 2⌋ are reset; where n is odd, one more in ⌊L / 2⌋ of the L blocks. So
    two of four attention matrices, one of two norms, and of three feed-forward matrices two in a
    random half of the blocks and one in the others. A bias goes with its weight. Embeddings, heads
    and everything outside of numbered blocks stay as they are.

    Parameters
    ----------
    seed : int, default 0
        Draws the modules; the names of the blocks' tensors decide what there is to draw from.
    """
    return stack * 0 if is_reset(at.site, seed) else stack
