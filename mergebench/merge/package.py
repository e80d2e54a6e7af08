"""What an output consists of: tensors, layout, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergebench.adapters_zoo.kinds.delta import delta_metadata
from mergebench.adapters_zoo.pack import Factor, PackedLayout, PackedTensor, pack_lora
from mergebench.card import card
from mergebench.checkpoints.placement import PT, Layout, TensorSpec, plan_layout
from mergebench.checkpoints.sizes import parse_size
from mergebench.core.delta import LowRank
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.manifest import CARD, KEY, MANIFEST, RECIPE, as_metadata, manifest
from mergebench.merge.align import Aligned
from mergebench.merge.method import METHODS
from mergebench.merge.stream import Item
from mergebench.recipe import Recipe
from mergebench.sources import Source

if TYPE_CHECKING:
    from mergebench.merge.plan import Variant

_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32", "f64": "F64"}
_TORCH = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
#: Stem of the weights inside an output folder.
STEMS = {"model": "model", "lora": "adapter_model", "delta": "delta"}


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


@dataclass(frozen=True, eq=False)
class Package:
    """Everything about the outputs but their values.

    Attributes
    ----------
    form : model, lora or delta
    specs : tuple of TensorSpec
    layout : Layout
        Of every variant, but for the recipe in the metadata of single files.
    single_file : bool
    stored : mapping of tensor name to dtype
        Of the merged tensors.
    modules : mapping of tensor name to Module
        For LoRA outputs.
    renamed : mapping of tensor name to name in the file
        Replaced tensors of LoRA outputs.
    dense_bytes : int
        Memory for one merged matrix, where updates are truncated.
    """

    form: str
    specs: tuple[TensorSpec, ...]
    layout: Layout
    single_file: bool
    shard_size: int | None
    stored: Mapping[str, str]
    modules: Mapping[str, Module]
    renamed: Mapping[str, str]
    dense_bytes: int
    metadata: Mapping[str, str]
    about: Mapping[str, Any]
    origins: tuple[str | None, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    companions: Mapping[str, Path | bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def dtype_of(self, name: str) -> str:
        """Stored dtype of a merged tensor."""
        return self.stored[name]

    def manifest_of(self, variant: Variant) -> dict[str, Any]:
        """The manifest of one variant, before its digests are known."""
        inputs: list[Mapping[str, Any]] = self.about["inputs"]
        return manifest(variant.recipe.to_dict(), inputs, self.form, self.notes)

    def layout_of(self, variant: Variant) -> Layout:
        """The layout; in a single file the header carries the manifest of this variant."""
        if not self.single_file:
            return self.layout
        extra = as_metadata(self.manifest_of(variant))
        if KEY in self.metadata:
            merged = {**json.loads(extra[KEY]), **json.loads(self.metadata[KEY])}
            extra = {KEY: json.dumps(merged, sort_keys=True)}
        return plan_layout(self.specs, STEMS[self.form], None, metadata={**self.metadata, **extra})

    def sides(self, variant: Variant) -> dict[str, bytes | Path]:
        """Files that stand beside the weights in a folder; none for a single file."""
        if self.single_file:
            return {}
        beside: dict[str, bytes | Path] = dict(self.companions)
        if self.config:
            beside["adapter_config.json"] = (json.dumps(self.config, indent=2) + "\n").encode()
        recipe = variant.recipe.to_yaml()
        method = variant.recipe.method
        beside[RECIPE] = recipe.encode()
        beside[CARD] = card(
            title=variant.out.name if variant.out is not None else "merged",
            kind=self.form,
            recipe_yaml=recipe,
            method=method or "a chain of ops",
            paper=METHODS[method].paper if method else "",
            inputs=self.about["inputs"],
            origins=self.origins,
            library=self.about["library"],
        ).encode()
        return beside


def package(
    recipe: Recipe,
    form: str,
    aligned: Aligned,
    models: Sequence[Source],
    base: Source | None,
    linear: bool,
) -> Package:
    """Decide names, dtypes, ranks and files of the outputs.

    Raises
    ------
    MismatchError
        If the result cannot take the form asked for.
    """
    shard_size = None if recipe.shard_size is None else parse_size(recipe.shard_size)
    single = recipe.out is not None and recipe.out.endswith(".safetensors")
    if single and shard_size is not None:
        raise ParameterError("--shard-size needs an output folder", got=str(recipe.out))
    reference = base or next((m for m in models if m.checkpoint is not None), None)
    stored = {name: _stored_dtype(item, recipe.dtype, form) for name, item in aligned.items.items()}
    packed: PackedLayout | None = None
    modules: dict[str, Module] = {}
    renamed: dict[str, str] = {}
    metadata: Mapping[str, str] = PT
    if form == "lora":
        packed, modules = _lora(recipe, aligned, models, base, linear)
        renamed = {t.source: t.name for t in packed.tensors if t.role == "value"}
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in packed.tensors]
        metadata = packed.metadata
    else:
        specs = _specs(aligned, stored)
    if form == "delta":
        identity = None if base is None else {"fingerprint": base.fingerprint, "path": base.label}
        metadata = delta_metadata(identity, replaced=list(aligned.copies))
    layout = plan_layout(specs, STEMS[form], shard_size, metadata=PT if not single else metadata)
    if form == "delta" and not single:
        layout = plan_layout(specs, STEMS[form], None, metadata=metadata)
    return Package(
        form=form,
        specs=tuple(specs),
        layout=layout,
        single_file=single,
        shard_size=shard_size,
        stored=stored,
        modules=modules,
        renamed=renamed,
        dense_bytes=_dense_bytes(aligned, modules, form, linear),
        metadata=metadata,
        about={"inputs": _inputs(recipe, models, base), "library": _library(form, reference)},
        origins=tuple(_origins(models, base)),
        config={} if packed is None else packed.config,
        companions=_companions(recipe, form, reference),
        notes=_notes(form, reference),
    )


def _stored_dtype(item: Item, asked: str, form: str) -> str:
    if asked != "keep":
        return _DTYPES[asked]
    if form == "delta":
        return "F64" if item.dtype.itemsize == 8 else "F32"
    if item.base is not None:
        return item.base.dtype
    found = {_dtype_of(delta) for delta in item.deltas if delta is not None}
    if len(found) == 1:
        return found.pop()
    return "F64" if "F64" in found else "F32"


def _dtype_of(delta: Any) -> str:
    if isinstance(delta, LowRank):
        return delta.B.dtype if delta.B.dtype == delta.A.dtype else "F32"
    tensor = getattr(delta, "finetuned", None) or delta.values
    return str(tensor.dtype)


def _specs(aligned: Aligned, stored: Mapping[str, str]) -> list[TensorSpec]:
    specs = []
    twin_of = {twin: name for name, twins in aligned.twins.items() for twin in twins}
    names = dict.fromkeys(aligned.order)
    names.update(dict.fromkeys(twin_of))
    for name in names:
        source = twin_of.get(name, name)
        if source in aligned.items:
            specs.append(TensorSpec(name, stored[source], aligned.items[source].site.shape))
        elif source in aligned.copies:
            tensor = aligned.copies[source]
            specs.append(TensorSpec(name, tensor.dtype, tensor.shape))
    return specs


def _lora(
    recipe: Recipe,
    aligned: Aligned,
    models: Sequence[Source],
    base: Source | None,
    linear: bool,
) -> tuple[PackedLayout, dict[str, Module]]:
    factors: dict[str, Factor] = {}
    for name, item in aligned.items.items():
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
            rank = min(rank, rows, item.site.size // rows)
        dtypes = {_dtype_of(delta) for delta in low}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        dtype = dtype if recipe.dtype == "keep" else _DTYPES[recipe.dtype]
        factors[name] = Factor(rank, item.site.shape, low[0].transposed, dtype)
    packed = pack_lora(
        factors,
        dialect=_dialect(factors),
        base_name=_base_name(models, base),
        replacements={name: (t.dtype, t.shape) for name, t in aligned.copies.items()},
        known_names=None if base is None or base.checkpoint is None else base.checkpoint.tensors,
    )
    modules = {}
    for name, factor in factors.items():
        specs: dict[str, PackedTensor] = {t.role: t for t in packed.tensors if t.source == name}
        modules[name] = Module(factor.rank, specs["A"].shape[0], factor.transposed, specs)
    return packed, modules


def _dialect(names: Mapping[str, Factor]) -> Literal["peft", "kohya"]:
    """Kohya's flattened names cannot be told apart without a base, so they stay as they are."""
    flat = all(name.startswith("lora_") and name.count(".") == 1 for name in names)
    return "kohya" if flat else "peft"


