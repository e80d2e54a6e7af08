"""Families that PEFT's own layers compute: everything else that can be merged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from mergebench.adapters_zoo.adapter import KINDS, AdapterSource, Kind, ReadOptions
from mergebench.adapters_zoo.dialects import peft
from mergebench.adapters_zoo.factors import put
from mergebench.adapters_zoo.on_base import needs_base
from mergebench.adapters_zoo.peft_bridge import (
    Bridge,
    Form,
    Layer,
    Need,
    ThroughPeft,
    known,
    need_peft,
)
from mergebench.adapters_zoo.peft_order import in_order
from mergebench.adapters_zoo.peft_settings import (
    COUNT,
    FLAG,
    NUMBER,
    SEED,
    STEPS,
    Check,
    checked,
    one_of,
    settings_of,
)
from mergebench.adapters_zoo.peft_shapes import check_shapes
from mergebench.adapters_zoo.resolve import BaseNames
from mergebench.adapters_zoo.values import add_values, is_declared
from mergebench.core.delta import Delta, Dense
from mergebench.core.errors import FormatError, MismatchError
from mergebench.core.site import kind_of

_FAN = {"fan_in_fan_out": FLAG}
_SEEDED = (
    "the file stores no {what}: they are drawn again from its seed, which torch promises only for "
    "the version that trained it"
)


@dataclass(frozen=True)
class Family:
    """One family of PEFT.

    Attributes
    ----------
    name, formula, notes : str
    prefix : str
        Of its tensors, which is PEFT's name of the family with an underscore.
    need : str
        What it needs of the base.
    entries : mapping of str to Check
        Config entries that decide ΔW.
    patterns : mapping of str to str
        Exceptions for modules, and the entry that they are from.
    biased : bool
        Whether it moves biases.
    double : bool
        Whether PEFT computes it in float64.
    forms : frozenset of str
        Kinds of modules that it adapts, besides linear ones.
    drawn : mapping of tensor suffix to str
        What is drawn from a seed where no tensor has the suffix; ``""``: always.
    ordered : str
        The tensors without which the order of the modules matters.
    required : str
        Tensors that PEFT can leave out when it saves, and that cannot be made again.
    sides : tuple of two str, or None
        Factors (r, inputs) and (outputs, r), whose shapes say how a weight is stored where PEFT
        does not write that into the config.
    searches : bool
        Patterns may match anywhere in a path, not only its end.
    """

    name: str
    formula: str
    notes: str
    prefix: str
    need: Need
    entries: Mapping[str, Check]
    patterns: Mapping[str, str] = field(default_factory=dict)
    biased: bool = False
    double: bool = True
    forms: frozenset[Form] = frozenset()
    drawn: Mapping[str, str] = field(default_factory=dict)
    ordered: str = ""
    required: str = ""
    sides: tuple[str, str] | None = None
    searches: bool = False

    @property
    def tuner(self) -> str:
        """PEFT's name of the family."""
        return self.prefix.removesuffix("_")

    @property
    def peft_type(self) -> str:
        """As the config says it."""
        return self.tuner.upper()


