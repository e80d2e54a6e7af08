"""What an output consists of: tensors, layout, and the files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergebench.adapters_zoo.kinds.delta import delta_metadata
from mergebench.adapters_zoo.pack import PackedLayout
from mergebench.card import card
from mergebench.checkpoints.layout import Checkpoint
from mergebench.checkpoints.placement import PT, Layout, TensorSpec, plan_layout
from mergebench.checkpoints.sizes import parse_size
from mergebench.compute.backend import lapack
from mergebench.core.errors import ParameterError
from mergebench.core.tensor import FLOATING
from mergebench.manifest import CARD, DIGESTS, KEY, RECIPE, as_metadata, manifest, no_digests
from mergebench.merge.align import Aligned
from mergebench.merge.chains import tolerance_of
from mergebench.merge.collected import Collected
from mergebench.merge.companions import companions, left_behind
from mergebench.merge.item import Item
from mergebench.merge.lora_layout import (
    STORED,
    Module,
    dense_bytes,
    dialect,
    lora_layout,
    stored_dtype,
)
from mergebench.merge.method import METHODS
from mergebench.merge.provenance import inputs_of, library_of, origins_of
from mergebench.merge.template import with_template
from mergebench.merge.variants import Variant
from mergebench.recipe import Recipe
from mergebench.sources import Source

#: Stem of the weights inside an output folder.
STEMS = {"model": "model", "lora": "adapter_model", "delta": "delta"}


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
        return manifest(variant.stored.to_dict(), inputs, self.form, self.notes)

    def layout_of(self, variant: Variant) -> Layout:
        """The layout; in a single file the header carries the manifest of this variant."""
        if not self.single_file:
            return self.layout
        extra = as_metadata(self.manifest_of(variant))
        if KEY in self.metadata:
            merged = {**json.loads(extra[KEY]), **json.loads(self.metadata[KEY])}
            extra = {KEY: json.dumps(merged, sort_keys=True)}
        entries = {**self.metadata, **extra, DIGESTS: no_digests(len(self.specs))}
        return plan_layout(self.specs, STEMS[self.form], None, metadata=entries, late=DIGESTS)

    def sides(self, variant: Variant) -> dict[str, bytes | Path]:
        """Files that stand beside the weights in a folder; none for a single file."""
        if self.single_file:
            return {}
        beside: dict[str, bytes | Path] = dict(self.companions)
        if self.config:
            beside["adapter_config.json"] = (json.dumps(self.config, indent=2) + "\n").encode()
        recipe = variant.stored.to_yaml()
        method = variant.recipe.method
        beside[RECIPE] = recipe.encode()
        beside[CARD] = card(
            title=variant.out.name if variant.out is not None else "merged",
            kind=self.form,
            recipe_yaml=recipe,
            recipe_file=RECIPE,
            method=method or ("a chain of ops" if variant.recipe.ops else ""),
            paper=METHODS[method].paper if method else "",
            inputs=self.about["inputs"],
            origins=self.origins,
            library=self.about["library"],
            parts=[
                (
                    each.select,
                    each.method or "a chain of ops",
                    METHODS[each.method].paper if each.method else "",
                )
                for each in variant.recipe.parts
            ],
        ).encode()
        return beside


def package(
    recipe: Recipe,
    form: str,
    aligned: Aligned,
    models: Sequence[Source],
    weights: Sequence[Any],
    base: Source | None,
    first: Source | None,
    variants: Sequence[Variant],
    sides: Mapping[str, bytes | Path | None] | None = None,
    ranks: Mapping[str, int] | None = None,
    *,
    collected: Sequence[Collected | None] = (),
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
    if form != "model" and shard_size is not None:
        raise ParameterError("--shard-size is for models", fix="leave it out: one file is written")
    reference = base or first
    under = None if base is None else base.checkpoint
    stored = {
        name: _stored_dtype(item, recipe.dtype, form, under) for name, item in aligned.items.items()
    }
    if form != "model":
        dialect(aligned.items)
    packed: PackedLayout | None = None
    modules: dict[str, Module] = {}
    renamed: dict[str, str] = {}
    metadata: Mapping[str, str] = PT
    served: tuple[str, ...] = ()
    if form == "lora":
        packed, modules, served = lora_layout(
            recipe, aligned, models, base, variants, stored, ranks
        )
        renamed = {t.source: t.name for t in packed.tensors if t.role == "value"}
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in packed.tensors]
        metadata = packed.metadata
    else:
        specs = _specs(aligned, stored, recipe.dtype)
    if form == "delta":
        identity = None if base is None else {"fingerprint": base.fingerprint, "path": base.label}
        metadata = delta_metadata(identity, replaced=list(aligned.copies))
    stem = _stem(form, reference, packed)
    layout = plan_layout(specs, stem, shard_size, metadata=PT if not single else metadata)
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
        dense_bytes=dense_bytes(aligned, modules, form, variants),
        metadata=metadata,
        about={
            "inputs": inputs_of(models, weights, base, collected),
            "library": library_of(form, reference, packed),
        },
        origins=tuple(origins_of(models, base)),
        config={} if packed is None else packed.config,
        companions=with_template(
            companions(recipe, form, reference, sides or {}),
            recipe.chat_template,
            None if form != "model" or single else reference,
            models,
        ),
        notes=(
            *(note for model in models if model.deltas is not None for note in model.deltas.notes),
            *left_behind(form, reference),
            *served,
            *tolerances(variants),
        ),
    )


def _stem(form: str, reference: Source | None, packed: PackedLayout | None) -> str:
    """What the weights in a folder are called; diffusers looks for names of its own."""
    if packed is not None and not packed.config:
        return "pytorch_lora_weights"
    known = reference.checkpoint.config if reference and reference.checkpoint else None
    diffusers = form == "model" and known is not None and "_class_name" in known
    return "diffusion_pytorch_model" if diffusers else STEMS[form]


def _stored_dtype(item: Item, asked: str, form: str, base: Checkpoint | None) -> str:
    if asked != "keep":
        return STORED[asked]
    if form == "delta":
        return "F64" if item.dtype.itemsize == 8 else "F32"
    if base is not None and item.site.name in base.tensors:
        return base.tensors[item.site.name].dtype
    found = {stored_dtype(delta) for delta in item.deltas if delta is not None}
    if len(found) == 1:
        return found.pop()
    return "F64" if "F64" in found else "F32"


def _specs(aligned: Aligned, stored: Mapping[str, str], asked: str) -> list[TensorSpec]:
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
            floating = tensor.dtype in FLOATING and asked != "keep"
            dtype = STORED[asked] if floating else tensor.dtype
            specs.append(TensorSpec(name, dtype, tensor.shape))
    return specs


def tolerances(variants: Sequence[Variant]) -> tuple[str, ...]:
    """What decomposed the matrices, where that decides the last digits."""
    tolerance = max(tolerance_of(ops) for each in variants for ops in each.distinct)
    if not tolerance:
        return ()
    done = f"matrices were decomposed by {lapack()} in float64; another LAPACK may differ by"
    return (f"{done} {tolerance:g} of a tensor's largest entry",)
