"""Buffers, mixtures of dtypes and of tied models, empty tensors: what becomes of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench import merge_models
from mergebench.core.errors import MergebenchError
from mergebench.core.site import is_constant, kind_of
from mergebench.merge.chains import is_apart
from mergebench.merge.method import METHODS
from tests.helpers.adapters import factors, save_delta, save_peft
from tests.helpers.compare import assert_close, assert_same
from tests.helpers.files import BF16, F16, F32, F64, Array, listing, read, write
from tests.helpers.models import added, base_model, fine_tune, save_folder, task_vector
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.statistics import options_for

MEAN, VAR, COUNT = "bn1.running_mean", "bn1.running_var", "bn1.num_batches_tracked"
STATISTICS = (MEAN, VAR)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
RECALIBRATE = "2 running statistics (bn1.running_mean, …) are weighted means of the models'"


def cnn(seed: int, count: int) -> dict[str, Array]:
    """A convolution with its BatchNorm after some training."""
    random = np.random.default_rng(seed)
    return {
        "conv1.weight": random.standard_normal((6, 3, 2, 2), np.float32),
        "bn1.weight": random.standard_normal(6, np.float32),
        "bn1.bias": random.standard_normal(6, np.float32),
        MEAN: random.standard_normal(6, np.float32),
        VAR: random.random(6, np.float32) + F32.type(1e-3),
        COUNT: np.array(count, np.int64),
    }


BASE, ONE, TWO = cnn(0, 100), cnn(1, 250), cnn(2, 300)


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    """A base and two fine-tunes, as files."""
    for name, arrays in (("base", BASE), ("one", ONE), ("two", TWO)):
        write(tmp_path / f"{name}.safetensors", arrays)
    return tmp_path


def mean_of(name: str, *pairs: tuple[Mapping[str, Array], float]) -> Array:
    """The weighted mean in float64, rounded once."""
    total = sum(weight for _, weight in pairs)
    return (sum(m[name].astype(F64) * (w / total) for m, w in pairs)).astype(F32)


def assert_ulp(actual: Array, expected: Array) -> None:
    """Equal but for the last digit."""
    np.testing.assert_array_max_ulp(actual, expected, maxulp=1)


APART = [name for name in METHODS if is_apart(METHODS[name]())]


@pytest.mark.parametrize("method", APART)
def test_running_statistics_stay_apart(nets: Path, method: str) -> None:
    """Where every model has a result of its own it keeps its own, as they are."""
    models = ("one.safetensors:3", "two.safetensors:1")
    common = ("merge", *models, "-b", "base.safetensors", "-m", method, "-o", "out.safetensors")

    ran = assert_done(call(*common, cwd=nets))

    for name, own in (("one", ONE), ("two", TWO)):
        found = read(nets / f"out-{name}.safetensors")
        assert_same({n: found[n] for n in STATISTICS}, {n: own[n] for n in STATISTICS})
        assert_same({"": found[COUNT]}, {"": BASE[COUNT]})
    assert RECALIBRATE not in ran.err
    plan = assert_done(call("plan", *common[1:-2], "--json", cwd=nets)).json["tensors"]
    assert {plan["copied"][n] for n in STATISTICS} == {"running statistics of each model itself"}


@pytest.mark.parametrize(
    "method", [n for n in METHODS if METHODS[n].models[1] != 1 and n not in APART]
)
def test_running_statistics_are_averaged(nets: Path, method: str) -> None:
    """By every method the weighted mean, and the base's counter; the rest is merged."""
    models = ("one.safetensors:3", "two.safetensors:1")
    base = () if METHODS[method].space == "weight" else ("-b", "base.safetensors")
    more = options_for(method, models, nets)
    common = ("merge", *models, *base, "-m", method, *more, "-o", "out.safetensors")

    ran = assert_done(call(*common, cwd=nets))

    found = read(nets / "out.safetensors")
    for name in STATISTICS:
        assert_ulp(found[name], mean_of(name, (ONE, 3), (TWO, 1)))
    assert (found[VAR] > 0).all()
    if base:
        assert_same({"": found[COUNT]}, {"": BASE[COUNT]})
    else:
        assert int(found[COUNT]) in (250, 300)
    assert RECALIBRATE in ran.err
    assert "recalibrate them by running training data" in ran.err
    assert not np.array_equal(found["conv1.weight"], BASE["conv1.weight"])
    plan = assert_done(call("plan", *common[1:-2], "--json", cwd=nets)).json["tensors"]
    assert {plan["copied"][name] for name in STATISTICS} == {"weighted mean of running statistics"}
    assert plan["copied"][COUNT].startswith("a counter, taken from ")
    assert plan["merged"] == 3


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1.0, -1.0), lambda name: ONE[name]),
        ((-2.0, 0.25), lambda name: TWO[name]),
        ((-1.0, -1.0), lambda name: BASE[name]),
        ((0.0, 0.0), lambda name: BASE[name]),
        ((0.0, 2.0), lambda name: TWO[name]),
    ],
)
def test_weights_that_are_not_positive(weights: tuple[float, float], expected: Any) -> None:
    """Unlearned tasks have no statistics to bring: a variance can never become negative."""
    found = merge_models(
        [(ONE, weights[0]), (TWO, weights[1])], base=BASE, method="task_arithmetic", lam=3.0
    )
    assert_same({n: found[n] for n in STATISTICS}, {n: expected(n) for n in STATISTICS})


