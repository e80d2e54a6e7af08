"""``compress`` and ``decompress``."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro
from mergebench.cli import scoring as s
from mergebench.cli.packed_scores import numbers, plain_choice, show_choice

if TYPE_CHECKING:
    from mergebench.ship.report import Report

_SHOWN = 8


def compress(
    model: Annotated[
        str,
        typer.Argument(
            help="An adapter, a saved task vector, or with --base a fine-tuned model.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A file named ….mbz.safetensors.")],
    base: o.Base = None,
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            "-s",
            help="ternary, one-bit, two-bit, sparse, lowrank, or lowrank+ and another.",
        ),
    ] = "ternary",
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            "-p",
            metavar="NAME=VALUE",
            help="Parameter of the scheme, repeatable: density=0.1, alpha=2, level=mse, "
            "scope=tensor, values=int8, energy=0.9. With --task several values: alpha=0.5,1,2.",
        ),
    ] = None,
    target_ratio: Annotated[
        str | None,
        typer.Option(
            "--target-ratio", help="Choose the density so that the file is as much smaller: 20x."
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", help="Choose it so that the relative error is at most this."),
    ] = None,
    whole: Annotated[
        list[str] | None,
        typer.Option(
            "--whole",
            metavar="SELECTOR",
            help="Store these tensors of a model as they are, repeatable: class=head.",
        ),
    ] = None,
    include: ro.Include = None,
    exclude: ro.Exclude = None,
    lora_alpha: ro.LoraAlpha = None,
    task: s.Tasks = None,
    select: s.Select = "val",
    limit: s.Limit = None,
    batch_size: s.Batch = 32,
    no_cache: s.NoCache = False,
    allow_base_mismatch: ro.AllowBaseMismatch = False,
    force: o.Force = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make an adapter or a task vector 8 to 50 times smaller, and say what that has cost.

    The result is used as it is: by merge, inspect, diff, spectral, and as base+packed. With
    --task, listed values of parameters are all tried, and what scores best on the base is kept.

    Examples:

    \b
      mergebench compress ft1 --base base -o ft1.mbz.safetensors -s ternary -p density=0.1
      mergebench compress adapter -b base -o a.mbz.safetensors -p alpha=0.5,1,2 --task eval.py
    """
    from mergebench.ship.compress import compress as run
    from mergebench.ship.scored import compress_best

    started = perf_counter()
    options: dict[str, Any] = {
        "scheme": scheme,
        "params": _params(param or (), lists=bool(task)),
        "target_ratio": None if target_ratio is None else _ratio(target_ratio),
        "max_error": max_error,
        "whole": whole or (),
        "include": include or (),
        "exclude": exclude or (),
        "lora_alpha": lora_alpha,
        "allow_base_mismatch": allow_base_mismatch,
        "force": force,
        "memory": o.size("--memory", memory),
        "workers": workers,
    }
    choice = None
    if task:
        scores = s.scores_of(task, _needed(base), limit, batch_size, None, "stop", no_cache)
        tell = s.teller(quiet or as_json)
        choice = compress_best(
            model, out.expanduser(), base=_needed(base), scores=scores, split=select, tell=tell,
            **options,
        )  # fmt: skip
        report = choice.best.report
    else:
        with console.bar(quiet or as_json) as progress:
            report = run(model, out.expanduser(), base=base, progress=progress, **options)
    if as_json:
        scored = {} if choice is None else {"scored": plain_choice(choice, select)}
        seconds = round(perf_counter() - started, 3)
        console.say_json({**report.to_json(), **scored, "seconds": seconds})
    elif not quiet:
        if choice is not None:
            show_choice(choice, select)
        _show(report)


def _needed(base: str | None) -> str:
    from mergebench.core.errors import ParameterError

    if base is None:
        raise ParameterError(
            "--task: what is packed is scored on its base", fix="name the base with --base"
        )
    return base


def _show(report: Report) -> None:
    from rich.table import Table

    for text in report.notes:
        console.note(text)
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "relative error", "cosine"):
        table.add_column(
            heading, overflow="fold", justify="left" if heading == "layer" else "right"
        )
    layers = report.layers()
    worst = sorted(layers, key=lambda name: -layers[name].relative)[:_SHOWN]
    for name in worst:
        table.add_row(console.cell(name), *numbers(layers[name]))
    if len(layers) > _SHOWN:
        table.add_row(f"… and {len(layers) - _SHOWN} layers with less error", "", "")
    table.add_row("all", *numbers(report.error))
    console.out().print(table)
    params = ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in report.params.items()
    )
    console.say(
        f"{report.path}: {console.size(report.bytes)}, {report.ratio:.1f} times smaller than "
        f"{console.size(report.before)}, {report.bits:.3f} bits per parameter, lossy: "
        f"{report.scheme} ({params})"
    )
    if (found := report.worst()) is not None:
        console.say(
            f"largest relative error: {found[1].relative:.3f}, {console.printable(found[0])}"
        )
    if report.exact:
        console.say(f"stored exactly: {len(report.exact)} tensors")


def _params(given: list[str] | tuple[str, ...], *, lists: bool) -> dict[str, Any]:
    from mergebench.core.errors import ParameterError

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name in found:
            raise ParameterError(
                f"-p {text}", expected="NAME=VALUE, each name once", fix="such as -p density=0.1"
            )
        if "," in value and not lists:
            raise ParameterError(
                f"-p {text}: several values", fix="name a --task that chooses, or give one value"
            )
        several = [_plain(each) for each in value.split(",")]
        found[name] = several if len(several) > 1 else several[0]
    return found


def _plain(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _ratio(text: str) -> float:
    from mergebench.core.errors import ParameterError

    try:
        return float(text.removesuffix("x").removesuffix("×"))
    except ValueError:
        raise ParameterError("--target-ratio", expected="a number such as 20x", got=text) from None


def decompress(
    packed: Annotated[str, typer.Argument(help="A packed file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors file, or a folder.")],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", help="Write this checkpoint with the update on top."),
    ] = None,
    target: ro.Target = None,
    force: o.Force = False,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Write what a packed file stands for: the adapter, the task vector, or a full model.

    Examples:

    \b
      mergebench decompress adapter.mbz.safetensors -o adapter
      mergebench decompress ft1.mbz.safetensors --base base -o ft1
    """
    from mergebench.ship.decompress import decompress as run

    started = perf_counter()
    with console.bar(quiet or as_json) as progress:
        size = run(
            packed,
            out.expanduser(),
            base=base,
            target=target,
            force=force,
            memory=o.size("--memory", memory),
            workers=workers,
            progress=progress,
        )
    if as_json:
        seconds = round(perf_counter() - started, 3)
        console.say_json({"path": str(out), "bytes": size, "seconds": seconds})
    elif not quiet:
        console.say(f"{out}: {console.size(size)}")
