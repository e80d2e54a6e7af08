"""A base that the models were not made from is refused, with what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench import merge_models
from mergebench.adapters_zoo.computed import Computed
from mergebench.core.delta import Dense
from mergebench.core.errors import MismatchError
from mergebench.core.site import Site
from mergebench.core.tensor import ArrayTensor
from mergebench.merge.item import Item
from mergebench.merge.origin import UNRELATED, tells
from mergebench.merge.sampled import (
    FEW,
    RUN,
    RUNS,
    TENSORS,
    Likeness,
    Pair,
    likeness,
    runs,
    task_norms,
)
from tests.helpers.adapters import factors, product, save_peft
from tests.helpers.compare import assert_same
from tests.helpers.files import F32, Array, listing, read
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, assert_refused, call

WIDTH = 96
#: Enough entries to tell: 4 matrices of 9216, and an embedding of 9216.
SHAPES = {
    "model.embed_tokens.weight": (96, WIDTH),
    "model.layers.0.mlp.up_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.mlp.down_proj.weight": (WIDTH, WIDTH),
    "model.layers.1.mlp.up_proj.weight": (WIDTH, WIDTH),
    "model.layers.1.mlp.down_proj.weight": (WIDTH, WIDTH),
    "model.layers.1.mlp.down_proj.bias": (WIDTH,),
    "model.norm.weight": (4 * WIDTH,),
}
LINEAR = [name for name in SHAPES if "_proj.weight" in name]
EMBEDDING = "model.embed_tokens.weight"


def model(seed: int) -> dict[str, Array]:
    """Weights as an initialisation makes them: matrices at random, norms at one."""
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal(shape, np.float32) * F32.type(0.02)
        if len(shape) > 1
        else np.ones(shape, F32)
        for name, shape in SHAPES.items()
    }


def towards(
    start: Mapping[str, Array], other: Mapping[str, Array], cosine: float
) -> dict[str, Array]:
    """``start`` turned towards ``other`` until the cosine between them is about ``cosine``."""
    sine = float(np.sqrt(1 - cosine**2))
    return {
        name: (cosine * array + sine * other[name]).astype(F32) if array.ndim > 1 else array
        for name, array in start.items()
    }


def cosine_of(one: Array, two: Array) -> float:
    """In float64, of all entries."""
    left, right = one.astype(np.float64).ravel(), two.astype(np.float64).ravel()
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, two fine-tunes of it, and a model that was made apart."""
    base, other = model(0), model(1)
    save_folder(tmp_path / "base", base)
    save_folder(tmp_path / "ft1", towards(base, model(2), 0.995))
    save_folder(tmp_path / "ft2", towards(base, model(3), 0.98))
    save_folder(tmp_path / "apart", other)
    return tmp_path


def test_model_made_apart_is_refused(place: Path) -> None:
    """The error says what was measured and what a fine-tune has; nothing is written."""
    before = listing(place)
    for method in ("ties", "task_arithmetic", "linear"):
        ran = call("merge", "ft1", "apart", "-b", "base", "-m", method, cwd=place)
        assert_refused(
            ran, "apart: was not fine-tuned from base", "‖τ‖/‖θ‖ 1.4", "36,864 sampled entries",
            "4 linear matrices", "least alike: model.layers.1.mlp.up_proj.weight (", "at least 0.1",
            "--allow-base-mismatch",
        )  # fmt: skip
        assert listing(place) == before
    assert_refused(call("plan", "ft1", "ft2", "-b", "apart", cwd=place), "was not fine-tuned")


def test_permuted_neurons_are_refused(place: Path) -> None:
    """A model of the same function whose neurons are in another order is another model."""
    order = np.random.default_rng(0).permutation(WIDTH)
    turned = model(0)
    for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
        turned[f"{layer}.up_proj.weight"] = turned[f"{layer}.up_proj.weight"][order]
        turned[f"{layer}.down_proj.weight"] = turned[f"{layer}.down_proj.weight"][:, order]
    save_folder(place / "permuted", turned)

    ran = call("merge", "ft1", "permuted", "-b", "base", "-m", "ties", cwd=place)
    assert_refused(ran, "permuted: was not fine-tuned from base", "linear matrices")