def _base_name(models: Sequence[Source], base: Source | None) -> str | None:
    named = {model.config.get("base_model_name_or_path") for model in models if model.config}
    if len(named) == 1:
        return named.pop()
    return None if base is None else base.label


def _dense_bytes(aligned: Aligned, modules: Mapping[str, Module], form: str, linear: bool) -> int:
    if form != "lora":
        return 0
    worst = 0
    for name, module in modules.items():
        rows = aligned.items[name].site.shape[0]
        columns = aligned.items[name].site.size // rows
        written = 24 * module.rank * (rows + columns)
        least = min(rows, columns)
        # The matrix in float32 and twice in float64, and the Gram matrix with its eigenvectors.
        dense = 0 if linear else 24 * rows * columns + 24 * least * least
        worst = max(worst, written + dense)
    return worst


def _inputs(recipe: Recipe, models: Sequence[Source], base: Source | None) -> list[dict[str, Any]]:
    weights = {each.path: each.weight for each in recipe.models}
    found: list[dict[str, Any]] = []
    for role, source in [*(("base", base) for _ in [0] if base), *(("model", m) for m in models)]:
        assert source is not None
        each: dict[str, Any] = {"role": role, "path": source.label}
        if role == "model":
            each["weight"] = weights.get(source.label, 1.0)
        each["fingerprint"] = source.fingerprint
        each["files"] = [dict(one) for one in source.identity]
        found.append(each)
    return found