def test_weights_without_a_base() -> None:
    """All negative, they normalise to positive ones."""
    found = merge_models([(ONE, -1.0), (TWO, -1.0)], method="linear")
    for name in STATISTICS:
        assert_ulp(found[name], mean_of(name, (ONE, 1), (TWO, 1)))


def test_weights_of_the_tensor_count() -> None:
    """Rules for selected tensors hold for statistics too."""
    found = merge_models([ONE, TWO], base=BASE, method="ties", where=["running_mean:weight=1/3"])
    assert_ulp(found[MEAN], mean_of(MEAN, (ONE, 1), (TWO, 3)))
    assert_ulp(found[VAR], mean_of(VAR, (ONE, 1), (TWO, 1)))


def test_statistics_do_not_take_part_in_thresholds() -> None:
    """However large they are, what is trimmed is decided among parameters."""
    far = {**TWO, MEAN: TWO[MEAN] * 1000, VAR: TWO[VAR] * 1000}
    for method in ("ties", "breadcrumbs"):
        params = {"density": 0.5, "scope": "model"} if method == "ties" else {"density": 0.5}
        small, large = (
            merge_models([ONE, each], base=BASE, method=method, **params) for each in (TWO, far)
        )
        rest = [name for name in BASE if name not in STATISTICS]
        assert_same({n: large[n] for n in rest}, {n: small[n] for n in rest})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--where", "class=buffer:lam=0"), "lam: class=buffer selects only tensors that no"),
        (("--where", "running_mean:lam=0"), f"{MEAN}: weighted mean of running statistics"),
        (("--method-for", "class=buffer:linear"), "part 1 (class=buffer) selects only tensors"),
        (("--method-for", "num_batches:linear"), f"{COUNT}: a counter"),
        (("--method-for", "running:ties", "--then", "scale:lam=0.5"), "part 1 (running) selects"),
    ],
)
def test_rules_that_no_method_hears(nets: Path, extra: tuple[str, ...], words: str) -> None:
    models = ("merge", "one.safetensors", "two.safetensors", "-b", "base.safetensors")
    ran = call(*models, "-m", "task_arithmetic", *extra, "-o", "x.safetensors", cwd=nets)
    assert_refused(ran, words, "weight=1/0")
    assert not (nets / "x.safetensors").exists()