def test_model_made_apart_is_not_compressed(place: Path) -> None:
    """What would be packed is no task vector; the same words as of a merge."""
    before = listing(place)
    common = ("compress", "apart", "-b", "base", "-o", "p.mbz.safetensors")
    ran = call(*common, cwd=place)
    assert_refused(ran, "apart: was not fine-tuned from base", "--allow-base-mismatch")
    assert listing(place) == before

    ran = assert_done(call(*common, "--allow-base-mismatch", cwd=place))
    assert "apart was not fine-tuned from base" in ran.err


def test_foreign_vocabulary_is_refused(place: Path) -> None:
    """Rows of the embedding in another order stand for other tokens, whatever the rest is."""
    save_folder(place / "tokens", {**model(0), EMBEDDING: model(0)[EMBEDDING][::-1].copy()})

    ran = call("merge", "ft1", "tokens", "-b", "base", "-m", "ties", cwd=place)
    assert_refused(ran, "tokens: was not fine-tuned from base", "1 embedding matrices")


def test_allowed_mismatch_merges_and_says_so(place: Path) -> None:
    """The option, the recipe key and the keyword merge all the same; the note has the figures."""
    common = ("merge", "apart", "-b", "base", "-m", "task_arithmetic", "--allow-base-mismatch")
    ran = assert_done(call(*common, "-o", "out", cwd=place))
    assert "apart was not fine-tuned from base: cosine" in ran.err

    kept = {name: a.astype(np.float64) for name, a in read(place / "out").items()}
    for name, array in model(1).items():
        np.testing.assert_allclose(kept[name], array, rtol=0, atol=1e-7)
    again = assert_done(call("run", "out/mergebench_recipe.yaml", "-o", "two", cwd=place))
    assert "was not fine-tuned" in again.err
    assert_same(read(place / "two"), read(place / "out"))

    with pytest.raises(MismatchError, match="was not fine-tuned"):
        merge_models([model(1)], base=model(0), method="task_arithmetic")
    merge_models([model(1)], base=model(0), method="task_arithmetic", allow_base_mismatch=True)


@pytest.mark.parametrize(
    ("cosine", "noted"), [(0.3, True), (0.45, True), (0.8, False), (0.999, False)]
)
def test_far_fine_tunes_pass(place: Path, cosine: float, noted: bool) -> None:
    """What moved far is merged; below a cosine of a half a note has the figures."""
    save_folder(place / "far", towards(model(0), model(7), cosine))

    ran = assert_done(call("merge", "ft1", "far", "-b", "base", "-m", "ties", cwd=place))

    assert ("far is far from base: cosine" in ran.err) is noted
    assert "ft1 is far" not in ran.err


def test_scaled_model_is_noted(place: Path) -> None:
    """The right direction at three times the length is no fine-tune either."""
    save_folder(place / "long", {name: 3 * array for name, array in model(0).items()})

    ran = assert_done(call("merge", "long", "-b", "base", "-m", "ties", cwd=place))

    assert "long is far from base: cosine 1.000 and ‖τ‖/‖θ‖ 2.00" in ran.err


