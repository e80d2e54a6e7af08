"""Parameters that stack the experts of a mixture, as one tensor of the base or as many."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.core.errors import MismatchError

#: Stacked parameter -> the expert's own tensors of a checkpoint that stores them apart, from top
#: to bottom. transformers 5 stacks them when it loads such a model.
_APART = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
#: Module path in the code of transformers 5 -> what checkpoints call it.
_PATHS = ((".mlp.experts", ".mlp.experts"), (".mlp.experts", ".block_sparse_moe.experts"))


@dataclass(frozen=True)
class Stack:
    """A parameter of several matrices.

    Attributes
    ----------
    name : str
        Of the base's tensor, or of the parameter where the base has its parts.
    shape : tuple of int
        (experts, rows, columns), or (rows, columns) of a single matrix.
    parts : tuple, default None
        Name and rows of the tensors of each expert, top to bottom, where the base has these.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[str, int], ...], ...] | None = None

    @property
    def parameter(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.shape[0] if len(self.shape) == 3 else 1


def find_stack(label: str, names: BaseNames, module: str, parameter: str) -> Stack | None:
    """The parameter in the base; None where the base has nothing like it.

    Raises
    ------
    MismatchError
        If it has more than one tensor of this name, or experts of different shapes.
    """
    wanted = f"{module}.{parameter}"
    if found := names.dotted(wanted):
        name = names.unique(label, wanted, wanted, found)
        shape = names.shapes[name]
        return Stack(name, shape) if len(shape) in (2, 3) and all(shape) else None
    for code, disk in _PATHS:
        place = f".{module}".replace(code, disk)
        for parts in _APART.get(parameter, ()):
            if experts := _experts(label, names, place.removeprefix("."), parts):
                rows = sum(height for _, height in experts[0])
                shape = (len(experts), rows, names.shapes[experts[0][0][0]][1])
                return Stack(wanted, shape, experts)
    return None


def _experts(
    label: str, names: BaseNames, place: str, parts: tuple[str, ...]
) -> tuple[tuple[tuple[str, int], ...], ...]:
    first = names.dotted(f"{place}.0.{parts[0]}.weight")
    if not first:
        return ()
    start = names.unique(label, place, f"{place}.0.{parts[0]}.weight", first)
    start = start.removesuffix(f"0.{parts[0]}.weight")
    form = re.compile(rf"{re.escape(start)}(\d+)\.{re.escape(parts[0])}\.weight")
    count = sum(form.fullmatch(name) is not None for name in names.shapes)
    experts, sizes = [], set()
    for expert in range(count):
        mine = [f"{start}{expert}.{part}.weight" for part in parts]
        shapes = [names.shapes.get(name, ()) for name in mine]
        sizes.add(tuple(shapes))
        if any(len(shape) != 2 for shape in shapes):
            return ()
        experts.append(tuple((name, shape[0]) for name, shape in zip(mine, shapes, strict=True)))
    if len(sizes) != 1 or len({shape[1] for shape in next(iter(sizes))}) != 1:
        raise MismatchError(
            f"{label}: the experts of {start.removesuffix('.')} differ in shape",
            got=", ".join(map(str, sorted(sizes)[:3])),
        )
    return tuple(experts)