def _origins(models: Sequence[Source], base: Source | None) -> list[str | None]:
    found: list[str | None] = []
    for source in [*([base] if base else []), *models]:
        found.append(source.label)
        found.append(source.config.get("base_model_name_or_path"))
        if source.checkpoint is not None and source.checkpoint.config is not None:
            found.append(source.checkpoint.config.get("_name_or_path"))
    return found


def _library(form: str, reference: Source | None) -> str | None:
    if form == "lora":
        return "peft"
    known = reference.checkpoint.config if reference and reference.checkpoint else None
    return "transformers" if form == "model" and known and "model_type" in known else None


def _companions(recipe: Recipe, form: str, reference: Source | None) -> dict[str, Path | bytes]:
    """Files of the base that loaders need; its config says the dtype of the output."""
    if form != "model" or reference is None or reference.checkpoint is None:
        return {}
    ours = {MANIFEST, RECIPE, CARD}
    found: dict[str, Path | bytes] = {
        name: path for name, path in reference.checkpoint.sides().items() if name not in ours
    }
    config = reference.checkpoint.config
    if recipe.dtype != "keep" and config is not None and "config.json" in found:
        changed = _with_dtype(config, _TORCH[recipe.dtype])
        found["config.json"] = (json.dumps(changed, indent=2) + "\n").encode()
    return found


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with every dtype it names replaced, those of its parts included."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, Mapping) else value
    return changed


def _notes(form: str, reference: Source | None) -> tuple[str, ...]:
    if form != "model" or reference is None or reference.checkpoint is None:
        return ()
    left = reference.checkpoint.left_out
    return tuple(f"{path.name} is not copied to the output" for path in left)