def test_figures_are_those_of_all_entries(place: Path) -> None:
    """Small matrices are looked at whole: cosine and ratio are what numpy finds."""
    data = assert_done(
        call("plan", "ft1", "ft2", "-b", "base", "-m", "ties", "--json", cwd=place)
    ).json["origin"]

    assert data["reference"] == "base"
    base = model(0)
    for label in ("ft1", "ft2"):
        tuned = read(place / label)
        found = data["models"][label]
        cosines = {name: cosine_of(base[name], tuned[name]) for name in LINEAR}
        assert found["linear"]["cosine"] == pytest.approx(np.mean(list(cosines.values())), rel=1e-9)
        assert found["embedding"]["cosine"] == pytest.approx(
            cosine_of(base[EMBEDDING], tuned[EMBEDDING]), rel=1e-9
        )
        worst = dict(sorted(cosines.items(), key=lambda pair: pair[1])[:3])
        assert found["linear"]["worst"] == pytest.approx(worst, rel=1e-9)
        start = np.concatenate([base[name].ravel() for name in LINEAR]).astype(np.float64)
        end = np.concatenate([tuned[name].ravel() for name in LINEAR]).astype(np.float64)
        ratio = np.linalg.norm(end - start) / np.linalg.norm(start)
        assert found["linear"]["ratio"] == pytest.approx(ratio, rel=1e-9)
        assert found["linear"]["entries"] == 4 * WIDTH**2
        assert found["linear"]["matrices"] == 4
        assert found["linear"]["tells"] is True
        tau = [(tuned[name].astype(np.float64) - base[name]).ravel() for name in base]
        norm = float(np.linalg.norm(np.concatenate(tau)))
        assert data["task_vector_norms"][label] == pytest.approx(norm, rel=1e-9)
    norms = sorted(data["task_vector_norms"].values())
    assert data["longest_over_shortest"] == pytest.approx(norms[1] / norms[0], rel=1e-12)


def test_norms_and_biases_do_not_count(place: Path) -> None:
    """Vectors that are the same in every model, however long, do not hide a wrong base."""
    for name, seed in (("base2", 0), ("apart2", 1)):
        save_folder(place / name, {**model(seed), "model.norm.weight": np.ones(100_000, F32)})

    ran = call("merge", "apart2", "-b", "base2", "-m", "ties", cwd=place)
    assert_refused(ran, "was not fine-tuned from base2")


def test_large_constants_do_not_outweigh_the_rest(place: Path) -> None:
    """A small matrix with large entries that all models share does not hide a wrong base."""
    shared = np.tile(np.arange(1, 17, dtype=F32), (24, 1))
    same = {"model.layers.0.mixer.A_log": shared, EMBEDDING: model(0)[EMBEDDING]}
    for name, seed in (("base2", 0), ("apart2", 1)):
        save_folder(place / name, {**model(seed), **same})

    ran = call("merge", "apart2", "-b", "base2", "-m", "ties", cwd=place)
    assert_refused(ran, "was not fine-tuned from base2", "5 linear matrices")


def test_vectors_named_after_embeddings_do_not_count(place: Path) -> None:
    """The bias of a patch embedding is a bias."""
    for name, seed in (("base2", 0), ("apart2", 1)):
        same = {each: model(0)[each] for each in LINEAR}
        bias = {"patch_embeddings.projection.bias": np.ones(100_000, F32)}
        save_folder(place / name, {**model(seed), **same, **bias})

    ran = call("merge", "apart2", "-b", "base2", "-m", "ties", cwd=place)
    assert_refused(ran, "was not fine-tuned from base2", "1 embedding matrices")


def test_new_heads_do_not_count(place: Path) -> None:
    """Fine-tunes come with heads made anew."""
    for name, seed in (("base2", 0), ("tuned2", 5)):
        head = np.random.default_rng(seed).standard_normal((200, WIDTH)).astype(F32)
        save_folder(place / name, {**model(0), "classifier.weight": head})

    ran = assert_done(call("merge", "tuned2", "-b", "base2", "-m", "ties", cwd=place))
    assert "far from" not in ran.err


def test_zero_matrices_say_nothing(place: Path) -> None:
    """A matrix that starts at zero has no direction to leave."""
    zero = {name: np.zeros(SHAPES[name], F32) for name in LINEAR[:3]}
    save_folder(place / "zero", {**model(0), **zero})

    data = assert_done(call("plan", "ft1", "-b", "zero", "-m", "ties", "--json", cwd=place)).json
    assert data["origin"]["models"]["ft1"]["linear"]["matrices"] == 1


def test_too_few_entries_are_not_judged() -> None:
    """Unrelated models of 3,000 entries are merged, and of 6,400 refused."""
    for side, refused in ((54, False), (80, True)):
        name = "layers.0.up.weight"
        one, two = (
            {name: np.random.default_rng(seed).standard_normal((side, side)).astype(F32)}
            for seed in (0, 1)
        )
        if refused:
            with pytest.raises(MismatchError, match="was not fine-tuned"):
                merge_models([two], base=one, method="ties")
        else:
            merged = merge_models([two], base=one, method="ties", density=1.0)
            np.testing.assert_allclose(merged[name], two[name], rtol=0, atol=1e-6)


