"""The layout of a merged LoRA: ranks, dtypes and names of its factors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import frexp
from typing import Any, Literal

from mergebench.adapters_zoo.layouts.spelling import Named, component_of, spelled
from mergebench.adapters_zoo.layouts.view import view_of
from mergebench.adapters_zoo.pack import Factor, PackedLayout, PackedTensor, pack_lora
from mergebench.adapters_zoo.targets import Target, check_served, default_target, target_named
from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.ties import is_tied
from mergebench.compute.matrices import matrix_shape
from mergebench.core.delta import LowRank
from mergebench.core.errors import MismatchError
from mergebench.core.site import kind_of
from mergebench.merge.align import Aligned
from mergebench.merge.chains import coefficients, is_linear, rank_of
from mergebench.merge.core_space import fits
from mergebench.merge.corrected import added_rank, corrects
from mergebench.merge.extraction import is_bounded, is_low
from mergebench.merge.item import Item
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
    specs : tuple of PackedTensor
        A and B, and α in Kohya's names; of several modules where they share a weight.
    full_rank : int
        Rank at which nothing is lost; larger than ``own_rank`` where the user asked for less.
    """

    own_rank: int
    rank: int
    transposed: bool
    specs: tuple[PackedTensor, ...]
    full_rank: int


def lora_layout(
    recipe: Recipe,
    aligned: Aligned,
    models: Sequence[Source],
    base: Source | None,
    variants: Sequence[Variant],
    stored: Mapping[str, str],
    ranks: Mapping[str, int] | None = None,
) -> tuple[PackedLayout, dict[str, Module], tuple[str, ...]]:
    """Tensors, config and ranks of an adapter that holds the merged updates.

    Linear chains concatenate factors, so ranks add up; others are truncated to the summed rank,
    or to less where the chain leaves less. Updates of full models have the rank that the chain
    leaves them; ``stored`` has the dtype of what is written in full (see
    :func:`~mergebench.merge.extraction.for_adapter`).

    Parameters
    ----------
    ranks : mapping of tensor name to int, optional
        Most rank of each module, where the data have been asked (``recipe.energy``).

    Returns
    -------
    PackedLayout, dict of tensor name to Module, and notes for the user

    Raises
    ------
    MismatchError
        If an input is no LoRA, inputs disagree on orientation or on the form of names, or the
        program that it is for does not take it.
    """
    known = None if base is None or base.checkpoint is None else base.checkpoint
    view = None if known is None else view_of({n: t.shape for n, t in known.tensors.items()})
    flat = dialect(aligned.items) == "kohya"
    target = (
        default_target(list(aligned.items), flat, None if view is None else view.layout)
        if recipe.target is None
        else target_named(recipe.target)
    )
    if flat and target.dialect != "kohya":
        raise MismatchError(
            f"{min(aligned.items)}: a flattened name (Kohya's) cannot be written for "
            f"{target.name}, since its dots are lost",
            fix="add --base with the model that the adapters were trained on",
        )
    spelling: Mapping[str, tuple[Named, ...]] = {}
    if target.dialect != "peft":
        component = recipe.part or component_of(None if known is None else known.config)
        spelling = spelled(list(aligned.items), target.dialect, view, component)
    factors: dict[str, Factor] = {}
    full: dict[str, int] = {}
    replaced: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, item in aligned.items.items():
        if item.base is not None:
            _check_untied(name, item, base)
            replaced[name] = stored[name], item.site.shape
            continue
        asked = recipe.rank is not None or recipe.energy is not None
        if not is_low(item) and (is_bounded(item, variants) or asked):
            _check_untied(name, item, base)
            whole, exact = _dense_factor(item, variants), False
            unasked = whole.rank
        else:
            whole, unasked, exact = _low_factor(name, item, variants)
        full[name] = whole.rank
        rank = _rank(recipe, whole, unasked, None if ranks is None else ranks[name])
        # What is only stacked keeps its digits, if its dtype can hold them.
        dtype = "F32" if exact and rank == whole.rank else whole.dtype
        dtype = _dtype_for(recipe, target, known, name, dtype)
        modules_of = spelling.get(name, ())
        factors[name] = replace(whole, rank=rank, dtype=dtype, modules=modules_of)
    largest = max((factor.rank for factor in factors.values()), default=1)
    packed = pack_lora(
        factors,
        dialect=target.dialect,
        base_name=_base_name(models, base),
        replacements={name: (t.dtype, t.shape) for name, t in aligned.copies.items()} | replaced,
        known_names=None if known is None else known.tensors,
        rank=target.padded(largest),
    )
    shapes = {tensor.name: tensor.shape for tensor in packed.tensors}
    notes = check_served(target, packed.config, shapes, target.padded(largest))
    modules = {}
    for name, factor in factors.items():
        specs = tuple(t for t in packed.tensors if t.source == name)
        rank = next(t.shape[0] for t in specs if t.role == "A")
        modules[name] = Module(factor.rank, rank, factor.transposed, specs, full[name])
    return packed, modules, notes


