"""``fit statistics``: what only data can tell of models, for methods that need it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergebench.cli import console
from mergebench.cli import machine_options as mo
from mergebench.cli import options as o
from mergebench.cli import scoring as s

if TYPE_CHECKING:
    from mergebench.merge.fit.statistics import How, Statistics
    from mergebench.merge.fit.task import Task


def statistics(
    models: o.Models,
    task: s.Tasks = None,
    base: o.Base = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="fisher, for method fisher; gram, for regmean; gram_pp, of all models together, "
            "for regmean_pp.",
        ),
    ] = "gram",
    split: Annotated[str, typer.Option("--split", help="Split whose data are used.")] = "val",
    batches: Annotated[
        int | None, typer.Option("--batches", min=1, help="Most batches of each task.")
    ] = None,
    labels: Annotated[
        str,
        typer.Option(
            "--labels",
            help="Of a Fisher: expected, over all classes; sampled, one class from the model's "
            "predictions; true, those of the data (the empirical Fisher).",
        ),
    ] = "expected",
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Of gram: count the rows of embeddings too.")
    ] = False,
    alpha: Annotated[
        float, typer.Option("--alpha", min=0, max=1, help="Of gram_pp: alpha of the merge.")
    ] = 0.95,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="SELECTOR",
            help="Of these tensors alone, repeatable: a regular expression, class=linear or "
            "block=0-3.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="SELECTOR",
            help="Not of these tensors; merges by statistics average them.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the classes that are drawn.")] = 0,
    device: mo.Device = "cpu",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A .safetensors file; of several models a folder."),
    ] = None,
    force: o.Force = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most examples of each task.")] = 256,
    batch_size: s.Batch = 32,
    memory: mo.Memory = "512MiB",
    workers: mo.Workers = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Collect the Fisher or Gram matrices of models on data, for `merge --statistics`.

    Of one model on all tasks; of several models on one task each, in order.

    Examples:

    \b
      mergebench fit statistics ft1 --base base --kind fisher --task eval.py -o one.safetensors
      mergebench fit statistics ft1 ft2 --kind fisher -t a=eval.py -t b=eval.py -o fishers
    """
    from mergebench.checkpoints.destination import check_destination
    from mergebench.core.errors import ParameterError, did_you_mean
    from mergebench.merge.collected import KINDS
    from mergebench.merge.device.choose import torch_device
    from mergebench.merge.fit.fishers import LABELS
    from mergebench.merge.fit.statistics import How, save

    for option, value, known in (("--kind", kind, KINDS), ("--labels", labels, LABELS)):
        if value not in known:
            raise ParameterError(f"{option}: {value!r}", fix=did_you_mean(value, known))
    device = torch_device(device)
    places = _places(models, out)
    for place in places:
        check_destination(place, single_file=True, force=force)
    scores = s.scores_of(task, base, limit, batch_size, None, "stop", True)
    if len(models) > 1 and len(scores.tasks) != len(models):
        raise ParameterError(
            "--task: one for each of several models, in order",
            expected=str(len(models)),
            got=str(len(scores.tasks)),
            fix="NAME=SPEC gives the same data another name",
        )
    tasks = [list(scores.tasks)] if len(models) == 1 else [[each] for each in scores.tasks]
    how = How(
        split, batches, labels, embeddings, seed, device,  # type: ignore[arg-type]
        tuple(include or ()), tuple(exclude or ()),
    )  # fmt: skip
    made = _collected(models, base, kind, tasks, how, alpha, memory, workers, quiet or as_json)
    sizes = []
    for each, place in zip(made, places, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        sizes.append(save(each, place, force=force))
    if as_json:
        console.say_json(
            [{"path": str(p), "bytes": size, "tensors": len(each.tensors), **each.about}
             for each, p, size in zip(made, places, sizes, strict=True)]
        )  # fmt: skip
        return
    for model, each, place, size in zip(models, made, places, sizes, strict=True):
        if not quiet:
            console.say(
                f"{place}: {kind} of {model}, {len(each.tensors)} tensors, {console.size(size)}, "
                f"{_extent(each.about)}"
            )


def _places(models: list[str], out: Path | None) -> list[Path]:
    """Where the statistics of each model are written."""
    from mergebench.core.errors import ParameterError
    from mergebench.merge.apart import names_of

    if len(models) == 1:
        place = out or Path("statistics.safetensors")
        if place.suffix != ".safetensors":
            raise ParameterError(f"{place}: is one file", fix="name it .safetensors with -o")
        return [place]
    folder = out or Path("statistics")
    if folder.suffix == ".safetensors" or folder.is_file():
        raise ParameterError(f"{folder}: several models need a folder", fix="-o FOLDER")
    return [folder / f"{name}.safetensors" for name in names_of(models)]


def _collected(
    models: list[str],
    base: str | None,
    kind: str,
    tasks: list[list[Task]],
    how: How,
    alpha: float,
    memory: str,
    workers: int | None,
    quiet: bool,
) -> list[Statistics]:
    from dataclasses import replace

    from mergebench.merge.fit.candidate import only
    from mergebench.merge.fit.statistics import collect
    from mergebench.merge.fit.through import collect_through
    from mergebench.sources.references import split_weight

    make, made = s.maker(memory, workers), []
    if kind == "gram_pp":
        recipe = replace(s.recipe_of(models, base, "linear", None, None, None), form="model")
        with console.bar(quiet, "blocks") as progress, make(recipe, "their mean") as candidate:
            return collect_through(candidate, tasks, how, alpha=alpha, tell=progress)
    for model, some in zip(models, tasks, strict=True):
        recipe = only(split_weight(model)[0], base)
        with console.bar(quiet, "batches") as progress, make(recipe, model) as candidate:
            made.append(collect(candidate, kind, some, how, progress))
    return made


def _extent(about: dict[str, Any] | Any) -> str:
    if "examples" in about:
        return f"{about['examples']} examples, {about['labels']} labels"
    return f"{max(about['rows'].values()):,} inputs of a layer"
