"""LoRA on stacked experts: one pair of factors for a parameter that holds many matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.computed import Block, Computed
from mergebench.adapters_zoo.dialects import peft
from mergebench.adapters_zoo.factors import put, rank_of
from mergebench.adapters_zoo.lazy import Reshaped
from mergebench.adapters_zoo.lora_settings import for_module, read_settings, scale_of, stated
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.adapters_zoo.stacks import Stack, find_stack
from mergebench.core.delta import Delta, Dense, LowRank
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import Array, ArrayTensor, read_all

_ENTRY = "target_parameters"
# A wrapper for every parameter of a module, one inside the other.
_KEY = re.compile(
    r"(?P<module>.+?)(?P<levels>(?:\.base_layer)*)\.lora_(?P<side>[AB])(?:\.(?!weight)[^.]+)?\.weight"
)
_MOST = 6


@dataclass(frozen=True)
class _Wrapper:
    """The factors of one parameter of a module, and their names."""

    module: str
    key_a: str
    key_b: str


def _targets(source: AdapterSource) -> tuple[str, ...]:
    for one in stated(source):
        entries = one.entries.get(_ENTRY) or ()
        if not isinstance(entries, list | tuple) or not all(isinstance(e, str) for e in entries):
            raise FormatError(
                f"{source.label}: {_ENTRY} in {one.where}",
                expected="a list of names",
                got=repr(entries),
            )
        if entries:
            return tuple(entries)
    return ()


def _parameters(module: str, targets: Iterable[str]) -> tuple[str, ...]:
    """Parameters of a module that the config names, by PEFT's rule: ends of paths."""
    found = []
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.append(parameter)
    return tuple(dict.fromkeys(found))


def _split(source: AdapterSource) -> tuple[AdapterSource, dict[str, dict[int, dict[str, str]]]]:
    """The rest of the adapter, which is a LoRA, and factors by module, level and side."""
    targets = _targets(source)
    found: dict[str, dict[int, dict[str, str]]] = {}
    for key in source.tensors if targets else ():
        match = _KEY.fullmatch(peft.strip(key))
        if match is None or not (match["levels"] or _parameters(match["module"], targets)):
            continue
        level = match["levels"].count(".base_layer")
        sides = found.setdefault(match["module"], {}).setdefault(level, {})
        if other := sides.get(match["side"]):
            raise FormatError(f"{source.label}: {other} and {key} are the same factor")
        sides[match["side"]] = key
    return _without(source, found), found


def _without(
    source: AdapterSource, found: Mapping[str, Mapping[int, Mapping[str, str]]]
) -> AdapterSource:
    ours = {key for levels in found.values() for sides in levels.values() for key in sides.values()}
    tensors = {key: tensor for key, tensor in source.tensors.items() if key not in ours}
    config = source.config
    if config is not None:
        config = {entry: value for entry, value in config.items() if entry != _ENTRY}
    return replace(source, tensors=tensors, config=config)


def _detect(source: AdapterSource) -> frozenset[str]:
    rest, found = _split(source)
    if not found:
        return frozenset()
    return frozenset(set(source.tensors) - set(rest.tensors)) | KINDS["lora"].detect(rest)


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    targets = _targets(source)
    if options.base_shapes is None:
        raise FormatError(
            f"{source.label}: adapts parameters that hold many matrices ({', '.join(targets[:3])}),"
            " and the file does not say how many",
            fix="give --base with the model that the adapter was trained on",
            lacks="base",
        )
    names = BaseNames(options.base_shapes)
    _, found = _split(source)
    stacks = {
        module: stacks
        for module in found
        if (stacks := _stacks(source, names, module, _parameters(module, targets)))
        or max(found[module]) > 0
    }
    chosen = {name: found[name] for name in stacks}
    rest = _without(source, chosen)
    deltas = dict(KINDS["lora"].read(rest, options)) if rest.tensors else {}
    laid = {name: _assigned(source, name, stacks[name], chosen[name]) for name in stacks}
    for pairs in laid.values():
        for stack, wrapper in pairs:
            upright = _is_upright(source, options, stack, wrapper, pairs, laid)
            for name, delta in _deltas(source, stack, wrapper, upright=upright).items():
                put(source.label, deltas, name, wrapper.key_a, delta)
    return deltas


