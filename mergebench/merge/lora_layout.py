"""The layout of a merged LoRA: ranks, dtypes and names of its factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import frexp
from typing import Any, Literal

from mergebench.adapters_zoo.pack import Factor, PackedLayout, PackedTensor, pack_lora
from mergebench.compute.matrices import matrix_shape
from mergebench.core.delta import LowRank
from mergebench.core.errors import MismatchError
from mergebench.merge.align import Aligned
from mergebench.merge.core_space import fits
from mergebench.merge.op import coefficients, is_linear, rank_of
from mergebench.merge.stream import Item
from mergebench.merge.variants import Variant
from mergebench.recipe import Recipe
from mergebench.sources import Applied, Source

#: What users call a dtype -> its safetensors name.
STORED = {"bf16": "BF16", "f16": "F16", "f32": "F32", "f64": "F64"}


@dataclass(frozen=True)
class Module:
    """One adapted module of a LoRA output.

    Attributes
    ----------
    own_rank, rank : int
        Rank of the merged factors, and of the zero-padded ones in the file.
    transposed : bool
        The displaced weight is stored input × output.
    specs : mapping of role to PackedTensor
        ``A`` and ``B``, and ``alpha`` in Kohya's names.
    """

    own_rank: int
    rank: int
    transposed: bool
    specs: Mapping[str, PackedTensor]


def lora_layout(
    recipe: Recipe,
    aligned: Aligned,
    models: Sequence[Source],
    base: Source | None,
    variants: Sequence[Variant],
) -> tuple[PackedLayout, dict[str, Module]]:
    """Tensors, config and ranks of an adapter that holds the merged updates.

    Linear chains concatenate factors, so ranks add up; others are truncated to the summed rank,
    or to less where the chain leaves less.

    Raises
    ------
    MismatchError
        If an input is no LoRA, or inputs disagree on orientation or on the form of names.
    """
    factors: dict[str, Factor] = {}
    for name, item in aligned.items.items():
        linear = all(is_linear(each.at(name)) for each in variants)
        found = [delta for delta in item.deltas if delta is not None]
        if not all(isinstance(delta, LowRank) for delta in found):
            odd = next(type(delta).__name__ for delta in found if not isinstance(delta, LowRank))
            raise MismatchError(
                f"{name}: the merged update is not a LoRA ({odd.lower()} input)",
                fix="use --as delta, or --as model with --base",
            )
        low = [delta for delta in found if isinstance(delta, LowRank)]
        if len({delta.transposed for delta in low}) > 1:
            raise MismatchError(
                f"{name}: some inputs store it input × output and others do not",
                fix="use --as delta",
            )
        rank = sum(delta.rank for delta in low)
        if not linear:
            rows = item.site.shape[0]
            rank = min(rank, rows, item.site.size // rows, _limit(item, variants))
        dtypes = {stored_dtype(delta) for delta in low}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        if linear and not _exactly(dtype, item, variants):
            dtype = "F32"
        dtype = dtype if recipe.dtype == "keep" else STORED[recipe.dtype]
        factors[name] = Factor(rank, item.site.shape, low[0].transposed, dtype, low[0].embedding)
    packed = pack_lora(
        factors,
        dialect=dialect(factors),
        base_name=_base_name(models, base),
        replacements={name: (t.dtype, t.shape) for name, t in aligned.copies.items()},
        known_names=None if base is None or base.checkpoint is None else base.checkpoint.tensors,
    )
    modules = {}
    for name, factor in factors.items():
        specs: dict[str, PackedTensor] = {t.role: t for t in packed.tensors if t.source == name}
        modules[name] = Module(factor.rank, specs["A"].shape[0], factor.transposed, specs)
    return packed, modules


def _limit(item: Item, variants: Sequence[Variant]) -> int:
    """The rank that the chains leave at most, at least 1; larger than any where they set none."""
    limits = [
        rank_of(each.at(item.site.name), len(item.deltas), item.site.shape) for each in variants
    ]
    return max(1, *(item.site.size if limit is None else limit for limit in limits))


def _exactly(dtype: str, item: Item, variants: Sequence[Variant]) -> bool:
    """Whether factors times their coefficients and scales can be stored without rounding."""
    if dtype in ("F32", "F64"):
        return True
    shares = {
        share * delta.scale
        for each in variants
        for share, delta in zip(
            coefficients(each.at(item.site.name), item.site, item.weights, item.places),
            item.deltas,
            strict=True,
        )
        if isinstance(delta, LowRank)
    }
    # Powers of two leave the digits of bf16 alone; in f16 small ones would cost digits.
    return (
        all(abs(frexp(s)[0]) == 0.5 for s in shares) if dtype == "BF16" else shares <= {1.0, -1.0}
    )


def dialect(names: Iterable[str]) -> Literal["peft", "kohya"]:
    """Kohya's flattened names cannot be told apart without a base, so they stay as they are.

    Raises
    ------
    MismatchError
        If some names are flattened and others are not.
    """
    flat = {name for name in names if name.startswith("lora_") and name.count(".") == 1}
    dotted = set(names) - flat
    if flat and dotted:
        raise MismatchError(
            f"{min(flat)} is a flattened name (Kohya's) and {min(dotted)} is not, so the same "
            "weight would have two names",
            fix="add --base with the model that both were trained on",
        )
    return "kohya" if flat else "peft"


def _base_name(models: Sequence[Source], base: Source | None) -> str | None:
    named = {model.config.get("base_model_name_or_path") for model in models if model.config}
    if len(named) == 1:
        return named.pop()
    return None if base is None else base.label


def dense_bytes(
    aligned: Aligned, modules: Mapping[str, Module], form: str, variants: Sequence[Variant]
) -> int:
    """Bytes that one merged matrix takes while it is truncated, or its factors while written."""
    if form != "lora":
        return 0
    worst = 0
    for name, module in modules.items():
        item = aligned.items[name]
        rows, columns = matrix_shape(item.site.shape)
        written = 24 * module.rank * (rows + columns)
        least = min(rows, columns)
        # The matrix in float32 and twice in float64, and the Gram matrix with its eigenvectors.
        chains = [each.at(name) for each in variants]
        factored = all(is_linear(ops) or fits(ops, item) for ops in chains)
        dense = 0 if factored else 24 * rows * columns + 24 * least * least
        worst = max(worst, written + dense)
    return worst


def stored_dtype(delta: Any) -> str:
    """The dtype that a displacement, or a weight, came in."""
    if isinstance(delta, LowRank):
        return delta.B.dtype if delta.B.dtype == delta.A.dtype else "F32"
    tensor = getattr(delta, "finetuned", None) or delta.values
    # An adapter on a checkpoint is computed in float32 but stored as the checkpoint is.
    return str(tensor.weight.dtype if isinstance(tensor, Applied) else tensor.dtype)