def test_rules_that_other_tensors_hear(nets: Path) -> None:
    """A weight chooses statistics, and a rule may select buffers beside parameters."""
    models = ("merge", "one.safetensors", "two.safetensors", "-b", "base.safetensors")
    rules = ("--where", "class=buffer:weight=1/0", "--where", "bn1:lam=0")
    out = ("-m", "task_arithmetic", "-o", "x.safetensors")
    assert_done(call(*models, *rules, *out, cwd=nets))
    made = read(nets / "x.safetensors")
    assert_same({"": made[MEAN]}, {"": ONE[MEAN]})
    assert_same({"": made["bn1.weight"]}, {"": BASE["bn1.weight"]})


def test_equal_statistics_need_no_note(nets: Path) -> None:
    """Frozen BatchNorm keeps its bytes, and nothing is to be recalibrated."""
    frozen = {**ONE, **{name: BASE[name] for name in (*STATISTICS, COUNT)}}
    write(nets / "frozen.safetensors", frozen)
    common = ("merge", "frozen.safetensors:0.3", "base.safetensors:0.9", "-b", "base.safetensors")

    ran = assert_done(call(*common, "-m", "ties", "-o", "out.safetensors", cwd=nets))

    found = read(nets / "out.safetensors")
    assert_same({n: found[n] for n in STATISTICS}, {n: BASE[n] for n in STATISTICS})
    assert "recalibrate" not in ran.err


def test_statistics_keep_dtype_and_read_in_tiles(tmp_path: Path) -> None:
    """bf16 stays bf16, --dtype counts, and a long statistic is the same in small memory."""
    size = 300_001
    random = np.random.default_rng(0)
    tables = [
        {"w.weight": np.ones((2, 2), BF16), "bn.running_mean": random.random(size).astype(BF16)}
        for _ in range(3)
    ]
    for name, arrays in zip(("base", "one", "two"), tables, strict=True):
        write(tmp_path / f"{name}.safetensors", arrays)
    common = ("merge", "one.safetensors", "two.safetensors", "-b", "base.safetensors", "-m", "ties")
    one, two = (table["bn.running_mean"].astype(F64) for table in tables[1:])

    assert_done(call(*common, "-o", "a.safetensors", cwd=tmp_path))
    extra = ("--dtype", "f32", "--memory", "96MiB", "-o", "b.safetensors")
    assert_done(call(*common, *extra, cwd=tmp_path))

    kept = read(tmp_path / "a.safetensors")["bn.running_mean"]
    assert_same({"": kept}, {"": ((one + two) / 2).astype(F32).astype(BF16)})
    assert read(tmp_path / "b.safetensors")["bn.running_mean"].dtype == F32


def test_statistics_of_a_task_vector(nets: Path) -> None:
    """A saved task vector holds them in full, and merging it gives what merging models does."""
    common = ("-b", "base.safetensors", "-m", "task_arithmetic")
    for name in ("one", "two"):
        made = ("merge", f"{name}.safetensors", *common, "--as", "delta")
        assert_done(call(*made, "-o", f"tau-{name}.safetensors", cwd=nets))
    tau = read(nets / "tau-one.safetensors")
    assert_same({n: tau[n] for n in STATISTICS}, {n: ONE[n] for n in STATISTICS})
    assert COUNT not in tau

    direct = ("merge", "one.safetensors:0.6", "two.safetensors:0.2", *common)
    assert_done(call(*direct, "-o", "direct.safetensors", cwd=nets))
    taus = ("merge", "tau-one.safetensors:0.6", "tau-two.safetensors:0.2", *common)
    assert_done(call(*taus, "-o", "taus.safetensors", cwd=nets))
    assert_close(read(nets / "taus.safetensors"), read(nets / "direct.safetensors"), 1e-6)


