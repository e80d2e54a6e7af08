"""The way out: which tensors and which config an adapter file of merged factors holds.

The layout is the one that servers accept as it is: plain LoRA, one rank, the scale folded into
the factors (``lora_alpha = r``), no patterns, an explicit list of modules. Nothing is written
here: the caller writes the tensors, zero-padding factors up to the shapes given.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergebench.adapters_zoo.adapter import CONFIG_KEY
from mergebench.adapters_zoo.dialects import Role, kohya, peft
from mergebench.adapters_zoo.layouts.spelling import Named
from mergebench.adapters_zoo.selection import saved_modules, target_modules
from mergebench.core.errors import FormatError, MismatchError, ParameterError
from mergebench.core.site import kind_of

Shape = tuple[int, ...]
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Factor:
    """One displaced weight to be written as ``B @ A``.

    Attributes
    ----------
    rank : int
        Columns of B before padding, at least 1.
    shape : tuple of int
        Shape of the displaced tensor: (out, in), (in, out) if ``transposed``, or
        (out, in, *kernel).
    transposed : bool
        The tensor is stored input × output: embeddings, GPT-2's ``Conv1D``.
    dtype : str
        safetensors dtype of both factors.
    embedding : bool or None, default None
        Whether the module is an embedding. None: a transposed tensor is one if its name says so.
    modules : tuple of Named, default ()
        What the file calls the module, or the modules that share the weight's rows; empty: the
        module of the tensor's name. Not for PEFT.
    """

    rank: int
    shape: Shape
    transposed: bool
    dtype: str
    embedding: bool | None = None
    modules: tuple[Named, ...] = ()


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the file.

    Attributes
    ----------
    name : str
        Name in the file.
    dtype : str
        safetensors dtype.
    shape : tuple of int
        A is (r, in) or (r, in, *kernel), B is (out, r) or (out, r, 1…), α is (), a value has its
        own shape. In and out are those of the layer, whatever way the weight is stored.
    source : str
        The displaced or replaced tensor that it belongs to.
    role : str
        ``A``, ``B``, ``alpha`` or ``value``.
    constant : float or None, default None
        The one entry of an α.
    rows : tuple of (int, int), default ()
        Ranges of B's rows that the tensor holds; empty for all.
    """

    name: str
    dtype: str
    shape: Shape
    source: str
    role: Literal["A", "B", "alpha", "value"]
    constant: float | None = None
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class PackedLayout:
    """What an adapter's files hold.

    Attributes
    ----------
    tensors : tuple of PackedTensor
        In name order.
    config : mapping of str to value
        ``adapter_config.json``; empty for Kohya's and diffusers' names, which have none.
    metadata : mapping of str to str
        ``__metadata__``, with the config for readers that see the bare file.
    """

    tensors: tuple[PackedTensor, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def pack_lora(
    modules: Mapping[str, Factor],
    *,
    dialect: Literal["peft", "kohya", "diffusers"],
    base_name: str | None,
    replacements: Mapping[str, tuple[str, Shape]],
    known_names: Collection[str] | None = None,
    rank: int | None = None,
    prefix: str = "lora_unet_",
) -> PackedLayout:
    """Lay out merged factors as a LoRA (arXiv:2106.09685) that common programs open.

    Parameters
    ----------
    modules : mapping of displaced tensor name to Factor
        Names end in ``.weight``. The scale belongs into the factors: the file's own is 1.
    dialect : {"peft", "kohya", "diffusers"}
    base_name : str or None
        ``base_model_name_or_path`` of the config.
    replacements : mapping of tensor name to (dtype, shape)
        Tensors written in full, as ``modules_to_save`` or as biases of low-rank modules; PEFT
        only. PEFT needs every tensor of a module to save.
    known_names : collection of str, optional
        All tensor names of the base. Given, ``target_modules`` are short where that selects the
        same modules; otherwise they are full paths.
    rank : int, optional
        Rank of PEFT's and diffusers' factors, by default the largest among ``modules``. Kohya's
        names state a scale per module, so factors there keep their own ranks.
    prefix : str, default "lora_unet_"
        What Kohya's names begin with where the tensor names have none of its prefixes.

    Returns
    -------
    PackedLayout

    Raises
    ------
    FormatError
        If the dialect has no name for something.
    MismatchError
        If transposed and other linear weights are mixed, or two updates meet in one module.
    ParameterError
        If ``rank`` is too small, or there is nothing to write.
    """
    if not modules:
        raise ParameterError("an adapter needs at least one low-rank module", got="none")
    for name, factor in modules.items():
        _check(name, factor)
    if dialect != "peft":
        _check_foreign(dialect, modules, replacements)
    if dialect == "kohya":
        return _pack_kohya(modules, prefix)
    largest = max(factor.rank for factor in modules.values())
    chosen = largest if rank is None else rank
    if chosen < largest:
        raise ParameterError("adapter: `rank`", expected=f"at least {largest}", got=str(chosen))
    if dialect == "diffusers":
        return _pack_diffusers(modules, chosen)
    return _pack_peft(modules, base_name, replacements, known_names, chosen)


def _check(name: str, factor: Factor) -> None:
    if not (name.endswith(_WEIGHT) or factor.modules) or len(factor.shape) < 2:
        raise FormatError(
            f"{name}: cannot be written as a LoRA module",
            got=f"shape {factor.shape}",
            expected="a matrix or a convolution named ….weight",
            fix="write the task vector itself (--as delta)",
        )
    if factor.rank < 1:
        raise ParameterError(f"{name}: rank", expected="at least 1", got=str(factor.rank))
    if factor.transposed and len(factor.shape) > 2:
        raise FormatError(f"{name}: a convolution stored input x output has no adapter form")
    if factor.embedding and not factor.transposed:
        raise MismatchError(
            f"{name}: factors of an embedding", expected="transposed ones", got="others"
        )


def _is_embedding(name: str, factor: Factor) -> bool:
    if factor.embedding is not None:
        return factor.embedding
    return factor.transposed and kind_of(name, factor.shape) == "embedding"


def _shapes(factor: Factor, rank: int) -> tuple[Shape, Shape]:
    shape = factor.shape[::-1] if factor.transposed else factor.shape
    out, into, *kernel = shape
    return (rank, into, *kernel), (out, rank, *(1 for _ in kernel))


def _pack_peft(
    modules: Mapping[str, Factor],
    base_name: str | None,
    replacements: Mapping[str, tuple[str, Shape]],
    known_names: Collection[str] | None,
    rank: int,
) -> PackedLayout:
    tensors = []
    turned = set()
    for name, factor in modules.items():
        module = name.removesuffix(_WEIGHT)
        roles: tuple[Role, Role] = ("A", "B")
        if _is_embedding(name, factor):
            roles = ("embedding_A", "embedding_B")
        elif len(factor.shape) == 2:
            turned.add(factor.transposed)
        a, b = _shapes(factor, rank)
        tensors.append(PackedTensor(peft.spell(module, roles[0]), factor.dtype, a, name, "A"))
        tensors.append(PackedTensor(peft.spell(module, roles[1]), factor.dtype, b, name, "B"))
    if len(turned) > 1:
        raise MismatchError(
            "adapter: some linear weights are stored input x output and others are not",
            expected="one fan_in_fan_out for all",
            fix="write the task vector itself (--as delta)",
        )
    adapted = {name.removesuffix(_WEIGHT) for name in modules}
    biases = {name for name in replacements if name.removesuffix(".bias") in adapted}
    saved = saved_modules(set(replacements) - biases, adapted, known_names)
    for name, (dtype, shape) in replacements.items():
        module, _, param = name.rpartition(".")
        # PEFT wraps what it adapts, and a wrapped layer's bias is a trained one of that layer.
        role: Role = "saved_base" if name in biases else "value"
        tensors.append(PackedTensor(peft.spell(module, role, param), dtype, shape, name, "value"))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "lora_only" if biases else "none",
        "lora_bias": False,
        "fan_in_fan_out": turned == {True},
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        **target_modules(adapted, known_names),
    }
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config, sort_keys=True)}
    return PackedLayout(tuple(sorted(tensors, key=lambda one: one.name)), config, metadata)