def test_bound_of_the_sample() -> None:
    """Six deviations of the mean cosine, from the sizes and entries of its matrices."""

    def sample(*pairs: tuple[int, int]) -> Likeness:
        return Likeness(tuple(Pair("w", size, n, 0.0, 1.4, 1.0, 1.0) for size, n in pairs))

    assert sample((100, 100)).deviation == pytest.approx(0.1)
    # One of 900 entries that stands for three quarters, and one of 100.
    mixed = sample((30_000, 900), (10_000, 100))
    assert mixed.deviation == pytest.approx(np.sqrt((9 / 16) / 900 + (1 / 16) / 100))
    assert UNRELATED == 0.1
    assert tells(sample((9999, 3600)))
    assert not tells(sample((9999, 3599)))


class Counting:
    """A large matrix that notes what is read of it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, "F32"
        self.places: list[tuple[int, int]] = []

    def read(self, start: int, stop: int, out: Any = None) -> Array:
        self.places.append((start, stop))
        return np.arange(start, stop).astype(F32) % 97 - 48


def test_sample_is_bounded_and_spread() -> None:
    """However many and however large the matrices: 512 short runs, all over the model."""
    names = [f"layers.{i:03}.up.weight" for i in range(700)]
    one, two = ({name: Counting((1 << 13, 1 << 13)) for name in names} for _ in range(2))
    found = likeness(one, [two])[0]["linear"]

    assert found.cosine == pytest.approx(1)
    assert len(found.pairs) == TENSORS
    places = [place for tensor in two.values() for place in tensor.places]
    assert len(places) == RUNS
    assert places == [place for tensor in one.values() for place in tensor.places]
    assert {stop - start for start, stop in places} == {RUN}
    looked = [int(pair.name.split(".")[1]) for pair in found.pairs]
    assert min(looked) < 3
    assert max(looked) > 696
    assert max(np.diff(looked)) <= 3


@pytest.mark.parametrize(
    ("size", "count"), [(0, 4), (100, 4), (4 * RUN, 4), (10**9 + 1, 4), (RUN + 1, 1)]
)
def test_runs_cover_or_spread(size: int, count: int) -> None:
    """Runs lie inside of the tensor, do not overlap, and leave no large gap."""
    found = list(runs(size, count))
    if size <= count * RUN:
        assert found == ([(0, size)] if size else [])
        return
    assert len(found) == count
    edges = [0, *(edge for run in found for edge in run), size]
    assert edges == sorted(edges)
    assert max(after - before for before, after in pairwise(edges)) <= max(size / count, RUN)


def test_unrelated_models_without_a_base(place: Path) -> None:
    """Averaging needs no base, and is not refused; the note says what it looks like."""
    ran = assert_done(call("merge", "ft1", "apart", "-o", "one", cwd=place))
    assert "look unrelated, merging them makes noise: cosine" in ran.err

    ran = assert_done(call("merge", "ft1", "ft2", "-o", "two", cwd=place))
    assert "unrelated" not in ran.err
    assert "far from" not in ran.err


CONTRADICTIONS = {
    "model_type": ({"model_type": "llama"}, {"model_type": "mistral"}, "model_type 'llama' and"),
    "layers": ({"num_hidden_layers": 2}, {"num_hidden_layers": 3}, "num_hidden_layers 2 and 3"),
    "width": ({"hidden_size": 96}, {"hidden_size": 128}, "hidden_size 96 and 128"),
    "heads": ({"n_head": 12}, {"n_head": 16}, "n_head 12 and 16"),
    "nested": (
        {"text_config": {"num_attention_heads": 8}},
        {"text_config": {"num_attention_heads": 4}},
        "text_config.num_attention_heads 8 and 4",
    ),
    "several": (
        {"d_model": 1, "d_ff": 2, "d_kv": 3, "num_layers": 4, "num_heads": 5},
        {"d_model": 9, "d_ff": 9, "d_kv": 9, "num_layers": 9, "num_heads": 9},
        "and 1 more",
    ),
    "architectures": (
        {"model_type": None, "architectures": ["GPT2LMHeadModel"]},
        {"model_type": None, "architectures": ["LlamaForCausalLM"]},
        "architectures ['GPT2LMHeadModel'] and ['LlamaForCausalLM']",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradicting_configs_are_refused(place: Path, case: str) -> None:
    """Keys that fine-tuning leaves alone are compared before shapes are."""
    one, two, words = CONTRADICTIONS[case]
    save_folder(place / "base2", model(0), one)
    tuned = read(place / "ft1")
    if case in ("layers", "width"):
        # The config says it better than the first tensor that does not fit.
        tuned = {"model.layers.0.mlp.up_proj.weight": np.ones((3, 3), F32)}
    save_folder(place / "tuned2", tuned, two)
    before = listing(place)

    ran = call("merge", "tuned2", "-b", "base2", "-m", "ties", cwd=place)
    assert_refused(ran, "tuned2: its config contradicts that of base2", words, "--allow-base-mis")
    assert listing(place) == before
    if len(tuned) > 1:
        allow = ("-m", "ties", "--allow-base-mismatch")
        assert words in assert_done(call("merge", "tuned2", "-b", "base2", *allow, cwd=place)).err


def test_what_fine_tuning_changes_does_not_matter(place: Path) -> None:
    """Dropout, labels, dtypes, windows, tasks and versions may differ."""
    ours = {
        "architectures": ["BertModel"], "model_type": "bert", "hidden_dropout_prob": 0.1,
        "use_cache": True, "torch_dtype": "float32", "max_position_embeddings": 512,
        "n_inner": None, "vocab_size": 96, "transformers_version": "4.8.2",
        "rope_theta": 1e4, "hidden_size": 96,
        "hidden_act": "gelu",
    }  # fmt: skip
    theirs = {
        "architectures": ["BertForSequenceClassification"], "model_type": "bert",
        "hidden_dropout_prob": 0.0, "use_cache": False, "torch_dtype": "bfloat16",
        "max_position_embeddings": 1024, "n_inner": 384, "vocab_size": 97,
        "transformers_version": "5.0", "rope_theta": 5e5, "hidden_size": 96,
        "hidden_act": "gelu_new",
        "id2label": {"0": "no"}, "problem_type": "single_label_classification",
    }  # fmt: skip
    save_folder(place / "base2", model(0), ours)
    save_folder(place / "tuned2", read(place / "ft1"), theirs)
    assert_done(call("merge", "tuned2", "-b", "base2", "-m", "ties", cwd=place))
    for names in (["GPT2Model"], ["GPT2LMHeadModel"], ["GPT2ForSequenceClassification"]):
        save_folder(place / "base3", model(0), {"model_type": None, "architectures": names})
        theirs = {"model_type": None, "architectures": ["GPT2DoubleHeadsModel"]}
        save_folder(place / "tuned3", read(place / "ft1"), theirs)
        call_ = ("merge", "tuned3", "-b", "base3", "-m", "ties", "-o", "out", "-f")
        assert_done(call(*call_, cwd=place))


def test_model_type_goes_before_names_of_classes(place: Path) -> None:
    """Where both configs have a model_type, what the classes are called does not matter."""
    for name, like, family in (("base2", "base", "OldForCausalLM"), ("ft3", "ft1", "NewModel")):
        save_folder(place / name, read(place / like), {"architectures": [family]})

    assert_done(call("merge", "ft3", "-b", "base2", "-m", "ties", cwd=place))


def test_saved_task_vector_of_another_base(place: Path) -> None:
    """A task vector knows its base by fingerprint, at any place; another one is refused."""
    made = ("merge", "ft1", "-b", "base", "-m", "task_arithmetic", "--as", "delta")
    assert_done(call(*made, "-o", "tau.safetensors", cwd=place))
    save_folder(place / "copy", model(0))
    common = ("merge", "tau.safetensors", "-m", "task_arithmetic", "-o", "out", "-f")

    assert_done(call(*common, "-b", "copy", cwd=place))
    before = listing(place)
    ran = call(*common[:-3], "-o", "out2", "-b", "ft2", cwd=place)
    assert_refused(
        ran, "tau.safetensors: is a difference to another model than the base ft2",
        "fingerprint", "--allow-base-mismatch",
    )  # fmt: skip
    assert listing(place) == before
    ran = assert_done(call(*common, "-b", "ft2", "--allow-base-mismatch", cwd=place))
    assert "is a difference to another model" in ran.err


def test_saved_task_vectors_of_two_bases(place: Path) -> None:
    """Without a base, task vectors of two bases are refused beside each other."""
    for number, base in ((1, "base"), (2, "ft2")):
        made = ("merge", "ft1", "-b", base, "-m", "task_arithmetic", "--as", "delta")
        assert_done(call(*made, "-o", f"tau{number}.safetensors", cwd=place))
    common = (
        "merge",
        "tau1.safetensors",
        "tau2.safetensors",
        "-m",
        "ties",
        "-o",
        "sum.safetensors",
    )

    assert_refused(call(*common, cwd=place), "is a difference to another model than", "one base")
    ran = assert_done(call(*common, "--allow-base-mismatch", cwd=place))
    assert "is a difference to another model than" in ran.err


def test_bases_that_adapters_name(place: Path) -> None:
    """Names of bases that differ, or that are not the base given, are noted."""
    made = {
        f"{name}": (
            np.random.default_rng(4).standard_normal((WIDTH, 2)).astype(F32) * F32.type(0.01),
            np.random.default_rng(5).standard_normal((2, WIDTH)).astype(F32) * F32.type(0.01),
        )
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    }
    save_peft(place / "a", made, base_model_name_or_path=str(place / "base"))
    save_peft(place / "b", made, base_model_name_or_path=str(place / "ft2"))
    save_peft(place / "c", made, base_model_name_or_path="org/name")

    ran = assert_done(call("merge", "a", "b", "-m", "ties", "-o", "one", cwd=place))
    assert "the adapters name different bases" in ran.err
    ran = assert_done(call("merge", "b", "-b", "base", "-m", "ties", "-o", "two", cwd=place))
    far = np.concatenate(
        [np.ravel(read(place / "base")[n] - read(place / "ft2")[n]) for n in LINEAR]
    )
    long = np.concatenate([np.ravel(read(place / "ft2")[n]) for n in LINEAR])
    distance = np.linalg.norm(far) / np.linalg.norm(long)
    words = " ".join(ran.err.split())
    assert f"b names the base {place / 'ft2'}, and base is given; 2 of its 2 tensors fit" in words
    assert (
        f"the linear matrices of the bases have cosine 0.980 and relative distance {distance:.2g}"
        in words
    )
    quiet = (("a", "base"), ("a", "base/model.safetensors"), ("c", "base"))
    for number, (adapter, base) in enumerate(quiet):
        ran = assert_done(
            call("merge", adapter, "-b", base, "-m", "ties", "-o", f"q{number}", cwd=place)
        )
        assert "names the base" not in ran.err
    hub = place / "models--org--other" / "snapshots" / "1"
    save_folder(hub, model(0))
    ran = assert_done(call("merge", "c", "-b", hub, "-m", "ties", "-o", "hub", cwd=place))
    assert "c names the base org/name, and" in ran.err


def test_adapters_of_unrelated_bases(place: Path) -> None:
    """An adapter whose own base is at hand and unrelated is refused, unless one insists."""
    made = {
        "model.layers.0.mlp.up_proj": (np.ones((WIDTH, 2), F32), np.ones((2, WIDTH), F32)),
    }
    save_folder(place / "other", model(77))
    save_peft(place / "a", made, base_model_name_or_path=str(place / "other"))
    line = ("merge", "a", "-b", "base", "-m", "task_arithmetic", "-o", "out")

    assert_refused(call(*line, cwd=place), "1 of its 1 tensors fit", "--allow-base-mismatch")
    ran = assert_done(call(*line, "--allow-base-mismatch", cwd=place))
    assert "names the base" in ran.err
    save_folder(place / "copy", read(place / "base"))
    save_peft(place / "b", made, base_model_name_or_path=str(place / "copy"))
    ran = assert_done(call("merge", "b", "-b", "base", "-m", "ties", "-o", "two", cwd=place))
    assert "names the base" not in ran.err


def test_bases_in_the_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base on the Hub is found in the cache."""
    snapshot = place / "hub" / "models--org--name" / "snapshots" / "abc"
    save_folder(snapshot, model(77))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    made = {"model.layers.0.mlp.up_proj": (np.ones((WIDTH, 2), F32), np.ones((2, WIDTH), F32))}
    save_peft(place / "a", made, base_model_name_or_path="org/name")
    line = ("merge", "a", "-b", "base", "-m", "task_arithmetic", "-o", "out")

    assert_refused(call(*line, cwd=place), "a names the base org/name", "--allow-base-mismatch")


