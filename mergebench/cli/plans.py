"""Plans as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mergebench.cli import console

if TYPE_CHECKING:
    from mergebench.merge.plan import Plan
    from mergebench.merge.variants import Variant


#: Most chains of one output that a plan shows.
_CHAINS = 6
#: Most characters of an op or a weight: `--json` has all.
_TEXT = 300
#: What the forms of outputs are called.
FORMS = {"model": "model", "lora": "LoRA adapter", "delta": "task vector"}


def _weight(weight: Any) -> str:
    return f"{weight:g}" if isinstance(weight, float) else _short(str(weight))


def _short(text: str) -> str:
    """As much of a text as a line of a plan is for."""
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}… ({len(text):,} characters)"


def _chains(variant: Variant) -> Iterator[tuple[str, str]]:
    """Rows for the chains of an output, with the tensors they are for if there are several."""
    title = variant.label or "ops"
    for chain in variant.distinct[:_CHAINS]:
        names = [name for name, ops in variant.chains.items() if ops == chain]
        where = f"  ({len(names)} tensors such as {names[0]})" if names else ""
        yield title, " → ".join(_short(str(each)) for each in chain) + where
    if len(variant.distinct) > _CHAINS:
        yield title, f"… {len(variant.distinct) - _CHAINS} more (--json lists all)"


def show_plan(made: Plan) -> None:
    """A plan as a table."""
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    weights = ", ".join(f"{each.path} × {_weight(each.weight)}" for each in made.recipe.models)
    table.add_row("inputs", weights)
    table.add_row("base", "none" if made.base is None else made.base.label)
    for each in made.variants:
        for title, ops in _chains(each):
            table.add_row(title, ops)
    places = ", ".join(str(each.out) for each in made.variants)
    table.add_row("output", f"{FORMS[made.form]}: {places}")
    files = ", ".join(file.name for file in made.layout.files)
    if not made.package.single_file:
        table.add_row("files", files)
    aligned = made.aligned
    for each_part in made.parts:
        what = f"{each_part['select']}: {each_part['method'] or 'a chain'}"
        table.add_row("part", f"{what}, {each_part['tensors']} tensors")
    table.add_row("merged", f"{len(aligned.items)} tensors, {made.entries:,} entries")
    reasons: dict[str, list[str]] = {}
    for name in aligned.copies:
        reasons.setdefault(aligned.reasons[name], []).append(name)
    for reason, copied in reasons.items():
        shown = ", ".join(copied[:4]) + (", …" if len(copied) > 4 else "")
        table.add_row("copied", f"{len(copied)} tensors ({reason}): {shown}")
    for name, twins in aligned.twins.items():
        table.add_row("tied", f"{', '.join(twins)} = {name}, merged once")
    table.add_row("passes", f"{made.passes} over {console.size(made.read_bytes)} of input")
    table.add_row(
        "memory",
        f"{console.size(made.memory)} with {made.tiling.workers} workers, at least "
        f"{console.size(made.least_memory)}",
    )
    table.add_row("disk", console.size(made.write_bytes))
    for each in made.variants:
        if each.out is not None and each.out.exists():
            table.add_row("note", f"{each.out} exists; only --force would replace it")
    if made.origin.norms:
        norms = ", ".join(f"{norm:.3g} ({label})" for label, norm in made.origin.norms.items())
        unequal = made.origin.unequal
        apart = "" if unequal is None else f"; longest / shortest {unequal:.2g}"
        table.add_row("norms", f"‖τ‖ ≈ {norms}{apart}")
    for text in made.notes:
        table.add_row("note", text)
    console.out().print(table)