def _check_foreign(
    dialect: str, modules: Mapping[str, Factor], replacements: Collection[str]
) -> None:
    theirs = {"kohya": "Kohya's format", "diffusers": "diffusers' format"}[dialect]
    fix = "use PEFT's names, or write the task vector itself (--as delta)"
    if replacements:
        raise FormatError(
            f"{min(replacements)}: {theirs} holds no tensors written in full", fix=fix
        )
    for name, factor in modules.items():
        if factor.transposed:
            raise FormatError(f"{name}: {theirs} has no weights stored input x output", fix=fix)


def _halves(
    name: str, factor: Factor, named: Named, rank: int, spell: tuple[str, str]
) -> list[PackedTensor]:
    """A and B of one module of the file."""
    a, b = _shapes(factor, rank)
    if named.rows:
        b = (sum(stop - start for start, stop in named.rows), *b[1:])
    return [
        PackedTensor(spell[0], factor.dtype, a, name, "A"),
        PackedTensor(spell[1], factor.dtype, b, name, "B", rows=named.rows),
    ]


def _pack_diffusers(modules: Mapping[str, Factor], rank: int) -> PackedLayout:
    tensors = []
    for name, factor in modules.items():
        for named in factor.modules or (Named(name.removesuffix(_WEIGHT)),):
            spell = (f"{named.module}.lora_A.weight", f"{named.module}.lora_B.weight")
            tensors += _halves(name, factor, named, rank, spell)
    ordered = tuple(sorted(tensors, key=lambda one: one.name))
    return PackedLayout(ordered, metadata={"format": "pt"})


def _pack_kohya(modules: Mapping[str, Factor], prefix: str) -> PackedLayout:
    tensors = []
    taken: dict[str, str] = {}
    for name, factor in modules.items():
        for named in factor.modules or (Named(_flattened(name, prefix)),):
            module = named.module
            if module in taken:
                raise FormatError(f"{name} and {taken[module]} are both {module} in Kohya's names")
            taken[module] = name
            spell = (kohya.spell(module, "A"), kohya.spell(module, "B"))
            tensors += _halves(name, factor, named, factor.rank, spell)
            # α is exact in float32 for any rank, in half precision not.
            alpha = kohya.spell(module, "alpha")
            tensors.append(PackedTensor(alpha, "F32", (), name, "alpha", factor.rank))
    ordered = tuple(sorted(tensors, key=lambda one: one.name))
    return PackedLayout(ordered, metadata={"format": "pt"})


def _flattened(name: str, prefix: str) -> str:
    module = name.removesuffix(_WEIGHT)
    if kohya.component(module)[0] and "." not in module:
        return module
    return prefix + kohya.flatten(module)
