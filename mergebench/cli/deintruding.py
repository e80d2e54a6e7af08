"""``edit deintrude``."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro

if TYPE_CHECKING:
    from mergebench.merge.deintruded import Matrix
    from mergebench.merge.outcome import Written

_FORMS = {"model": "model", "lora": "LoRA adapter", "delta": "task vector"}


def deintrude(
    model: Annotated[
        str, typer.Argument(help="A fine-tune, an adapter or a task vector.", show_default=False)
    ],
    base: Annotated[
        str, typer.Option("--base", "-b", help="The checkpoint it was fine-tuned from.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="A .safetensors file or a folder.")],
    lam: Annotated[
        str,
        typer.Option(
            "--lam",
            "--lambda",
            help="What is kept of an intruder, 0 removes it; several as 0.3,0.5,0.7 give several "
            "outputs.",
        ),
    ] = "0.7",
    top: Annotated[
        str,
        typer.Option("--top", help="How many of each matrix, those with the largest σ; or all."),
    ] = "1",
    k: Annotated[
        int, typer.Option("-k", "--k", min=1, help="Leading directions of each matrix to look at.")
    ] = 10,
    epsilon: Annotated[
        float,
        typer.Option("--epsilon", help="An intruder's largest cosine with the base is below."),
    ] = 0.5,
    side: Annotated[str, typer.Option("--side", help="left (output) or right (input).")] = "left",
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Shrink those updates as a whole by as much instead, to compare with.",
        ),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="SELECTOR",
            help="Look at these tensors only, repeatable: a regular expression, class=embedding "
            "or block=0-3; the others stay as in the model.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="SELECTOR", help="Leave these tensors as in the model."),
    ] = None,
    form: Annotated[
        str,
        typer.Option("--as", help="auto, model, lora or delta. auto: an adapter gives an adapter."),
    ] = "auto",
    rank: ro.Rank = None,
    energy: ro.Energy = None,
    target: ro.Target = None,
    dtype: ro.Dtype = "keep",
    lora_alpha: ro.LoraAlpha = None,
    allow_base_mismatch: ro.AllowBaseMismatch = False,
    allow_nonfinite: ro.AllowNonfinite = False,
    force: o.Force = False,
    memory: mo.Memory = "2GiB",
    workers: mo.Workers = None,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Scale down intruder dimensions: leading directions that the base does not have.

    W becomes W0 + ΔW + (λ - 1) σ u vᵀ for the intruder with the largest σ of each matrix. An
    adapter stays one, with the correction as further rank.

    Examples:

    \b
      mergebench edit deintrude ft1 --base base -o mended
      mergebench edit deintrude lora1 --base base -o mended --lam 0.5,0.7,0.9
    """
    from mergebench.merge.deintruded import deintruding, found_in
    from mergebench.merge.engine import check_outputs, execute
    from mergebench.merge.package import tolerances
    from mergebench.merge.planning import make_plan

    started = perf_counter()
    params = {"top": top, "k": k, "epsilon": epsilon, "side": side,
              "control": "removed" if control else "none"}  # fmt: skip
    recipe = deintruding(
        model, base, out, params, lams=_numbers(lam), include=include or (), exclude=exclude or (),
        form=form, rank=rank, energy=energy, target=target, dtype=dtype, lora_alpha=lora_alpha,
        allow_base_mismatch=allow_base_mismatch, allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    made = make_plan(recipe, memory=o.size("--memory", memory), workers=workers)
    if dry_run:
        from mergebench.cli.plans import show_plan

        console.say_json(made.to_json()) if as_json else show_plan(made)
        return
    check_outputs(made, force=force)
    if not quiet:
        # That matrices are decomposed is what was asked for; the manifest says by what.
        for text in [each for each in made.notes if each not in tolerances(made.variants)]:
            console.note(text)
    with console.bar(quiet or as_json) as progress:
        note = None if quiet else console.note
        written = execute(made, force=force, progress=progress, note=note)
    found = [found_in(each) for each in written]
    if as_json:
        outputs = [_plain(*each) for each in zip(written, found, strict=True)]
        seconds = round(perf_counter() - started, 3)
        console.say_json({"form": made.form, "seconds": seconds, "outputs": outputs})
    elif not quiet:
        for one, matrices in zip(written, found, strict=True):
            console.say(f"{one.path}: {_FORMS[made.form]}, {console.size(one.bytes)}")
            _show(matrices, epsilon)


def _numbers(text: str) -> list[float]:
    from mergebench.core.errors import ParameterError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ParameterError(
            "--lam: must be a number from 0 on, or several as 0.3,0.5,0.7", got=repr(text)
        ) from None


def _plain(written: Written, matrices: list[Matrix]) -> dict[str, Any]:
    from mergebench.merge.deintruded import totals

    return {
        "label": written.label,
        "path": str(written.path),
        "bytes": written.bytes,
        "totals": totals(matrices),
        "residuals": dict(written.residuals),
        "matrices": [each.to_json() for each in matrices],
    }


def _show(matrices: list[Matrix], epsilon: float) -> None:
    from rich.table import Table

    from mergebench.merge.deintruded import totals

    total = totals(matrices)
    console.say(
        f"  {total['intruders']} intruders below {epsilon:g} in "
        f"{total['matrices_with_intruders']} of {total['matrices']} matrices, "
        f"{total['scaled']} scaled down ({total['exact']} exact, "
        f"{total['scaled'] - total['exact']} certified by bounds)"
    )
    touched = [each for each in matrices if each.directions]
    if not touched:
        console.say("  nothing had to be changed")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for heading in ("index", "cosine", "σ", "energy", "removed of ΔW", "‖ΔW'‖/‖ΔW‖"):
        table.add_column(heading, justify="right")
    for each in touched:
        for place, one in enumerate(each.directions):
            last = place == len(each.directions) - 1
            whole = (f"{each.removed:.3g}", f"{each.left:.3g}") if last else ("", "")
            table.add_row(
                console.cell(each.tensor), str(one["index"]), _cosine(one), f"{one['sigma']:.4g}",
                f"{one['energy']:.2%}", *whole,
            )  # fmt: skip
    console.out().print(table)


def _cosine(one: dict[str, Any]) -> str:
    if one["status"] == "exact":
        return f"{one['cosine']:.3f}"
    return f"{one['cosine']:.3f} to {one['bound']:.3f}"
