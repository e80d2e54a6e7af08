"""Compressing adapters and task vectors: what is read, coded, measured and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.adapters_zoo.packed_file import SUFFIX, packed_metadata
from mergebench.checkpoints.placement import Layout, TensorSpec, plan_layout
from mergebench.checkpoints.writer import Output
from mergebench.compute.threads import one_thread
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.core.version import own_version
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.sparse import check_place
from mergebench.ship.choose import Goal, settled
from mergebench.ship.compared import compared
from mergebench.ship.factoring import canonical, factored
from mergebench.ship.measure import Error, Sums, measure, summed
from mergebench.ship.packer import pack
from mergebench.ship.pieces import Contents
from mergebench.ship.report import Report
from mergebench.ship.requested import contents_of, inputs_of, parsed
from mergebench.ship.schemes import Scheme
from mergebench.ship.spool import Spool, Spooled

#: Told what is done, and how many entries of how many.
Progress = Callable[[str, int, int], None]


def compress(
    model: str,
    out: str | Path,
    *,
    scheme: str = "ternary",
    params: Mapping[str, Any] | None = None,
    base: str | None = None,
    target_ratio: float | None = None,
    max_error: float | None = None,
    whole: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lora_alpha: float | None = None,
    allow_base_mismatch: bool = False,
    force: bool = False,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write an adapter or a task vector as a packed file.

    Parameters
    ----------
    model : str
        An adapter, a saved task vector, or with ``base`` a fine-tuned model.
    out : path
        Ends in ``.mbz.safetensors``.
    scheme : str, default "ternary"
        A name of :data:`~mergebench.ship.schemes.SCHEMES`, ``lowrank``, or ``lowrank+`` and one.
    params : mapping, optional
        Parameters of the scheme; of ``lowrank`` ``energy`` (0.9) and ``rank`` (0 for any).
    base : str, optional
        The checkpoint that a model was fine-tuned from, or that an adapter needs.
    target_ratio, max_error : float, optional
        Choose the density (of ``lowrank``: the energy) so that the file is that many times
        smaller, or the relative error at most so large.
    whole, include, exclude : sequence of str
        Selectors, of models: tensors stored as they are, and which take part.
    lora_alpha : float, optional
    allow_base_mismatch, force : bool
    memory : int, bytes
    workers : int, optional
    progress : callable, optional

    Raises
    ------
    MergebenchError
        For anything the user can fix; then nothing is written.
    """
    out = Path(out)
    if not out.name.endswith(SUFFIX):
        raise ParameterError(f"{out}: a packed file is one file", fix=f"name it {SUFFIX} with -o")
    chosen, own, factoring = parsed(scheme, dict(params or {}))
    goal = Goal.of(chosen, target_ratio, max_error, factoring is not None)
    check_place(out, "safetensors", force=force, inputs=[str(p) for p in inputs_of(model, base)])
    options = ReadOptions(lora_alpha=lora_alpha)
    contents = contents_of(
        model, base, options, whole, include, exclude, allow_base_mismatch, memory, workers
    )
    told = _Told(progress or _silent, model)
    if factoring is not None:
        if goal is not None and goal.error is not None:
            # Rounding the factors takes a little more.
            factoring["energy"] = max(1 - (0.995 * goal.error) ** 2, 1e-6)
        told.start("factoring", contents)
        made = contents
        if contents.pairs:
            made = canonical(contents, step=told.step, **factoring)
        elif any(piece.displacement for piece in contents.pieces.values()):
            made = factored(contents, step=told.step, **factoring)
        else:
            raise MismatchError(
                f"{model}: lowrank needs matrices, or the factors of a LoRA",
                fix="choose another scheme, or write the update first: merge --as delta",
            )
    elif own.get("compat") == "official":
        made = contents
    else:
        made = canonical(contents)
    loses = [piece for piece in made.pieces.values() if not piece.exact]
    with (
        # Products of vectors are too short to be shared between threads.
        one_thread(),
        ThreadPoolExecutor(workers or _cores()) as pool,
        Spool(out.parent) as spool,
    ):
        told.start("measuring", made)
        sums = measure(model, loses, pool, told.step)

        def attempt(values: Mapping[str, Any]) -> tuple[_Attempt, float, float]:
            spool.clear()
            found = _attempt(made, chosen, values, sums, pool, spool, told)
            layout = _layout(scheme, {**(factoring or {}), **values}, made, found)
            return found, made.nbytes / layout.files[0].size, found.error.relative

        found, own = settled(goal, own, attempt, loses, sums, pool, made)
        return _write(out, scheme, {**(factoring or {}), **own}, made, found, force=force)


@dataclass(eq=False)
class _Told:
    """Progress in entries of the stage that is under way."""

    progress: Progress
    label: str
    what: str = ""
    done: int = 0
    total: int = 0

    def start(self, what: str, contents: Contents) -> None:
        self.what, self.done = what, 0
        self.total = sum(piece.size for piece in contents.pieces.values())

    def step(self, entries: int) -> None:
        self.done = min(self.done + entries, self.total)
        self.progress(self.what, self.done, self.total)


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total


def _cores() -> int:
    import os

    return min(os.cpu_count() or 1, 8)


@dataclass(frozen=True, eq=False)
class _Attempt:
    packed: Mapping[str, Spooled]
    errors: Mapping[str, Error]
    error: Error


def _attempt(
    contents: Contents,
    scheme: Scheme,
    params: Mapping[str, Any],
    sums: Mapping[str, Sums],
    pool: Executor,
    spool: Spool,
    told: _Told,
) -> _Attempt:
    told.start("packing", contents)
    packed = pack(contents, scheme, params, sums, pool, spool, told.step)
    told.start("comparing", contents)
    errors = dict(compared(contents, packed))
    return _Attempt(packed, errors, summed(errors.values()))


def _layout(scheme: str, params: Mapping[str, Any], contents: Contents, found: _Attempt) -> Layout:
    cosine = found.error.cosine
    made = {
        "mergebench": own_version(),
        "scheme": scheme,
        "params": dict(params),
        "input_bytes": contents.nbytes,
        "relative_error": float(f"{found.error.relative:.6g}"),
        "cosine": None if cosine is None else float(f"{cosine:.6g}"),
    }
    metadata = packed_metadata(contents.metadata, list(found.packed), made)
    specs = [TensorSpec(name, each.dtype, each.shape) for name, each in found.packed.items()]
    return plan_layout(specs, "packed", None, metadata=metadata)


def _write(
    out: Path,
    scheme: str,
    params: Mapping[str, Any],
    contents: Contents,
    found: _Attempt,
    *,
    force: bool,
) -> Report:
    layout = _layout(scheme, params, contents, found)
    with Output(out, layout, single_file=True, force=force) as output:
        for name, each in found.packed.items():
            for start, data in each.chunks():
                output.write(name, start, data)
            output.finish(name, "")
    return Report(
        path=out,
        scheme=scheme,
        params=params,
        bytes=out.stat().st_size,
        before=contents.nbytes,
        parameters=sum(piece.size for piece in contents.pieces.values()),
        error=found.error,
        tensors=found.errors,
        exact=tuple(name for name, piece in contents.pieces.items() if piece.exact),
        notes=contents.notes,
    )
