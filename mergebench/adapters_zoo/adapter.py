"""An adapter file or folder as a task vector: detect its kind, refuse what is not understood."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mergebench.adapters_zoo.dialects import WHOLE, dotted, kohya, peft
from mergebench.adapters_zoo.layouts.view import view_of
from mergebench.adapters_zoo.parts import only
from mergebench.adapters_zoo.refusals import family_of, like_kohya, refuse_keys, refuse_type
from mergebench.core.delta import Delta
from mergebench.core.errors import FormatError
from mergebench.core.plain import parse_json
from mergebench.core.registry import Registry
from mergebench.core.task_vector import TaskVector
from mergebench.core.tensor import Tensor

#: Metadata entry in which a bare adapter file carries its adapter_config.json.
CONFIG_KEY = "mergebench_adapter_config"
#: Metadata entry in which a file written by mergebench says what it is.
FILE_KEY = "mergebench"
#: What a task vector is saved as: every entry, some with their places, or several by masks.
SAVED = ("delta", "sparse", "tasks")


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """An opened adapter whose tensors have not been read.

    Attributes
    ----------
    label : str
        How messages call it: the path or name that the user gave.
    tensors : mapping of str to Tensor
        Every tensor of the file, under its name there.
    config : mapping or None
        ``adapter_config.json``; None for a bare file.
    metadata : mapping of str to str
        ``__metadata__`` of the safetensors header.
    fingerprint : str, default ""
        Identifies the content; handed on to the task vector.
    """

    label: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    fingerprint: str = ""


@dataclass(frozen=True, eq=False)
class ReadOptions:
    """What the user and the base say that the adapter does not.

    Attributes
    ----------
    lora_alpha : float or None, default None
        α of LoRA modules whose file states none; never overrides the file.
    base_shapes : mapping of str to tuple of int, or None (default)
        Shapes of all tensors of the base. Given, every displacement gets the name of a base
        tensor and its shape is checked.
    base : mapping of str to Tensor, or None (default)
        The base's tensors, for kinds whose displacement is a function of the weight.
    transposed : frozenset of str or None, default None
        Names of the base's weights that are stored input × output. None: decide from the shapes
        where they are decisive, else from the adapter's ``fan_in_fan_out``.
    ignore_saved_base : bool, default False
        Drop copies of frozen base parameters (``…base_layer.weight``, which PEFT saves beside
        adapted embeddings) instead of refusing them. Right only if the base has these values.
    part : str or None, default None
        Read only what adapts this component of a pipeline: a key of
        :data:`~mergebench.adapters_zoo.parts.PARTS`.
    task : str or None, default None
        Which of several task vectors of one file is meant.
    revisions : mapping of str to str, default none
        For references to the Hub, the commits to take.
    stream : bool, default False
        Read checkpoints on the Hub where they are, instead of downloading them.
    """

    lora_alpha: float | None = None
    base_shapes: Mapping[str, tuple[int, ...]] | None = None
    base: Mapping[str, Tensor] | None = None
    transposed: frozenset[str] | None = None
    ignore_saved_base: bool = False
    part: str | None = None
    task: str | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)
    stream: bool = False


def _no_remarks(_: AdapterSource) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Kind:
    """One family of adapters.

    Attributes
    ----------
    name : str
    formula : str
        The displacement as a function of the stored tensors, for help and docs.
    detect : callable
        ``(source) -> keys`` that this kind can account for; reads no tensor.
    read : callable
        ``(source, options) -> deltas`` under tensor names, called only when every key is claimed.
    notes : str, default ""
        What a user should know: sources, limits.
    peft_types : frozenset of str, default empty
        The ``peft_type`` values of a config that this kind reads.
    remarks : callable, default none
        ``(source) -> notes`` for the user about an adapter that is read.
    support : str, default "own"
        Who computes the displacement: ``own``, or the library that does (``PEFT``).
    """

    name: str
    formula: str
    detect: Callable[[AdapterSource], frozenset[str]]
    read: Callable[[AdapterSource, ReadOptions], dict[str, Delta]]
    notes: str = ""
    peft_types: frozenset[str] = frozenset()
    remarks: Callable[[AdapterSource], tuple[str, ...]] = _no_remarks
    support: str = "own"


KINDS: Registry[Kind] = Registry(
    "adapter kind", "mergebench.adapters_zoo.kinds", "mergebench.adapter_kinds"
)


def is_adapter(
    names: Collection[str], config: Mapping[str, Any] | None, metadata: Mapping[str, str]
) -> bool:
    """Whether files with these tensor names are an adapter or a saved task vector.

    True for every recognised family, also one that :func:`read_adapter` will refuse. A full
    checkpoint that still has adapters inside holds the weights they adapt, and is none.

    Parameters
    ----------
    names : collection of str
        Tensor names.
    config : mapping or None
        ``adapter_config.json``, if there is one.
    metadata : mapping of str to str
        ``__metadata__`` of the safetensors header.
    """
    if config is not None and "peft_type" in config:
        return True
    if CONFIG_KEY in metadata or saved_kind(metadata) in SAVED:
        return True
    held = {peft.strip(name) for name in names}
    for name in held:
        part = kohya.parse(name) or dotted.parse(name)
        if part is not None and part.role not in WHOLE:
            weights = (f"{part.module}.weight", f"{part.module}.base_layer.weight")
            if part.role != "alpha" and not held.intersection(weights):
                return True
        elif family_of(name) is not None or like_kohya(name):
            return True
    return False


def is_saved_delta(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata are those of a task vector saved by mergebench, whole or sparse."""
    return saved_kind(metadata) in SAVED


