"""What cannot be honoured is an error that names it: types, features, contradictions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from mergebench.adapters_zoo.adapter import CONFIG_KEY, ReadOptions, is_adapter, read_adapter
from mergebench.core.errors import FormatError, MergebenchError, MismatchError, ParameterError
from mergebench.core.tensor import Array

from .support import assert_close, read_values, source_of

A = np.array([[1, 2, 0], [0, 1, 4]], np.float32)
B = np.array([[1, 2], [3, 0], [0, 1], [1, 1]], np.float32)
PRODUCT = B.astype(np.float64) @ A.astype(np.float64)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}


def module(name: str = "layers.0.q", a: Array = A, b: Array = B) -> dict[str, Array]:
    """One adapted module in PEFT's names."""
    prefix = f"base_model.model.{name}"
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def refuse(
    error: type[MergebenchError],
    pattern: str,
    arrays: dict[str, Array],
    config: dict[str, Any] | None = CONFIG,
    options: ReadOptions | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Reading raises exactly this class, with this text."""
    with pytest.raises(error, match=pattern) as caught:
        read_adapter(source_of(arrays, config, metadata), options)
    assert type(caught.value) is error
    assert str(caught.value).startswith("toy: ")


@pytest.mark.parametrize(
    ("peft_type", "reason"),
    [
        ("XLORA", "routed"),
        ("POLY", "routed"),
        ("PROMPT_TUNING", "activations"),
        ("PREFIX_TUNING", "activations"),
        ("ADAPTION_PROMPT", "activations"),
        ("SHADOW", "depends on the input"),
        ("DELORRA", "; did you mean 'DELORA'"),
    ],
)
def test_peft_types(peft_type: str, reason: str) -> None:
    """The type is named, with the reason or the nearest known type."""
    refuse(FormatError, f"{peft_type}.*{reason}", module(), CONFIG | {"peft_type": peft_type})


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("use_dora", True, "DoRA stores magnitudes .*, and the file has none"),
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("layer_replication", [[0, 4], [2, 5]], "repeated layers"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("use_qalora", True, "QALoRA"),
        ("kasa_config", {"x": 1}, "KaSA"),
        ("arrow_config", {"top_k": 3}, "Arrow"),
        ("monteclora_config", {"num_samples": 8}, "MonteCLoRA"),
        ("trainable_token_indices", {"embed": [1]}, "token rows, and the file has none"),
        ("enable_lora", [True, False, True], "before its release"),
        ("use_future", True, "this version does not know"),
        ("future_config", {"a": 1}, "this version does not know"),
        ("init_lora_weights", "pissa", "modified the base"),
        ("init_lora_weights", "pissa_niter_16", "modified the base"),
        ("init_lora_weights", "olora", "modified the base"),
        ("init_lora_weights", "corda", "modified the base"),
        ("init_lora_weights", "loftq", "modified the base"),
        ("init_lora_weights", "lora_ga", "modified the base"),
        ("init_lora_weights", "sparkling", "may have modified the base.*got 'sparkling'"),
        ("bias", "some", "expected none, all or lora_only"),
        ("lora_alpha", "16", "expected a number, got '16'"),
        ("lora_alpha", float("nan"), "expected a finite number"),
        ("lora_alpha", True, "expected a number"),
        ("use_rslora", "yes", "expected true or false"),
        ("rank_pattern", ["q"], "expected an object"),
        ("alpha_pattern", {"q": "3"}, "expected a number"),
        ("alpha_pattern", {"q(": 3}, "no regular expression"),
        ("modules_to_save", "head", "expected a list of names"),
    ],
)
def test_config_entries(entry: str, value: Any, reason: str) -> None:
    """The entry and the reason are named, whether it is refused or malformed."""
    pattern = "q\\(" if entry == "alpha_pattern" and "q(" in value else entry
    refuse(FormatError, f"{pattern}.*{reason}", module(), CONFIG | {entry: value})


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base(start: bool | str) -> None:
    """How the factors began does not matter where the base was left alone."""
    values = read_values(source_of(module(), CONFIG | {"init_lora_weights": start}))

    assert_close(values["layers.0.q.weight"], 1.5 * PRODUCT, 0)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("layers.0.q.lora_magnitude_vector", "DoRA"),
        ("experts.base_layer.lora_A.weight", "stacked experts"),
        ("attn.base_layer.out_proj.lora_A.weight", "MultiheadAttention"),
        ("layers.0.q.lora_E", "AdaLoRA"),
        ("unet:9:up", "cloneofsimo"),
        ("text_encoder:unet:9:down", "cloneofsimo"),
        ("layers.0.k.reshape_weight", "enlarged"),
        ("embed.token_adapter.trainable_tokens_delta", "token rows"),
        ("layers.0.q.hada_w1_a", "LoHa"),
        ("layers.0.q.lokr_w1", "LoKr"),
        ("layers.0.q.ia3_l", "IA"),
        ("x.vera_lambda_b", "VeRA"),
        ("x.oft_R.weight", "OFT"),
        ("x.hira_A", "HiRA.*adapter_config.json"),
        ("x.fourierft_spectrum", "FourierFT.*adapter_config.json"),
    ],
)
def test_tensors_of_other_families(key: str, family: str) -> None:
    """A tensor that another family writes names that family, among LoRA's own."""
    whole = key if ":" in key else f"base_model.model.{key}"
    refuse(FormatError, f"{key}.*{family}", module() | {whole: np.ones((2, 2), np.float32)})


@pytest.mark.parametrize(
    "key",
    ["layers.0.k.lora_A", "unet.k.lora.down.weight", "unet.k.processor.to_q_lora.up.weight",
     "diffusion_model.k.lora_down.weight"],
)  # fmt: skip
def test_half_a_pair_in_another_dialect(key: str) -> None:
    """A factor without its partner is named as it is spelled in the file."""
    arrays = module() | {key: np.ones((2, 2), np.float32)}
    refuse(FormatError, rf"only one of the factors A and B, got {key}", arrays)


def test_cloneofsimo_names() -> None:
    """Positions in a module tree are not names; the error says so."""
    arrays = {f"unet:{i}:{side}": A for i in range(2) for side in ("up", "down")}
    refuse(FormatError, "unet:0:down.*order in which the code", arrays, None)


@pytest.mark.parametrize("names", [("double", "qkv_lora1"), ("single", "qkv_lora")])
def test_xlabs_names(names: tuple[str, str]) -> None:
    """They are not those of diffusers' processors, which they look like."""
    stem = f"{names[0]}_blocks.0.processor.{names[1]}"
    arrays = {f"{stem}.{side}.weight": A for side in ("up", "down")}
    assert is_adapter(arrays, None, {})
    refuse(FormatError, "XLabs.*save_lora_adapter", arrays, None)


def test_unclaimed_tensors() -> None:
    """The first few are listed and the others counted."""
    extra = {f"base_model.model.layers.{i:02}.extra": A for i in range(10)}
    pattern = (
        r"10 tensors belong to no.*layers\.00\.extra.*layers\.07\.extra and 2 more.*modules_to"
    )
    refuse(FormatError, pattern, module() | extra)


def test_embeddings_of_other_families() -> None:
    """A tensor inside an embedding, or a saved module, is a value only if nothing else is."""
    arrays = module() | {"base_model.model.head.ia3_l": A}
    refuse(
        FormatError, r"head\.ia3_l is of the kind", arrays, CONFIG | {"modules_to_save": ["head"]}
    )


def test_undeclared_modules() -> None:
    """A tensor trained in full must be declared, or be an embedding or a head."""
    arrays = module() | {"base_model.model.layers.0.norm.weight": A[0]}
    refuse(FormatError, r"layers\.0\.norm\.weight", arrays)


def test_no_tensors() -> None:
    """An empty file is no update."""
    refuse(FormatError, "holds no tensors", {})


def test_not_an_adapter() -> None:
    """Plain weights are claimed by no kind."""
    refuse(FormatError, r"1 tensors.*q\.weight", {"q.weight": A}, None)


def test_rank_of_the_config() -> None:
    """The rank is checked against the shape of A, patterns included."""
    pattern = r"rank of .*layers\.0\.q\.lora_A\.weight, expected 4 \(adapter_config\.json\), got 2"
    refuse(MismatchError, pattern, module(), CONFIG | {"r": 4})
    refuse(MismatchError, pattern, module(), CONFIG | {"rank_pattern": {"0.q": 4}})


def test_factors_that_do_not_fit() -> None:
    """B must have as many columns as A has rows."""
    pattern = r"columns of .*layers\.0\.q\.lora_B\.weight, expected 2, the rows of .*, got 3"
    refuse(MismatchError, pattern, module(b=np.ones((4, 3), np.float32)))


def test_grouped_convolution() -> None:
    """A grouped convolution's B has r/groups columns; its update is no product."""
    arrays = module(a=np.ones((2, 3, 3, 3)), b=np.ones((4, 1, 1, 1)))
    refuse(MismatchError, r"columns of .*lora_B\.weight.*grouped convolution", arrays)


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        (A.ravel(), B, r"lora_A\.weight is no factor.*\(6,\).*ZeRO-3"),
        (A, B[:, :0], r"lora_B\.weight is no factor.*\(4, 0\)"),
        (A.astype(np.int8), B, r"lora_A\.weight is no factor.*I8"),
        (
            A,
            B.reshape(4, 2, 1, 1).repeat(3, axis=2),
            r"lora_B\.weight.*1x1 kernel, got.*\(4, 2, 3, 1\)",
        ),
    ],
)
def test_malformed_factors(a: Array, b: Array, word: str) -> None:
    """Unsharded, empty, integer and misshapen factors are named with what they are."""
    refuse(FormatError, word, module(a=a, b=b))