def test_old_task_vector_of_statistics(nets: Path) -> None:
    """A displacement of statistics counts as the base moved by it."""
    steps = {name: (ONE[name].astype(F64) - BASE[name]).astype(F32) for name in STATISTICS}
    save_delta(nets / "old.safetensors", steps)
    common = ("merge", "old.safetensors", "two.safetensors", "-b", "base.safetensors")

    assert_done(call(*common, "-m", "task_arithmetic", "-o", "out.safetensors", cwd=nets))

    found = read(nets / "out.safetensors")
    for name in STATISTICS:
        np.testing.assert_allclose(found[name], mean_of(name, (ONE, 1), (TWO, 1)), atol=1e-6)


def adapter(path: Path, seed: int, statistics: Mapping[str, Array]) -> Path:
    """A LoRA that saves a BatchNorm in full."""
    return save_peft(path, factors(seed), extra={n: statistics[n] for n in (*STATISTICS, COUNT)})


def test_adapters_with_batch_norm(tmp_path: Path) -> None:
    """Saved beside factors: averaged, with and without a base that has it."""
    adapter(tmp_path / "a", 1, ONE)
    adapter(tmp_path / "b", 2, TWO)
    save_peft(tmp_path / "plain", factors(3))
    norm = {name: BASE[name] for name in (*STATISTICS, COUNT)}
    save_folder(tmp_path / "base", {**base_model(), **norm})

    ran = assert_done(call("merge", "a:3", "b", "-m", "ties", "-o", "lora", cwd=tmp_path))
    found = {n.removeprefix("base_model.model."): a for n, a in read(tmp_path / "lora").items()}
    for name in STATISTICS:
        assert_ulp(found[name], mean_of(name, (ONE, 3), (TWO, 1)))
    assert int(found[COUNT]) in (250, 300)
    assert "recalibrate" in ran.err

    for method in ("linear", "ties"):
        common = ("merge", "a:3", "b", "plain", "-b", "base", "-m", method, "-o", "out", "-f")
        assert_done(call(*common, cwd=tmp_path))
        found = read(tmp_path / "out")
        for name in STATISTICS:
            assert_ulp(found[name], mean_of(name, (ONE, 3), (TWO, 1), (BASE, 1)))
        assert_same({"": found[COUNT]}, {"": BASE[COUNT]})


def test_nonfinite_statistics(nets: Path) -> None:
    """Refused by name and number; passed through as one NaN where that is asked for."""
    bad = {name: array.copy() for name, array in TWO.items()}
    bad[VAR][2], bad[VAR][4] = np.inf, np.nan
    write(nets / "bad.safetensors", bad)
    common = ("merge", "one.safetensors", "bad.safetensors", "-b", "base.safetensors", "-m", "ties")
    before = listing(nets)
    assert_refused(
        call(*common, "-q", "-o", "out.safetensors", cwd=nets), "bad.safetensors", VAR, "2 entries"
    )
    assert listing(nets) == before

    allow = ("--allow-nonfinite", "--json", "-o", "out.safetensors")
    ran = assert_done(call(*common, *allow, cwd=nets))
    assert ran.json["outputs"][0]["nonfinite"] == {VAR: {"bad.safetensors": 2}}
    found, expected = read(nets / "out.safetensors")[VAR], mean_of(VAR, (ONE, 1), (TWO, 1))
    assert np.isnan(found).nonzero()[0].tolist() == [2, 4]
    good = [0, 1, 3, 5]
    assert_ulp(found[good], expected[good])


def test_other_integers_must_agree(tmp_path: Path) -> None:
    """Counters may differ and nothing else: neither in models nor in adapters."""
    base = {**base_model(), "steps": np.array(3, np.int64)}
    save_folder(tmp_path / "base", base)
    save_folder(tmp_path / "other", {**base, "steps": np.array(4, np.int64)})
    save_peft(tmp_path / "lora", factors(1), extra={"head.steps": np.array(4, np.int64)})
    save_folder(tmp_path / "headed", {**base, "head.steps": np.array(3, np.int64)})
    before = listing(tmp_path)
    ran = call("merge", "other", "-b", "base", "-m", "ties", cwd=tmp_path)
    assert_refused(ran, "steps: I64 tensors are not merged and must agree", "other differs")
    ran = call("merge", "lora", "-b", "headed", "-m", "ties", cwd=tmp_path)
    assert_refused(ran, "head.steps: I64 tensors are not merged and must agree", "lora differs")
    assert listing(tmp_path) == before


