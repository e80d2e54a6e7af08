"""``check``, and ``merge --check``."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.core.errors import EXIT_FINDINGS

if TYPE_CHECKING:
    from mergebench.loading.report import Loaded
    from mergebench.merge.check import Checked
    from mergebench.merge.drift import Drift, Layer
    from mergebench.merge.plan import Plan

#: Most names of one kind that are printed.
_NAMES = 20
_BAR = 16


def check(
    model: Annotated[
        Path, typer.Argument(help="A model or an adapter.", show_default=False, metavar="MODEL")
    ],
    origins: Annotated[
        list[str] | None,
        typer.Argument(
            help="What it was made of; its manifest says so by itself.", metavar="INPUT"
        ),
    ] = None,
    base: o.Base = None,
    inputs: o.Inputs = None,
    perplexity: Annotated[
        Path | None,
        typer.Option("--perplexity", metavar="FILE", help="Measure perplexity on a text."),
    ] = None,
    every: Annotated[
        bool, typer.Option("--perplexity-all", help="Of the base and the inputs too.")
    ] = False,
    context: Annotated[
        int | None, typer.Option("--context", min=2, help="Most tokens seen at once.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", min=1, help="Tokens from window to window.")
    ] = None,
    lora_alpha: ro.LoraAlpha = None,
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Try to load a model without its values, and show how far it is from its base.

    transformers, diffusers or PEFT say which tensors are missing, unexpected or misshapen (exit
    code 1). Per block: the relative change, and the cosine with and the share of every input.

    Examples:

    \b
      mergebench check merged
      mergebench check merged ft1 ft2 --base base --json
    """
    from mergebench.core.errors import ParameterError
    from mergebench.loading.report import NotCheckedError
    from mergebench.merge.check import Text, find_origins
    from mergebench.merge.check import check as run

    if perplexity is None and (every or context or stride):
        raise ParameterError("--perplexity-all, --context and --stride need --perplexity FILE")
    text = None if perplexity is None else Text(perplexity, context, stride, every)
    found = find_origins(model, base, origins or (), folder=inputs, lora_alpha=lora_alpha)
    with console.bar(quiet or as_json) as progress:
        checked = run(
            model, found, text=text, lora_alpha=lora_alpha, workers=workers, progress=progress
        )
    if as_json:
        console.say_json(checked.to_json())
    elif not quiet:
        show(checked)
    if checked.findings:
        raise typer.Exit(EXIT_FINDINGS)
    if checked.refused:
        raise NotCheckedError(checked.refused)


def need_library(made: Plan) -> None:
    """Refuse a merge whose outputs could not be checked for want of a library."""
    from mergebench.loading.check import need_library as need

    sources = [*([made.base] if made.base is not None else []), *made.models]
    configs = [each.checkpoint.config for each in sources if each.checkpoint is not None]
    need(made.form, next(iter(configs), None))


def check_outputs(
    made: Plan, workers: int | None, quiet: bool, as_json: bool
) -> list[dict[str, Any]]:
    """Check every output of a merge; plain data, for ``--json``."""
    from mergebench.merge.check import Origins
    from mergebench.merge.check import check as run

    results = []
    for variant in made.variants:
        assert variant.out is not None
        with console.bar(quiet or as_json) as progress:
            checked = run(
                variant.out,
                Origins(made.base, made.models),
                lora_alpha=made.recipe.lora_alpha,
                workers=workers,
                progress=progress,
            )
        results.append({**checked.to_json(), "findings": checked.findings})
        if not quiet and not as_json:
            show(checked)
            if checked.refused:
                console.note(f"not loaded: {checked.refused}")
    return results


def show(checked: Checked) -> None:
    """Print what was found."""
    for text in (*checked.notes, *(checked.loaded.notes if checked.loaded else ())):
        console.note(text)
    if checked.drift is not None:
        _show_drift(checked.drift)
    for each in checked.perplexities:
        console.say(
            f"{each.path}: perplexity {each.perplexity:.4g} of {each.tokens:,} tokens "
            f"(context {each.context}, stride {each.stride})"
        )
    if checked.loaded is not None:
        _show_loaded(checked.path, checked.loaded)


def _show_loaded(path: Path, found: Loaded) -> None:
    for what, names in (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        (
            "misshapen",
            [f"{name}: {list(one)}, expected {list(two)}" for name, one, two in found.misshapen],
        ),
        ("refused", found.errors),
    ):
        for name in list(names)[:_NAMES]:
            console.say(f"{what}: {name}")
        if len(names) > _NAMES:
            console.say(f"{what}: {len(names) - _NAMES} more (--json lists all)")
    many = found.findings
    result = f"{many} finding{'s' if many > 1 else ''}" if many else "fits"
    console.say(
        f"{path}: {result}; {found.tensors} tensors, {found.architecture} of "
        f"{found.library} {found.version}"
    )


def _show_drift(found: Drift) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("where")
    based = isfinite(found.total.drift)
    table.add_column("drift" if based else "norm", justify="right")
    table.add_column("")
    for label in console.short_labels(found.inputs):
        table.add_column(f"cos {label}", justify="right")
        table.add_column("share", justify="right")
    if found.inputs:
        table.add_column("rest", justify="right")
    rows = [*found.layers, found.total]
    top = max(((each.drift if based else each.norm) for each in found.layers), default=0.0)
    for each in rows:
        size = each.drift if based else each.norm
        table.add_row(each.where, _number(size), _bar(size, top), *_cells(each))
    console.out().print(table)


def _cells(layer: Layer) -> list[str]:
    cells = []
    for each in layer.parts:
        cells += [_written(each.cosine, ".3f"), _written(each.share, ".0%")]
    return [*cells, _written(layer.unexplained, ".0%")] if layer.parts else []


def _written(value: float, how: str) -> str:
    return format(value, how) if isfinite(value) else "–"


def _number(value: float) -> str:
    return _written(value, ".4f" if 0.001 <= value < 1000 else ".3g")


def _bar(value: float, top: float) -> str:
    if not top > 0 or not isfinite(value):
        return ""
    return "█" * min(round(_BAR * value / top), _BAR) or "▏"