def test_unequal_task_vectors_are_noted(place: Path) -> None:
    """Above a ratio of three the note has both norms and the weight that would even them out."""
    base, step = model(0), model(8)
    tuned = {
        name: {
            key: (array + size * step[key]).astype(F32) if array.ndim > 1 else array
            for key, array in base.items()
        }
        for name, size in (("short", 0.02), ("long", 0.1), ("middle", 0.05))
    }
    for name, arrays in tuned.items():
        save_folder(place / name, arrays)
    common = ("-b", "base", "-m", "task_arithmetic", "-f", "-o", "out")

    ran = assert_done(call("merge", "short", "long", *common, cwd=place))
    assert "(long) is 5.0 times" in ran.err
    assert "0.2 of its weight for long would even them out" in ran.err
    for models in (("short", "middle"), ("short", "long:0.2"), ("short", "long:0"), ("long",)):
        ran = assert_done(call("merge", *models, *common, cwd=place))
        assert "task vectors differ" not in ran.err
    # Weights count where they apply: √(25 + 4) / √5 is below three, the embedding not among them.
    for weight, noted in (("1/0.2", False), ("1/0.9", True)):
        extra = ("--where", f"block=0-1:weight={weight}")
        ran = assert_done(call("merge", "short", "long", *common, *extra, cwd=place))
        assert ("task vectors differ" in ran.err) is noted
    shown = assert_done(call("plan", "short", "long", *common[:4], cwd=place)).out
    assert "longest / shortest 5" in shown


