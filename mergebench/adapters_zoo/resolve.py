"""From an adapter's module names to the tensor names and shapes of the base."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from mergebench.adapters_zoo.dialects import kohya
from mergebench.adapters_zoo.layouts.unmapped import unmapped
from mergebench.adapters_zoo.parts import part_of
from mergebench.core.errors import MismatchError

Shape = tuple[int, ...]
_PART = "; if it is another part of a pipeline than its {part}, choose one with --part"


@dataclass(frozen=True, eq=False)
class BaseNames:
    """Finds the tensor of the base that an adapter's name means.

    Attributes
    ----------
    shapes : mapping of tensor name to shape
    """

    shapes: Mapping[str, Shape]

    @cached_property
    def _by_suffix(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            for suffix in _suffixes(name):
                found.setdefault(suffix, []).append(name)
        return found

    @cached_property
    def _by_flat_module(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            if name.endswith(".weight"):
                flat = kohya.flatten(name.removesuffix(".weight"))
                found.setdefault(flat, []).append(name)
        return found

    @cached_property
    def _by_flat_suffix(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            if name.endswith(".weight"):
                for suffix in _suffixes(name.removesuffix(".weight")):
                    found.setdefault(kohya.flatten(suffix), []).append(name)
        return found

    def dotted(self, name: str) -> tuple[str, ...]:
        """Base tensors that ``name`` may mean: itself, else those that differ by a prefix.

        A prefix that the base lacks has no number in it: what remains of ``blocks.3.proj`` behind
        one is another module. Of several such ends the longest counts.
        """
        if name in self.shapes:
            return (name,)
        dropped = _suffixes(name)
        count = next((i for i, part in enumerate(name.split(".")) if part.isdigit()), len(dropped))
        shorter = [suffix for suffix in dropped[: count + 1] if suffix in self.shapes][:1]
        return tuple(sorted({*self._by_suffix.get(name, ()), *shorter}))

    def flattened(self, module: str) -> tuple[str, ...]:
        """Base weights that a Kohya module name may mean: whole paths first, else path ends."""
        prefix, flat = kohya.component(module)
        found = self._by_flat_module.get(flat) or self._by_flat_suffix.get(flat, [])
        if len(found) > 1:
            # Two text encoders have the same modules; only the prefix tells them apart.
            homes = kohya.COMPONENTS.get(prefix, ())
            inside = [
                name for name in found if name.startswith(tuple(f"{home}." for home in homes))
            ]
            found = inside or found
        return tuple(sorted(found))

    def unique(self, label: str, key: str, wanted: str, candidates: tuple[str, ...]) -> str:
        """The one candidate.

        Raises
        ------
        MismatchError
            If there is none, or more than one; it lists candidates.
        """
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise MismatchError(
                f"{label}: {key} fits several tensors of the base",
                got=_listed(candidates),
                expected="exactly one",
                fix="use the base that the adapter was trained on, or rename the adapter's tensor",
            )
        raise MismatchError(
            f"{label}: {key} fits no tensor of the base",
            expected=wanted,
            got=f"a base with {_listed(self._near(wanted))}" if self.shapes else "an empty base",
            fix=unmapped(key, self.shapes)
            or "check that --base is the model that the adapter was trained on"
            + ("" if (part := part_of(key)) is None else _PART.format(part=part)),
        )

    def _near(self, wanted: str) -> tuple[str, ...]:
        # Comparing text with every name of a large base takes seconds, so a shared ending is
        # tried first.
        for suffix in _suffixes(wanted)[1:]:
            if "." in suffix and suffix in self._by_suffix:
                return tuple(self._by_suffix[suffix])
        close = difflib.get_close_matches(wanted, list(self.shapes)[:5000], n=3, cutoff=0.5)
        return tuple(close) or tuple(self.shapes)


def share(count: int, total: int) -> str:
    """How many modules of an adapter do not fit a base, for messages; nothing for the only one."""
    return "" if total < 2 else f" ({count} of {total} modules do not fit)"


def _suffixes(name: str) -> list[str]:
    """The name and every part of it behind a dot: ``a.b.c`` gives ``a.b.c``, ``b.c``, ``c``."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more


@dataclass(frozen=True)
class Placement:
    """How a product of factors lies in the tensor it displaces.

    Attributes
    ----------
    shape : tuple of int
        Shape of the displaced tensor.
    transposed : bool
        Whether the tensor is stored input × output.
    decisive : bool
        Whether that follows from the shapes or from the caller, not from the adapter's word.
    """

    shape: Shape
    transposed: bool
    decisive: bool = True


def place(
    natural: Shape, stored: Shape | None, *, transposed: bool | None, claimed: bool
) -> Placement | None:
    """How ``B @ A`` of shape ``natural`` lies in a base tensor; None where it does not fit.

    Parameters
    ----------
    natural : tuple of int
        ``(out, in)``, or ``(out, in, *kernel)`` for a convolution.
    stored : tuple of int or None
        Shape of the base tensor; None where there is no base.
    transposed : bool or None
        What is known of the base tensor; None if nothing is.
    claimed : bool
        What the adapter says (``fan_in_fan_out``); used only where shapes do not decide.
    """
    matrix = len(natural) == 2
    flipped = natural[::-1]
    if stored is None:
        turned = claimed and matrix
        return Placement(flipped if turned else natural, turned, decisive=False)
    # A 1x1 convolution and a linear layer hold the same numbers, and trainers treat them alike.
    upright = _trim(natural) == _trim(stored)
    if transposed is not None:
        fits = (matrix and stored == flipped) if transposed else upright
        return Placement(stored, transposed) if fits else None
    turned = matrix and stored == flipped
    if upright and turned:
        return Placement(stored, claimed, decisive=False)
    return Placement(stored, turned) if upright or turned else None


def _trim(shape: Shape) -> Shape:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