def saved_kind(metadata: Mapping[str, str]) -> str | None:
    """The kind of adapter that metadata written by mergebench name."""
    try:
        about = parse_json(metadata.get(FILE_KEY, "null"))
    except ValueError:
        return None
    kind = about.get("kind") if isinstance(about, dict) else None
    return kind if isinstance(kind, str) else None


def read_adapter(source: AdapterSource, options: ReadOptions | None = None) -> TaskVector:
    """The task vector of an adapter; tensors stay unread except one-entry scales.

    Parameters
    ----------
    source : AdapterSource
    options : ReadOptions, optional

    Returns
    -------
    TaskVector
        Its metadata are those of the file, plus ``kind`` and, where there is a config, the
        config as JSON under :data:`CONFIG_KEY`.

    Raises
    ------
    FormatError
        If no kind, or more than one, accounts for every tensor; if the kind is refused.
    MismatchError
        If the file contradicts itself or the base.
    ParameterError
        If the file lacks a number that an option must give.
    """
    options = options or ReadOptions()
    source = _with_config(source)
    if not source.tensors:
        raise FormatError(f"{source.label}: the adapter holds no tensors")
    if options.part is not None:
        source = replace(source, tensors=only(source.label, source.tensors, options.part))
    kind, beside = _kind_of(source)
    if options.task is not None and kind.name != "tasks":
        raise FormatError(
            f"{source.label}: holds a single task vector, and task {options.task!r} is named",
            fix=f"leave out #{options.task}",
        )
    view = None if options.base_shapes is None else view_of(options.base_shapes)
    if view is None:
        deltas = _read(kind, beside, source, options)
    else:
        base = None if options.base is None else view.tensors(options.base)
        seen = replace(options, base_shapes=view.shapes, base=base)
        deltas = view.back(source.label, _read(kind, beside, source, seen))
    about = {**source.metadata, "kind": kind.name}
    if source.config is not None:
        about[CONFIG_KEY] = json.dumps(dict(source.config), sort_keys=True)
    return TaskVector(source.label, deltas, source.fingerprint, about, kind.remarks(source))


def kind_of_adapter(source: AdapterSource) -> Kind:
    """The kind of an adapter, from names and config alone.

    Raises
    ------
    FormatError
        As :func:`read_adapter`.
    """
    return _kind_of(_with_config(source))[0]


def _read(
    kind: Kind, beside: frozenset[str], source: AdapterSource, options: ReadOptions
) -> dict[str, Delta]:
    """What a kind reads, and the parameters beside it that were trained in full."""
    from mergebench.adapters_zoo.values import add_beside

    own = {key: tensor for key, tensor in source.tensors.items() if key not in beside}
    deltas = kind.read(replace(source, tensors=own) if beside else source, options)
    if beside:
        add_beside(source, options, deltas, beside)
    return deltas


def _kind_of(source: AdapterSource) -> tuple[Kind, frozenset[str]]:
    """The kind of an adapter, and tensors that it leaves to :func:`_read`: declared values."""
    from mergebench.adapters_zoo.values import declared

    candidates = [KINDS[name] for name in KINDS]
    peft_type = (source.config or {}).get("peft_type")
    if peft_type is not None and not isinstance(peft_type, str):
        raise FormatError(
            f"{source.label}: peft_type in adapter_config.json",
            expected="a name",
            got=repr(peft_type),
        )
    if peft_type is not None:
        known = {accepted for kind in candidates for accepted in kind.peft_types}
        candidates = [kind for kind in candidates if peft_type in kind.peft_types]
        if not candidates:
            refuse_type(source.label, str(peft_type), known)
    claims = {kind.name: kind.detect(source) for kind in candidates}
    every, values = frozenset(source.tensors), declared(source)
    whole = [kind for kind in candidates if claims[kind.name] == every]
    if not whole:
        # Any tuner of PEFT may train modules in full as well.
        found = {name: claim | values for name, claim in claims.items() if claim - values}
        whole = [kind for kind in candidates if found.get(kind.name) == every]
    if len(whole) > 1:
        raise FormatError(
            f"{source.label}: more than one adapter kind accounts for its tensors",
            got=", ".join(kind.name for kind in whole),
        )
    if not whole:
        best = max(claims.values(), key=len, default=frozenset())
        refuse_keys(source.label, set(source.tensors) - best)
    return whole[0], every - claims[whole[0].name]


def _with_config(source: AdapterSource) -> AdapterSource:
    if source.config is not None or CONFIG_KEY not in source.metadata:
        return source
    config = parse_object(source.label, CONFIG_KEY, source.metadata[CONFIG_KEY])
    return replace(source, config=config)


def parse_object(label: str, entry: str, text: str) -> dict[str, Any]:
    """The JSON object in a metadata entry.

    Raises
    ------
    FormatError
        If the entry is not JSON, or not an object.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        raise FormatError(f"{label}: metadata entry {entry!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(
            f"{label}: metadata entry {entry!r} is not a JSON object", got=type(value).__name__
        )
    return value