def test_fragile_methods_warn_earlier_of_unequal_norms(place: Path) -> None:
    """WUDI, as a method or an op, warns above a ratio of two; others do not there."""
    base, step = model(0), model(8)
    for name, size in (("short", 0.04), ("long", 0.1), ("like", 0.075)):
        tuned = {
            key: (array + size * step[key]).astype(F32) if array.ndim > 1 else array
            for key, array in base.items()
        }
        save_folder(place / name, tuned)
    for name, method, noted in (
        ("long", "wudi", True),
        ("like", "wudi", False),
        ("long", "tsv_merge", False),
    ):
        ran = assert_done(call("plan", "short", name, "-b", "base", "-m", method, cwd=place))
        assert ("is known to fail" in ran.out) is noted
        assert ("2.5 times" in " ".join(ran.out.split())) is noted


def test_norms_of_adapters_are_exact(tmp_path: Path) -> None:
    """Factors give the norm of their product, scale included."""
    save_peft(tmp_path / "a", factors(1), alpha=8.0)
    save_peft(tmp_path / "b", factors(2), alpha=2.0)

    data = assert_done(call("plan", "a", "b", "-m", "linear", "--json", cwd=tmp_path)).json

    for label, made, scale in (("a", factors(1), 2.0), ("b", factors(2), 0.5)):
        squares = sum(float((matrix**2).sum()) for matrix in product(made, scale).values())
        found = data["origin"]["task_vector_norms"][label]
        assert found == pytest.approx(np.sqrt(squares), rel=1e-9)
    assert data["origin"]["reference"] is None


