"""Adapters that are recognised and not read, each with its reason.

Three tables: by ``peft_type``, by a feature in the config of a LoRA, by a tensor name. A kind
that claims a type or a tensor is asked first, so adding one needs no edit here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, NoReturn

from mergebench.core.errors import FormatError, did_you_mean

_ROUTED = "it is routed per token or per task, so no single displacement of a weight exists"
_PROMPT = "it acts on activations and displaces no weight"
_SHADOW = "its update depends on the input, so no single displacement of a weight exists"
_LATER = "not supported yet"
_MIXED = "it is not complete, or stands among tensors of another kind"
_CONFIG = "what it means stands in an adapter_config.json of its type, which must lie beside it"

#: Every ``peft_type`` of PEFT 0.21 that is not read, and why it never will be.
PEFT_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("XLORA", "POLY", "LILY"), _ROUTED),
    **dict.fromkeys(
        (
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "ADAPTION_PROMPT",
            "CPT",
            "CARTRIDGE",
        ),
        _PROMPT,
    ),
    "SHADOW": _SHADOW,
}

#: Config entries of a LoRA that, when set, make ΔW something else than scale · BA.
FEATURES: Mapping[str, str] = {
    "use_dora": "DoRA stores magnitudes (lora_magnitude_vector), and the file has none",
    "alora_invocation_tokens": "aLoRA acts on some tokens only and cannot be merged",
    "layer_replication": "it belongs to a model with repeated layers, not to the base",
    "use_bdlora": "BD-LoRA stores block-diagonal factors; not supported yet",
    "use_qalora": "QALoRA pools the inputs of a quantized base; not supported yet",
    "kasa_config": "KaSA truncates the base weights, so ΔW alone is not the update",
    "arrow_config": "Arrow routes between adapters per token",
    "monteclora_config": "MonteCLoRA samples its factors; not supported yet",
    "trainable_token_indices": "it trains token rows, and the file has none",
    "enable_lora": "merged linear layers of PEFT before its release are not supported",
}
#: ``init_lora_weights`` that subtract the initial factors from the base before training.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_HARMLESS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})
#: ``use_…`` and ``…_config`` entries that leave ΔW = scale · BA as it is.
_KNOWN_ENTRIES = frozenset(
    {
        *("use_rslora", "megatron_config", "runtime_config", "loftq_config", "eva_config"),
        *("corda_config", "lora_ga_config", "velora_config"),
    }
)

# Suffixes as short as `diff` or `b1.weight` also occur in models, so the whole name must fit.
_LYCORIS = r"^(lora_|lycoris_|diffusion_model\.).*"

#: Family -> tensor names that betray it, and why a file of it is not read (yet).
FAMILIES: Mapping[str, tuple[str, str]] = {
    "DoRA": (
        r"\.lora_magnitude_vector(\.|$)|\.dora_scale$",
        _MIXED,
    ),
    "KaSA": (r"\.lora_diag(\.|$)", FEATURES["kasa_config"]),
    "LoRA with a middle factor": (
        r"\.lora_mid\.weight$",
        _MIXED,
    ),
    "LoRA on nn.MultiheadAttention": (
        r"\.base_layer\.out_proj\.lora_[AB](\.|$)",
        (
            "PEFT up to 0.21 adds its output projection twice while training, so the update that "
            "was trained depends on PEFT's version"
        ),
    ),
    "LoRA on stacked experts": (
        r"\.base_layer\.lora_[AB](\.|$)",
        "adapter_config.json, which names the parameters (target_parameters), must lie beside it",
    ),
    "AdaLoRA or loralib": (
        r"\.lora_([ABE]|ranknum)(\.[^.]+)?$",
        _MIXED,
    ),
    "trained token rows": (
        r"(^|\.)trainable_tokens_(delta|indices)(\.|$)",
        _MIXED,
    ),
    "LoHa": (r"\.hada_[wt]\d", _MIXED),
    "LoKr": (r"\.lokr_[wt]\d", _MIXED),
    "(IA)³": (rf"\.ia3_l(\.|$)|{_LYCORIS}\.on_input$", _LATER),
    "full difference (LyCORIS)": (
        rf"{_LYCORIS}\.(diff(_b)?|[wb]_norm)$",
        _LATER,
    ),
    "GLoRA (LyCORIS)": (
        rf"{_LYCORIS}\.[ab][12]\.weight$",
        (
            "its update W A + B is not computed yet; merge it into the base with LyCORIS and give "
            "the merged checkpoint"
        ),
    ),
    "LoRA in XLabs' names": (
        r"(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora\d?\.(down|up)\.weight$",
        (
            "not supported yet; diffusers reads them (load_lora_weights) and saves others "
            "(transformer.save_lora_adapter)"
        ),
    ),
    "LoRA in diffusers' old names": (
        r"(\.lora|_lora|\.lora_linear_layer)\.(up|down)\.weight$",
        _MIXED,
    ),
    "LoRA in dotted Kohya names": (r"\.lora_(down|up)\.weight$", _MIXED),
    "LoRA in cloneofsimo's names": (
        r"^(unet|text_encoder)(:unet)?:\d+:(up|down)$",
        (
            "modules are numbered in the order in which the code of the trained model made them, "
            "which no name in a base tells; convert it with the program that trained it"
        ),
    ),
    "LoRA on an enlarged weight": (
        r"\.reshape_weight$",
        (
            "it is meant for a weight padded with zeros to a larger shape (reshape_weight); pad "
            "the base first"
        ),
    ),
    "VeRA": (r"(^|\.)vera_(lambda_[bd]|A|B)(\.|$)", _MIXED),
    "PVeRA": (r"(^|\.)pvera_(lambda_[bd]|A|B)(\.|$)", _CONFIG),
    "RandLoRA": (r"(^|\.)randlora_(lambda|gamma|A|B)(\.|$)", _CONFIG),
    "FourierFT or WaveFT": (r"\.\w+_spectrum(\.|$)", _CONFIG),
    "VB-LoRA": (r"(^|\.)vblora_(logits_[AB]|vector_bank)", _CONFIG),
    "UniLoRA": (r"(^|\.)unilora_(indices|scales|theta_d)", _CONFIG),
    "TinyLoRA": (r"(^|\.)tinylora_[ABPv](\.|$)", _CONFIG),
    "DeLoRA": (r"\.delora_(A|B|lambda|w_norm)(\.|$)", _CONFIG),
    "GraLoRA": (r"\.gralora_[AB](_general)?(\.|$)", _CONFIG),
    "Super-Tuning": (r"\.supertuning_(values|indices|lora_[AB])(\.|$)", _CONFIG),
    "AdaMSS": (r"\.adamss_(A|B|newB)(\.|$)", _CONFIG),
    "HiRA": (r"\.hira_(embedding_)?[AB](\.|$)", _CONFIG),
    "PSOFT": (r"\.psoft_R\.", _CONFIG),
    "OSF": (r"\.osf_svd_params\.", _CONFIG),
    "DEFT": (r"\.deft_[PR](\.|$)", _CONFIG),
    "PEANuT": (r"\.peanut_(A|B|encoders|decoders)\.", _CONFIG),
    "GLoRA": (r"\.glora_[A-E]\.", _CONFIG),
    "RoAd": (r"\.road_(theta|alpha)(\.|$)", _CONFIG),
    "FRoD": (r"(^|\.)frod_(lambda_l|lambda_s_values|V|s_\w+)(\.|$)", _MIXED),
    "BEFT": (r"\.beft_bias(\.|$)", _MIXED),
    "LN tuning": (r"\.ln_tuning_layers\.", _MIXED),
    "SHiRA": (r"\.shira_(weight|indices)(\.|$)", _MIXED),
    "C3A": (r"\.c3a_kernel(\.|$)", _MIXED),
    "MiSS": (r"\.(miss|bone)_block(\.|$)", _MIXED),
    "OFT or BOFT": (r"\.b?oft_(R|s)(\.|$)", _MIXED),
    "OFT (LyCORIS)": (rf"\.oft_blocks(\.|$)|{_LYCORIS}\.rescale$", _LATER),
    "HRA": (r"\.hra_u(\.|$)", _MIXED),
    "prompt or prefix tuning": (r"(^|\.)prompt_(embeddings|encoder)(\.|$)", _PROMPT),
}


_KOHYA = re.compile(r"lora_(unet|te\d*|transformer|prior_unet)[_.]")
# Names of unclaimed tensors that an error lists.
_SHOWN = 8


def refuse_type(label: str, peft_type: str, read: Iterable[str]) -> NoReturn:
    """Refuse a whole adapter by the type its config names.

    Parameters
    ----------
    label : str
        The adapter, as messages call it.
    peft_type : str
    read : iterable of str
        The types that registered kinds read.

    Raises
    ------
    FormatError
        Always.
    """
    if reason := PEFT_TYPES.get(peft_type):
        raise FormatError(f"{label}: peft_type {peft_type} cannot be opened: {reason}")
    raise FormatError(
        f"{label}: unknown peft_type {peft_type!r}",
        fix=did_you_mean(peft_type, {*PEFT_TYPES, *read}),
    )


def refuse_features(label: str, where: str, config: Mapping[str, Any]) -> None:
    """Refuse a LoRA whose config asks for more than scale · BA on an unchanged base.

    Raises
    ------
    FormatError
        Naming the entry and the reason.
    """
    for entry, reason in FEATURES.items():
        if config.get(entry):
            raise FormatError(f"{label}: {where} sets {entry}: {reason}")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_BASE_CHANGING):
        raise FormatError(
            f"{label}: {where} has init_lora_weights {start!r}, which modified the base: "
            "BA is not the difference from the original weights",
            fix="save it again with PEFT's path_initial_model_for_weight_conversion",
        )
    if start not in _HARMLESS:
        raise FormatError(
            f"{label}: {where} has an unknown init_lora_weights, which may have modified the base",
            got=repr(start),
            expected=", ".join(sorted(_HARMLESS)),
        )
    for entry, value in config.items():
        special = entry.startswith("use_") or entry.endswith("_config")
        if special and value and entry not in _KNOWN_ENTRIES:
            raise FormatError(
                f"{label}: {where} sets {entry}, a feature that this version does not know",
                got=repr(value),
            )


def family_of(key: str) -> str | None:
    """The family whose tensors are named like this; None where no table entry matches."""
    # Whole checkpoints are asked about, name by name, and almost none matches.
    if not _any_family().search(key):
        return None
    return next((name for name, (form, _) in FAMILIES.items() if re.search(form, key)), None)


@cache
def _any_family() -> re.Pattern[str]:
    # Compiled when first asked for: it takes as long as the import of ten modules.
    return re.compile("|".join(form for form, _ in FAMILIES.values()))


def refuse_keys(label: str, unclaimed: Collection[str]) -> NoReturn:
    """Refuse a file because of tensors that no kind claims.

    Raises
    ------
    FormatError
        Always; it names the family where the names betray one, else the first few names.
    """
    names = sorted(unclaimed)
    for key in names:
        if family := family_of(key):
            raise FormatError(f"{label}: {key} is of the kind {family}: {FAMILIES[family][1]}")
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    fix = (
        "remove them from the file, or list their modules in modules_to_save if they were "
        "trained in full"
    )
    if any(map(like_kohya, names)):
        fix = (
            "rename them: Kohya's names are lora_unet_<path with underscores> followed by "
            ".lora_down.weight, .lora_up.weight or .alpha, with both factors of a module"
        )
    raise FormatError(
        f"{label}: {len(names)} tensors belong to no adapter kind",
        got=", ".join(names[:_SHOWN]) + more,
        fix=fix,
    )


def like_kohya(key: str) -> bool:
    """Whether a name begins as Kohya's do, whatever follows."""
    return _KOHYA.match(key) is not None
