"""The families that PEFT's own layers compute, and what decides their ΔW."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mergebench.adapters_zoo.peft_bridge import Form, Need
from mergebench.adapters_zoo.peft_settings import COUNT, FLAG, NUMBER, SEED, STEPS, Check, one_of

_FAN = {"fan_in_fan_out": FLAG}


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