_CONV1D: frozenset[Form] = frozenset({"conv1d"})
FAMILIES = (
    Family(
        "fourierft", "ΔW = scaling · Re ifft2(spectrum at drawn places)", "arXiv:2405.03003.",
        "fourierft_", "nothing",
        _FAN | {"n_frequency": COUNT, "scaling": NUMBER, "random_loc_seed": SEED},
        {"n_frequency_pattern": "n_frequency"}, forms=_CONV1D, drawn={"": "places"},
    ),
    Family(
        "waveft", "ΔW = scaling · inverse wavelet transform of a spectrum at drawn places",
        "arXiv:2505.12532.", "waveft_", "nothing",
        _FAN | {
            "n_frequency": COUNT, "scaling": NUMBER, "random_loc_seed": SEED, "use_idwt": FLAG,
            "wavelet_family": Check(
                "a short name", lambda value: bool(re.fullmatch(r"[a-z0-9.]{1,12}", str(value)))
            ),
            "proportional_parameters": FLAG,
        },
        {"n_frequency_pattern": "n_frequency"}, forms=_CONV1D, drawn={"": "places"},
    ),
    Family(
        "randlora", "ΔW = s · Σ_j B_j diag(λ_j) A diag(γ_j), A and B shared", "arXiv:2502.00987.",
        "randlora_", "nothing",
        _FAN | {"r": COUNT, "randlora_alpha": NUMBER, "projection_prng_key": SEED,
                "save_projection": FLAG, "sparse": FLAG, "very_sparse": FLAG},
        forms=_CONV1D, drawn={"randlora_A": "shared bases"},
    ),
    Family(
        "vblora", "ΔW = B A, each piece a mixture of the k likeliest vectors of a shared bank",
        "arXiv:2405.15179.", "vblora_", "nothing",
        _FAN | {"r": COUNT, "num_vectors": COUNT, "vector_length": COUNT, "topk": COUNT,
                "save_only_topk_weights": FLAG},
        forms=_CONV1D,
    ),
    Family(
        "unilora", "ΔW = B A, entries taken from one shared vector", "arXiv:2506.00799. Needs the "
        "indices in the file (save_indices).", "unilora_", "nothing",
        _FAN | {"r": COUNT, "proj_seed": SEED, "theta_d_length": COUNT, "save_indices": FLAG},
        forms=_CONV1D, ordered="unilora_indices_A",
    ),
    Family(
        "tinylora", "ΔW = B (Σ_i v_i P_i) A, v shared", "Needs the projections in the file "
        "(save_projection), where v is not shared by all modules.", "tinylora_", "nothing",
        _FAN | {"r": COUNT, "u": COUNT, "weight_tying": NUMBER, "projection_seed": SEED,
                "save_projection": FLAG},
        forms=_CONV1D | {"embedding"}, drawn={"tinylora_P": "projections"}, ordered="tinylora_P",
    ),
    Family(
        "pvera", "ΔW = diag(b) B diag(d) A, at the mean of the learned distribution",
        "Probabilistic VeRA.", "pvera_", "nothing",
        _FAN | {"r": COUNT, "projection_prng_key": SEED, "save_projection": FLAG,
                "d_initial": NUMBER},
        forms=_CONV1D, drawn={"pvera_A": "shared factors"},
    ),
    Family(
        "vera_drawn", "ΔW = diag(b) B diag(d) A, A and B drawn from the config's seed",
        "VeRA, arXiv:2310.11454, saved without its shared factors.", "vera_", "nothing",
        _FAN | {"r": COUNT, "projection_prng_key": SEED, "save_projection": FLAG,
                "d_initial": NUMBER},
        forms=_CONV1D, drawn={"": "shared factors"},
    ),
    Family(
        "delora", "ΔW = B diag(λ / (r ‖b_i‖ ‖a_i‖)) A diag(‖W‖ by columns, as stored)",
        "arXiv:2503.18225.", "delora_", "nothing",
        {"r": COUNT, "delora_lambda": NUMBER},
        {"rank_pattern": "r", "lambda_pattern": "delora_lambda"},
    ),
    Family(
        "gralora", "ΔW = (α/r) · blocks B_ij A_ij, and a plain B A where hybrid",
        "arXiv:2505.20355.", "gralora_", "nothing",
        _FAN | {"r": COUNT, "hybrid_r": COUNT, "alpha": NUMBER, "gralora_k": COUNT},
        forms=_CONV1D,
    ),
    Family(
        "supertuning", "ΔW = values at stored places, and (α/r) · B A where hybrid",
        "Needs the places in the file (save_precomputed_indices).", "supertuning_", "nothing",
        {"sparsity": NUMBER, "select_top": FLAG, "r": COUNT, "lora_alpha": NUMBER,
         "save_precomputed_indices": FLAG},
        required="supertuning_indices",
    ),
    Family(
        "adamss", "ΔW = B_k A_k V in the rows of each cluster k, V stored", "The clusters are "
        "found again from the base's weight and a seed.", "adamss_", "build",
        {"r": COUNT, "num_subspaces": COUNT, "subspace_rank": COUNT, "use_dynamic_rank": FLAG,
         "svd_threshold": NUMBER, "random_seed": SEED},
        biased=True, double=False, drawn={"": "clusters of rows"},
    ),
    Family(
        "hira", "ΔW = W ∘ (B A)", "HiRA.", "hira_", "merge",
        _FAN | {"r": COUNT}, {"rank_pattern": "r"},
        forms=_CONV1D | {"embedding", "conv"}, sides=("hira_A", "hira_B"),
    ),
    Family(
        "psoft", "ΔW = (α/r) · B (R - I) A, B and A of the weight's SVD", "The SVD is computed "
        "again.", "psoft_", "build",
        _FAN | {
            "r": COUNT, "psoft_alpha": NUMBER, "ab_svd_init": one_of("psoft_init", "pissa_init"),
            "psoft_svd": one_of("full", "lowrank"), "psoft_svd_lowrank_niter": STEPS,
            "random_seed": SEED, "psoft_orth": FLAG, "psoft_mag_b": FLAG, "psoft_mag_a": FLAG,
            "use_cayley_neumann": FLAG, "num_cayley_neumann_terms": STEPS,
            "cayley_neumann_eps": NUMBER,
        },
        double=False,
    ),
    Family(
        "osf", "ΔW = U S V of the trained low part - that of the weight's SVD",
        "arXiv:2504.07097.", "osf_", "build",
        {"effective_rank": NUMBER}, {"rank_pattern": "effective_rank"}, searches=True,
    ),
    Family(
        "deft", "ΔW = Q (s R - Qᵀ W), or P (s R - relu(P)ᵀ W)", "DEFT.", "deft_", "merge",
        _FAN | {"r": COUNT, "decomposition_method": one_of("relu", "qr"), "init_scale": NUMBER,
                "alpha": NUMBER, "para": FLAG},
        forms=_CONV1D,
    ),
    Family(
        "peanut", "ΔW = a small network of W", "arXiv:2410.01870.", "peanut_", "merge",
        {"r": COUNT, "depth": STEPS, "scaling": NUMBER,
         "act_fn": Check(
             "a short name", lambda value: bool(re.fullmatch(r"[a-z0-9_]{1,32}", str(value)))
         )},
    ),
    Family(
        "glora", "ΔW = W ∘ A + B, Δb = b ∘ D + E + W C", "arXiv:2306.07967.", "glora_", "merge",
        {"r": COUNT, "config_A_B": one_of("lora", "vector", "constant", "none"),
         "config_C": one_of("lora", "vector", "none"),
         "config_D_E": one_of("vector", "constant", "none")},
        biased=True,
    ),
    Family(
        "road", "ΔW = R W - W, Δb = R b - b, R rotates and scales pairs of outputs",
        "RoAd, arXiv:2409.00119.", "road_", "merge",
        {"variant": one_of("road_1", "road_2", "road_4"), "group_size": COUNT},
        biased=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class _Parts:
    """Tensors of an adapter: by module and suffix, those of all modules, and full values."""

    modules: Mapping[str, Mapping[str, str]]
    shared: Mapping[str, str]
    values: frozenset[str]

    @property
    def keys(self) -> frozenset[str]:
        own = {key for suffixes in self.modules.values() for key in suffixes.values()}
        return frozenset(own) | set(self.shared.values()) | self.values


def _parts(family: Family, source: AdapterSource) -> _Parts:
    config = source.config or {}
    if config.get("peft_type") != family.peft_type:
        return _Parts({}, {}, frozenset())
    form = re.compile(rf"(?P<module>.+?)\.(?P<suffix>{family.prefix}.+)")
    modules: dict[str, dict[str, str]] = {}
    shared: dict[str, str] = {}
    values: set[str] = set()
    settings = settings_of(config)
    for key in source.tensors:
        start = "base_model."
        if key.startswith(start + family.prefix):
            shared[key.removeprefix(start)] = key
        elif match := form.fullmatch(peft.strip(key)):
            modules.setdefault(match["module"], {})[match["suffix"]] = key
        elif (part := peft.parse(key)) is not None and is_declared(part, settings):
            values.add(key)
    return _Parts(dict(sorted(modules.items())), shared, frozenset(values))


def _detect(family: Family, source: AdapterSource) -> frozenset[str]:
    parts = _parts(family, source)
    if family.name == "vera_drawn" and parts.shared:
        return frozenset()
    return parts.keys


def _remarks(family: Family, source: AdapterSource) -> tuple[str, ...]:
    return tuple(
        f"{source.label}: {_SEEDED.format(what=what)}"
        for suffix, what in family.drawn.items()
        if not suffix or not any(f".{suffix}" in key for key in source.tensors)
    )


def _read(family: Family, source: AdapterSource, options: ReadOptions) -> dict[str, Delta]:
    parts = _parts(family, source)
    config = source.config or {}
    if options.base_shapes is None:
        raise FormatError(
            f"{source.label}: {family.name} does not say how large the weights are",
            fix="give --base with the model that the adapter was trained on",
            lacks="base",
        )
    if family.need != "nothing" and options.base is None:
        needs_base(source.label, min(parts.keys), family.name)
    if not parts.modules:
        raise FormatError(
            f"{source.label}: the file does not tell which modules it adapts",
            got=min(parts.keys),
            fix="save the adapter with save_indices=True" if family.name == "unilora" else "",
        )
    names = BaseNames(options.base_shapes)
    turned = _is_turned(family, source, names, parts)
    found = [
        _layer(family, source, options, names, turned, *item) for item in parts.modules.items()
    ]
    shared = {suffix: source.tensors[key] for suffix, key in parts.shared.items()}
    for layer, _ in found:
        if family.required and family.required not in layer.tensors:
            raise FormatError(
                f"{source.label}: {layer.name} has no {family.required}",
                fix="save the adapter with save_precomputed_indices=True",
            )
    targets = {layer.name: weight for layer, weight in found}
    layers = [layer for layer, _ in found]
    entries = _entries(family, source, layers)
    need_peft(source.label, family.tuner)
    if family.ordered:
        layers = in_order(source.label, family.ordered, layers, shared, entries)
        entries = _entries(family, source, layers)
    check_shapes(source.label, targets, layers, entries)
    bridge = Bridge(
        source.label, family.peft_type, entries, tuple(layers), shared, family.need, family.double
    )
    deltas: dict[str, Delta] = {}
    for index, layer in enumerate(layers):
        key = min(parts.modules[layer.name].values())
        name = targets[layer.name]
        delta = Dense(ThroughPeft(bridge, index, "weight", layer.shape))
        put(source.label, deltas, name, key, delta)
        if family.biased and layer.biased:
            bias = f"{name.removesuffix('weight')}bias"
            shape = options.base_shapes[bias]
            moved = Dense(ThroughPeft(bridge, index, "bias", shape))
            put(source.label, deltas, bias, key, moved)
    add_values(source, options, deltas, parts.values, settings_of(config), names)
    return deltas


def _is_turned(family: Family, source: AdapterSource, names: BaseNames, parts: _Parts) -> bool:
    """Whether the adapter's weights are stored input × output."""
    for module, keys in parts.modules.items() if family.sides is not None else ():
        assert family.sides is not None
        found = names.dotted(f"{module}.weight")
        if len(found) == 1 and set(family.sides) <= keys.keys():
            a, b = (source.tensors[keys[side]].shape for side in family.sides)
            rows, columns = (*names.shapes[found[0]], 0, 0)[:2]
            if len(a) == len(b) == len(names.shapes[found[0]]) == 2 and rows != columns:
                return (rows, columns) == (a[1], b[0])
    return bool((source.config or {}).get("fan_in_fan_out"))


def _entries(family: Family, source: AdapterSource, layers: list[Layer]) -> dict[str, object]:
    names = {layer.name: known(index) for index, layer in enumerate(layers)}
    config = source.config or {}
    largest = max(max(tensor.shape, default=0) for tensor in source.tensors.values())
    if family.searches:
        # PEFT searches the path for these, where it matches its end for others.
        for entry in family.patterns:
            listed = config.get(entry)
            if isinstance(listed, Mapping):
                config = {**config, entry: {f".*(?:{p}).*": v for p, v in listed.items()}}
    return checked(source.label, config, family.entries, family.patterns, names, largest)


def _layer(
    family: Family,
    source: AdapterSource,
    options: ReadOptions,
    names: BaseNames,
    turned: bool,
    module: str,
    keys: Mapping[str, str],
) -> tuple[Layer, str]:
    key, wanted = min(keys.values()), f"{module}.weight"
    name = names.unique(source.label, key, wanted, names.dotted(wanted))
    bias = f"{name.removesuffix('weight')}bias"
    if options.transposed is not None:
        turned = name in options.transposed
    form = _form(family, source, name, names.shapes[name], key, turned=turned)
    base = options.base if family.need != "nothing" and options.base is not None else {}
    layer = Layer(
        module, form, names.shapes[name],
        {suffix: source.tensors[each] for suffix, each in keys.items()},
        base.get(name), base.get(bias), bias in names.shapes and bias != name,
    )  # fmt: skip
    return layer, name


def _form(
    family: Family,
    source: AdapterSource,
    name: str,
    shape: tuple[int, ...],
    key: str,
    *,
    turned: bool,
) -> Form:
    form: Form
    if len(shape) in (3, 4, 5):
        form = "conv"
    elif kind_of(name, shape) == "embedding" and "embedding" in family.forms:
        form = "embedding"
    else:
        form = "conv1d" if turned else "linear"
    if len(shape) not in (2, 3, 4, 5) or 0 in shape or form not in {"linear", *family.forms}:
        raise MismatchError(
            f"{source.label}: {key} adapts {name}, which {family.name} cannot",
            expected=", ".join(sorted({"linear", *family.forms})),
            got=f"{form} of shape {shape}",
        )
    return form


for _family in FAMILIES:
    KINDS.add(
        _family.name,
        Kind(
            name=_family.name,
            formula=_family.formula,
            detect=partial(_detect, _family),
            read=partial(_read, _family),
            notes=f"{_family.notes} Computed by PEFT's layers, a whole weight at a time (extra: "
            f"peft). Needs the base{'' if _family.need != 'nothing' else chr(39) + 's shapes'}.",
            peft_types=frozenset({_family.peft_type}),
            remarks=partial(_remarks, _family),
            support="PEFT",
        ),
    )