def _stacks(
    source: AdapterSource, names: BaseNames, module: str, parameters: Iterable[str]
) -> tuple[Stack, ...]:
    found = (find_stack(source.label, names, module, parameter) for parameter in parameters)
    return tuple(stack for stack in found if stack is not None)


def _assigned(
    source: AdapterSource,
    module: str,
    stacks: tuple[Stack, ...],
    levels: Mapping[int, Mapping[str, str]],
) -> list[tuple[Stack, _Wrapper]]:
    """Which factors are whose: PEFT numbers them in the order of the model's code."""
    wrappers = []
    for sides in levels.values():
        if set(sides) != {"A", "B"}:
            raise FormatError(
                f"{source.label}: {module} has only one of the factors A and B",
                got=", ".join(sides.values()),
            )
        rank_of(source, sides["A"], sides["B"])
        wrappers.append(_Wrapper(module, sides["A"], sides["B"]))
    if len(wrappers) != len(stacks) or len(stacks) > _MOST:
        raise MismatchError(
            f"{source.label}: {module} has factors for {len(wrappers)} parameters",
            expected=f"{len(stacks)}, those of {_ENTRY} that the base has"
            + (f" ({', '.join(stack.name for stack in stacks)})" if stacks else ""),
            got=wrappers[0].key_a,
            fix="check that --base is the model that the adapter was trained on, and has the "
            "parameters under the names of the model's code",
        )
    fitting = [
        list(zip(order, wrappers, strict=True))
        for order in permutations(stacks)
        if all(_ways(source, *pair) for pair in zip(order, wrappers, strict=True))
    ]
    if not fitting:
        shapes = ", ".join(f"{stack.name} {stack.shape}" for stack in stacks)
        factors = ", ".join(
            f"{source.tensors[w.key_a].shape} and {source.tensors[w.key_b].shape}" for w in wrappers
        )
        raise MismatchError(
            f"{source.label}: the factors of {module} do not fit its parameters",
            expected=shapes,
            got=factors,
            fix="check that --base is the model that the adapter was trained on",
        )
    if len(fitting) > 1:
        raise MismatchError(
            f"{source.label}: the factors of {module} fit its parameters in more than one way, and "
            "which are whose stands only in the code of the model",
            got=", ".join(stack.name for stack in stacks),
        )
    return fitting[0]


def _ways(source: AdapterSource, stack: Stack, wrapper: _Wrapper) -> frozenset[bool]:
    """Orientations in which factors fit: True where experts are stored output × input."""
    a, b = source.tensors[wrapper.key_a].shape, source.tensors[wrapper.key_b].shape
    if len(a) != 2 or len(b) != 2 or a[0] % stack.count:
        return frozenset()
    path = f"{wrapper.module}.{stack.parameter}"
    wanted = for_module(read_settings(source), path).rank_of(source.label, path)
    if wanted is not None and wanted != a[0] // stack.count:
        return frozenset()
    rows, columns = stack.shape[-2:]
    ways = {True} if (b[0], a[1]) == (rows, columns) else set()
    if (b[0], a[1]) == (columns, rows) and len(stack.shape) == 3 and stack.parts is None:
        ways.add(False)
    return frozenset(ways)


