"""Some tensors of an output computed once more, from its inputs and its stored recipe."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import nbytes
from mergebench.core.version import own_version
from mergebench.merge.chains import is_linear, tolerance_of
from mergebench.merge.compared import Comparison
from mergebench.merge.engine import Progress, execute_into
from mergebench.merge.inputs import check_input, find_input
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.made import Finding, Made, read_made
from mergebench.merge.one_tensor import targets_of
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.merge.verify import tensor_digest
from mergebench.recipe import Recipe
from mergebench.recipe.reading import recipe_from_dict
from mergebench.sources import Source


@dataclass(frozen=True, eq=False)
class Replay:
    """A replay that only waits to be run.

    Attributes
    ----------
    made : Made
    plan : Plan
        Of the stored recipe.
    """

    made: Made
    plan: Plan


@dataclass(frozen=True)
class Replayed:
    """What :func:`replay` found.

    Attributes
    ----------
    tensors, of : int
        How many tensors were computed again and compared, of how many.
    bytes : int
        Bytes compared.
    findings : tuple of Finding
        Tensors that differ, with the bytes from the first difference to the last.
    notes : tuple of str
        Also of tensors that are as they were written and differ by no more than another LAPACK may.
    """

    tensors: int
    of: int
    bytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "tensors": self.tensors,
            "of": self.of,
            "bytes": self.bytes,
            "findings": [each.to_json() for each in self.findings],
            "notes": list(self.notes),
        }


def plan_replay(
    path: Path,
    *,
    inputs: Path | None = None,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
) -> Replay:
    """Plan the merge of an output once more; nothing is computed.

    Parameters
    ----------
    path : Path
        A folder or a single file that mergebench has written.
    inputs : Path, optional
        Where to look for inputs that are not at their recorded place.
    memory : int, bytes, default 512 MiB
    workers : int, optional

    Raises
    ------
    MergebenchError
        If there is no manifest, or if inputs are gone or have changed.
    """
    made = read_made(path)
    if not made.manifest:
        raise MergebenchError(
            f"{path}: the manifest cannot be read, so the merge cannot be repeated",
            fix="`mergebench verify` without --replay says what is damaged",
        )
    base: Source | None = None
    for about in made.manifest["inputs"]:
        source, changed, _ = check_input(about, made, inputs, base)
        if changed:
            raise MergebenchError(
                f"{source.label}: is not the input that was merged: {', '.join(changed)} changed",
                fix="bring back the input, or give --inputs with the folder that holds it",
            )
        if about.get("role") == "base":
            base = source
    recipe = _recipe(made, inputs)
    return Replay(made, make_plan(recipe, memory=memory, workers=workers))


def _recipe(made: Made, inputs: Path | None) -> Recipe:
    stored = recipe_from_dict(made.manifest["recipe"], f"{made.path}: stored recipe")
    models = tuple(
        replace(
            each,
            path=find_input(each.path, inputs),
            statistics=each.statistics and find_input(each.statistics, inputs),
        )
        for each in stored.models
    )
    return replace(
        stored,
        models=models,
        base=None if stored.base is None else find_input(stored.base, inputs),
        form=str(made.manifest.get("kind", stored.form)),
        shard_size=None,
        out=None,
    )


def replay(
    what: Replay, count: int | None = None, *, seed: int = 0, progress: Progress | None = None
) -> Replayed:
    """Compute a random sample of tensors again and compare their bytes.

    Only the data of sampled tensors are read, of output and inputs; ops that look at the whole
    model first (a threshold over all tensors) read the inputs once more for each of them.

    Parameters
    ----------
    what : Replay
    count : int or None
        Size of the sample; all tensors if ``None``. Both factors of a sampled LoRA module are
        compared.
    seed : int, default 0
        Of the sample.
    progress : callable, optional
    """
    made, plan = what.made, what.plan
    held = made.tensors
    sources = {target: name for name in plan.aligned.order for target in targets_of(plan, name)}
    findings = [
        Finding("replay", "the recipe gives this tensor, and it is not here", tensor=name)
        for name in sorted(sources.keys() - held.keys())
    ]
    findings += [
        Finding("replay", "the recipe does not give this tensor", held[name][0], name)
        for name in sorted(held.keys() - sources.keys())
    ]
    names = sorted(sources.keys() & held.keys())
    if count is not None and count < len(names):
        names = random.Random(seed).sample(names, count)  # noqa: S311
    wanted = {sources[name] for name in names}
    order = tuple(name for name in plan.aligned.order if name in wanted)
    reduced = replace(plan, aligned=replace(plan.aligned, order=order))
    sink = Comparison(held, *_tolerant(plan))
    entries = sum(
        plan.aligned.items[name].site.size for name in order if name in plan.aligned.items
    )

    def shown(doing: str, done: int, total: int) -> None:
        # The engine counts the whole model; of the merging only a part is done here.
        assert progress is not None
        measured = total - plan.entries
        progress(doing, min(done, measured + entries), measured + entries)

    execute_into(reduced, [sink], None if progress is None else shown)
    intact = {name for name in sink.near() if _is_intact(made, name)}
    findings += sink.findings(intact)
    compared = [target for name in order for target in targets_of(plan, name) if target in held]
    read = sum(nbytes(held[name][1].dtype, held[name][1].shape) for name in compared)
    return Replayed(
        len(compared),
        len(sources),
        read,
        tuple(findings),
        (*_notes(made, plan), *sink.notes(intact)),
    )


def _tolerant(plan: Plan) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """Where LAPACK decides the last digits: tensors with tolerances, and pairs of factors."""
    variant = plan.variants[0]
    dense: dict[str, float] = {}
    pairs: list[tuple[str, str]] = []
    for name in plan.aligned.items:
        if (module := plan.package.modules.get(name)) is None:
            if tolerance := tolerance_of(variant.at(name)):
                dense |= dict.fromkeys(targets_of(plan, name), tolerance)
            continue
        if is_linear(variant.at(name)) and module.own_rank >= module.full_rank:
            continue
        factors = {spec.role: spec.name for spec in module.specs}
        # Of several pairs for one weight each is compared to the last bit.
        if len(factors) == len(module.specs) and {"A", "B"} <= factors.keys():
            pairs.append((factors["A"], factors["B"]))
    return dense, pairs


def _is_intact(made: Made, name: str) -> bool:
    """Whether a tensor still has the bytes that the merge wrote."""
    expected = made.expected.get(name)
    digest = tensor_digest(made.tensors[name][1], threading.local())
    return expected is not None and digest == expected.digest


def _notes(made: Made, plan: Plan) -> tuple[str, ...]:
    notes = []
    then, now = made.manifest.get("mergebench"), own_version()
    if then != now:
        notes.append(f"written by mergebench {then}, replayed by {now}")
    whole = [
        op.name
        for variant in plan.variants
        for op in dict.fromkeys(op for ops in variant.distinct for op in ops)
        if op.statistic is not None and op.statistic.scope == "model"
    ]
    if whole:
        notes.append(f"{', '.join(whole)} looked at the whole model, so all inputs were read")
    return tuple(notes)
