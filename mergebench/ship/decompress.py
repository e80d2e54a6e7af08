"""Taking packed files out again: as the adapter or task vector they were, or as a full model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.adapter import CONFIG_KEY, is_saved_delta
from mergebench.adapters_zoo.packed_file import PackedFile
from mergebench.checkpoints.placement import TensorSpec, plan_layout
from mergebench.checkpoints.writer import Output
from mergebench.core.errors import MergebenchError, MismatchError, ParameterError
from mergebench.core.tensor import DTYPES, size_of
from mergebench.merge.api import merge_models
from mergebench.merge.limits import DEFAULT_MEMORY
from mergebench.merge.sparse import check_place
from mergebench.sources.adapters import packed_at
from mergebench.sources.references import paths_of

_PIECE = 1 << 20


def decompress(
    packed: str,
    out: str | Path,
    *,
    base: str | None = None,
    target: str | None = None,
    force: bool = False,
    memory: int = DEFAULT_MEMORY,
    workers: int | None = None,
    progress: Any = None,
) -> int:
    """Write what a packed file stands for; the bytes of its weights.

    Parameters
    ----------
    packed : str
        A packed file.
    out : path
        A ``.safetensors`` file, or a folder: of PEFT for adapters that have a config.
    base : str, optional
        With it a full model is written: the base with the update on top.
    target : str, optional
        Program that an adapter is written for, as of merges; without it, names and layout are
        those that were packed, and so is every bit of what was stored.
    force : bool
    memory : int, bytes
    workers : int, optional
    progress : callable, optional

    Raises
    ------
    MergebenchError
        For anything the user can fix; then nothing is written.
    """
    out = Path(out)
    opened = packed_at(packed)
    if opened is None:
        raise MismatchError(f"{packed}: is not packed", fix="it can be used, and merged, as it is")
    if base is not None or target is not None:
        if base is not None and target is not None:
            raise ParameterError("--base and --target: a full model is no adapter", fix="give one")
        written = merge_models(
            [packed],
            base=base,
            method="task_arithmetic",
            lam=1.0,
            out=out,
            form="auto" if base is not None else "lora",
            target=target,
            memory=memory,
            workers=workers,
            force=force,
            progress=progress,
        )
        return int(written.bytes)
    return _as_it_was(packed, opened, out, force)


def _as_it_was(label: str, packed: PackedFile, out: Path, force: bool) -> int:
    single = out.suffix == ".safetensors"
    taken = [str(path) for path in paths_of(label) if path.exists()]
    if single:
        check_place(out, "safetensors", force=force, inputs=taken)
    elif out.resolve() in (Path(each).resolve() for each in taken):
        raise MergebenchError(f"{out}: is the input", fix="choose another name")
    specs = [TensorSpec(name, t.dtype, t.shape) for name, t in packed.tensors.items()]
    side: dict[str, bytes | Path] = {}
    stem = "delta" if is_saved_delta(packed.metadata) else "pytorch_lora_weights"
    if not single and (text := packed.metadata.get(CONFIG_KEY)) is not None:
        stem = "adapter_model"
        side["adapter_config.json"] = (json.dumps(json.loads(text), indent=2) + "\n").encode()
    layout = plan_layout(specs, out.stem if single else stem, None, metadata=packed.metadata)
    with Output(out, layout, single_file=single, side=side, force=force) as output:
        for name, tensor in packed.tensors.items():
            size, item = size_of(tensor.shape), DTYPES[tensor.dtype].itemsize
            for start in range(0, size, _PIECE):
                piece = tensor.read(start, min(start + _PIECE, size))
                output.write(name, start * item, piece)
            output.finish(name, "")
    return sum(spec.nbytes for spec in specs)
