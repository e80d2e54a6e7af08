"""Spectral merges of adapters: in factors all the way, and equal to those of dense matrices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mergebench import merge_models
from mergebench.compute.backend import lapack
from mergebench.manifest import MANIFEST
from mergebench.merge.chains import rank_of
from mergebench.merge.op import OPS
from tests.helpers.adapters import Factors, factors, product, save_delta, save_peft
from tests.helpers.compare import assert_close
from tests.helpers.files import F32, F64, Array, read
from tests.helpers.models import base_model
from tests.helpers.running import assert_done, call
from tests.helpers.updates import update_of
from tests.oracle import spectral

ALPHA = 6.0
RANKS = (4, 1, 3)
#: (method, parameters, what follows, oracle on a list of matrices)
Oracle = Callable[[list[torch.Tensor]], torch.Tensor]
CASES: list[tuple[str, dict[str, Any], list[str], Oracle]] = [
    ("tsv_merge", {}, [], spectral.tsv_merge),
    ("tsv_merge", {"over": "full"}, [], lambda ms: spectral.tsv_merge(ms, over="full")),
    ("iso_c", {"lam": 1.5}, [], lambda ms: 1.5 * spectral.iso_c(ms)),
    ("iso_c", {"over": "full"}, [], lambda ms: spectral.iso_c(ms, "full")),
    ("iso_cts", {"common": 0.5}, [], lambda ms: spectral.iso_cts(ms, 0.5)),
    ("cart", {"share": 0.3}, [], lambda ms: spectral.cart(ms, share=0.3)),
    ("star", {}, [], lambda ms: sum(map(spectral.star, ms), torch.zeros(())) / len(ms)),
    ("knots_ties", {"density": 0.4}, [], lambda ms: spectral.knots_ties(ms, [1.0] * 3, 0.4)),
    ("core_ties", {"density": 0.4}, [], lambda ms: spectral.core_ties(ms, [1.0] * 3, 0.4)),
    ("wudi", {"solver": "exact"}, [], spectral.wudi_exact),
    ("task_arithmetic", {}, ["svc"], lambda ms: spectral.svc(sum(ms, torch.zeros(())), ms)),
    (
        "tsv_merge",
        {},
        ["svc:alpha=0.1", "truncate:rank=3"],
        lambda ms: spectral.truncate(spectral.svc(spectral.tsv_merge(ms), ms, 0.1), 3),
    ),
]
IDS = [f"{method}-{params or ''}{then or ''}" for method, params, then, _ in CASES]


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[list[Path], list[dict[str, Array]]]:
    """Three adapters of ranks 4, 1 and 3, and what they add to the weights."""
    paths, updates = [], []
    for seed, rank in enumerate(RANKS):
        made = factors(seed, rank)
        paths.append(save_peft(tmp_path / f"lora{seed}", made, ALPHA))
        updates.append(product(made, ALPHA / rank))
    return paths, updates


def oracle(updates: list[dict[str, Array]], merge: Oracle) -> dict[str, Array]:
    """The oracle's result for every weight, in float64."""
    return {
        name: merge([torch.tensor(update[name]) for update in updates]).numpy()
        for name in updates[0]
    }


@pytest.mark.parametrize(("method", "params", "then", "merge"), CASES, ids=IDS)
def test_factors_merge_as_dense_matrices(
    adapters: Any, method: str, params: dict[str, Any], then: list[str], merge: Oracle
) -> None:
    """As a model, a task vector and an adapter, the result is that of the full matrices."""
    paths, updates = adapters
    wanted = oracle(updates, merge)
    common: dict[str, Any] = {"method": method, "then": then, **params}
    assert_close(merge_models(paths, form="delta", **common), wanted, 2e-6)
    base = base_model()
    model = merge_models(paths, base=base, **common)
    assert_close(
        {name: model[name].astype(F64) - base[name].astype(F64) for name in wanted}, wanted, 2e-5
    )
    out = paths[0].parent / "out"
    written = merge_models(paths, form="lora", out=out, **common)
    assert written.residuals == {}
    assert_close(update_of(out), wanted, 2e-6)


