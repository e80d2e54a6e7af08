"""From opened models to a report, one tensor at a time per worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from mergebench.checkpoints.passing import Passing
from mergebench.compute.backend import lapack
from mergebench.compute.entrywise import SUMS, passes
from mergebench.compute.machine import cores
from mergebench.compute.objects import WORTHWHILE
from mergebench.compute.threads import one_thread
from mergebench.core.errors import MismatchError, ParameterError, ResourceError
from mergebench.core.params import bind
from mergebench.core.site import Site
from mergebench.sources import Source
from mergebench.spectral.diagnostic import DIAGNOSTICS, Diagnostic, Row
from mergebench.spectral.memory import job_bytes
from mergebench.spectral.report import Found, Record, Report, gather
from mergebench.spectral.spectrum import Looked, SiteSpectrum, Tuned, look, sides
from mergebench.spectral.store import Store
from mergebench.spectral.subjects import Inputs, Subject, subjects
from mergebench.spectral.work import within

DEFAULT_MEMORY = 2 << 30
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
#: A task vector this long is none: the models are unrelated.
_LONG = 1.0

#: ``(what is being done, entries done, entries in all)``.
Progress = Callable[[str, int, int], None]


def layer_of(site: Site) -> str:
    """The block that a tensor stands in, ``model.layers.3``, else its class."""
    return site.kind if site.block is None else f"{site.stack}.{site.block}"


def module_of(site: Site) -> str:
    """What a tensor is within its block, ``self_attn.q_proj``, numbers replaced by ``*``."""
    name = site.name
    if site.block is not None:
        name = name[len(f"{site.stack}.{site.block}.") if site.stack else 0 :]
    return _NUMBER.sub("*", f".{name}")[1:].removesuffix(".weight")


def analyse(
    inputs: Inputs,
    *,
    diagnostics: Sequence[str] | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    compiles: Callable[[int], bool] = lambda entries: entries >= WORTHWHILE,
) -> Report:
    """Run diagnostics over models and their base.

    Everything is computed in float64; vectors of full decompositions are kept in float32, so that
    cosines carry an error of about 1e-7 whether a decomposition was kept or not.

    Parameters
    ----------
    inputs : Inputs
    diagnostics : sequence of str, optional
        Names; by default all that the inputs allow.
    params : mapping of diagnostic to {name: value}
    include, exclude : sequences of str
        Selectors.
    memory : int, default 2 GiB
        Most bytes above the libraries. Decompositions need whole matrices, so the largest one sets
        the least.
    workers : int, optional
        Threads; the number of usable cores by default. LAPACK gets one thread in each.
    store : Store, optional
        Where decompositions of the base are kept.
    progress : callable, optional
    compiles : callable, optional
        ``(entries) -> bool``: whether compiled passes are used for so many, over all models; from
        16 million on by default. They change the last digits of sums, and nothing else.

    Raises
    ------
    MergebenchError
        Before any tensor is read: for unknown names, values out of bounds, models that do not fit
        the base, and too little memory.
    """
    chosen, notes = _chosen(inputs, diagnostics)
    bound = _bound(chosen, params or {})
    looked_at, left = subjects(inputs, include, exclude)
    notes += left
    if not any(each.matrix for each in looked_at) and all(d.on == "matrix" for d in chosen):
        raise ParameterError(
            "there is no matrix among the tensors to look at",
            got=f"{len(looked_at)} tensors",
            fix="--include class=embedding and class=head select what is left out by default",
        )
    if workers is not None and workers < 1:
        raise ParameterError("workers", expected="at least 1", got=str(workers))
    jobs = [
        (each, job_bytes(each, chosen, len(inputs.models), store is not None)) for each in looked_at
    ]
    _check_memory(jobs, memory)
    everyone = list(range(len(inputs.models)))
    uses = frozenset[str]().union(*(each.uses for each in chosen))
    whole = sum(each.site.size for each in looked_at)
    entries = whole * len(inputs.models)
    compiled = passes() if compiles(entries if "entries" in uses else entries // SUMS) else None
    tensors: list[Record] = []
    rows: dict[str, list[Record]] = {each.name: [] for each in chosen}
    done = 0
    # Its BLAS must be there before threads are limited.
    import scipy.optimize
    import scipy.special  # noqa: F401

    def at_one(subject: Subject) -> tuple[Looked, list[tuple[str, Row]]]:
        with np.errstate(all="ignore"):
            looked = look(subject.base, subject.deltas, subject.site.size, uses, compiled)
            spectrum = SiteSpectrum(
                subject.site,
                subject.base,
                {m: d for m, d in subject.deltas.items() if _state(looked, m) == "changed"},
                looked,
                uses,
                everyone,
                everyone[:-1] if inputs.merged else everyone,
                store,
                compiled,
            )
            return looked, list(_rows_of(spectrum, subject, chosen, bound))

    passing = Passing((each.base, each.deltas.values()) for each in looked_at)
    with one_thread():
        for subject, (looked, found) in within(at_one, jobs, workers or cores(), memory):
            passing.done(subject.base, subject.deltas.values())
            record = _record(subject, looked)
            tensors.append(record)
            place = {key: record[key] for key in ("tensor", "layer", "module", "shape")}
            for name, row in found:
                rows[name].append(
                    {**place, "model": row.model, "other": row.other, "values": row.values}
                )
            done += subject.site.size
            if progress is not None:
                progress("decomposing", done, whole)
    passing.over()
    labels = [each.label for each in inputs.models]
    results = {each.name: gather(each.name, bound[each.name], rows[each.name], labels)
               for each in chosen}  # fmt: skip
    notes += _notes(tensors, results, labels, store)
    return Report(
        base=None if inputs.base is None else _about(inputs.base),
        models=[
            {**_about(each), "merged": inputs.merged and number == len(inputs.models) - 1}
            for number, each in enumerate(inputs.models)
        ],
        settings={"include": list(include), "exclude": list(exclude)},
        tensors=tensors,
        found=results,
        notes=notes,
        lapack=lapack(),
    )


def check_names(names: Sequence[str] | None) -> list[str]:
    """The names of diagnostics, all of them for ``None``.

    Raises
    ------
    ParameterError
        For one that is unknown.
    """
    return [DIAGNOSTICS[name].name for name in (DIAGNOSTICS if names is None else names)]


def _chosen(inputs: Inputs, names: Sequence[str] | None) -> tuple[list[Diagnostic], list[str]]:
    tasks = len(inputs.models)
    known = [DIAGNOSTICS[name] for name in check_names(names)]
    notes = []
    chosen = []
    for each in dict.fromkeys(known):
        why = ""
        if each.base and inputs.base is None:
            why = "needs --base"
        elif tasks < each.least:
            why = f"needs {each.least} models"
        if not why:
            chosen.append(each)
        elif names:
            raise MismatchError(f"{each.name}: {why}")
        elif "base" in why:
            notes.append(each.name)
    if notes:
        notes = [f"without --base there is no {', '.join(notes)}"]
    return sorted(chosen, key=lambda each: (each.per != "model", _place(each.name))), notes


def _place(name: str) -> tuple[int, str]:
    first = ("intruders", "spectra")
    return (first.index(name) if name in first else len(first), name)


def _bound(
    chosen: Sequence[Diagnostic], params: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    names = [each.name for each in chosen]
    for name in params:
        if DIAGNOSTICS[name].name not in names:
            raise ParameterError(
                f"{name}: has parameters but does not take part", fix="name it with --only"
            )
    bound = {each.name: bind(each.name, each.params, params.get(each.name, {})) for each in chosen}
    if "intruders" in bound:
        from mergebench.spectral.diagnostics.intruders import parse_epsilons

        parse_epsilons(bound["intruders"]["epsilon"])
    return bound


def _check_memory(jobs: Sequence[tuple[Subject, int]], memory: int) -> None:
    subject, needed = max(jobs, key=lambda each: each[1])
    if needed > memory:
        rows, columns = sides(subject.site)
        raise ResourceError(
            f"{subject.site.name}: decomposing {rows} × {columns} entries takes {_mib(needed)} MiB",
            got=f"--memory {_mib(memory)} MiB",
            fix=f"give --memory {_mib(needed)}MiB, fewer diagnostics with --only, or --exclude it",
        )


def _mib(count: int) -> int:
    return -(-count // (1 << 20))


def _state(looked: Looked, model: int) -> str:
    """What became of a tensor: changed, unchanged or not finite."""
    squared = looked.deltas[model]
    if not isfinite(squared) or (looked.base is not None and not isfinite(looked.base)):
        return "not finite"
    return "changed" if squared > 0 else "unchanged"


def _rows_of(
    spectrum: SiteSpectrum,
    subject: Subject,
    chosen: Sequence[Diagnostic],
    bound: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, Row]]:
    fitting = [each for each in chosen if each.on == "tensor" or subject.matrix]
    # Model by model, so that one tuned matrix and its decomposition are held at a time.
    for model in spectrum.models:
        tuned = Tuned(spectrum, model)
        for each in fitting:
            if each.per == "model":
                values = each.function(tuned, subject.site, **bound[each.name])
                if values is not None:
                    yield each.name, Row(values, model)
    for each in fitting:
        if each.per == "site" and spectrum.models:
            for row in each.function(spectrum, subject.site, **bound[each.name]):
                yield each.name, row


def _record(subject: Subject, looked: Looked) -> Record:
    site = subject.site
    return {
        "tensor": site.name,
        "stack": site.stack if site.block is not None else None,
        "block": site.block,
        "depth": site.depth,
        "layer": layer_of(site),
        "module": module_of(site),
        "kind": site.kind,
        "shape": list(sides(site)) if subject.matrix else list(site.shape),
        "decomposed": subject.matrix,
        "transposed": site.transposed,
        "base_norm": None if looked.base is None else float(np.sqrt(looked.base)),
        "models": [
            {"model": model, "state": _state(looked, model), "norm": float(np.sqrt(squared))}
            for model, squared in looked.deltas.items()
        ],
    }


def _about(source: Source) -> Record:
    kind = "checkpoint" if source.deltas is None else "adapter"
    return {"label": source.label, "fingerprint": source.fingerprint, "kind": kind}


def _notes(
    tensors: Sequence[Record],
    results: Mapping[str, Found],
    labels: Sequence[str],
    store: Store | None,
) -> list[str]:
    notes = []
    for number, label in enumerate(labels):
        states = [
            (record["tensor"], each["state"])
            for record in tensors
            for each in record["models"]
            if each["model"] == number
        ]
        odd = [name for name, state in states if state == "not finite"]
        if odd:
            some = ", ".join(odd[:3]) + (", …" if len(odd) > 3 else "")
            notes.append(f"{label}: {len(odd)} tensors hold entries that are not finite ({some})")
        same = sum(state == "unchanged" for _, state in states)
        if same:
            notes.append(f"{label}: {same} of {len(states)} tensors are as in the base")
    if "contribution" in results:
        notes.extend(
            f"{labels[each['model']]}: ΔW is as large as W0; is this the base it was fine-tuned "
            "from?"
            for each in results["contribution"].all
            if (each["relative"] or 0.0) >= _LONG
        )
    if store is not None and store.problem:
        notes.append(f"decompositions are not kept: {store.problem}")
    return notes