def test_norms_of_computed_updates_are_estimated_from_few() -> None:
    """An update that is computed when read is looked at in a few places of a few matrices."""
    asked: list[str] = []

    def update(name: str) -> Dense:
        def block(rows: slice, columns: slice) -> Array:
            asked.append(name)
            return np.full((rows.stop - rows.start, columns.stop - columns.start), 0.5)

        return Dense(Computed((4096, 4096), block))

    names = [f"layers.{number}.up.weight" for number in range(40)]
    items = {
        name: Item(Site(name, (4096, 4096)), (update(name),), (2.0,), ("a",), None)
        for name in names
    }
    ((norm, weighted),) = task_norms(items)
    assert norm == pytest.approx(0.5 * np.sqrt(40) * 4096)
    assert weighted == pytest.approx(2 * norm)
    assert len(set(asked)) == FEW
    assert len(asked) <= 2 * FEW * FEW


def test_model_given_twice(place: Path) -> None:
    """Both are listed."""
    data = assert_done(
        call("plan", "ft1", "ft1", "-b", "base", "-m", "ties", "--json", cwd=place)
    ).json
    assert sorted(data["origin"]["task_vector_norms"]) == ["ft1", "ft1 (2)"]


def test_adapter_on_a_wrong_base(place: Path) -> None:
    """A base+adapter is judged by the checkpoint below the adapter."""
    made = {
        "model.layers.0.mlp.up_proj": (np.ones((WIDTH, 1), F32), np.full((1, WIDTH), 1e-3, F32))
    }
    save_peft(place / "lora", made)
    ran = call("merge", "apart+lora", "ft1", "-b", "base", "-m", "ties", cwd=place)
    assert_refused(ran, "apart+lora: was not fine-tuned from base")
    assert_done(call("merge", "ft2+lora", "ft1", "-b", "base", "-m", "ties", cwd=place))