def _is_upright(
    source: AdapterSource,
    options: ReadOptions,
    stack: Stack,
    wrapper: _Wrapper,
    beside: list[tuple[Stack, _Wrapper]],
    laid: Mapping[str, list[tuple[Stack, _Wrapper]]],
) -> bool:
    ways = _ways(source, stack, wrapper)
    if options.transposed is not None and len(stack.shape) == 3:
        upright = stack.name not in options.transposed
        if upright in ways:
            return upright
        raise MismatchError(
            f"{source.label}: {wrapper.key_a} does not fit {stack.name} as the base stores it",
            expected=f"shape {stack.shape}",
            fix="check that --base is the model that the adapter was trained on",
        )
    # Square experts say nothing; the model's code is the same for all of them.
    every = [pair for pairs in laid.values() for pair in pairs]
    for pairs in (((stack, wrapper),), beside, every):
        told = {
            next(iter(found))
            for each, factors in pairs
            if len(found := _ways(source, each, factors)) == 1 and len(each.shape) == 3
        }
        if len(told) == 1:
            return told.pop()
    if len(ways) == 1:
        return next(iter(ways))
    raise MismatchError(
        f"{source.label}: {stack.name} holds square matrices, and whether they are stored output x "
        "input stands only in the code of the model",
        got=f"shape {stack.shape}",
    )


def _deltas(
    source: AdapterSource, stack: Stack, wrapper: _Wrapper, *, upright: bool
) -> dict[str, Delta]:
    a, b = source.tensors[wrapper.key_a], source.tensors[wrapper.key_b]
    rank = a.shape[0] // stack.count
    path = f"{wrapper.module}.{stack.parameter}"
    scale = scale_of(
        source.label, wrapper.key_a, path, rank, for_module(read_settings(source), path),
        alpha=None, fallback=None,
    )  # fmt: skip
    if len(stack.shape) == 2:
        return {stack.name: LowRank(b, a, scale, stack.shape, transposed=False)}
    right = read_all(a).reshape(stack.count, rank, a.shape[1])
    # The experts lie next to each other within a rank, not ranks within an expert.
    left = read_all(b).reshape(b.shape[0], rank, stack.count).transpose(2, 0, 1)
    if stack.parts is not None:
        return _of_parts(stack, left, right, scale)
    dtype = "F64" if "F64" in (a.dtype, b.dtype) else "F32"
    wide = (left.astype(np.float64) * scale, right.astype(np.float64))
    if not upright:
        wide = (wide[1].transpose(0, 2, 1), wide[0].transpose(0, 2, 1))
    block = _expert_rows(*wide)
    flat = Computed((stack.count * stack.shape[1], stack.shape[2]), block, dtype=dtype)
    return {stack.name: Dense(Reshaped(flat, stack.shape))}


def _expert_rows(left: Array, right: Array) -> Block:
    """Rows of the experts' products ``left[e] @ right[e]``, one expert below the other."""
    height, width = left.shape[1], right.shape[2]

    def block(rows: slice, columns: slice) -> Array:
        values = np.empty((rows.stop - rows.start, len(range(*columns.indices(width)))))
        row = rows.start
        while row < rows.stop:
            expert, first = divmod(row, height)
            count = min(height - first, rows.stop - row)
            piece = left[expert, first : first + count] @ right[expert][:, columns]
            values[row - rows.start : row - rows.start + count] = piece
            row += count
        return values

    return block


def _of_parts(stack: Stack, left: Array, right: Array, scale: float) -> dict[str, Delta]:
    """One pair of factors for every expert's own tensors, which lie below each other."""
    assert stack.parts is not None
    deltas: dict[str, Delta] = {}
    for expert, parts in enumerate(stack.parts):
        row = 0
        for name, height in parts:
            b = ArrayTensor(np.ascontiguousarray(left[expert, row : row + height]))
            a = ArrayTensor(np.ascontiguousarray(right[expert]))
            deltas[name] = LowRank(b, a, scale, (height, right.shape[2]), transposed=False)
            row += height
    return deltas


KINDS.add(
    "experts",
    Kind(
        name="experts",
        formula="ΔW[e] = (α/r) · B[:, e::E] A[er : (e+1)r], or its transpose",
        detect=_detect,
        read=_read,
        notes="LoRA on parameters that stack experts (target_parameters), beside plain LoRA. Needs "
        "the base's shapes; a base that stores gate_proj, up_proj and down_proj, or w1, w3 and w2, "
        "expert by expert is understood too.",
        peft_types=frozenset({"LORA"}),
    ),
)