def test_missing_partner() -> None:
    """A without B is no update."""
    arrays = module()
    del arrays["base_model.model.layers.0.q.lora_B.weight"]
    refuse(FormatError, r"layers\.0\.q has only one .*lora_A\.weight", arrays)


def test_one_factor_twice() -> None:
    """Two spellings of one name in one file."""
    arrays = module() | {"layers.0.q.lora_A.weight": A}
    refuse(FormatError, r"lora_A\.weight and .*lora_A\.weight are the same factor", arrays)


def test_several_adapters_in_one_file() -> None:
    """Raw state dicts may hold more than one adapter."""
    arrays = {
        f"x.lora_{side}.{name}.weight": array
        for side, array in (("A", A), ("B", B))
        for name in ("en", "fr")
    }
    refuse(
        FormatError,
        "several adapters",
        {k: v for k, v in arrays.items() if "A.en" in k or "B.fr" in k},
    )
    refuse(FormatError, "are the same factor", arrays)


def test_displaced_and_replaced() -> None:
    """One tensor cannot get new values and a difference."""
    arrays = module() | {"base_model.model.layers.0.q.weight": PRODUCT}
    refuse(
        MismatchError,
        r"second update of layers\.0\.q\.weight",
        arrays,
        CONFIG | {"modules_to_save": ["q"]},
    )