CONSTANTS: dict[str, Array] = {
    "model.layers.0.attn.bias": np.tril(np.ones((1, 1, 4, 4), F32)),
    "model.layers.0.attn.masked_bias": np.array(-1e4, F32),
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.array([1.0, 0.1], F32),
    "model.embeddings.position_ids": np.arange(4, dtype=F32),
}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_buffers_that_libraries_no_longer_save(tmp_path: Path, method: str) -> None:
    """In the base alone they are copied, in models alone left out; both are told."""
    base = base_model()
    tuned = [fine_tune(base, seed) for seed in (1, 2)]
    save_folder(tmp_path / "old", {**base, **CONSTANTS})
    save_folder(tmp_path / "new", base)
    save_folder(tmp_path / "one-old", {**tuned[0], **CONSTANTS})
    save_folder(tmp_path / "one-new", tuned[0])
    save_folder(tmp_path / "two-new", tuned[1])
    found = {}
    for number, (first, origin) in enumerate(
        [("one-new", "old"), ("one-old", "old"), ("one-old", "new"), ("one-new", "new")]
    ):
        common = ("merge", first, "two-new", "-b", origin, "-m", method, "-o", f"out{number}")
        ran = assert_done(call(*common, cwd=tmp_path))
        found[first, origin] = read(tmp_path / f"out{number}")
        left = f"{min(CONSTANTS)} of one-old is left out: new does not have it"
        assert (left in ran.err) is ((first, origin) == ("one-old", "new"))

    plain = found["one-new", "new"]
    assert_same(found["one-old", "new"], plain)
    assert_same(found["one-new", "old"], {**plain, **CONSTANTS})
    assert_same(found["one-old", "old"], {**plain, **CONSTANTS})


