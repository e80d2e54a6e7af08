"""``adapters``: which kinds of adapters are read, and which are not."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import options as o


def adapters(
    name: Annotated[str | None, typer.Argument(help="One kind, in full.")] = None,
    refused: Annotated[
        bool, typer.Option("--refused", help="What is recognised and not read, and why.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """List the kinds of adapters that are read, with their formulas.

    Examples:

    \b
      mergebench adapters
      mergebench adapters lora
    """
    rows = _refused() if refused else _kinds(name)
    if as_json:
        console.say_json(rows)
        return
    if name is not None and not refused:
        for key, value in rows[0].items():
            console.say(f"{key.replace('_', ' ')}: {value or '-'}")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    shown = [key for key in rows[0] if key != "notes"]
    for heading in shown:
        table.add_column(heading.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(row[heading] for heading in shown))
    console.out().print(table)


def _kinds(name: str | None) -> list[dict[str, Any]]:
    from mergebench.adapters_zoo.adapter import KINDS

    kinds = list(KINDS) if name is None else [name]
    return [
        {
            "kind": KINDS[each].name,
            "formula": KINDS[each].formula,
            "peft_type": ", ".join(sorted(KINDS[each].peft_types)),
            "notes": KINDS[each].notes,
        }
        for each in kinds
    ]


def _refused() -> list[dict[str, Any]]:
    from mergebench.adapters_zoo.adapter import KINDS
    from mergebench.adapters_zoo.refusals import FEATURES, PEFT_TYPES

    read = {accepted for name in KINDS for accepted in KINDS[name].peft_types}
    rows = [
        {"what": f"peft_type {name}", "why": why}
        for name, why in PEFT_TYPES.items()
        if name not in read
    ]
    return rows + [{"what": f"config entry {name}", "why": why} for name, why in FEATURES.items()]
