"""The Python face of a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

import numpy as np

from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.sizes import parse_size
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.rules import parse_weight
from mergebench.core.task_vector import TaskVector
from mergebench.core.tensor import ArrayTensor
from mergebench.merge.collected import collected_of_arrays
from mergebench.merge.engine import Progress, execute_in_memory
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.many.numbered import WAIT
from mergebench.merge.many.where import Where
from mergebench.merge.plan import Plan
from mergebench.merge.planning import make_plan
from mergebench.recipe import ModelRef, Recipe, with_rules
from mergebench.sources import Source, fingerprint, source_of_arrays, source_of_deltas
from mergebench.sources.references import split_weight
from mergebench.steps import OpRef, Part, parse_op, part_in

#: What may stand for a model: a reference, a state dict, or one of them with a weight.
Model = str | PathLike[str] | Mapping[str, Any] | Checkpoint | tuple[Any, float]


def merge_models(
    models: Sequence[Model],
    *,
    base: str | PathLike[str] | Mapping[str, Any] | None = None,
    method: str | None = None,
    out: str | PathLike[str] | None = None,
    then: Sequence[str | OpRef] = (),
    parts: Sequence[str | Part | Mapping[str, Any]] = (),
    where: Sequence[str] = (),
    tasks: Sequence[str] = (),
    statistics: Sequence[str | PathLike[str] | Mapping[str, Any] | None] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    block_pattern: str | None = None,
    compat: str | None = None,
    dtype: str = "keep",
    form: str = "auto",
    shard_size: str | None = None,
    lora_alpha: float | None = None,
    ignore_saved_base: bool = False,
    part: str | None = None,
    target: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    whole: Sequence[str] = (),
    on_mismatch: str = "error",
    vocab: str = "error",
    allow_base_mismatch: bool = False,
    allow_nonfinite: bool = False,
    memory: int | str = DEFAULT_MEMORY,
    workers: int | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
    executor: str = "threads",
    scheduler: Any = None,
    worker: str | None = None,
    wait: float = WAIT,
    **params: Any,
) -> Any:
    """Merge models, adapters or state dicts.

    Parameters
    ----------
    models : sequence
        Paths, ``base+adapter``, state dicts of numpy arrays or torch tensors, what
        :func:`mergebench.load` returned, or pairs of one of these and a weight. A path may end
        in ``:0.3``, its weight.
    base : path or state dict, optional
    method : str, default "linear", or none where there are ``parts``
        See :data:`mergebench.methods`; its parameters are further keywords. A list of values
        gives one output per value, from one reading of the inputs; methods such as ``emr`` give
        one per model.
    out : path, optional
        A ``.safetensors`` file or a folder. Without it the result is returned.
    then : sequence of str or OpRef
        Ops applied after the method, such as ``"scale:lam=0.5"``.
    parts : sequence of str, mapping or Part
        Tensors that are merged by methods of their own, each by the first part that selects it:
        ``"class=norm:linear"``, ``"self_attn:ties:density=0.3"``, or what a recipe has under
        ``parts``. The others follow ``method``; without one they are the base's.
    where : sequence of str
        Other values for selected tensors, such as ``"class=norm:lam=0"`` or
        ``"block=0-3:weight=1/0"``.
    tasks : sequence of str
        Where every model has a result of its own: the names of those that are wanted, such as
        ``ft-a`` for ``models/ft-a`` or ``models_0`` for the first of state dicts; all by default.
    statistics : sequence, optional
        One per model, for methods such as ``fisher`` and ``regmean``: files of ``mergebench fit
        statistics``, or mappings of tensor name to array.
    include, exclude : sequence of str
        Selectors of the tensors to merge, such as ``"class=norm"`` or a regular expression; the
        others come from the base.
    block_pattern, compat, dtype, form, shard_size, lora_alpha, ignore_saved_base, part, target,
    rank, energy, whole, on_mismatch, vocab, allow_base_mismatch, allow_nonfinite
        As in :class:`~mergebench.recipe.Recipe`.
    memory : int or str, bytes or such as "256MiB", default 512 MiB
    workers : int, optional
    device : str, default cpu
        Where chains are run: cpu, cuda, cuda:1, or auto for the first CUDA device if there is one.
    force : bool, default False
        Replace an existing output.
    progress : callable, optional
    executor : threads (default) or dask
        Threads of this process, or the workers of a Dask cluster, which read the inputs and write
        ``out`` on a disk that all share.
    scheduler : str or distributed.Client, optional
        Of that cluster: an address, a scheduler file, or a client.
    worker : str, optional
        ``"i/N"``: take part as one of N processes that all make this call, with the same ``out``.
    wait : float, seconds, default 600
        For workers that have not started.

    Returns
    -------
    Written or list of Written
        With ``out``; a list where a parameter has several values, or where every model has a
        result of its own (in the order of the models, unless one of ``tasks`` is asked for).
    dict or list of dict
        Without: tensor name -> array, torch tensors if the first state dict held them.

    Raises
    ------
    MergebenchError
        For anything the user can fix.
    """
    if isinstance(models, (str, Mapping)) or not models:
        raise MergebenchError("models: a list of at least one", got=type(models).__name__)
    chosen = Where(executor, scheduler, worker, wait, device)
    if out is None and chosen != Where(wait=wait, device=device):
        raise MergebenchError("out: many processes write to a disk", fix="give out=")
    pairs = [_pair(each) for each in models]
    files = [None] * len(pairs) if statistics is None else list(statistics)
    if len(files) != len(pairs):
        raise MergebenchError(
            "statistics: one for every model", expected=str(len(pairs)), got=str(len(files))
        )
    plain = Recipe(
        models=tuple(
            ModelRef(
                _label(model, f"models[{index}]"),
                weight,
                statistics=None if file is None else _label(file, f"statistics[{index}]"),
            )
            for index, ((model, weight), file) in enumerate(zip(pairs, files, strict=True))
        ),
        method=method or ("" if parts else "linear"),
        params={key: tuple(v) if isinstance(v, list) else v for key, v in params.items()},
        then=tuple(parse_op(each) if isinstance(each, str) else each for each in then),
        parts=tuple(
            each if isinstance(each, Part) else part_in(each, f"parts[{index}]")
            for index, each in enumerate(parts)
        ),
        tasks=(tasks,) if isinstance(tasks, str) else tuple(tasks),
        base=None if base is None else _label(base, "base"),
        include=tuple(include),
        exclude=tuple(exclude),
        block_pattern=block_pattern,
        compat=compat,
        dtype=dtype,
        form=form,
        shard_size=shard_size,
        lora_alpha=lora_alpha,
        ignore_saved_base=ignore_saved_base,
        part=part,
        target=target,
        rank=rank,
        energy=energy,
        whole=tuple(whole),
        on_mismatch=on_mismatch,
        vocab=vocab,
        allow_base_mismatch=allow_base_mismatch,
        allow_nonfinite=allow_nonfinite,
        out=None if out is None else fspath(out),
    )
    recipe = with_rules(plain, where)
    opened = [_source(model, f"models[{index}]") for index, (model, _) in enumerate(pairs)]
    under = None if base is None else _source(base, "base")
    held = [
        collected_of_arrays(
            f"statistics[{index}]", {name: _array(value) for name, value in file.items()}
        )
        if isinstance(file, Mapping)
        else None
        for index, file in enumerate(files)
    ]
    budget = parse_size(memory) if isinstance(memory, str) else memory
    plan = make_plan(
        recipe, sources=opened, base=under, statistics=held, memory=budget, workers=workers,
        device=device,
    )  # fmt: skip
    if out is not None:
        written = chosen.execute(plan, memory=budget, force=force, progress=progress)
        return written if _several(plan) else written[0]
    results = execute_in_memory(plan, progress)
    if any(_is_torch(model) for model, _ in pairs):
        results = [to_torch(each) for each in results]
    return results if _several(plan) else results[0]


def _several(plan: Plan) -> bool:
    listed = any(isinstance(value, (list, tuple)) for value in plan.recipe.params.values())
    # A single task that is asked for is no list, as a single value is none.
    apart = any(each.tail for each in plan.variants) and len(plan.recipe.tasks) != 1
    return listed or apart


def _pair(model: Model) -> tuple[Any, Any]:
    if isinstance(model, tuple):
        return model[0], parse_weight(model[1], f"{type(model[0]).__name__} with a weight")
    if isinstance(model, (str, PathLike)):
        return split_weight(fspath(model))
    return model, 1.0


def _label(model: Any, fallback: str) -> str:
    if isinstance(model, (Checkpoint, TaskVector)):
        return model.label
    return fallback if isinstance(model, Mapping) else fspath(model)


def _source(model: Any, label: str) -> Source | None:
    """A source over what is already open or in memory; ``None`` for a path."""
    if isinstance(model, Checkpoint):
        return Source(model.label, model, None, fingerprint(model.tensors), {}, model.identity)
    if isinstance(model, TaskVector):
        return source_of_deltas(model)
    if isinstance(model, Mapping):
        arrays = {name: ArrayTensor(_array(value)) for name, value in model.items()}
        return source_of_arrays(label, arrays)
    return None


def _array(value: Any) -> Any:
    """A numpy view of an array or of a torch tensor on the host."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().cpu().contiguous()
    try:
        return tensor.numpy()
    except TypeError:
        # numpy's own types lack bfloat16 and float8: the bytes are viewed as those of ml_dtypes.
        import ml_dtypes
        import torch

        names = {
            torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
            torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
            torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
        }
        if tensor.dtype not in names:
            raise FormatError("tensor dtype has no counterpart", got=str(tensor.dtype)) from None
        plain, dtype = names[tensor.dtype]
        return tensor.view(plain).numpy().view(dtype)


def _is_torch(model: Any) -> bool:
    return isinstance(model, Mapping) and any(hasattr(v, "detach") for v in model.values())


def to_torch(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Torch tensors that share memory with numpy arrays, bfloat16 and float8 included."""
    import torch

    special = {
        "bfloat16": (np.int16, torch.bfloat16),
        "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
        "float8_e5m2": (np.uint8, torch.float8_e5m2),
    }
    out = {}
    for name, array in arrays.items():
        plain = special.get(array.dtype.name)
        out[name] = (
            torch.from_numpy(array)
            if plain is None
            else torch.from_numpy(array.view(plain[0])).view(plain[1])
        )
    return out
