"""Compressing adapters and task vectors: what is read, coded, measured and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions, read_adapter
from mergebench.adapters_zoo.packed_file import SUFFIX, Cache, Unpacked, packed_metadata
from mergebench.checkpoints.placement import Layout, TensorSpec, plan_layout
from mergebench.checkpoints.writer import Output
from mergebench.core.delta import Delta, LowRank
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.core.site import make_sites
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.sparse import check_place
from mergebench.ship.choose import Goal, settled
from mergebench.ship.factoring import canonical, factored
from mergebench.ship.measure import Error, Sums, error_of, errors_of, measure, summed
from mergebench.ship.models import of_model
from mergebench.ship.packer import pack
from mergebench.ship.pieces import Contents, of_adapter
from mergebench.ship.schemes import LOWRANK, SCHEMES, Scheme, scheme_named
from mergebench.ship.spool import Spool, Spooled
from mergebench.sources import open_source, paths_of, with_base

#: Told what is done, and how many entries of how many.
Progress = Callable[[str, int, int], None]
_FACTORING: Mapping[str, Any] = {"energy": 0.9, "rank": 0}


@dataclass(frozen=True, eq=False)
class Report:
    """What compressing has cost.

    Attributes
    ----------
    path : Path
    scheme : str
    params : mapping
        All parameters, those that were chosen included.
    bytes, before : int
        Of the file, header and all, and of the input's tensors.
    parameters : int
        Entries of all tensors of the file that is unpacked to.
    error : Error
        Of the whole update, read back from what was written.
    tensors : mapping of name to Error
        Of each displaced tensor, or adapted module.
    exact : tuple of str
        Tensors that are stored as they are.
    notes : tuple of str
    """

    path: Path
    scheme: str
    params: Mapping[str, Any]
    bytes: int
    before: int
    parameters: int
    error: Error
    tensors: Mapping[str, Error]
    exact: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.before / self.bytes

    @property
    def bits(self) -> float:
        """Bits of the file per parameter."""
        return 8 * self.bytes / max(self.parameters, 1)

    def layers(self) -> dict[str, Error]:
        """The error of each numbered block, and of the tensors outside of them, by name."""
        sites = make_sites({name: (error.entries,) for name, error in self.tensors.items()})
        groups: dict[str, list[Error]] = {}
        for name, error in self.tensors.items():
            site = sites[name]
            key = f"{site.stack}.{site.block}" if site.block is not None else name
            groups.setdefault(key, []).append(error)
        return {key: summed(each) for key, each in groups.items()}

    def worst(self) -> tuple[str, Error] | None:
        """The tensor of the largest relative error."""
        if not self.tensors:
            return None
        name = max(self.tensors, key=lambda each: self.tensors[each].relative)
        return name, self.tensors[name]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        worst = self.worst()

        def row(error: Error) -> dict[str, Any]:
            return {"relative_error": error.relative, "cosine": error.cosine}

        return {
            "path": str(self.path),
            "scheme": self.scheme,
            "params": dict(self.params),
            "bytes": self.bytes,
            "input_bytes": self.before,
            "ratio": self.ratio,
            "parameters": self.parameters,
            "bits_per_parameter": self.bits,
            **row(self.error),
            "worst": None if worst is None else {"tensor": worst[0], **row(worst[1])},
            "layers": {name: row(error) for name, error in self.layers().items()},
            "tensors": {name: row(error) for name, error in self.tensors.items()},
            "exact": list(self.exact),
            "notes": list(self.notes),
        }


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
    check_place(out, "safetensors", force=force, inputs=[str(p) for p in _inputs(model, base)])
    options = ReadOptions(lora_alpha=lora_alpha)
    contents = _contents(
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
    from threadpoolctl import threadpool_limits

    with (
        # Products of vectors are too short to be shared between threads.
        threadpool_limits(1),
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


def _inputs(model: str, base: str | None) -> list[Path]:
    paths = [*paths_of(model), *(paths_of(base) if base is not None else ())]
    return [path for path in paths if path.exists()]


def _contents(
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
    errors = dict(_compared(contents, packed))
    return _Attempt(packed, errors, summed(errors.values()))


def _compared(contents: Contents, packed: Mapping[str, Spooled]) -> Iterator[tuple[str, Error]]:
    """The error of every displacement, from what will be read from the file."""
    cache = Cache()
    tensors = {name: Unpacked(each.opened(contents.label), cache) for name, each in packed.items()}
    if contents.pairs:
        yield from _compared_pairs(contents, tensors)
        return
    adapter = AdapterSource(contents.label, tensors, None, contents.metadata)
    options = contents.reopen or ReadOptions()
    yield from errors_of(contents.deltas, read_adapter(adapter, options)).items()


def _compared_pairs(
    contents: Contents, tensors: Mapping[str, Unpacked]
) -> Iterator[tuple[str, Error]]:
    def product(pair: tuple[str, str], of: Mapping[str, Any]) -> Delta:
        B, A = (of[name] for name in pair)
        return LowRank(B, A, 1.0, B.shape[:1] + A.shape[1:])

    for module, pair in contents.pairs.items():
        error = error_of(product(pair, contents.factors), product(pair, tensors))
        assert error is not None
        scale = contents.scales.get(module, 1.0) ** 2
        yield module, Error(
            error.apart * scale, error.own * scale, error.other * scale, error.inner * scale,
            error.entries,
        )  # fmt: skip


def _layout(scheme: str, params: Mapping[str, Any], contents: Contents, found: _Attempt) -> Layout:
    cosine = found.error.cosine
    made = {
        "mergebench": version("mergebench"),
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