def test_constants_that_differ(tmp_path: Path) -> None:
    """They follow from the config, which is the base's; the note says that they differ."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base = {**base_model(), name: np.array([1.0, 0.1], F32)}
    other = {**fine_tune(base, 1), name: np.array([1.0, 0.01], F32)}
    wide = {**fine_tune(base, 2), name: np.array([1.0, 0.1], BF16)}
    for label, arrays in (("base", base), ("other", other), ("wide", wide)):
        save_folder(tmp_path / label, arrays)

    ran = assert_done(call("merge", "other", "wide", "-b", "base", "-m", "ties", cwd=tmp_path))

    assert_same({"": read(tmp_path / "merged")[name]}, {"": base[name]})
    assert f"{name} of other differs from that of base, which is kept" in ran.err
    assert f"{name} of wide" not in ran.err


def test_masks_of_another_dtype(tmp_path: Path) -> None:
    """A mask that one library stores as numbers and another as truth values is a mask."""
    mask = "model.layers.0.attn.bias"
    base = {**base_model(), mask: CONSTANTS[mask].astype(np.bool_)}
    save_folder(tmp_path / "base", base)
    save_folder(tmp_path / "ft", {**fine_tune(base, 1), mask: CONSTANTS[mask]})
    for one, two in (("ft", "base"), ("base", "ft")):
        common = ("merge", one, "-b", two, "-m", "ties", "-o", "out", "-f")
        assert_done(call(*common, cwd=tmp_path))
        assert_same({"": read(tmp_path / "out")[mask]}, {"": read(tmp_path / two)[mask]})


def test_names_of_constants() -> None:
    """True biases and parameters are not mistaken for them."""
    for name, shape in (
        ("h.0.attn.bias", (1, 1, 8, 8)), ("h.0.attn.masked_bias", ()),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 8, 8)),
        ("gpt_neox.layers.0.attention.masked_bias", ()), ("rotary_emb.inv_freq", (8,)),
        ("model.rotary_emb.original_inv_freq", (8,)), ("embeddings.position_ids", (1, 8)),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 8, 8)),
    ):  # fmt: skip
        assert is_constant(name, shape), name
        assert kind_of(name, shape) == "buffer"
    for name, shape in (
        ("attn.bias", (8,)), ("h.0.attn.c_attn.bias", (24,)), ("attention.output.bias", (8,)),
        ("layers.0.attention.bias", (8, 8)), ("embeddings.position_embeddings.weight", (8, 8)),
        ("relative_attention_bias.weight", (32, 8)), ("x.frequency", (8,)),
    ):  # fmt: skip
        assert not is_constant(name, shape), name
        assert kind_of(name, shape) != "buffer"


MIXTURES = {
    "bf16 base": (BF16, (F32, F32)),
    "f16 and bf16": (F32, (F16, BF16)),
    "f16 base": (F16, (BF16, F32)),
    "float64": (F32, (F64, F16)),
    "all alike": (BF16, (BF16, BF16)),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_mixtures_of_dtypes(tmp_path: Path, case: str) -> None:
    """The base's dtype is written, arithmetic loses nothing, and finer models are named."""
    dtype, others = MIXTURES[case]
    base = base_model(dtype=dtype)
    tuned = [fine_tune(base_model(dtype=other), seed) for seed, other in enumerate(others)]
    save_folder(tmp_path / "base", base)
    for number, arrays in enumerate(tuned):
        save_folder(tmp_path / f"ft{number}", arrays)
    common = ("merge", "ft0", "ft1", "-b", "base", "-m", "task_arithmetic", "-p", "lam=0.5")

    ran = assert_done(call(*common, "-o", "out", cwd=tmp_path))

    taus = [task_vector(each, base) for each in tuned]
    exact = added(base, {name: (taus[0][name] + taus[1][name]) / 2 for name in taus[0]})
    found = read(tmp_path / "out")
    for name, array in base.items():
        assert found[name].dtype == array.dtype
        if array.dtype.kind not in "iub":
            step = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-23}[array.dtype]
            error = np.abs(found[name].astype(F64) - exact[name])
            assert (error <= step * np.abs(exact[name]) * 1.01 + 1e-6).all(), name
    digits = {BF16: 7, F16: 10, F32: 23, F64: 52}
    names = {BF16: "BF16", F16: "F16", F32: "F32", F64: "F64"}
    for number, other in enumerate(others):
        line = f"ft{number}: 9 tensors are stored as {names[other]} and rounded to {names[dtype]}"
        assert (line in ran.err) is (digits[other] > digits[dtype])
    asked = assert_done(call(*common, "--dtype", "f32", "-o", "asked", cwd=tmp_path))
    assert "rounded to" not in asked.err


def test_empty_tensors_and_scalars_keep_their_shapes(tmp_path: Path) -> None:
    """An empty tensor stays empty, a scalar parameter is merged as a scalar."""
    base = {
        "logit_scale": np.array(2.5, F32),
        "empty": np.empty((0, 4), F32),
        "hollow": np.empty((3, 0, 2), BF16),
        "none": np.empty(0, np.int64),
        "one": np.array([[1.5]], F32),
    }
    tuned = {**base, "logit_scale": np.array(3.5, F32), "one": np.array([[2.5]], F32)}
    write(tmp_path / "base.safetensors", base)
    write(tmp_path / "ft.safetensors", tuned)
    common = ("merge", "ft.safetensors:0.5", "-b", "base.safetensors", "-o", "out.safetensors")

    assert_done(call(*common, "-m", "task_arithmetic", cwd=tmp_path))

    expected = {**base, "logit_scale": np.array(3, F32), "one": np.array([[2]], F32)}
    assert_same(read(tmp_path / "out.safetensors"), expected)


