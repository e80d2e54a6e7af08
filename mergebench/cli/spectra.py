"""``spectral``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import recipe_options as ro

if TYPE_CHECKING:
    from mergebench.spectral.store import Store


def spectral(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Checkpoints, adapters, saved task vectors, or base+adapter.",
            show_default=False,
        ),
    ],
    base: o.Base = None,
    merged: Annotated[
        str | None,
        typer.Option("--merged", help="What the models were merged to, to compare them with."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME,...",
            help="Diagnostics to run, all by default: intruders, spectra, rotation, heavy_tail, "
            "allocation, contribution; of several models cosine, angles, crosstalk, signs, "
            "overlap, alignment, interference.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="SELECTOR",
            help="Look at these tensors only, repeatable: a regular expression, class=embedding "
            "or block=0-3.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="SELECTOR", help="Leave these tensors out."),
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", "--top", help="Leading directions looked at for intruders.")
    ] = None,
    epsilon: Annotated[
        str | None,
        typer.Option("--epsilon", help="Threshold of intruders; several as 0.3,0.5,0.7."),
    ] = None,
    side: Annotated[
        str | None, typer.Option("--side", help="Of intruders: left (output) or right (input).")
    ] = None,
    signed: Annotated[
        bool, typer.Option("--signed", help="Signed cosines, as the paper writes them.")
    ] = False,
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            "-p",
            metavar="NAME.PARAM=VALUE",
            help="Any parameter of a diagnostic, such as overlap.density=0.2, repeatable.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="JSON", help="An earlier report, to show what changed."),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="DIR|FILE", help="Write rows as tables, or as one .csv."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write one page to look at; needs the extra report."
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png", metavar="DIR", help="Write pictures for papers; needs the extra report."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace existing files.")] = False,
    memory: mo.Memory = "2GiB",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            "-j",
            min=1,
            help="Threads; all cores by default.",
            envvar="MERGEBENCH_WORKERS",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            help="Folder for decompositions of the base; mergebench in the user's cache by "
            "default.",
            envvar="MERGEBENCH_CACHE",
        ),
    ] = None,
    cache_size: Annotated[
        str,
        typer.Option("--cache-size", help="Most to keep there.", envvar="MERGEBENCH_CACHE_SIZE"),
    ] = "8GiB",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep and use nothing.")] = False,
    lora_alpha: ro.LoraAlpha = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Look at what fine-tuning did to the spectra: intruder dimensions, ranks, angles.

    Everything is exact, or certified by bounds; decompositions of the base are kept for the next
    model on it. --json prints everything, for programs and for --against.

    Examples:

    \b
      mergebench spectral adapter --base base --only intruders --epsilon 0.3,0.5,0.7
      mergebench spectral ft1 ft2 --base base --json
    """
    from mergebench.merge.kernels import ready
    from mergebench.pages import check_page, check_pictures
    from mergebench.spectral.against import changes, load_report
    from mergebench.spectral.engine import analyse, check_names
    from mergebench.spectral.html import write_page, write_pictures
    from mergebench.spectral.subjects import open_inputs
    from mergebench.spectral.tables import check_place, write_tables

    names = [part.strip() for text in only or () for part in text.split(",")] or None
    params = _params(param or (), k=k, epsilon=epsilon, side=side, signed=signed or None)
    budget = o.size("--memory", memory)
    store = _store(cache, cache_size, no_cache)
    earlier = None if against is None else load_report(against)
    if csv is not None:
        check_place(csv, check_names(names), force)
    if html is not None:
        check_page(html, force)
    if png is not None:
        check_pictures(png, force)
    inputs = open_inputs(models, base, merged, lora_alpha=lora_alpha)
    with console.bar(quiet or as_json) as progress:
        report = analyse(
            inputs,
            diagnostics=names,
            params=params,
            include=include or (),
            exclude=exclude or (),
            memory=budget,
            workers=workers,
            store=store,
            progress=progress,
            compiles=ready.wanted,
        )
    data = report.to_json()
    if earlier is not None:
        found, notes = changes(earlier, data)
        data["against"] = {"path": str(against), "changes": found, "notes": notes}
    written = [] if csv is None else write_tables(data, csv)
    if html is not None:
        write_page(data, html)
        written.append(html)
    if png is not None:
        drawn = write_pictures(data, png)
        written += drawn
        if not drawn:
            console.note("there is nothing to draw, so that --png wrote nothing")
    if as_json:
        console.say_json(data)
    elif not quiet:
        from mergebench.cli.spectral_tables import show

        show(data)
        for each in written:
            console.note(f"wrote {each}")


def _store(cache: Path | None, size: str, off: bool) -> Store | None:
    from mergebench.core.cache_folder import cache_folder
    from mergebench.spectral.store import Store

    limit = o.size("--cache-size", size)
    return None if off else Store((cache or cache_folder()).expanduser(), limit)


def _params(texts: list[str] | tuple[()], **flags: Any) -> dict[str, dict[str, Any]]:
    """Parameters by diagnostic; flags are those of the intruders."""
    from mergebench.core.errors import ParameterError
    from mergebench.spectral.diagnostic import DIAGNOSTICS

    found: dict[str, dict[str, Any]] = {}
    if given := {name: value for name, value in flags.items() if value is not None}:
        found["intruders"] = given
    for text in texts:
        key, equals, value = text.partition("=")
        name, dot, parameter = key.strip().partition(".")
        if not equals or not dot:
            raise ParameterError(
                "-p: a parameter is written diagnostic.name=value", got=repr(text),
                fix="such as overlap.density=0.2",
            )  # fmt: skip
        own = found.setdefault(DIAGNOSTICS[name].name, {})
        if parameter in own:
            raise ParameterError(f"-p: {name}.{parameter} is given twice", fix="keep one of them")
        own[parameter] = value.strip()
    return found
