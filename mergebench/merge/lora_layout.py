"""The layout of a merged LoRA: ranks, dtypes and names of its factors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import frexp
from typing import Any, Literal

from mergebench.adapters_zoo.pack import Factor, PackedLayout, PackedTensor, pack_lora
from mergebench.checkpoints.ties import is_tied
from mergebench.compute.matrices import matrix_shape
from mergebench.core.delta import LowRank
from mergebench.core.errors import MismatchError
from mergebench.core.site import kind_of
from mergebench.merge.align import Aligned
from mergebench.merge.core_space import fits
from mergebench.merge.op import coefficients, is_linear, rank_of
from mergebench.merge.stream import Item
from mergebench.merge.variants import Variant
from mergebench.recipe import Recipe
from mergebench.sources import Applied, Source

#: Architectures whose head may be the embedding.
_HEADED = re.compile(r"For(CausalLM|MaskedLM|ConditionalGeneration|PreTraining)|LMHead")
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
    stored: Mapping[str, str],
) -> tuple[PackedLayout, dict[str, Module]]:
    """Tensors, config and ranks of an adapter that holds the merged updates.

    Linear chains concatenate factors, so ranks add up; others are truncated to the summed rank,
    or to less where the chain leaves less. Updates of full models have the rank that the chain
    leaves them; ``stored`` has the dtype of what is written in full (see :func:`in_full`).

    Raises
    ------
    MismatchError
        If an input is no LoRA, or inputs disagree on orientation or on the form of names.
    """
    factors: dict[str, Factor] = {}
    full: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, item in aligned.items.items():
        if item.base is not None:
            full[name] = stored[name], item.site.shape
            continue
        linear = all(is_linear(each.at(name)) for each in variants)
        found = [delta for delta in item.deltas if delta is not None]
        if not all(isinstance(delta, LowRank) for delta in found):
            if _bounded(item, variants):
                _check_untied(name, item, base)
                factors[name] = _dense_factor(recipe, item, variants)
                continue
            odd = next(type(delta).__name__ for delta in found if not isinstance(delta, LowRank))
            raise MismatchError(
                f"{name}: the merged update is not a LoRA ({odd.lower()} input)",
                fix="use --as delta, --as model with --base, or a method that leaves a low rank",
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
        replacements={name: (t.dtype, t.shape) for name, t in aligned.copies.items()} | full,
        known_names=None if base is None or base.checkpoint is None else base.checkpoint.tensors,
    )
    modules = {}
    for name, factor in factors.items():
        specs: dict[str, PackedTensor] = {t.role: t for t in packed.tensors if t.source == name}
        modules[name] = Module(factor.rank, specs["A"].shape[0], factor.transposed, specs)
    return packed, modules


def in_full(aligned: Aligned, variants: Sequence[Variant]) -> Aligned:
    """Add the base to what has no low-rank form, so that an adapter holds the new values.

    That is what full models change beside matrices: norms and biases.
    """
    items = {
        name: replace(item, base=item.origin)
        if not _is_low(item) and not _bounded(item, variants) and len(item.site.shape) != 2
        else item
        for name, item in aligned.items.items()
    }
    return replace(aligned, items=items)


def _is_low(item: Item) -> bool:
    return all(delta is None or isinstance(delta, LowRank) for delta in item.deltas)


def _bounded(item: Item, variants: Sequence[Variant]) -> bool:
    """Whether every chain leaves a low rank of any input."""
    shape, count = item.site.shape, len(item.deltas)
    limits = [rank_of(each.at(item.site.name), count, shape) for each in variants]
    return len(shape) > 1 and None not in limits


def _check_untied(name: str, item: Item, base: Source | None) -> None:
    """Refuse the factors of an embedding that is the head as well."""
    own = None if base is None else base.checkpoint
    if own is None or item.site.kind != "embedding" or not is_tied(own.config):
        return
    config = own.config or {}
    built = config.get("architectures") or ["LMHeadModel"]
    tables = [t.shape[0] for n, t in own.tensors.items() if kind_of(n, t.shape) == "embedding"]
    rows = config.get("vocab_size", max(tables))
    # Encoders and classifiers have no head to tie, whatever their config says.
    if item.site.shape[0] == rows and any(_HEADED.search(str(name)) for name in built):
        raise MismatchError(
            f"{name}: tied to the head, and an adapter would displace only one of them",
            fix=f"leave it at the base with --exclude {name}, or use --as delta",
        )


def _dense_factor(recipe: Recipe, item: Item, variants: Sequence[Variant]) -> Factor:
    """The factors of an update that a full model has, and that the chain leaves at a low rank."""
    dtypes = {stored_dtype(delta) for delta in item.deltas if delta is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    dtype = dtype if recipe.dtype == "keep" else STORED[recipe.dtype]
    rank = min(*matrix_shape(item.site.shape), _limit(item, variants))
    site = item.site
    # Kernels that cut images into patches are called embeddings too.
    embedding = site.kind == "embedding" and len(site.shape) == 2 and not site.transposed
    return Factor(rank, site.shape, site.transposed or embedding, dtype, embedding)


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