@pytest.mark.parametrize(("method", "params", "then", "merge"), CASES, ids=IDS)
def test_no_full_matrix_is_decomposed(
    adapters: Any,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    params: dict[str, Any],
    then: list[str],
    merge: Oracle,
) -> None:
    """No decomposition has both sides of a weight: one of them is the summed rank, 8, or less."""
    paths, _ = adapters
    seen: list[tuple[int, ...]] = []
    plain = np.linalg.svd

    def watched(matrix: Array, **options: Any) -> Any:
        seen.append(matrix.shape)
        return plain(matrix, **options)

    monkeypatch.setattr(np.linalg, "svd", watched)
    for form in ("delta", "lora"):
        merge_models(paths, form=form, method=method, then=then, **params)
    assert seen
    assert max(min(shape) for shape in seen) <= sum(RANKS)


def regauged(made: Factors, seed: int) -> Factors:
    """``(B M, M⁻¹ A)``: the same updates in other factors."""
    random = np.random.default_rng(seed)
    found = {}
    for name, (B, A) in made.items():
        M = random.normal(size=(A.shape[0], A.shape[0])) + 2 * np.eye(A.shape[0])
        found[name] = (B.astype(F64) @ M, np.linalg.solve(M, A.astype(F64)))
    return found


@pytest.mark.parametrize(("method", "params", "then", "merge"), CASES, ids=IDS)
def test_the_gauge_is_immaterial(
    tmp_path: Path, method: str, params: dict[str, Any], then: list[str], merge: Oracle
) -> None:
    """(B, A) and (B M, M⁻¹ A) are the same update and merge alike, to 1e-9 in float64."""
    found = []
    for turn in (0, 1):
        paths = []
        for seed, rank in enumerate(RANKS):
            made = factors(seed, rank, dtype=F64)
            made = regauged(made, seed) if turn else made
            paths.append(save_peft(tmp_path / f"{turn}-{seed}", made, ALPHA))
        found.append(merge_models(paths, form="delta", method=method, then=then, **params))
    assert_close(found[1], found[0], 1e-9)


@pytest.mark.parametrize(("method", "params", "then", "merge"), CASES, ids=IDS)
def test_factors_that_lack_rank(
    tmp_path: Path, method: str, params: dict[str, Any], then: list[str], merge: Oracle
) -> None:
    """An untrained adapter (B = 0), repeated columns and a module of one adapter only."""
    made = [factors(seed, 3, dtype=F64) for seed in range(3)]
    for name, (B, A) in made[0].items():
        made[0][name] = (np.zeros_like(B), A)
    for name, (B, A) in made[1].items():
        made[1][name] = (np.repeat(B[:, :1], 3, axis=1), A)
    alone = min(made[2])
    only = {alone: made[2][alone]}
    paths = [
        save_peft(tmp_path / "untrained", made[0], ALPHA),
        save_peft(tmp_path / "repeated", made[1], ALPHA),
        save_peft(tmp_path / "alone", only, ALPHA),
    ]
    updates = [product(each, ALPHA / 3) for each in made]
    updates[2] = {
        name: array if name == f"{alone}.weight" else np.zeros_like(array)
        for name, array in updates[2].items()
    }
    got = merge_models(paths, form="delta", method=method, then=then, **params)
    assert_close(got, oracle(updates, merge), 1e-9)
    out = tmp_path / "out"
    merge_models(paths, form="lora", out=out, method=method, then=then, **params)
    assert_close(update_of(out), got, 1e-9)


def test_untrained_adapters_alone(tmp_path: Path) -> None:
    """Where every B is zero, an adapter of zeros comes out, and the base as it was."""
    made = {name: (np.zeros_like(B), A) for name, (B, A) in factors(0, 2).items()}
    paths = [save_peft(tmp_path / name, made, ALPHA) for name in "ab"]
    out = merge_models(paths, form="lora", method="tsv_merge")
    assert all(np.count_nonzero(a) == 0 for n, a in out.items() if "lora_B" in n)
    base = base_model()
    merged = merge_models(paths, base=base, method="tsv_merge")
    assert all(np.array_equal(merged[name], array) for name, array in base.items())


