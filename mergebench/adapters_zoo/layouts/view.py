"""A base seen in both layouts: adapters made for either apply to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mergebench.adapters_zoo.layouts import clip, flux, unet
from mergebench.adapters_zoo.layouts.pieces import Piece, Rows, assembled
from mergebench.adapters_zoo.layouts.tables import Shape, Span, to_diffusers, to_original
from mergebench.core.delta import Delta
from mergebench.core.errors import MismatchError
from mergebench.core.tensor import Tensor


@dataclass(frozen=True, eq=False)
class View:
    """The tensors of a base under their own names and under those of the other layout.

    Attributes
    ----------
    own : mapping of tensor name to shape
    other : mapping of str to tuple of Span
        Tensors of the other layout, and the rows of the base that they are.
    renamed : mapping of str to str
        Own names that the view leaves out, since the other layout's differ by a prefix only.
    layout : original or diffusers
        That of the base.
    family : sd, sdxl or flux
    """

    own: Mapping[str, Shape]
    other: Mapping[str, tuple[Span, ...]]
    renamed: Mapping[str, str]
    layout: Literal["original", "diffusers"] = "original"
    family: Literal["sd", "sdxl", "flux"] = "sd"

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of everything that an adapter may name."""
        found = {name: shape for name, shape in self.own.items() if name not in self.renamed}
        for name, spans in self.other.items():
            rest = self.own[spans[0].name][1:]
            found[name] = (sum(span.rows for span in spans), *rest)
        return found

    def tensors(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same as tensors, those of the other layout being rows of the base."""
        found = {name: tensor for name, tensor in base.items() if name not in self.renamed}
        for name, spans in self.other.items():
            if all(span.name in base for span in spans):
                found[name] = Rows(self.shapes[name], tuple((base[s.name], s) for s in spans))
        return found

    def back(self, label: str, deltas: Mapping[str, Delta]) -> dict[str, Delta]:
        """Updates of the view's tensors as updates of the base's own.

        Raises
        ------
        MismatchError
            If two updates meet in one row, or part of a tensor is replaced.
        """
        pieces: dict[str, list[Piece]] = {}
        for name, delta in deltas.items():
            spans = self.other.get(name)
            if spans is None or (name in self.own and name not in self.renamed):
                size = delta.shape[0] if delta.shape else 1
                spans = (Span(name, 0, size, 0),)
            for span in spans:
                pieces.setdefault(span.name, []).append(Piece(name, delta, span))
        found: dict[str, Delta] = {}
        for name, given in pieces.items():
            given.sort(key=lambda piece: (piece.span.start, piece.name))
            end = 0
            for before, piece in zip([None, *given], given, strict=False):
                if before is not None and piece.span.start < end:
                    raise MismatchError(
                        f"{label}: {before.name} and {piece.name} update the same rows of {name}",
                        expected="one update per weight",
                    )
                end = piece.span.start + piece.span.rows
            only = given[0]
            shape = self.own.get(name, only.delta.shape)
            whole = len(given) == 1 and only.span.at == 0 and only.delta.shape == shape
            found[name] = only.delta if whole else assembled(label, name, shape, given)
        return found


def view_of(shapes: Mapping[str, Shape]) -> View | None:
    """The view of a diffusion model in one of the known layouts, None for any other base.

    Parameters
    ----------
    shapes : mapping of tensor name to shape
    """
    other: dict[str, tuple[Span, ...]] = {}
    own_flux, their_flux = flux.original(shapes), flux.diffusers(shapes)
    for table in (unet.original(shapes), own_flux, *clip.original(shapes)):
        if table is not None:
            other |= to_diffusers(table, shapes)
    renamed = clip.renamed(shapes)
    for name, alias in renamed.items():
        if shapes[name]:
            other[alias] = (Span(name, 0, shapes[name][0], 0),)
    layout: Literal["original", "diffusers"] = "original" if other else "diffusers"
    for table in (unet.diffusers(shapes), their_flux):
        if table is not None:
            other |= to_original(table, shapes)
    other = {name: spans for name, spans in other.items() if name not in shapes}
    known = {name: alias for name, alias in renamed.items() if alias in other}
    family: Literal["sd", "sdxl", "flux"] = "sd"
    if own_flux or their_flux:
        family = "flux"
    elif any(".label_emb." in f".{name}" or "add_embedding." in name for name in shapes):
        family = "sdxl"
    return View(shapes, other, known, layout, family) if other else None
