"""LoRA: ``ΔW = scale · B A``, in the names of PEFT, Kohya, diffusers, ComfyUI and loralib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mergebench.adapters_zoo.adapter import (
    KINDS,
    AdapterSource,
    Kind,
    ReadOptions,
    is_saved_delta,
)
from mergebench.adapters_zoo.dialects import WHOLE, Part, Role, dotted, kohya, peft
from mergebench.adapters_zoo.factors import Pair, lay, put, rank_of
from mergebench.adapters_zoo.lazy import Scaled
from mergebench.adapters_zoo.lora_settings import (
    for_module,
    read_settings,
    scale_of,
    stated,
)
from mergebench.adapters_zoo.refusals import family_of, refuse_features
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.adapters_zoo.tucker import without_cores
from mergebench.adapters_zoo.values import add_values, is_declared
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.site import kind_of

_FACTORS: tuple[tuple[Role, Role], ...] = (("A", "B"), ("embedding_A", "embedding_B"))


def _detect(source: AdapterSource) -> frozenset[str]:
    if is_saved_delta(source.metadata):
        return frozenset()
    if any(one.entries.get("target_parameters") for one in stated(source)):
        return frozenset()
    return max(_kohya_keys(source), _peft_keys(source), key=len)


def _kohya_keys(source: AdapterSource) -> frozenset[str]:
    parts = {key: kohya.parse(key) for key in source.tensors}
    adapted = {part.module for part in parts.values() if part and part.role in ("A", "B")}
    return frozenset(key for key, part in parts.items() if part and part.module in adapted)


def _peft_keys(source: AdapterSource) -> frozenset[str]:
    settings = read_settings(source)
    parts = {key: dotted.parse(key) for key in source.tensors}
    factors = {role for pair in _FACTORS for role in pair}
    adapted = {part.module for part in parts.values() if part and part.role in factors}

    def ours(key: str, part: Part) -> bool:
        if part.role not in WHOLE:
            return part.module in adapted
        if part.role == "saved_base":
            return part.module in adapted or is_declared(part, settings)
        if family_of(key) is not None:
            return False
        if is_declared(part, settings):
            return True
        # PEFT saves the embeddings and the head undeclared once the vocabulary was resized.
        name, shape = f"{part.module}.{part.param}", source.tensors[key].shape
        resizable = kind_of(name, shape) in ("embedding", "head") and len(shape) == 2
        plain = part.role == "value" and part.param == "weight" and key.startswith(peft.PREFIX)
        return bool(adapted) and plain and resizable

    return frozenset(key for key, part in parts.items() if part and ours(key, part))


def _read(source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    for one in stated(source):
        refuse_features(source.label, one.where, one.entries)
    names = None if options.base_shapes is None else BaseNames(options.base_shapes)
    if _kohya_keys(source):
        return _read_kohya(source, options, names)
    return _read_peft(source, options, names)


def _read_kohya(
    source: AdapterSource, options: ReadOptions, names: BaseNames | None
) -> dict[str, Delta]:
    pairs = []
    source = without_cores(source)
    for module, roles in _by_module(source, kohya.parse).items():
        key_a, key_b = _both(source.label, module, roles, ("A", "B"))
        rank = rank_of(source, key_a, key_b)
        alpha = _alpha(source, roles.get("alpha"))
        if alpha is None and source.config is not None:
            raise FormatError(
                f"{source.label}: {module} has no .alpha, which means scale 1 in Kohya's names, "
                "but there is an adapter_config.json too",
                fix="remove the config for scale 1, or write the .alpha tensors",
            )
        if alpha is None:
            alpha = options.lora_alpha
        scale = 1.0 if alpha is None else alpha / rank
        pairs.append(Pair(module, key_a, key_b, f"{module}.weight", scale))
    return lay(source, options, pairs, names, lambda base, pair: base.flattened(pair.module))[0]


def _read_peft(
    source: AdapterSource, options: ReadOptions, names: BaseNames | None
) -> dict[str, Delta]:
    settings = read_settings(source)
    modules = _by_module(source, dotted.parse)
    unscaled = _unscaled(source)
    pairs = []
    for module, roles in modules.items():
        mine = for_module(settings, module)
        for form in _FACTORS:
            if not (form[0] in roles or form[1] in roles):
                continue
            key_a, key_b = _both(source.label, module, roles, form)
            rank = rank_of(source, key_a, key_b)
            scale = scale_of(
                source.label,
                key_a,
                module,
                rank,
                mine,
                alpha=_alpha(source, roles.get("alpha")),
                fallback=rank if unscaled and options.lora_alpha is None else options.lora_alpha,
            )
            embedding = form[0] == "embedding_A"
            pairs.append(
                Pair(
                    module,
                    key_a,
                    key_b,
                    f"{module}.weight",
                    scale,
                    embedding,
                    mine.fan_in_fan_out,
                )
            )
    deltas, targets = lay(
        source, options, pairs, names, lambda base, pair: base.dotted(pair.target)
    )
    for pair in pairs:
        if key := modules[pair.module].get("bias"):
            name = targets[pair.module].removesuffix("weight") + "bias"
            _add_bias(source, deltas, name, key, pair.scale, names)
    add_values(source, options, deltas, source.tensors, settings, names)
    return deltas


def _unscaled(source: AdapterSource) -> bool:
    """Whether every factor is spelled in a dialect whose files mean scale 1 without α."""
    parts = [part for key in source.tensors if (part := dotted.parse(key)) is not None]
    return set(dotted.dialect_of(parts).split("; ")) <= dotted.UNSCALED


def _add_bias(
    source: AdapterSource,
    deltas: dict[str, Delta],
    name: str,
    key: str,
    scale: float,
    names: BaseNames | None,
) -> None:
    tensor = source.tensors[key]
    stored = tensor.shape if names is None else names.shapes.get(name)
    if stored != tensor.shape:
        raise MismatchError(
            f"{source.label}: {key} displaces {name}",
            expected="a base that has this bias" if stored is None else f"shape {stored}",
            got="none" if stored is None else str(tensor.shape),
            fix="check that --base is the model that the adapter was trained on",
        )
    put(source.label, deltas, name, key, Dense(Scaled(tensor, scale)))


def _by_module(
    source: AdapterSource, parse: Callable[[str], Part | None]
) -> dict[str, dict[Role, str]]:
    """Keys of factors, biases and α by module and role, modules in name order.

    Raises
    ------
    FormatError
        If two tensors play one role, or the names hold several adapters.
    """
    found: dict[str, dict[Role, str]] = {}
    adapters: dict[str, str] = {}
    for key in source.tensors:
        part = parse(key)
        if part is not None and part.adapter:
            adapters.setdefault(part.adapter, key)
        if part is None or part.role in WHOLE:
            continue
        roles = found.setdefault(part.module, {})
        if other := roles.get(part.role):
            raise FormatError(f"{source.label}: {other} and {key} are the same factor")
        roles[part.role] = key
    if len(adapters) > 1:
        raise FormatError(
            f"{source.label}: the file holds several adapters",
            got=", ".join(f"{name!r} ({key})" for name, key in sorted(adapters.items())),
            expected="one",
            fix="save them separately",
        )
    return dict(sorted(found.items()))


def _both(
    label: str, module: str, roles: Mapping[Role, str], form: tuple[Role, Role]
) -> tuple[str, str]:
    if form[0] in roles and form[1] in roles:
        return roles[form[0]], roles[form[1]]
    present = roles.get(form[0]) or roles.get(form[1])
    raise FormatError(f"{label}: {module} has only one of the factors A and B", got=str(present))


def _alpha(source: AdapterSource, key: str | None) -> float | None:
    if key is None:
        return None
    tensor = source.tensors[key]
    alpha = float(tensor.read(0, 1)[0]) if math.prod(tensor.shape) == 1 else math.nan
    if not math.isfinite(alpha) or alpha == 0:
        raise FormatError(
            f"{source.label}: {key} is no α (programs disagree on the meaning of 0)",
            got=f"{alpha} of shape {tensor.shape}",
            expected="one finite number other than 0",
        )
    return alpha


KINDS.add(
    "lora",
    Kind(
        name="lora",
        formula="ΔW = (α/r) · B A, or (α/√r) · B A where rank-stabilised",
        detect=_detect,
        read=_read,
        notes="LoRA arXiv:2106.09685, rank-stabilised arXiv:2312.03732. Linear, embedding and "
        "convolution, with Tucker cores too (LoCon's lora_mid); names of PEFT, Kohya, diffusers, "
        "ComfyUI and loralib. Files without α have scale 1 where their program gives them that "
        "(Kohya, diffusers, ComfyUI).",
        peft_types=frozenset({"LORA"}),
    ),
)
