"""``crosstalk``, and what ops report of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro

if TYPE_CHECKING:
    from mergebench.merge.readings import Row


def crosstalk(
    models: o.Models,
    base: o.Base = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    lora_alpha: ro.LoraAlpha = None,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    layers: Annotated[
        bool, typer.Option("--layers", "-l", help="Also list every tensor and pair.")
    ] = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Say how far models answer each other's inputs, per pair and layer.

    Crosstalk, overlap and angles of row spaces, and cosines of task vectors. Where crosstalk is 0
    the sum does to the inputs of each model what that model alone does.

    Examples:

    \b
      mergebench crosstalk a.safetensors b.safetensors
      mergebench crosstalk ft1 ft2 --base base --layers
    """
    from mergebench.merge.readings import compare
    from mergebench.merge.readings import spans as spans_of

    with console.bar(quiet or as_json) as progress:
        found = compare(
            models, base, include=include or (), exclude=exclude or (), lora_alpha=lora_alpha,
            memory=o.size("--memory", memory), workers=workers, progress=progress,
        )  # fmt: skip
    pairs = spans_of(found, by_model=True)
    if as_json:
        data = {"pairs": [each.to_json() for each in pairs]}
        console.say_json(data | {"rows": [row.to_json() for row in found]})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("models", "what", "least", "mean", "most", "most in"):
        number = heading in ("least", "mean", "most")
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for each in pairs:
        numbers = (each.least.value, each.mean, each.most.value)
        table.add_row(
            console.cell(", ".join(each.models)), each.what,
            *(f"{number:.3g}" for number in numbers), console.cell(each.most.tensor),
        )  # fmt: skip
    if pairs:
        console.out().print(table)
    else:
        console.say("no matrix is changed by two of the models")
    if layers:
        show_rows(found)


def show_rows(found: Sequence[Row]) -> None:
    """A table of everything that was reported."""
    if not found:
        console.say("nothing was reported")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "models", "what"):
        table.add_column(heading, overflow="fold")
    table.add_column("value", justify="right")
    for row in found:
        names = console.cell(", ".join(row.models))
        table.add_row(console.cell(row.tensor), names, row.what, f"{row.value:.4g}")
    console.out().print(table)


def spans(found: Sequence[Row]) -> Iterator[str]:
    """A line for each thing that was reported."""
    from mergebench.merge.readings import spans as spans_of

    for each in spans_of(found):
        least, most = each.least, each.most
        places = " and ".join(
            f"{name} in {row.tensor} of {', '.join(row.models)}"
            for name, row in (("least", least), ("most", most))
        )
        if least.value == most.value:
            yield f"{each.what}: {most.value:.3g} everywhere"
        else:
            yield f"{each.what}: {least.value:.3g} to {most.value:.3g}, {places}"