def _low_factor(name: str, item: Item, variants: Sequence[Variant]) -> tuple[Factor, int, bool]:
    """The factors of a merged LoRA at the rank that loses nothing, and of it what is kept unasked.

    Last, whether the dtype of the inputs cannot hold them as they are.
    """
    low = _low_rank(name, item)
    rows, summed = item.site.shape[0], sum(delta.rank for delta in low)
    most, full = min(rows, item.site.size // rows), summed
    chains = [each.at(name) for each in variants]
    linear = all(map(is_linear, chains))
    if not linear and all(is_linear(ops) or corrects(ops) for ops in chains):
        # Corrections stand beside the factors, so that nothing is lost unasked.
        linear, full = (
            True,
            summed + max(added_rank(ops, matrix_shape(item.site.shape)) for ops in chains),
        )
        summed = full
    elif not linear:
        # What cannot be merged in factors may have any rank; unasked, the summed one is kept.
        factored = all(is_linear(ops) or fits(ops, item) for ops in chains)
        full = min(min(summed, most) if factored else most, _limit(item, variants))
    dtypes = {stored_dtype(delta) for delta in low}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    factor = Factor(full, item.site.shape, low[0].transposed, dtype, low[0].embedding)
    exact = all(map(is_linear, chains)) and _exactly(dtype, item, variants)
    return factor, summed, linear and not exact and dtype != "F64"


def _rank(recipe: Recipe, whole: Factor, unasked: int, energy: int | None) -> int:
    """The rank that is written: what was asked for, by size or by energy."""
    most = unasked
    if recipe.rank is not None or energy is not None:
        most = min(recipe.rank or whole.rank, energy or whole.rank)
    if whole.rank <= most:
        # A concatenation that is small enough loses nothing and costs no decomposition.
        return whole.rank
    return min(most, *matrix_shape(whole.shape))


def _dtype_for(
    recipe: Recipe, target: Target, known: Checkpoint | None, name: str, own: str
) -> str:
    """The dtype of factors: what was asked for, the base's for servers, or ``own``."""
    if recipe.dtype != "keep":
        return STORED[recipe.dtype]
    if target.serves and known is not None and name in known.tensors:
        # Servers cast factors to the model's dtype when they load them.
        return known.tensors[name].dtype
    return own


def _low_rank(name: str, item: Item) -> list[LowRank]:
    """The inputs' factors.

    Raises
    ------
    MismatchError
        If an input has none, or they disagree on the orientation of the weight.
    """
    found = [delta for delta in item.deltas if delta is not None]
    low = [delta for delta in found if isinstance(delta, LowRank)]
    if len(low) < len(found):
        odd = next(type(delta).__name__ for delta in found if not isinstance(delta, LowRank))
        raise MismatchError(
            f"{name}: the merged update is not a LoRA ({odd.lower()} input)",
            fix="truncate it with --rank or --energy, use --as delta, or --as model with --base",
        )
    if len({delta.transposed for delta in low}) > 1:
        raise MismatchError(
            f"{name}: some inputs store it input × output and others do not",
            fix="use --as delta",
        )
    return low


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


def _dense_factor(item: Item, variants: Sequence[Variant]) -> Factor:
    """The factors of an update that a full model has, and that the chain leaves at a low rank."""
    dtypes = {stored_dtype(delta) for delta in item.deltas if delta is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
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
        factored = is_low(item) and all(
            is_linear(ops) or corrects(ops) or fits(ops, item)
            for ops in (each.at(name) for each in variants)
        )
        dense = 0 if factored else 24 * rows * columns + 24 * least * least
        if factored and module.own_rank < module.full_rank:
            written += 24 * module.full_rank * (rows + columns)
        worst = max(worst, written + dense)
    return worst


def stored_dtype(delta: Any) -> str:
    """The dtype that a displacement, or a weight, came in."""
    if isinstance(delta, LowRank):
        return delta.B.dtype if delta.B.dtype == delta.A.dtype else "F32"
    tensor = getattr(delta, "finetuned", None) or delta.values
    # An adapter on a checkpoint is computed in float32 but stored as the checkpoint is.
    return str(tensor.weight.dtype if isinstance(tensor, Applied) else tensor.dtype)