class TestScaleOfBareFiles:
    """Without adapter_config.json, α comes from the metadata or from the user."""

    def test_no_scale_at_all(self) -> None:
        """The error names the tensor, its rank and the option."""
        pattern = (
            r"no α for .*layers\.0\.q\.lora_A\.weight \(rank 2\).*--lora-alpha 2 gives scale 1"
        )
        refuse(ParameterError, pattern, module(), None)
        refuse(ParameterError, pattern, module(), {"peft_type": "LORA", "r": 2})

    def test_option(self) -> None:
        """``--lora-alpha`` is divided by the rank of A; a stated α is stronger."""
        options = ReadOptions(lora_alpha=5)

        bare = read_values(source_of(module()), options)
        stated = read_values(source_of(module(), CONFIG), options)
        assert_close(bare["layers.0.q.weight"], 2.5 * PRODUCT, 0)
        assert_close(stated["layers.0.q.weight"], 1.5 * PRODUCT, 0)

    @pytest.mark.parametrize("alpha", ["lora_alpha", "alpha"])
    @pytest.mark.parametrize("rank", ["r", "rank", ""])
    def test_flat_metadata(self, alpha: str, rank: str) -> None:
        """Some trainers write α and r as plain entries."""
        metadata = {alpha: "7", "format": "pt"} | ({rank: "2"} if rank else {})
        values = read_values(source_of(module(), None, metadata))

        assert_close(values["layers.0.q.weight"], 3.5 * PRODUCT, 0)

    def test_flat_metadata_that_contradict(self) -> None:
        """The rank is checked there, too; text is no number."""
        refuse(MismatchError, "expected 4", module(), None, None, {"alpha": "7", "r": "4"})
        refuse(FormatError, "'alpha'.*a number.*'big'", module(), None, None, {"alpha": "big"})

    def test_own_metadata(self) -> None:
        """Our own bare files carry the whole config, refusals included."""
        config = {**CONFIG, "use_rslora": True}
        values = read_values(source_of(module(), None, {CONFIG_KEY: json.dumps(config)}))

        assert_close(values["layers.0.q.weight"], 3 / 2**0.5 * PRODUCT, 1e-15)
        dora = {CONFIG_KEY: json.dumps(CONFIG | {"use_dora": True})}
        refuse(FormatError, "use_dora", module(), None, None, dora)
        refuse(FormatError, "is not JSON", module(), None, None, {CONFIG_KEY: "{"})
        refuse(FormatError, "not a JSON object", module(), None, None, {CONFIG_KEY: "[]"})

    def test_diffusers_metadata(self) -> None:
        """Diffusers writes one config per component, its patterns without the component."""
        stated = {
            "unet.r": 2,
            "unet.lora_alpha": 3,
            "unet.alpha_pattern": {"^mid.q": 4},
            "text_encoder.r": 2,
            "text_encoder.lora_alpha": 5,
            "text_encoder.use_rslora": True,
        }
        arrays = {
            f"{name}.lora_{side}.weight": array
            for name in ("unet.mid.q", "unet.up.q", "text_encoder.q")
            for side, array in (("A", A), ("B", B))
        }
        metadata = {"lora_adapter_metadata": json.dumps(stated)}
        values = read_values(source_of(arrays, None, metadata))

        assert_close(values["unet.mid.q.weight"], 2 * PRODUCT, 0)
        assert_close(values["unet.up.q.weight"], 1.5 * PRODUCT, 0)
        assert_close(values["text_encoder.q.weight"], 5 / 2**0.5 * PRODUCT, 1e-15)
        other = {"vae.q.lora_A.weight": A, "vae.q.lora_B.weight": B}
        refuse(ParameterError, r"vae\.q", arrays | other, None, None, metadata)
        dora = {"lora_adapter_metadata": json.dumps(stated | {"unet.use_dora": True})}
        refuse(FormatError, "use_dora", arrays, None, None, dora)

    def test_diffusers_metadata_of_one_model(self) -> None:
        """A model saved alone has the config without a component."""
        metadata = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 3})}
        values = read_values(source_of(module(), None, metadata))

        assert_close(values["layers.0.q.weight"], 1.5 * PRODUCT, 0)

    def test_alpha_tensors(self) -> None:
        """An α beside PEFT's factors counts, and must agree with the config."""
        arrays = module() | {"base_model.model.layers.0.q.alpha": np.float32(5).reshape(())}
        values = read_values(source_of(arrays))

        assert_close(values["layers.0.q.weight"], 2.5 * PRODUCT, 0)
        refuse(MismatchError, r"α of .*lora_A\.weight, expected 3 .*got 5", arrays, CONFIG)


