"""``mergebench crosstalk``, projected merges and what they report, and the order of models."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mergebench import merge_models
from tests.helpers.adapters import save_delta, save_peft
from tests.helpers.compare import assert_close
from tests.helpers.files import F32, F64, Array, read
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene
from tests.helpers.updates import update_of
from tests.oracle import orthogonal

Q0 = "model.layers.0.self_attn.q_proj.weight"


def reported(rows: list[dict[str, Any]]) -> dict[Any, float]:
    """Rows by what they are about."""
    return {(row["tensor"], row["what"], *row["models"]): row["value"] for row in rows}


def test_crosstalk_of_adapters(scene: Scene) -> None:
    """Every module has the numbers of its dense updates, the pair those over all modules."""
    ran = call("crosstalk", "lora1", "lora2", "--json", cwd=scene.path)

    data = assert_done(ran).json
    got = reported(data["rows"])
    one, two = ({n: torch.tensor(a) for n, a in each.items()} for each in scene.updates)
    assert len(got) == 4 * len(one)
    for name in one:
        pair = one[name], two[name]
        wanted = {
            "crosstalk": orthogonal.crosstalk(*pair),
            "overlap of row spaces": orthogonal.overlap(*pair),
            "smallest angle": orthogonal.smallest_angle(*pair),
            "cosine": float((pair[0] * pair[1]).sum() / (pair[0].norm() * pair[1].norm())),
        }
        for what, value in wanted.items():
            assert got[name, what, "lora1", "lora2"] == pytest.approx(value, abs=1e-6)
    (pair_of,) = [each for each in data["pairs"] if each["what"] == "crosstalk"]
    values = {name: got[name, "crosstalk", "lora1", "lora2"] for name in one}
    assert pair_of["most"] == max(values.values())
    assert pair_of["most_in"] == max(values, key=values.__getitem__)
    assert pair_of["mean"] == pytest.approx(sum(values.values()) / len(values))


def test_spectral_says_the_same_of_pairs(scene: Scene) -> None:
    """Both commands that speak of pairs have the same numbers, of factors and of full models."""
    for pair, base in (("lora1", "lora2"), ()), (("ft1", "ft2"), ("--base", "base")):
        included = ("--include", "class=linear")
        ran = call("crosstalk", *pair, *base, *included, "--json", cwd=scene.path)
        got = reported(assert_done(ran).json["rows"])
        only = ("--only", "crosstalk,angles,cosine", "-p", "angles.share=1", "--no-cache")
        ran = call("spectral", *pair, *base, *included, *only, "--json", cwd=scene.path)
        found = assert_done(ran).json["diagnostics"]
        assert len(found["crosstalk"]["rows"]) * 4 == len(got) > 0
        for what, name, value in (
            ("crosstalk", "crosstalk", lambda row: row["crosstalk"]),
            ("overlap of row spaces", "angles", lambda row: row["row"]["overlap"]),
            ("smallest angle", "angles", lambda row: row["row"]["smallest_angle"]),
            ("cosine", "cosine", lambda row: row["cosine"]),
        ):
            for row in found[name]["rows"]:
                assert got[row["tensor"], what, *pair] == pytest.approx(value(row), abs=1e-3 if
                    what == "smallest angle" else 1e-6), what  # fmt: skip


def test_crosstalk_of_fine_tunes_reads_the_base(scene: Scene) -> None:
    """Full checkpoints are compared as task vectors, two by two, in the order given."""
    ran = call("crosstalk", "ft2", "ft1", "lora1", "--base", "base", "--json", cwd=scene.path)

    got = reported(assert_done(ran).json["rows"])
    assert {key[2:] for key in got} == set(combinations(("ft2", "ft1", "lora1"), 2))
    one, two = (torch.tensor(each[Q0]) for each in scene.taus)
    expected = orthogonal.crosstalk(one, two)
    assert got[Q0, "crosstalk", "ft2", "ft1"] == pytest.approx(expected, rel=1e-5)
    # An adapter does not touch the embeddings, and nothing has no crosstalk.
    assert got["model.embed_tokens.weight", "crosstalk", "ft1", "lora1"] == 0
    assert got["model.embed_tokens.weight", "smallest angle", "ft1", "lora1"] == 90


def test_crosstalk_is_shown(scene: Scene) -> None:
    """A line per pair and number, and with --layers one per tensor too; filters apply."""
    ran = assert_done(call("crosstalk", "lora1", "lora2", "--include", "q_proj", cwd=scene.path))
    assert "crosstalk" in ran.out
    assert "lora1, lora2" in ran.out
    assert len(ran.out.splitlines()) == 5
    more = call(
        "crosstalk", "lora1", "lora2", "--include", "q_proj", "--layers", cwd=scene.path
    ).out
    assert more.startswith(ran.out)
    assert len(more.splitlines()) == 5 + 1 + 2 * 4
    norms = ("crosstalk", "ft1", "ft2", "--base", "base", "--include", "class=norm")
    shown = assert_done(call(*norms, cwd=scene.path)).out
    assert shown == "no matrix is changed by two of the models\n"


def test_crosstalk_refuses(scene: Scene) -> None:
    """One model, no base, a selector without a tensor: one line each."""
    refused = {
        ("lora1",): "expected 2 or more",
        ("ft1", "ft2"): "add --base",
        ("lora1", "lora2", "--include", "nothing"): "matches no tensor",
        ("lora1", "lora3"): "lora3",
        ("lora1", "lora2", "--memory", "1KiB"): "at least",
    }
    for words, expected in refused.items():
        assert_refused(call("crosstalk", *words, cwd=scene.path), expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_are_projected_in_factors(order: tuple[int, int], scene: Scene) -> None:
    """Two LoRAs give a LoRA of the summed rank without a residual, and its report."""
    one, two = (f"lora{place + 1}" for place in order)
    ran = call(*("merge", one, two, "-m", "orthogonal", "-o", "out", "--json"), cwd=scene.path)

    (output,) = assert_done(ran).json["outputs"]
    assert output["residuals"] == {}
    got = reported(output["readings"])
    merged = update_of(scene.path / "out")
    for name in scene.updates[0]:
        pair = [torch.tensor(scene.updates[place][name]) for place in order]
        made = orthogonal.sequential(pair)
        assert np.abs(merged[name] - sum(made).numpy()).max() < 1e-6
        assert got[name, "retained energy", one] == pytest.approx(1)
        kept = float(made[1].square().sum() / pair[1].square().sum())
        assert got[name, "retained energy", two] == pytest.approx(kept, abs=1e-6)
        before = got[name, "crosstalk before", one, two]
        assert before == pytest.approx(orthogonal.crosstalk(*pair), abs=1e-6)
        assert got[name, "crosstalk after", one, two] < 1e-12


def test_the_summary_says_what_was_lost(scene: Scene) -> None:
    """A line for each thing that was reported, and with --report every tensor."""
    words = ("merge", "lora1", "lora2", "-m", "orthogonal", "-o", "out", "--force")
    plain = assert_done(call(*words, cwd=scene.path)).out.splitlines()
    listed = assert_done(call(*words, "--report", cwd=scene.path)).out.splitlines()

    assert [line.split(":")[0] for line in plain[1:4]] == [
        "  retained energy",
        "  crosstalk before",
        "  crosstalk after",
    ]
    assert plain[1].split(", ")[0].endswith(" to 1")
    assert " of lora2 and most in " in plain[1]
    assert len(listed) == len(plain) + 1 + 4 * 4
    ties = call("merge", "lora1", "lora2", "-m", "ties", "-o", "t", "--report", cwd=scene.path)
    assert assert_done(ties).out.endswith("nothing was reported\n")


def projected(arrays: list[Array]) -> Array:
    """The sum of what each keeps of itself, in the order given."""
    made = orthogonal.sequential([torch.tensor(each) for each in arrays])
    return np.asarray(sum(made, torch.zeros_like(made[0])).numpy())


@pytest.mark.parametrize("names", list(permutations(("one", "two", "three"))))
def test_the_order_is_that_of_the_user(names: tuple[str, ...], tmp_path: Path) -> None:
    """Whatever their content: on the command line, in the stored recipe, and again from it."""
    random = np.random.default_rng(5)
    taus = {
        name: random.normal(size=(6, 2)).astype(F32) @ random.normal(size=(2, 8)).astype(F32)
        for name in ("one", "two", "three")
    }
    for name, tau in taus.items():
        save_delta(tmp_path / f"{name}.safetensors", {"w.weight": tau})
    files = [f"{name}.safetensors" for name in names]
    expected = {"w.weight": projected([taus[name].astype(F64) for name in names])}

    assert_done(call("merge", *files, "-m", "orthogonal", "-o", "out", cwd=tmp_path))

    assert_close(read(tmp_path / "out" / "delta.safetensors"), expected)
    recipe = tmp_path / "out" / "mergebench_recipe.yaml"
    stored = yaml.safe_load(recipe.read_text())
    assert [each["path"] for each in stored["models"]] == files
    assert_done(call("run", recipe, "-o", "again", cwd=tmp_path))
    again = (tmp_path / "again" / "delta.safetensors").read_bytes()
    assert again == (tmp_path / "out" / "delta.safetensors").read_bytes()
    assert_done(call("verify", "out", "--replay", "all", cwd=tmp_path))
    tables = [{"w.weight": taus[name]} for name in names]
    zero = {"w.weight": np.zeros((6, 8), F32)}
    assert_close(merge_models(tables, base=zero, method="orthogonal"), expected)


def test_one_variant_per_part_keeps_the_order(tmp_path: Path) -> None:
    """Where a rule makes some tensors sequential, the stored recipe has the order of the user."""
    random = np.random.default_rng(6)
    for name in ("a", "b"):
        arrays = {f"{part}.weight": random.normal(size=(4, 2)).astype(F32) for part in "vw"}
        save_delta(tmp_path / f"{name}.safetensors", arrays)
    orders = []
    for files in (("a.safetensors", "b.safetensors"), ("b.safetensors", "a.safetensors")):
        words = ("-m", "orthogonal", "-p", "variant=joint", "-o", "out", "--force")
        rule = ("--where", "^w:variant=sequential")
        assert_done(call("merge", *files, *words, *rule, cwd=tmp_path))
        stored = yaml.safe_load((tmp_path / "out" / "mergebench_recipe.yaml").read_text())
        orders.append([each["path"] for each in stored["models"]])
        merged = read(tmp_path / "out" / "delta.safetensors")
        taus = [read(tmp_path / file)["w.weight"].astype(F64) for file in files]
        assert_close({"w": merged["w.weight"]}, {"w": projected(taus)})
    assert orders[0] == orders[1][::-1]


def test_bad_values_end_with_two(scene: Scene) -> None:
    """Every value outside of what is declared is one line that names it."""
    for text in ("variant=both", "claim=0", "claim=2", "kernels=rows", "rank=3"):
        ran = call("merge", "lora1", "lora2", "-m", "orthogonal", "-p", text, cwd=scene.path)
        assert_refused(ran, f"`{text.split('=')[0]}`")


def test_adapters_of_one_weight_and_another(tmp_path: Path) -> None:
    """A module that only one adapter has keeps its update, of whatever ranks."""
    random = np.random.default_rng(7)

    def factors(rank: int) -> tuple[Array, Array]:
        return (
            random.normal(size=(6, rank)).astype(F32),
            random.normal(size=(rank, 8)).astype(F32),
        )

    first, second = {"l.q": factors(1), "l.k": factors(1)}, {"l.q": factors(3)}
    save_peft(tmp_path / "one", first, alpha=1.0)
    save_peft(tmp_path / "two", second, alpha=3.0)
    assert_done(call("merge", "one", "two", "-m", "orthogonal", "-o", "out", cwd=tmp_path))
    merged = update_of(tmp_path / "out")
    B, A = first["l.k"]
    whole = [(B @ A).astype(F64) for B, A in (first["l.q"], second["l.q"])]
    assert_close(merged, {"l.k.weight": (B @ A).astype(F64), "l.q.weight": projected(whole)})