def with_head(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The head as a second copy of the embedding."""
    return {**arrays, HEAD: arrays[EMBEDDING]}


def without_head(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The embedding alone."""
    return {name: array for name, array in arrays.items() if name != HEAD}


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


@pytest.mark.parametrize("origin", ["tied", "tied on disk", "untied"])
@pytest.mark.parametrize("tuned", ["tied", "tied on disk", "untied"])
def test_repeated_head_is_taken_as_tied(tmp_path: Path, origin: str, tuned: str) -> None:
    """A head that equals the embedding byte by byte fits a tied model, on either side."""
    base = base_model()
    arrays = {"tied": without_head, "tied on disk": with_head, "untied": with_head}
    config = {"tied": TIED, "tied on disk": TIED, "untied": UNTIED}
    save_folder(tmp_path / "base", arrays[origin](base), config[origin])
    save_folder(tmp_path / "ft1", arrays[tuned](fine_tune(base, 1)), config[tuned])
    save_folder(tmp_path / "ft2", without_head(fine_tune(base, 2)), TIED)
    common = ("merge", "ft1", "ft2", "-b", "base", "-m", "task_arithmetic", "-o", "out")

    ran = assert_done(call(*common, cwd=tmp_path))

    taus = [task_vector(without_head(fine_tune(base, seed)), base) for seed in (1, 2)]
    expected = added(without_head(base), {name: taus[0][name] + taus[1][name] for name in taus[0]})
    assert_close(read(tmp_path / "out"), arrays[origin](expected))
    for label, kind in (("base", origin), ("ft1", tuned)):
        assert (f"{HEAD} of {label} repeats '{EMBEDDING}'" in ran.err) is (kind == "untied")
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["tie_word_embeddings"] is (origin != "untied")


@pytest.mark.parametrize("seeds", [(1, 2), (6, 7), (10, 11)])
@pytest.mark.parametrize("first", ["one", "two"])
def test_repeated_head_without_a_base(tmp_path: Path, first: str, seeds: tuple[int, int]) -> None:
    """Whichever config is taken, and whichever order: the head is written, as is right in both."""
    base = base_model()
    save_folder(tmp_path / "one", with_head(fine_tune(base, seeds[0])), UNTIED)
    save_folder(tmp_path / "two", without_head(fine_tune(base, seeds[1])), TIED)
    second = {"one": "two", "two": "one"}[first]

    ran = assert_done(call("merge", first, second, "-o", "out", cwd=tmp_path))

    found = read(tmp_path / "out")
    assert_same({"": found[HEAD]}, {"": found[EMBEDDING]})
    one, two = (fine_tune(base, seed)[EMBEDDING].astype(F64) for seed in seeds)
    assert_close({"": found[EMBEDDING]}, {"": (one + two) / 2})
    assert "is taken as tied, as in two" in ran.err


def test_heads_of_their_own_stay_refused(tmp_path: Path) -> None:
    """Next to a tied model, with the next step in the error and nothing written."""
    base = base_model()
    save_folder(tmp_path / "tied", without_head(base), TIED)
    save_folder(tmp_path / "both", with_head(base), TIED)
    save_folder(tmp_path / "apart", base, UNTIED)
    before = listing(tmp_path)
    for model, origin in (
        ("apart", "tied"),
        ("apart", "both"),
        ("tied", "apart"),
        ("both", "apart"),
    ):
        ran = call("merge", model, "-b", origin, "-m", "ties", cwd=tmp_path)
        assert_refused(ran, HEAD, "apart", "set tie_word_embeddings to false", "save it")
        assert listing(tmp_path) == before
    assert_refused(call("merge", "tied", "apart", cwd=tmp_path), HEAD, "set tie_word_embeddings")


def test_statistics_in_memory_refuse_nan() -> None:
    """Arrays are treated as files are."""
    bad = {**TWO, MEAN: np.full(6, np.nan, F32)}
    with pytest.raises(MergebenchError, match=r"bn1\.running_mean.*6 entries of 6"):
        merge_models([ONE, bad], base=BASE, method="ties")