def test_what_is_not_finite_is_left_to_the_merge() -> None:
    """Entries that are NaN or infinite do not spoil the figures of the others."""
    base, tuned = model(0), towards(model(0), model(2), 0.9)
    spoilt = {name: array.copy() for name, array in tuned.items()}
    spoilt[LINEAR[0]][0, :2] = np.nan, np.inf
    found = likeness(
        {name: ArrayTensor(array) for name, array in base.items()},
        [{name: ArrayTensor(array) for name, array in each.items()} for each in (tuned, spoilt)],
    )
    one, two = (each["linear"] for each in found)
    assert two.entries == one.entries - 2
    assert two.cosine == pytest.approx(one.cosine, abs=1e-4)


def test_only_what_is_selected_is_judged(place: Path) -> None:
    """Parts that filters leave to the base count neither for a model nor against it."""
    half = {name: model(1 if "layers.1" in name else 0)[name] for name in SHAPES}
    save_folder(place / "half", half)
    common = ("merge", "half", "-b", "base", "-m", "ties", "-o")

    ran = assert_done(call(*common, "one", cwd=place))
    assert "half is far from base: cosine 0.5" in ran.err or "cosine 0.49" in ran.err
    ran = call(*common, "two", "--include", "block=1", cwd=place)
    assert_refused(ran, "half: was not fine-tuned from base", "2 linear matrices")
    ran = assert_done(call(*common, "three", "--exclude", "block=1", cwd=place))
    assert "far from" not in ran.err


def test_recipes_carry_the_choice(place: Path) -> None:
    """``allow_base_mismatch`` is a key of recipes, true or false."""
    recipe: dict[str, Any] = {"models": ["apart"], "base": "base", "method": "ties"}
    (place / "r.json").write_text(json.dumps(recipe))
    assert_refused(call("run", "r.json", "-o", "o", cwd=place), "was not fine-tuned")
    (place / "r.json").write_text(json.dumps({**recipe, "allow_base_mismatch": True}))
    assert_done(call("run", "r.json", "-o", "o", cwd=place))
    (place / "r.json").write_text(json.dumps({**recipe, "allow_base_mismatch": "yes"}))
    assert_refused(call("run", "r.json", "-o", "p", cwd=place), "`allow_base_mismatch`")
