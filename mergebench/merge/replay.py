"""Some tensors of an output computed once more, from its inputs and its stored recipe."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mergebench.checkpoints.reader import FileTensor
from mergebench.core.errors import MergebenchError
from mergebench.core.tensor import DTYPES, Array, nbytes
from mergebench.merge.engine import Progress, execute_into, targets_of
from mergebench.merge.inputs import check_input, find_input
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.made import Finding, Made, read_made
from mergebench.merge.plan import Plan, make_plan
from mergebench.recipe import Recipe, recipe_from_dict
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
    models = tuple(replace(each, path=find_input(each.path, inputs)) for each in stored.models)
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
    sink = _Comparison(held)
    entries = sum(
        plan.aligned.items[name].site.size for name in order if name in plan.aligned.items
    )

    def shown(doing: str, done: int, total: int) -> None:
        # The engine counts the whole model; of the merging only a part is done here.
        assert progress is not None
        measured = total - plan.entries
        progress(doing, min(done, measured + entries), measured + entries)

    execute_into(reduced, [sink], None if progress is None else shown)
    truncated = bool(plan.package.dense_bytes)
    findings += sink.findings(truncated)
    compared = [target for name in order for target in targets_of(plan, name) if target in held]
    read = sum(nbytes(held[name][1].dtype, held[name][1].shape) for name in compared)
    return Replayed(len(compared), len(sources), read, tuple(findings), _notes(made, plan))


def _notes(made: Made, plan: Plan) -> tuple[str, ...]:
    notes = []
    then, now = made.manifest.get("mergebench"), version("mergebench")
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


@dataclass(eq=False)
class _Comparison:
    """A sink that compares what it is given with what is stored."""

    held: Mapping[str, tuple[str, FileTensor]]
    spans: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    misshapen: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, byte_start: int, data: Array) -> None:
        """Compare entries of a tensor from byte ``byte_start`` on."""
        if name not in self.held or name in self.misshapen:
            return
        tensor = self.held[name][1]
        dtype = DTYPES[tensor.dtype]
        given = np.ascontiguousarray(data).reshape(-1)
        start = byte_start // dtype.itemsize
        fits = (start + given.size) * dtype.itemsize <= nbytes(tensor.dtype, tensor.shape)
        if given.dtype != dtype or not fits:
            self.misshapen[name] = f"{given.dtype}"
            return
        stored = tensor.read(start, start + given.size)
        one, two = (each.view(np.uint8).reshape(given.size, -1) for each in (given, stored))
        wrong = np.flatnonzero((one != two).any(axis=1))
        if wrong.size:
            first, last, many = self.spans.get(name, (start + int(wrong[0]), 0, 0))
            last = start + int(wrong[-1]) + 1
            self.spans[name] = first, last, many + int(wrong.size)

    def finish(self, name: str) -> None:
        """Nothing is left to do."""

    def findings(self, truncated: bool) -> list[Finding]:
        """One finding for each tensor that differs."""
        found = []
        for name, given in self.misshapen.items():
            what = f"the recipe gives {given} of another shape or dtype"
            found.append(Finding("replay", what, self.held[name][0], name))
        for name, (first, last, many) in self.spans.items():
            file, tensor = self.held[name]
            size = DTYPES[tensor.dtype].itemsize
            what = f"{many} entries differ from what the recipe gives"
            if truncated:
                what += "; truncated factors depend on the version of LAPACK"
            start, stop = tensor.offset + first * size, tensor.offset + last * size
            found.append(Finding("replay", what, file, name, start, stop))
        return found
