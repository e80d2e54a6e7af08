"""What is compressed, and how, as the user has written it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.core.errors import ParameterError
from mergebench.ship.models import of_model
from mergebench.ship.pieces import Contents, of_adapter
from mergebench.ship.schemes import LOWRANK, SCHEMES, Scheme, scheme_named
from mergebench.sources.opening import open_source, with_base
from mergebench.sources.references import paths_of

_FACTORING: Mapping[str, Any] = {"energy": 0.9, "rank": 0}


def parsed(
    scheme: str, params: dict[str, Any]
) -> tuple[Scheme, dict[str, Any], dict[str, Any] | None]:
    """The scheme, its own parameters in full, and those of ``lowrank`` if it comes first.

    Raises
    ------
    ParameterError
        For a scheme or parameter that is none, or a value out of its range.
    """
    first, _, second = scheme.partition("+")
    factoring = None
    if first == LOWRANK:
        factoring = {key: params.pop(key, value) for key, value in _FACTORING.items()}
        energy, rank = factoring["energy"], factoring["rank"]
        if not (isinstance(energy, int | float) and 0 < energy <= 1):
            raise ParameterError(
                "lowrank: `energy`", expected="a number in (0, 1]", got=str(energy)
            )
        if type(rank) is not int or rank < 0:
            raise ParameterError("lowrank: `rank`", expected="an integer >= 0", got=str(rank))
        if not second:
            if params:
                raise ParameterError(
                    f"lowrank: no parameter `{min(params)}`", fix="known: energy, rank"
                )
            chosen = SCHEMES["sparse"]
            return chosen, chosen.bound({"density": 1.0, "values": "bf16"}), factoring
        first = second
    elif second:
        raise ParameterError(f"no scheme {scheme!r}", fix=f"write lowrank+{second}")
    chosen = scheme_named(first)
    return chosen, chosen.bound(params), factoring


def inputs_of(model: str, base: str | None) -> list[Path]:
    """Files and folders that must not be written over."""
    paths = [*paths_of(model), *(paths_of(base) if base is not None else ())]
    return [path for path in paths if path.exists()]


def contents_of(
    model: str,
    base: str | None,
    options: ReadOptions,
    whole: Sequence[str],
    include: Sequence[str],
    exclude: Sequence[str],
    allow_base_mismatch: bool,
    memory: int,
    workers: int | None,
) -> Contents:
    """What is packed of an adapter, or of a model and its base."""
    if base is not None:
        under = open_source(base, options).checkpoint
        if under is None:
            raise ParameterError(f"{base}: the base must be a checkpoint", got="an adapter")
        options = with_base(options, under)
    source = open_source(model, options)
    if source.checkpoint is None:
        if whole or include or exclude:
            raise ParameterError(
                "--include, --exclude and --whole choose tensors of models",
                fix="leave them out: an adapter is packed as a whole",
            )
        contents = of_adapter(source)
        again = (f"{model}: is packed already, and loses once more",) if source.packed else ()
        return replace(contents, reopen=options, notes=(*contents.notes, *again))
    if base is None:
        raise ParameterError(
            f"{model}: is a model, and weights themselves do not survive compression",
            fix="give --base: what fine-tuning has changed does",
        )
    return of_model(
        model,
        base,
        whole=whole,
        include=include,
        exclude=exclude,
        allow_base_mismatch=allow_base_mismatch,
        memory=memory,
        workers=workers,
    )
