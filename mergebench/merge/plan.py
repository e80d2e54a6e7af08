"""The plan: everything that headers, configs and parameters have decided, before work begins."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergebench.checkpoints.placement import Layout
from mergebench.compute.tiles import Tiling
from mergebench.core.delta import reads
from mergebench.core.schedule import to_plain
from mergebench.core.tensor import nbytes
from mergebench.merge.align import Aligned
from mergebench.merge.collected import Collected
from mergebench.merge.device.choose import Device
from mergebench.merge.method import Method
from mergebench.merge.mismatch import Odd
from mergebench.merge.origin import Origin
from mergebench.merge.package import Package
from mergebench.merge.variants import Variant
from mergebench.recipe import Recipe
from mergebench.sources import Source


@dataclass(frozen=True, eq=False)
class Plan:
    """A merge that only waits to be run.

    Attributes
    ----------
    recipe : Recipe
        As asked.
    method : Method or None
        ``None`` for a chain written out.
    models : tuple of Source
        In canonical order: by fingerprint, so that the order of the command line does not
        change a bit of the result.
    aligned : Aligned
        The fate of every tensor.
    form : model, lora or delta
    variants : tuple of Variant
    package : Package
        Tensors, layout and companions of each output.
    tiling : Tiling
    memory, least_memory : int
        Bytes the merge will hold, and the least that any tiling needs.
    passes : int
        How often the inputs are read.
    origin : Origin
        How the models relate to the base, from a sample.
    odd : tuple of Odd
        Tensors that do not match in all inputs, and what is done with them.
    collected : tuple of Collected
        The statistics of every model, if a method asks for them.
    device : Device or None
        Where chains are run, if not on the processor.
    """

    recipe: Recipe
    method: Method | None
    models: tuple[Source, ...]
    weights: tuple[Any, ...]
    base: Source | None
    aligned: Aligned
    form: str
    variants: tuple[Variant, ...]
    package: Package
    tiling: Tiling
    memory: int
    least_memory: int
    passes: int
    notes: tuple[str, ...]
    origin: Origin
    odd: tuple[Odd, ...] = ()
    collected: tuple[Collected, ...] = ()
    device: Device | None = None

    @property
    def layout(self) -> Layout:
        """Files and offsets of each output."""
        return self.package.layout

    @property
    def entries(self) -> int:
        """Entries that are merged, per output."""
        return sum(item.site.size for item in self.aligned.items.values())

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of input that one pass reads."""
        tensors = {
            id(tensor): tensor
            for item in self.aligned.items.values()
            for delta in item.deltas
            if delta is not None
            for tensor in reads(delta)
        }
        copied = sum(nbytes(t.dtype, t.shape) for t in self.aligned.copies.values())
        return copied + sum(nbytes(t.dtype, t.shape) for t in tensors.values())

    @property
    def parts(self) -> list[dict[str, Any]]:
        """What the parts of the recipe select, their methods, and how many tensors each has."""
        counts = Counter(item.part for item in self.aligned.items.values())
        return [
            {"select": each.select, "method": each.method, "tensors": counts[str(number)]}
            for number, each in enumerate(self.recipe.parts, start=1)
        ]

    @property
    def write_bytes(self) -> int:
        """Bytes of output, over all variants."""
        return self.layout.total_bytes * len(self.variants)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "method": self.recipe.method or None,
            "form": self.form,
            "outputs": [
                {
                    "label": each.label,
                    "path": None if each.out is None else str(each.out),
                    "ops": [str(op) for op in each.ops],
                    "chains": [
                        {
                            "ops": [str(op) for op in chain],
                            "tensors": [n for n, ops in each.chains.items() if ops == chain],
                        }
                        for chain in (each.distinct if each.chains else ())
                    ],
                    "recipe": each.stored.to_dict(),
                }
                for each in self.variants
            ],
            "inputs": [
                {"path": m.label, "weight": to_plain(w), "fingerprint": m.fingerprint}
                for m, w in zip(self.models, self.weights, strict=True)
            ],
            **({"statistics": [each.label for each in self.collected]} if self.collected else {}),
            "base": None if self.base is None else self.base.label,
            "origin": self.origin.to_json(),
            "mismatches": [each.to_json() for each in self.odd],
            "tensors": {
                "merged": len(self.aligned.items),
                "copied": {name: self.aligned.reasons[name] for name in self.aligned.copies},
                "tied": {name: list(twins) for name, twins in self.aligned.twins.items()},
            },
            "parts": self.parts,
            "entries": self.entries,
            "passes": self.passes,
            "read_bytes": self.read_bytes * self.passes,
            "write_bytes": self.write_bytes,
            "memory": self.memory,
            "least_memory": self.least_memory,
            "workers": self.tiling.workers,
            "device": "cpu" if self.device is None else self.device.title,
            "files": [file.name for file in self.layout.files],
            "notes": list(self.notes),
        }
