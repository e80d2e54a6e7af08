"""One result per task, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mergebench import apply, merge_models
from mergebench.core.errors import MismatchError, ParameterError
from mergebench.core.site import make_sites
from mergebench.merge.chains import chain
from mergebench.merge.method import METHODS
from mergebench.merge.op import OPS
from mergebench.merge.ops.emr import elected
from mergebench.merge.ops.flexmerge import block_of

from .support import assert_exactly

TAU_1, TAU_2 = [2.0, -1.0, 0.5, 1.0], [1.0, 2.0, -0.5, -1.0]
#: What has one result for each model.
APART = ("emr", "flexmerge", "tall_masks", "tsv_compress", "twin_merging")


def results(method: str, *vectors: Any, weights: Sequence[float] = (), **params: Any) -> list[Any]:
    """The results of a merge of single tensors into zeros, as nested lists."""
    tables = [{"w": np.array(vector, np.float32)} for vector in vectors]
    base = {"w": np.zeros_like(tables[0]["w"])}
    pairs = list(zip(tables, weights or (1.0,) * len(tables), strict=True))
    found = merge_models(pairs, base=base, method=method, **params)
    return [each["w"].tolist() for each in found]


def assert_near(got: Any, expected: Any, within: float = 1e-6) -> None:
    """Equal numbers but for a rounding."""
    assert np.allclose(got, expected, rtol=0, atol=within), (got, expected)


# EMR


def test_emr_elects_masks_and_rescales() -> None:
    """Unified [2, 2, -.5, -1], masks [1, 0, 0, 0] and all, scales 2.25 and .81818."""
    unified, agrees = elected(np.array([TAU_1, TAU_2], np.float32))
    assert_exactly(unified.tolist(), [[2, 2, -0.5, -1]])
    assert_exactly(agrees.tolist(), [[True, False, False, False], [True] * 4])
    first, second = results("emr", TAU_1, TAU_2)
    assert_exactly(first, [4.5, 0, 0, 0])
    assert_near(second, [1.6363637, 1.6363637, -0.4090909, -0.8181818])


def test_emr_of_one_or_equal_models_is_exact() -> None:
    """A single model comes out as it is, and so do copies of it."""
    assert_exactly(results("emr", TAU_1), [TAU_1])
    assert_exactly(results("emr", TAU_1, TAU_1, TAU_1), [TAU_1] * 3)


def test_emr_of_opposite_models() -> None:
    """Sums of zero count as negative: each keeps its negative entries, at twice their size."""
    assert_exactly(results("emr", [1, -1], [-1, 1]), [[0, -2], [-2, 0]])


def test_emr_of_a_task_that_agrees_nowhere() -> None:
    """It is left at the base, as a zero task vector is; nothing is divided by zero."""
    assert_exactly(results("emr", [1, 1], [-3, -3]), [[0, 0], [-3, -3]])
    assert_exactly(results("emr", [0, 0], [1, 2]), [[0, 0], [1, 2]])
    assert_exactly(results("emr", [0, 0], [0, 0]), [[0, 0], [0, 0]])


def test_emr_over_tensors_counts_small_tensors_as_much() -> None:
    """Means of |τ| over tensors: (1 + 4) / (3 + 4), against (3 + 4) / (9 + 4) over entries."""
    taus = [
        {"a": np.array([1.0, 1, 1], np.float32), "b": np.array([4.0], np.float32)},
        {"a": np.array([3.0, 3, 3], np.float32), "b": np.array([0.0], np.float32)},
    ]
    base = {name: np.zeros_like(array) for name, array in taus[0].items()}
    for over, scale in (("tensors", 5 / 7), ("entries", 7 / 13)):
        first = merge_models(taus, base=base, method="emr", over=over)[0]
        assert_near(first["a"], [3 * scale] * 3)
        assert_near(first["b"], [4 * scale])


# TALL masks


def test_tall_masks_of_one_model_keep_its_support() -> None:
    """With N = 1 nothing is left over, and the mask is the support."""
    assert_exactly(results("tall_masks", [1, 0, -2], mask_lam=0.4), [[1, 0, -2]])


def test_tall_masks_recover_disjoint_tasks() -> None:
    """Where no two tasks displace the same entry each comes out exactly."""
    taus = [1, 0, 0, 2], [0, -3, 0, 0], [0, 0, 4, 0]
    assert_exactly(results("tall_masks", *taus), [list(map(float, tau)) for tau in taus])


def test_tall_masks_compare_with_the_rest() -> None:
    """|τ_t| > λ_t |τ - τ_t|: of τ = [3, 1] task 1 uses both at .4, and the first alone at 1."""
    one, other = [2, -1], [1, 2]
    assert_exactly(results("tall_masks", one, other, mask_lam=0.4), [[3, 1], [3, 1]])
    assert_exactly(results("tall_masks", one, other, mask_lam=1), [[3, 0], [0, 1]])


def test_tall_masks_follow_any_method() -> None:
    """After TIES the merged entries are those of TIES."""
    taus = [{"w": np.array(tau, np.float32)} for tau in ([4, -1, 0], [2, 3, 0])]
    base = {"w": np.zeros(3, np.float32)}
    found = merge_models(
        taus, base=base, method="ties", density=1, divisor="none", then=["tall_mask:mask_lam=1"]
    )
    assert_exactly([each["w"].tolist() for each in found], [[6, 0, 0], [0, 3, 0]])


# TSV-Compress

DIAGONALS = [np.diag([4.0, 3, 2, 1]), np.diag([-1.0, 6, 0, 2])]


def test_tsv_compress_shares_out_the_singular_values() -> None:
    """Two tasks on a 4 x 4 matrix keep two singular values each, their own."""
    first, second = results("tsv_compress", *DIAGONALS)
    assert_near(first, np.diag([4.0, 3, 0, 0]))
    assert_near(second, np.diag([0.0, 6, 0, 2]))


@pytest.mark.parametrize(("share", "kept"), [("0.25", 1), ("0.74", 2), ("1", 4), ("0", 1)])
def test_tsv_compress_of_a_share(share: str, kept: int) -> None:
    """⌊share · r⌋ singular values, at least one, however many tasks there are."""
    (found,) = results("tsv_compress", DIAGONALS[0], share=share)
    assert_near(found, np.diag([4.0, 3, 2, 1][:kept] + [0.0] * (4 - kept)))


def test_tsv_compress_keeps_vectors_and_single_models() -> None:
    """Vectors stay whole, per task; one model alone keeps everything."""
    assert_exactly(results("tsv_compress", TAU_1, TAU_2), [TAU_1, TAU_2])
    assert_exactly(results("tsv_compress", DIAGONALS[0]), [DIAGONALS[0].tolist()])


@pytest.mark.parametrize("share", ["nonsense", "1.5", "-0.1", "nan"])
def test_tsv_compress_refuses_other_shares(share: str) -> None:
    """A share is a number from 0 to 1, or the word."""
    with pytest.raises(ParameterError, match=r"`share` must be a number from 0 to 1, or tasks"):
        results("tsv_compress", DIAGONALS[0], share=share)


def test_low_ranks_are_not_filled_up() -> None:
    """Of a task of rank 1 nothing but that is left, and of a zero one nothing, at any share."""
    thin, none = np.outer([1.0, 2, 0, 0], [3.0, 0, 4, 0]), np.zeros((4, 4))
    for share in ("tasks", "0.5", "1"):
        first, second = results("tsv_compress", thin, none, share=share)
        assert_near(first, thin)
        assert_exactly(second, none.tolist())
    first, second = results("twin_merging", thin, none, lam=0.25, density=0.25)
    assert_near(first, thin)
    assert_near(second, none)


# Twin-Merging


def test_twin_is_shared_plus_exclusive() -> None:
    """λ = .5 of diag(4, 0), diag(0, 2) shares diag(2, 1); of diag(±2, ∓1) each keeps the first."""
    one, other = np.diag([4.0, 0]), np.diag([0.0, 2])
    first, second = results("twin_merging", one, other, lam=0.5, density=0.5)
    assert_near(first, np.diag([4.0, 1]))
    assert_near(second, np.diag([0.0, 1]))


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_twin_of_full_density_gives_every_model(lam: float) -> None:
    """Whatever is shared."""
    taus = [each.tolist() for each in DIAGONALS]
    assert_exactly(results("twin_merging", *taus, lam=lam, density=1), taus)


def test_twin_of_no_density_is_the_shared_expert() -> None:
    """All results are task arithmetic."""
    shared = (0.25 * (DIAGONALS[0] + DIAGONALS[1])).tolist()
    assert_exactly(results("twin_merging", *DIAGONALS, lam=0.25, density=0), [shared] * 2)


def test_twin_combines_by_weights() -> None:
    """One-hot weights give a single twin; weights are divided by their sum."""
    tables = [{"w": np.asarray(each, np.float32)} for each in DIAGONALS]
    base = {"w": np.zeros((4, 4), np.float32)}
    apart = merge_models(tables, base=base, method="twin_merging", density=0.5)
    for weights in ((1.0, 0.0), (0.0, 3.0), (1.0, 3.0)):
        pairs = list(zip(tables, weights, strict=True))
        one = merge_models(pairs, base=base, method="twin_merging", density=0.5, experts="combined")
        shares = np.array(weights) / sum(weights)
        assert_near(one["w"], shares[0] * apart[0]["w"] + shares[1] * apart[1]["w"])


# FlexMerge

A, B = "model.layers.0.attn.weight", "model.layers.0.mlp.weight"


def blocks(*values: tuple[Sequence[float], Sequence[float]]) -> list[dict[str, np.ndarray]]:
    """Models of two blocks of two entries."""
    return [{A: np.array(a, np.float32), B: np.array(b, np.float32)} for a, b in values]


def flexed(models: list[dict[str, np.ndarray]], **params: Any) -> list[list[list[float]]]:
    """Both blocks of every result."""
    base = {name: np.zeros_like(array) for name, array in models[0].items()}
    found = merge_models(models, base=base, method="flexmerge", **params)
    return [[each[A].tolist(), each[B].tolist()] for each in found]


#: In block A the first two point the same way, in block B no two do.
THREE = blocks(([1, 0], [1, 0]), ([3, 0], [0, 2]), ([0, 4], [-1, -1]))


def test_flexmerge_merges_what_is_most_alike_first() -> None:
    """At 2.5 models one merge is due, of six blocks: the parallel ones of block A."""
    assert_exactly(
        flexed(THREE, size=2.5), [[[2, 0], [1, 0]], [[2, 0], [0, 2]], [[0, 4], [-1, -1]]]
    )


def test_flexmerge_goes_on_with_equals_by_name() -> None:
    """Then come the rest of block A, tasks 1 and 2 of block B (both cosines are 0), all of B."""
    third, thirds = float(np.float32(1 / 3)), float(np.float32(4 / 3))
    alone = [[1, 0], [0, 2], [-1, -1]]
    assert_exactly(flexed(THREE, size=2), [[[thirds] * 2, b] for b in alone])
    pair = [[0.5, 1], [0.5, 1], [-1, -1]]
    assert_exactly(flexed(THREE, size=1.9), [[[thirds] * 2, b] for b in pair])
    assert_exactly(flexed(THREE, size=1), [[[thirds] * 2, [0, third]]] * 3)


def test_flexmerge_of_as_many_models_as_there_are_gives_them_back() -> None:
    """Nothing is merged, scaled or trimmed."""
    whole = [[each[A].tolist(), each[B].tolist()] for each in THREE]
    assert_exactly(flexed(THREE, size=3, lam=0.1, density=0.1, merger="ties"), whole)
    assert_exactly(flexed(THREE[:1], size=1, lam=0.1), whole[:1])


@pytest.mark.parametrize(("linkage", "shared"), [("complete", B), ("single", A), ("average", A)])
def test_flexmerge_links_groups_by_their_members(linkage: str, shared: str) -> None:
    """Of angles 0, 40 and 90 degrees the pair and the third are 0 apart at most, or cos 50."""
    angles = np.radians([0.0, 40.0, 90.0])
    third = (0.3, np.sqrt(1 - 0.09))
    models = blocks(
        *(
            ((np.cos(angle), np.sin(angle)), other)
            for angle, other in zip(angles, ((1, 0), third, (-1, 0)), strict=True)
        )
    )
    found = flexed(models, size=2, linkage=linkage)
    both = [len({str(each[place]) for each in found}) for place in (0, 1)]
    assert both == ([2, 2] if shared == B else [1, 3])


def test_flexmerge_shares_by_ties_and_lambda() -> None:
    """What has the sign of the sum is averaged; a sum of zero is zero; λ scales what is shared."""
    models = blocks(([4, 1], [1, 1]), ([-2, -1], [3, 1]))
    assert_exactly(flexed(models, size=1, merger="ties", lam=0.5), [[[2, 0], [1, 0.5]]] * 2)
    # In block B alone: what a task has for itself is not scaled.
    assert_exactly(
        flexed(models, size=1.5, merger="ties", lam=0.5),
        [[[4, 1], [1, 0.5]], [[-2, -1], [1, 0.5]]],
    )


def test_flexmerge_of_zero_task_vectors() -> None:
    """Two of them are alike, and merge before others; one and another are at right angles."""
    models = blocks(([0, 0], [1, 0]), ([0, 0], [0.9, 0.1]), ([1, 0], [0.8, 0.3]))
    found = flexed(models, size=2.5)
    assert_exactly([each[0] for each in found], [[0, 0], [0, 0], [1, 0]])
    assert_exactly([each[1] for each in found], [each[B].tolist() for each in models])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("model.layers.3.self_attn", "model.layers.3")),
        ("model.layers.3.norm1.weight", ("model.layers.3.norm1", "model.layers.3")),
        ("encoder.block.0.layer.1.wi.weight", ("encoder.block.0.layer.1", "encoder.block.0")),
        ("model.embed.weight", ("model.embed", "model.embed")),
        ("scale", ("scale", "scale")),
    ],
)
def test_blocks_of_tensors(name: str, expected: tuple[str, str]) -> None:
    """Parts of numbered blocks, whole blocks, and modules outside of them."""
    site = make_sites({name: (2, 2)})[name]
    assert (block_of(site, "part"), block_of(site, "layer")) == expected
    assert block_of(site, "tensor") == name


# All of them


@pytest.mark.parametrize("method", APART)
def test_one_result_for_each_model(method: str) -> None:
    """In the order of the models, of a single one too; `apply` gives them as well."""
    for count in (1, 3):
        taus = [np.diag([index + 1.0, 2, 0]) for index in range(count)]
        found = results(method, *taus)
        assert len(found) == count
        applied = apply(METHODS[method](), [np.asarray(tau, np.float32) for tau in taus])
        assert_near(applied, found)


@pytest.mark.parametrize("method", APART)
def test_weights_multiply_task_vectors(method: str) -> None:
    """A model of weight 2 is one with twice its task vector; for TALL masks it is in τ alone."""
    taus = [np.diag([1.0, 5, 2]), np.diag([4.0, -3, 1])]
    got = results(method, *taus, weights=(2.0, 1.0))
    if method == "tall_masks":
        assert_near(got, [np.diag([6.0, 7, 5]) * keep for keep in ([0, 1, 1], [1, 0, 0])])
    else:
        assert_near(got, results(method, 2 * taus[0], taus[1]))


@pytest.mark.parametrize("method", APART)
def test_full_models_need_their_base(method: str) -> None:
    """Without it there are no task vectors."""
    with pytest.raises(MismatchError, match="combines task vectors"):
        merge_models([{"w": np.ones(2, np.float32)}] * 2, method=method)


def test_what_is_apart_stands_where_it_can() -> None:
    """After an op that combines only what looks back at all models; then any combining op."""
    for name in ("emr", "compress", "twin", "flexmerge"):
        with pytest.raises(ParameterError, match=f"{name}: nothing left to combine, sum has left"):
            chain(OPS["sum"](), OPS[name]())
    mean = chain(OPS["sum"](), OPS["tall_mask"](), OPS["mean"]())
    taus = [np.array(tau, np.float32) for tau in ([1.0, 0], [0, 2.0])]
    assert_exactly(apply(mean, taus, [3.0, 1.0]).tolist(), [0.75, 0.5])