class TestNamesOfTheBase:
    """PEFT's module names against the base's tensor names."""

    def test_ambiguous(self) -> None:
        """Several ends that fit are listed."""
        shapes = {"text.layers.0.q.weight": (4, 3), "vision.layers.0.q.weight": (4, 3)}
        refuse(
            MismatchError,
            r"layers\.0\.q\.lora_A\.weight fits several.*text\.layers\.0\.q.*vision\.layers",
            module(),
            options=ReadOptions(base_shapes=shapes),
        )

    def test_exact_name_wins(self) -> None:
        """A name that is there is meant, even if it also ends another."""
        shapes = {"layers.0.q.weight": (4, 3), "vision.layers.0.q.weight": (4, 3)}
        source = source_of(module(), CONFIG)

        assert list(read_adapter(source, ReadOptions(base_shapes=shapes))) == ["layers.0.q.weight"]

    def test_none(self) -> None:
        """The error says what the base has instead."""
        options = ReadOptions(base_shapes={"h.0.q.weight": (4, 3), "h.1.q.weight": (4, 3)})
        refuse(
            MismatchError,
            r"layers\.0\.q\.lora_A\.weight fits no.*expected layers\.0\.q\.weight.*h\.0\.q\.weight",
            module(),
            options=options,
        )
        refuse(MismatchError, "an empty base", module(), options=ReadOptions(base_shapes={}))

    def test_parts_of_words_do_not_match(self) -> None:
        """Ends are compared from dot to dot."""
        options = ReadOptions(base_shapes={"my_layers.0.q.weight": (4, 3)})
        refuse(MismatchError, "fits no tensor", module(), options=options)

    def test_two_modules_meet(self) -> None:
        """Two modules of the adapter must not be one tensor of the base."""
        options = ReadOptions(base_shapes={"layers.0.q.weight": (4, 3)})
        refuse(
            MismatchError,
            r"second update of layers\.0\.q\.weight",
            module() | module("model.layers.0.q"),
            options=options,
        )

    @pytest.mark.parametrize("stored", [(4, 4), (3, 3), (3, 4, 1), (12,)])
    def test_shapes(self, stored: tuple[int, ...]) -> None:
        """Both shapes are named."""
        refuse(
            MismatchError,
            rf"layers\.0\.q\.weight, expected shape \({stored[0]},.*got \(4, 3\)",
            module(),
            options=ReadOptions(base_shapes={"layers.0.q.weight": stored}),
        )

    def test_known_orientation(self) -> None:
        """What the base says about its storage outweighs config and shapes."""
        shapes = {"layers.0.q.weight": (3, 4)}
        known = ReadOptions(base_shapes=shapes, transposed=frozenset({"layers.0.q.weight"}))
        values = read_values(source_of(module(), CONFIG), known)

        assert_close(values["layers.0.q.weight"], 1.5 * PRODUCT.T, 0)
        refuse(
            MismatchError,
            r"does not fit layers\.0\.q\.weight, expected shape \(3, 4\)",
            module(),
            options=ReadOptions(base_shapes=shapes, transposed=frozenset()),
        )

    def test_bias_without_counterpart(self) -> None:
        """A displaced bias needs one in the base, of the same shape."""
        arrays = module() | {"base_model.model.layers.0.q.lora_B.bias": np.ones(4, np.float32)}
        shapes = {"layers.0.q.weight": (4, 3)}
        pattern = r"lora_B\.bias displaces layers\.0\.q\.bias"
        refuse(MismatchError, pattern, arrays, options=ReadOptions(base_shapes=shapes))
        shapes["layers.0.q.bias"] = (5,)
        refuse(MismatchError, pattern, arrays, options=ReadOptions(base_shapes=shapes))

    def test_heads_may_be_new(self) -> None:
        """A module trained in full keeps its own name where the base has none like it."""
        arrays = module() | {"base_model.model.score.weight": PRODUCT}
        config = CONFIG | {"modules_to_save": ["score"]}
        options = ReadOptions(base_shapes={"model.layers.0.q.weight": (4, 3)})
        vector = read_adapter(source_of(arrays, config), options)

        assert list(vector) == ["model.layers.0.q.weight", "score.weight"]
