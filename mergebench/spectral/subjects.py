"""Which tensors of which models are looked at, from headers and configs alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.checkpoints.layout import Checkpoint
from mergebench.core.delta import Delta, Difference, LowRank, Replacement
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.core.selector import Selector
from mergebench.core.site import Site, conv1d_names, make_sites
from mergebench.core.tensor import FLOATING, Tensor
from mergebench.sources import Applied, Source
from mergebench.sources.opening import open_source, with_base

#: Classes of tensors whose spectra are looked at where nothing is selected.
_MATRICES = frozenset({"linear", "conv"})


@dataclass(frozen=True, eq=False)
class Subject:
    """One tensor.

    Attributes
    ----------
    site : Site
    base : Tensor or None
    deltas : mapping of model to Delta
        Of the models that have the tensor.
    matrix : bool
        Whether it is decomposed.
    """

    site: Site
    base: Tensor | None
    deltas: Mapping[int, Delta]
    matrix: bool


@dataclass(frozen=True, eq=False)
class Inputs:
    """Opened models.

    Attributes
    ----------
    base : Source or None
    models : tuple of Source
        The merge, where there is one, last.
    merged : bool
        Whether there is one.
    """

    base: Source | None
    models: tuple[Source, ...]
    merged: bool = False


def open_inputs(
    models: Sequence[str],
    base: str | None = None,
    merged: str | None = None,
    *,
    lora_alpha: float | None = None,
) -> Inputs:
    """Open models, base and merge by their references.

    Raises
    ------
    MergebenchError
        If one cannot be opened, if the base is no checkpoint, or if a full checkpoint has none.
    """
    options = ReadOptions(lora_alpha=lora_alpha)
    under = None if base is None else open_source(base, options)
    if under is not None:
        if under.checkpoint is None or under.deltas is not None:
            raise MismatchError(
                f"{base}: the base must be a checkpoint",
                got="an adapter" if under.checkpoint is None else "a checkpoint with an adapter",
            )
        options = with_base(options, under.checkpoint)
    references = [*models, *([] if merged is None else [merged])]
    opened = tuple(open_source(each, options) for each in references)
    for each in opened:
        if under is None and each.checkpoint is not None:
            raise MismatchError(
                f"{each.label}: is a full checkpoint, and what was added to it needs the base",
                fix="add --base with the model that it was fine-tuned from",
            )
    return Inputs(under, opened, merged is not None)


def subjects(
    inputs: Inputs,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[list[Subject], list[str]]:
    """Tensors to look at, in the order of the model, and notes on what is left out.

    Matrices are linear layers and kernels, the latter as output × (input · kernel). Embeddings and
    heads are matrices too where ``include`` selects them. All other floating-point tensors are
    looked at entry by entry only.

    Raises
    ------
    ParameterError
        If a selector is none or matches nothing, or if nothing is left.
    """
    under = None if inputs.base is None else inputs.base.checkpoint
    rows, notes = _rows(inputs, under)
    origin = {} if under is None else dict(under.tensors)
    shapes = {name: next(iter(row.values())).shape for name, row in rows.items()}
    known = {name: tuple(tensor.shape) for name, tensor in origin.items()} | shapes
    sites = make_sites(known, transposed=_transposed(rows, under))
    chosen = _selected({name: sites[name] for name in rows}, include, exclude)
    found = []
    left = 0
    for name in chosen:
        site = sites[name]
        matrix = len(site.shape) > 1 and site.size > 0
        if matrix and not include and site.kind not in _MATRICES:
            matrix, left = False, left + 1
        found.append(Subject(site, origin.get(name), rows[name], matrix))
    if left:
        notes.append(
            f"{left} embeddings, heads and norms of two dimensions are not decomposed; "
            "--include class=embedding does"
        )
    return found, notes


def _rows(
    inputs: Inputs, under: Checkpoint | None
) -> tuple[dict[str, dict[int, Delta]], list[str]]:
    rows: dict[str, dict[int, Delta]] = {}
    notes: list[str] = []
    for number, model in enumerate(inputs.models):
        apart: list[str] = []
        found = _displacements(model, under, apart)
        if apart:
            word = "tensor has" if len(apart) == 1 else "tensors have"
            some = ", ".join(apart[:3]) + (", …" if len(apart) > 3 else "")
            notes.append(
                f"{model.label}: {len(apart)} {word} no counterpart in the base and are left out "
                f"({some})"
            )
        for name, delta in found.items():
            rows.setdefault(name, {})[number] = delta
    order = {} if under is None else {name: place for place, name in enumerate(under.tensors)}
    names = sorted(rows, key=lambda name: order.get(name, len(order)))
    for name in names:
        if len({delta.shape for delta in rows[name].values()}) > 1:
            raise MismatchError(
                f"{name}: has different shapes in the models",
                got=", ".join(str(delta.shape) for delta in rows[name].values()),
                fix="leave it out with --exclude, or give --base",
            )
    return {name: rows[name] for name in names}, notes


def _displacements(model: Source, under: Checkpoint | None, apart: list[str]) -> dict[str, Delta]:
    found: dict[str, Delta] = {}
    own = model.checkpoint
    deltas = dict(model.deltas or {})
    if own is not None:
        assert under is not None
        same = own.path.resolve() == under.path.resolve()
        for name, tensor in own.tensors.items():
            if tensor.dtype not in FLOATING or name in own.aliases:
                continue
            delta = deltas.pop(name, None)
            if same and delta is not None and not isinstance(delta, Replacement):
                found[name] = delta
            elif not _fits(under, name, tensor.shape):
                apart.append(name)
            elif not same or delta is not None:
                found[name] = Difference(_applied(tensor, delta), under.tensors[name])
        apart.extend(deltas)
        return found
    for name, delta in deltas.items():
        if under is not None and not _fits(under, name, delta.shape):
            apart.append(name)
        elif isinstance(delta, Replacement):
            if under is None or delta.values.dtype not in FLOATING:
                apart.append(name)
            else:
                found[name] = Difference(delta.values, under.tensors[name])
        else:
            found[name] = delta
    return found


def _applied(tensor: Tensor, delta: Delta | None) -> Tensor:
    if delta is None:
        return tensor
    return delta.values if isinstance(delta, Replacement) else Applied(tensor, delta)


def _fits(under: Checkpoint, name: str, shape: tuple[int, ...]) -> bool:
    tensor = under.tensors.get(name)
    return tensor is not None and tensor.shape == shape and tensor.dtype in FLOATING


def _transposed(rows: Mapping[str, Mapping[int, Delta]], under: Checkpoint | None) -> Iterable[str]:
    """Weights stored input × output: those of GPT-2's layers, and what adapters say."""
    config = None if under is None else under.config
    found = set(conv1d_names(rows, (config or {}).get("model_type")))
    for name, row in rows.items():
        low = [each for each in row.values() if isinstance(each, LowRank) and not each.embedding]
        if any(each.transposed for each in low):
            found.add(name)
    return found


def _selected(
    sites: Mapping[str, Site], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    wanted = [Selector(text) for text in include]
    unwanted = [Selector(text) for text in exclude]
    for option, each in (*(("include", s) for s in wanted), *(("exclude", s) for s in unwanted)):
        if not any(each.matches(site) for site in sites.values()):
            raise ParameterError(
                f"--{option} {each}: matches no tensor that the models have",
                fix="`mergebench inspect --tensors` lists the names",
            )
    chosen = [
        name
        for name, site in sites.items()
        if (not wanted or any(each.matches(site) for each in wanted))
        and not any(each.matches(site) for each in unwanted)
    ]
    if not sites:
        raise ParameterError(
            "there is nothing to look at: no model has a tensor that it could have moved",
            fix="give other models than the base, with its names and shapes of tensors",
        )
    if not chosen:
        raise ParameterError(
            "there is nothing to look at",
            got=f"{len(sites)} tensors, none selected",
            fix="relax --include or --exclude, or give other models",
        )
    return chosen
