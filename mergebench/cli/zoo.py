"""``adapters``: which kinds are read, and which are not; ``make-basis``: bases to train them on."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro


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
    if not refused:
        console.say(f"\n{len(_refused())} more are recognised and refused: see --refused")


def _kinds(name: str | None) -> list[dict[str, Any]]:
    from mergebench.adapters_zoo.adapter import KINDS

    kinds = list(KINDS) if name is None else [name]
    return [
        {
            "kind": KINDS[each].name,
            "formula": KINDS[each].formula,
            "computed_by": KINDS[each].support,
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


def make_basis(
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="A .safetensors file, or a folder for an adapter that is ready for training.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(help="The checkpoint that adapters are for.", show_default=False),
    ] = None,
    width: Annotated[
        list[int] | None,
        typer.Option("--width", help="Input width of layers, repeatable, instead of a model."),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", "-r", help="Of every adapter.")] = 16,
    slot: Annotated[
        int | None,
        typer.Option("--slot", help="Which slice, from 0: different slots share no direction."),
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw",
            metavar="NAME",
            help="Instead: random directions by a name, which may collide.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Names the bases: the same for all that are to be added.")
    ] = 0,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    dtype: Annotated[str, typer.Option("--dtype", help="f32, f64, bf16 or f16.")] = "f32",
    force: o.Force = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make shared orthogonal bases, or an adapter on a slice of them, for training.

    Adapters that are trained with their down-projection frozen on different slots add up without
    crosstalk.

    Examples:

    \b
      mergebench make-basis base --rank 4 --slot 0 -o slot0
      mergebench make-basis --width 320 --width 768 --rank 20 -o bases.safetensors
    """
    from mergebench.bases import plan_basis, write_basis

    plan = plan_basis(
        out, rank=rank, model=model, widths=width or (), seed=seed, slot=slot, draw=draw,
        include=include or (), exclude=exclude or (), dtype=dtype,
    )  # fmt: skip
    write_basis(plan, force=force)
    data = plan.to_json()
    if as_json:
        console.say_json(data)
        return
    if quiet:
        return
    which = {"bases": "whole bases", "slices": "slices", "adapter": "adapter with B = 0"}
    of = "" if slot is None and draw is None else f", {'slot' if draw is None else 'draw'} "
    of += "" if not of else str(slot if draw is None else draw)
    console.say(
        f"{plan.out}: {which[plan.form]}, rank {rank}, seed {seed}{of}, "
        f"{console.size(data['bytes'])}"
    )
    for each in data["widths"]:
        own = "" if each["modules"] is None else f" ({each['modules']} weights)"
        text = f"  width {each['width']}{own}: {each['slots']} slots"
        if draw is not None:
            text += (
                f"; two draws share {each['expected_shared']:.2f} directions on average, none with "
                f"probability {each['disjoint_probability']:.3f}"
            )
        console.say(text)