def test_scales_of_factors_are_immaterial(tmp_path: Path) -> None:
    """(B, A) and (1e-20 B, 1e20 A) are the same update, also beside one of ordinary factors."""
    one, other = factors(0, 2, dtype=F64), factors(1, 3, dtype=F64)
    moved = {name: (1e-20 * B, 1e20 * A) for name, (B, A) in other.items()}
    first = save_peft(tmp_path / "one", one, ALPHA)
    found = [
        merge_models([first, save_peft(tmp_path / name, made, ALPHA)], form="delta", method="iso_c")
        for name, made in (("plain", other), ("moved", moved))
    ]
    assert_close(found[1], found[0], 1e-9)


def test_columns_that_nearly_agree_are_told_apart(tmp_path: Path) -> None:
    """Two columns of B at an angle of 1e-5 are two directions: both get the mean of Iso-C."""
    made = factors(0, 2, dtype=F64)
    for name, (B, A) in made.items():
        made[name] = (np.stack([B[:, 0], B[:, 0] + 1e-5 * B[:, 1]], axis=1), A)
    path = save_peft(tmp_path / "near", made, ALPHA)
    got = merge_models([path], form="delta", method="iso_c")
    wanted = {}
    for name, update in product(made, ALPHA / 2).items():
        # Gram matrices, as in the oracle, would not tell the columns apart so well.
        U, S, Vt = spectral.svd(torch.tensor(update))
        assert len(S) == 2
        wanted[name] = (S.mean() * U @ Vt).numpy()
    assert_close(got, wanted, 1e-8)


def test_factored_and_dense_inputs_together(adapters: Any, tmp_path: Path) -> None:
    """An adapter beside a full task vector: that site is dense, the others stay in factors."""
    paths, updates = adapters
    name = min(updates[2])
    some = {name: updates[2][name].astype(F64)}
    delta = save_delta(tmp_path / "delta.safetensors", some)
    got = merge_models([*paths[:2], delta], form="delta", method="tsv_merge")
    zero = {key: np.zeros_like(array) for key, array in updates[2].items()}
    assert_close(got, oracle([*updates[:2], {**zero, **some}], spectral.tsv_merge), 1e-6)


