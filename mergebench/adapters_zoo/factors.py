"""Pairs of low-rank factors, checked and laid over the tensors that they displace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mergebench.adapters_zoo.adapter import AdapterSource, ReadOptions
from mergebench.adapters_zoo.resolve import BaseNames, Placement, place, share
from mergebench.core.delta import Delta, LowRank
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.tensor import FLOATING


@dataclass(frozen=True)
class Pair:
    """Two factors, and the tensor that their product displaces.

    Attributes
    ----------
    module : str
        Adapted module, as the adapter spells it.
    key_a, key_b : str
        Names of the factors in the file: A (r, in, *kernel) and B (out, r, 1…).
    target : str
        Name of the displaced tensor, as the adapter spells it.
    scale : float
    embedding : bool, default False
        The factors are those of an embedding, whose weight is stored input × output.
    fan_in_fan_out : bool, default False
        The adapter says that the weight is stored input × output.
    """

    module: str
    key_a: str
    key_b: str
    target: str
    scale: float
    embedding: bool = False
    fan_in_fan_out: bool = False


def rank_of(source: AdapterSource, key_a: str, key_b: str) -> int:
    """Rows of A, once both factors are found to fit each other.

    Raises
    ------
    FormatError
        For empty, one-dimensional or integer factors, and for a B with a kernel.
    MismatchError
        If B does not have as many columns as A has rows.
    """
    for key in (key_a, key_b):
        tensor = source.tensors[key]
        if len(tensor.shape) < 2 or 0 in tensor.shape:
            raise FormatError(
                f"{source.label}: {key} is no factor",
                got=f"shape {tensor.shape}",
                expected="a non-empty matrix",
                fix="if it was trained with DeepSpeed ZeRO-3 or FSDP, gather the shards first",
            )
        if tensor.dtype not in FLOATING:
            raise FormatError(
                f"{source.label}: {key} is no factor",
                got=tensor.dtype,
                expected="a floating-point dtype",
            )
    a, b = source.tensors[key_a].shape, source.tensors[key_b].shape
    if any(size != 1 for size in b[2:]):
        raise FormatError(
            f"{source.label}: {key_b} is no factor", got=f"shape {b}", expected="a 1x1 kernel"
        )
    if a[0] != b[1]:
        raise MismatchError(
            f"{source.label}: columns of {key_b}",
            expected=f"{a[0]}, the rows of {key_a}",
            got=str(b[1]),
            fix=_why(a, b),
        )
    return a[0]


def _why(a: tuple[int, ...], b: tuple[int, ...]) -> str:
    if len(b) > 2:
        return "a grouped convolution, if it is one, cannot be merged"
    if a[0] % b[1] == 0:
        return (
            "if it is loralib's MergedLinear (query, key and value in one layer), multiply it out "
            "with loralib first: which of the parts were trained is not in the file"
        )
    return ""


def put(label: str, deltas: dict[str, Delta], name: str, key: str, delta: Delta) -> None:
    """Add an update of one tensor to ``deltas``, which no other tensor of the file may update.

    Raises
    ------
    MismatchError
        If there is one already.
    """
    if name in deltas:
        raise MismatchError(
            f"{label}: {key} is a second update of {name}", expected="one update per tensor"
        )
    deltas[name] = delta


def lay(
    source: AdapterSource,
    options: ReadOptions,
    pairs: Iterable[Pair],
    names: BaseNames | None,
    candidates: Callable[[BaseNames, Pair], tuple[str, ...]],
) -> tuple[dict[str, Delta], dict[str, str]]:
    """Every pair as a displacement of one tensor.

    Parameters
    ----------
    source : AdapterSource
    options : ReadOptions
        Only ``transposed`` is used.
    pairs : iterable of Pair
    names : BaseNames or None
        The base; None leaves names as the adapter spells them and shapes unchecked.
    candidates : callable
        ``(names, pair) ->`` the base tensors that the pair may mean.

    Returns
    -------
    tuple of two dicts
        Displacements by tensor name, and the tensor name of each module.

    Raises
    ------
    MismatchError
        If a name, a shape or an orientation does not settle, or two pairs meet.
    """
    deltas: dict[str, Delta] = {}
    targets: dict[str, str] = {}
    placed: list[tuple[Pair, Placement]] = []
    pairs = tuple(pairs)
    for pair in pairs:
        try:
            name = pair.target
            if names is not None:
                found = candidates(names, pair)
                name = names.unique(source.label, pair.key_a, pair.target, found)
            placement = _placement(source, options, pair, name, names)
        except MismatchError as error:
            assert names is not None
            fits = sum(_fits(source, options, each, names, candidates) for each in pairs)
            raise MismatchError(
                error.what + share(len(pairs) - fits, len(pairs)),
                got=error.got, expected=error.expected, fix=error.fix,
            ) from None  # fmt: skip
        a, b = source.tensors[pair.key_a], source.tensors[pair.key_b]
        delta = LowRank(b, a, pair.scale, placement.shape, placement.transposed, pair.embedding)
        put(source.label, deltas, name, pair.key_a, delta)
        targets[pair.module] = name
        placed.append((pair, placement))
    if names is not None:
        _check_orientation(source.label, placed)
    return deltas, targets


def _placement(
    source: AdapterSource, options: ReadOptions, pair: Pair, name: str, names: BaseNames | None
) -> Placement:
    natural = (source.tensors[pair.key_b].shape[0], *source.tensors[pair.key_a].shape[1:])
    stored = None if names is None else names.shapes[name]
    known = True if pair.embedding else None
    if known is None and options.transposed is not None:
        known = name in options.transposed
    claimed = pair.fan_in_fan_out if known is None else known
    found = place(natural, stored, transposed=known, claimed=claimed)
    if found is None:
        raise MismatchError(
            f"{source.label}: the product of {pair.key_b} and {pair.key_a} does not fit {name}",
            expected=f"shape {stored}" + (" of a weight stored input x output" if known else ""),
            got=str(natural),
            fix="check that --base is the model that the adapter was trained on",
        )
    return found


def _fits(
    source: AdapterSource,
    options: ReadOptions,
    pair: Pair,
    names: BaseNames,
    candidates: Callable[[BaseNames, Pair], tuple[str, ...]],
) -> bool:
    found = candidates(names, pair)
    if len(found) != 1:
        return False
    try:
        _placement(source, options, pair, found[0], names)
    except MismatchError:
        return False
    return True


def _check_orientation(label: str, placed: list[tuple[Pair, Placement]]) -> None:
    # Shapes that prove the config wrong for one weight make it worthless for a square one.
    linear = [(p, q) for p, q in placed if not p.embedding and len(q.shape) == 2]
    wrong = [p for p, q in linear if q.decisive and q.transposed != p.fan_in_fan_out]
    guessed = [p for p, q in linear if not q.decisive]
    if wrong and guessed:
        raise MismatchError(
            f"{label}: {guessed[0].target} is square, so only fan_in_fan_out can tell how it is "
            f"stored, and that is wrong for {wrong[0].target}",
            got=f"fan_in_fan_out {str(wrong[0].fan_in_fan_out).lower()}",
            fix="correct fan_in_fan_out in adapter_config.json",
        )