class Conv1D(nn.Module):
    """GPT-2's layer, stored input × output, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D as Stored

        self.c_attn = Stored(9, 5)
        self.conv = nn.Conv2d(4, 8, (3, 2))


def test_transposed_weights_and_kernels(tmp_path: Path) -> None:
    """PEFT's LoRAs of a Conv1D and of a convolution: left is the output side, kernels are averaged
    or taken as matrices.
    """
    updates: list[dict[str, Array]] = []
    for seed, rank in enumerate((2, 3)):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=4, target_modules=["c_attn", "conv"], fan_in_fan_out=True
        )
        model = get_peft_model(Conv1D(), config)
        for parameter in model.parameters():
            nn.init.normal_(parameter.data)
        model.save_pretrained(tmp_path / str(seed))
        layers = dict(model.base_model.model.named_modules())
        updates.append(
            {
                f"{name}.weight": layers[name].get_delta_weight("default").detach().numpy()
                for name in ("c_attn", "conv")
            }
        )
    paths = [tmp_path / "0", tmp_path / "1"]
    base = {"c_attn.weight": np.zeros((5, 9), F32), "conv.weight": np.zeros((8, 4, 3, 2), F32)}
    assert updates[0]["c_attn.weight"].shape == (5, 9)
    params = {"density": 0.4}
    got = merge_models(paths, base=base, method="knots_ties", kernels="matrix", **params)
    taus = [torch.tensor(each["c_attn.weight"].T.copy()).double() for each in updates]
    wanted = spectral.knots_ties(taus, (1.0, 1.0), 0.4).T
    kernels = [torch.tensor(each["conv.weight"]).double().reshape(8, -1) for each in updates]
    flat = spectral.knots_ties(kernels, (1.0, 1.0), 0.4).reshape(8, 4, 3, 2)
    assert_close(got, {"c_attn.weight": wanted.numpy(), "conv.weight": flat.numpy()}, 1e-5)
    got = merge_models(paths, base=base, method="knots_ties", **params)
    mean = (updates[0]["conv.weight"].astype(F64) + updates[1]["conv.weight"]) / 2
    assert_close(got, {"c_attn.weight": wanted.numpy(), "conv.weight": mean}, 1e-5)


def test_the_manifest_names_the_backend(adapters: Any) -> None:
    """Outputs say which LAPACK has decomposed, and how far another may be off."""
    paths, _ = adapters
    place = paths[0].parent
    ran = call("merge", *paths, "-m", "iso_c", "-o", "out", "--json", cwd=place)
    assert_done(ran)
    text = json.dumps(json.loads((place / "out" / MANIFEST).read_text()))
    assert lapack() in text
    assert "1e-05" in text
    call("merge", *paths, "-m", "task_arithmetic", "-o", "plain", cwd=place)
    assert lapack() not in (place / "plain" / MANIFEST).read_text()


def test_ranks_of_the_output_are_the_summed_ranks(adapters: Any) -> None:
    """An adapter that comes out has the summed rank, or the smaller side of the weight."""
    paths, _ = adapters
    out = paths[0].parent / "out"
    merge_models(paths, form="lora", out=out, method="iso_c")
    tensors: Mapping[str, Array] = read(out / "adapter_model.safetensors")
    for key, array in tensors.items():
        if key.endswith("lora_A.weight"):
            assert array.shape[0] == sum(RANKS)


def stored_rank(out: Path) -> int:
    """Rows of the factors in an adapter that are not padding; all are padded to 8."""
    stored: Mapping[str, Array] = read(out / "adapter_model.safetensors")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    rows = [array for key, array in stored.items() if key.endswith("lora_A.weight")]
    assert {array.shape[0] for array in rows} == {8}
    return max(int(np.count_nonzero(array.any(axis=1))) for array in rows)


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_merge", "ties"])
@pytest.mark.parametrize("rank", [0, 1, 3, 50])
def test_truncation_decides_the_rank_of_the_output(adapters: Any, method: str, rank: int) -> None:
    """``--then truncate:rank=r`` writes an adapter of rank r, the best one there is."""
    paths, _ = adapters
    out = paths[0].parent / "out"
    whole = merge_models(paths, form="delta", method=method)
    merge_models(paths, form="lora", out=out, method=method, then=[f"truncate:rank={rank}"])
    assert stored_rank(out) <= min(rank, sum(RANKS))
    wanted = {
        name: spectral.truncate(torch.tensor(array).double(), min(rank, sum(RANKS))).numpy()
        for name, array in whole.items()
    }
    assert_close(update_of(out), wanted, 2e-6)


def test_what_follows_a_truncation_may_raise_the_rank(adapters: Any) -> None:
    """Sums of truncated updates have the summed rank, and entries cut off them any."""
    paths, _ = adapters
    for method, then, rank in (
        ("task_arithmetic", ["truncate:rank=2", "scale:lam=0.5", "svc"], 2),
        ("task_arithmetic", ["truncate:rank=2", "trim:density=0.5,scope=tensor"], sum(RANKS)),
        ("task_arithmetic", ["truncate:rank=2", "truncate:rank=3"], 2),
    ):
        out = paths[0].parent / "out"
        merge_models(paths, form="lora", out=out, method=method, then=then, force=True)
        assert stored_rank(out) == rank
    chain = (OPS["truncate"](2), OPS["sum"](), OPS["svc"]())
    assert rank_of(chain, 3, (9, 8)) == 6
    assert rank_of((*chain, OPS["truncate"](4)), 3, (9, 8)) == 4
    assert rank_of((OPS["sum"](),), 3, (9, 8)) is None
