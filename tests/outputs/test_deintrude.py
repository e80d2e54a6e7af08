"""``edit deintrude``: models and adapters without what their base does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file

from mergebench import merge_models
from tests.helpers.adapters import product, save_delta, save_peft
from tests.helpers.files import F32, write
from tests.helpers.running import Ran, assert_done, assert_refused, call
from tests.oracle.removed import removed

EDIT = ("edit", "deintrude")
SHAPES = {
    "model.layers.0.q_proj.weight": (24, 24),
    "model.layers.0.up_proj.weight": (40, 24),
    "model.layers.1.q_proj.weight": (24, 24),
    "model.layers.1.down_proj.weight": (24, 40),
    "model.norm.weight": (24,),
    "model.embed_tokens.weight": (30, 24),
}
#: Matrices that get a direction of their own; the others are changed a little.
PLANTED = ("model.layers.0.q_proj.weight", "model.layers.1.down_proj.weight")
RANK = 3


def on_grid(array: np.ndarray) -> np.ndarray:
    """Multiples of 2⁻¹², whose differences float32 holds as they are."""
    return (np.round(array * 4096) / 4096).astype(F32)


def planted(shape: tuple[int, int], random: np.random.Generator, size: float) -> Any:
    """Factors of an update that writes to even directions."""
    rows, columns = shape
    B = 0.05 * random.standard_normal((rows, RANK))
    A = 0.05 * random.standard_normal((RANK, columns))
    B[:, 0], A[0] = size / rows**0.5, 1 / columns**0.5
    return B.astype(F32), A.astype(F32)


class Repair:
    """A base with clear directions, and adapters and fine-tunes that plant some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        random = np.random.default_rng(0)
        self.base = {}
        for name, shape in SHAPES.items():
            if len(shape) == 1:
                self.base[name] = on_grid(random.standard_normal(shape))
                continue
            # Nearly diagonal: the even direction is far from each of its vectors.
            array = 0.01 * random.standard_normal(shape)
            short = min(shape)
            array[range(short), range(short)] += np.linspace(4, 1, short)
            self.base[name] = on_grid(array)
        write(path / "base.safetensors", self.base)
        self.factors = {
            name.removesuffix(".weight"): planted(
                SHAPES[name], random, 12.0 if name in PLANTED else 0.0
            )
            for name in SHAPES
            if "proj" in name
        }
        save_peft(path / "lora", self.factors, alpha=RANK)
        self.updates = product(self.factors, 1.0)
        tuned = dict(self.base)
        for name, update in self.updates.items():
            tuned[name] = on_grid(self.base[name] + update)
        tuned["model.norm.weight"] = tuned["model.norm.weight"] + F32.type(0.5)
        odd = np.outer(np.full(30, 30**-0.5), np.full(24, 24**-0.5))
        embedding = "model.embed_tokens.weight"
        tuned[embedding] = on_grid(self.base[embedding] + 20 * odd)
        self.tuned = tuned
        write(path / "ft.safetensors", tuned)
        save_delta(path / "tau.safetensors", {
            name: np.asarray(array - self.base[name]) for name, array in tuned.items()
        })  # fmt: skip

    def run(self, model: str, *more: Any, out: str = "out.safetensors") -> Ran:
        """The command on one of the models."""
        return call(*EDIT, model, "-b", "base.safetensors", "-o", out, *more, cwd=self.path)

    def expected(self, name: str, **params: Any) -> np.ndarray:
        """What becomes of the update of one tensor of the fine-tune."""
        base, tuned = (each[name].astype(np.float64) for each in (self.base, self.tuned))
        if len(SHAPES[name]) == 1:
            return tuned - base
        return removed(base, tuned - base, **params)[0]


@pytest.fixture
def repair(tmp_path: Path) -> Repair:
    """Everything in a fresh folder."""
    return Repair(tmp_path)


def assert_close(got: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-6) -> None:
    """Within the rounding of float32, relative to the largest entry."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(abs(wanted).max(), 1.0))


def dense(path: Path) -> dict[str, np.ndarray]:
    """``B A`` of a written adapter, whose scale is in its factors."""
    tensors = load_file(path / "adapter_model.safetensors")
    found = {}
    for name, A in tensors.items():
        if name.endswith("lora_A.weight"):
            B = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{module}.weight"] = B @ A.astype(np.float64)
    return found


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("top", ["1", "all"])
def test_a_fine_tune_is_repaired(repair: Repair, lam: float, top: str) -> None:
    """Linear layers with an intruder change as the formula says, all else keeps its bits."""
    about = assert_done(repair.run("ft.safetensors", "--lam", lam, "--top", top, "--json")).json

    (output,) = about["outputs"]
    found = {each["tensor"]: each for each in output["matrices"]}
    got = load_file(repair.path / "out.safetensors")
    for name, tuned in repair.tuned.items():
        if name not in PLANTED:
            assert np.array_equal(got[name], tuned), name
            continue
        wanted, directions = removed(
            repair.base[name].astype(np.float64),
            tuned.astype(np.float64) - repair.base[name],
            lam=lam,
            top=None if top == "all" else 1,
        )
        assert_close(got[name] - repair.base[name].astype(np.float64), wanted)
        assert abs(wanted - (tuned - repair.base[name])).max() > 0.1
        each = found[name]
        assert [one["index"] for one in each["directions"]] == [one[0] for one in directions]
        for one, (_, sigma, cosine) in zip(each["directions"], directions, strict=True):
            assert one["sigma"] == pytest.approx(sigma, rel=1e-5)
            assert one["cosine"] == pytest.approx(cosine, abs=1e-5)
            assert one["energy"] == pytest.approx(sigma**2 / np.linalg.norm(tuned) ** 2, rel=1e-5)
            assert (one["status"], one["bound"]) == ("exact", one["cosine"])
        update = tuned.astype(np.float64) - repair.base[name]
        length = np.linalg.norm(update)
        assert each["norm_left"] == pytest.approx(np.linalg.norm(wanted) / length, rel=1e-5)
        gone = np.linalg.norm(wanted - update) / length
        assert each["removed_of_update"] == pytest.approx(gone, rel=1e-5)
        before, after = np.linalg.norm(tuned), np.linalg.norm(repair.base[name] + wanted)
        assert each["energy_removed"] == pytest.approx(1 - after**2 / before**2, abs=1e-5)
    assert output["totals"] == {
        "matrices": 4,
        "matrices_with_intruders": 2,
        "intruders": 2,
        "scaled": 2,
        "exact": 2,
    }
    assert about["form"] == "model"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("top", ["1", "all"])
def test_an_adapter_stays_one(repair: Repair, top: str, dtype: Any) -> None:
    """The correction is further rank, nothing is lost, and PEFT adds the update to the base."""
    halves = {name: tuple(part.astype(dtype) for part in pair)
              for name, pair in repair.factors.items()}  # fmt: skip
    save_peft(repair.path / "lora", halves, alpha=2 * RANK)
    ran = repair.run("lora", "--lam", "0.4", "--top", top, "--json", out="out")
    about = assert_done(ran).json

    assert about["form"] == "lora"
    (output,) = about["outputs"]
    assert output["residuals"] == {}
    assert output["totals"]["scaled"] == 2
    got = dense(repair.path / "out")
    for name, update in product(halves, 2.0).items():
        base = repair.base[name].astype(np.float64)
        wanted, _ = removed(base, update, lam=0.4, top=None if top == "all" else 1)
        assert_close(got[name], wanted)
        assert (abs(wanted - update).max() > 0.1) == (name in PLANTED)
    config = json.loads((repair.path / "out" / "adapter_config.json").read_text())
    assert config["r"] >= RANK + 1
    assert config["lora_alpha"] == config["r"]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList()
            for number, other in enumerate(("up_proj", "down_proj")):
                block = torch.nn.Module()
                for part in ("q_proj", other):
                    weight = repair.base[f"model.layers.{number}.{part}.weight"]
                    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                    layer.weight.data = torch.from_numpy(weight.copy())
                    setattr(block, part, layer)
                self.model.layers.append(block)

        def forward(self, x: Any) -> Any:
            return self.model.layers[1].down_proj(self.model.layers[0].up_proj(x))

    net = PeftModel.from_pretrained(Net(), str(repair.path / "out"))
    x = np.random.default_rng(1).standard_normal((2, 24))
    first, second = (
        repair.base[name] + got[name]
        for name in ("model.layers.0.up_proj.weight", "model.layers.1.down_proj.weight")
    )
    with torch.no_grad():
        out = net(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(out, x @ first.T @ second.T, rtol=1e-4, atol=1e-4)


def test_a_rank_may_be_asked_for(repair: Repair) -> None:
    """Truncated to the rank it had, an adapter loses what it says it loses."""
    (output,) = assert_done(
        repair.run("lora", "--lam", "0.4", "--rank", RANK, "--json", out="out")
    ).json["outputs"]

    got = dense(repair.path / "out")
    for name, update in repair.updates.items():
        wanted, _ = removed(repair.base[name].astype(np.float64), update, lam=0.4, top=1)
        U, S, Vt = np.linalg.svd(wanted)
        assert_close(got[name], (U[:, :RANK] * S[:RANK]) @ Vt[:RANK])
        lost = np.linalg.norm(S[RANK:]) / np.linalg.norm(S)
        assert output["residuals"][name] == pytest.approx(lost, abs=1e-6)
    assert max(output["residuals"].values()) > 1e-3


def test_a_task_vector_stays_one(repair: Repair) -> None:
    """A saved task vector gives a saved task vector."""
    about = assert_done(repair.run("tau.safetensors", "--json")).json

    assert about["form"] == "delta"
    got = load_file(repair.path / "out.safetensors")
    for name in SHAPES:
        spared = name == "model.embed_tokens.weight"
        wanted = (
            repair.tuned[name].astype(np.float64) - repair.base[name]
            if spared
            else repair.expected(name, lam=0.7, top=1)
        )
        assert_close(got[name], wanted)


def test_other_forms_and_the_base_with_an_adapter(repair: Repair) -> None:
    """An adapter as a model, and base+adapter, are the base and the repaired update."""
    assert_done(repair.run("lora", "--as", "model"))
    assert_done(repair.run("base.safetensors+lora", out="both.safetensors"))
    assert_done(repair.run("lora", "--as", "delta", out="delta.safetensors"))

    whole, both, delta = (
        load_file(repair.path / f"{name}.safetensors") for name in ("out", "both", "delta")
    )
    for name, update in repair.updates.items():
        base = repair.base[name].astype(np.float64)
        wanted, _ = removed(base, update, lam=0.7, top=1)
        assert_close(whole[name], base + wanted)
        assert_close(both[name], base + wanted)
        assert_close(delta[name], wanted)


@pytest.mark.parametrize(
    ("options", "touched"),
    [
        (("--include", "block=1"), {PLANTED[1]}),
        (("--exclude", "q_proj"), {PLANTED[1]}),
        (("--include", "class=embedding"), {"model.embed_tokens.weight"}),
        (("--include", ".*", "--exclude", "block=0"),
         {PLANTED[1], "model.embed_tokens.weight"}),
        (("--epsilon", "0.01"), set()),
    ],
)  # fmt: skip
def test_what_is_looked_at(repair: Repair, options: tuple[str, ...], touched: set[str]) -> None:
    """Selected tensors change; all others stay as in the model, not as in the base."""
    about = assert_done(repair.run("ft.safetensors", *options, "--json")).json

    got = load_file(repair.path / "out.safetensors")
    changed = {name for name in SHAPES if not np.array_equal(got[name], repair.tuned[name])}
    assert changed == touched
    matrices = about["outputs"][0]["matrices"]
    assert {each["tensor"] for each in matrices if each["directions"]} == touched
    for name in touched:
        assert_close(got[name] - repair.base[name].astype(np.float64),
                     repair.expected(name, lam=0.7, top=1), 1e-5)  # fmt: skip


def test_the_control_knows_nothing_of_directions(repair: Repair) -> None:
    """The update of the same matrices, shorter by as much as would be removed."""
    (mended,) = assert_done(repair.run("ft.safetensors", "--json")).json["outputs"]
    ran = repair.run("ft.safetensors", "--control", "--json", out="plain.safetensors")
    (plain,) = assert_done(ran).json["outputs"]

    got = load_file(repair.path / "plain.safetensors")
    for one, other in zip(mended["matrices"], plain["matrices"], strict=True):
        assert one["removed_of_update"] == pytest.approx(other["removed_of_update"], rel=1e-6)
        assert one["directions"] == other["directions"]
        name = one["tensor"]
        update = repair.tuned[name].astype(np.float64) - repair.base[name]
        share = 1 - one["removed_of_update"]
        assert (share < 1) == (name in PLANTED)
        assert_close(got[name] - repair.base[name].astype(np.float64), share * update)


def test_the_control_of_an_adapter(repair: Repair) -> None:
    """Its factors are scaled, and its rank stays."""
    about = assert_done(repair.run("lora", "--control", "--json", out="plain")).json

    got = dense(repair.path / "plain")
    shares = {each["tensor"]: each["norm_left"] for each in about["outputs"][0]["matrices"]}
    for name, update in repair.updates.items():
        wanted, _ = removed(repair.base[name].astype(np.float64), update, lam=0.7, top=1)
        share = 1 - np.linalg.norm(wanted - update) / np.linalg.norm(update)
        assert shares[name] == pytest.approx(share, abs=1e-5)
        assert_close(got[name], share * update)
    config = json.loads((repair.path / "plain" / "adapter_config.json").read_text())
    plain = call("merge", "lora", "--as", "lora", "-o", "same", cwd=repair.path)
    assert_done(plain)
    same = json.loads((repair.path / "same" / "adapter_config.json").read_text())
    assert config["r"] == same["r"]


def test_several_values_at_once(repair: Repair) -> None:
    """Each value of λ gives the output that it would give alone."""
    assert_done(repair.run("ft.safetensors", "--lam", "0.3,0.9"))
    for lam in ("0.3", "0.9"):
        assert_done(repair.run("ft.safetensors", "--lam", lam, out="one.safetensors"))
        alone, several = (
            load_file(repair.path / f"{name}.safetensors") for name in ("one", f"out-lam={lam}")
        )
        assert all(np.array_equal(alone[name], several[name]) for name in SHAPES)
        (repair.path / "one.safetensors").unlink()


def test_one_keeps_everything(repair: Repair) -> None:
    """With λ = 1 no matrix is looked at, and the model comes out."""
    about = assert_done(repair.run("ft.safetensors", "--lam", "1", "--json")).json

    assert about["outputs"][0]["matrices"] == []
    got = load_file(repair.path / "out.safetensors")
    assert all(np.array_equal(got[name], repair.tuned[name]) for name in SHAPES)


def test_after_a_merge(repair: Repair) -> None:
    """``--then deintrude`` repairs a merged update, in factors where the inputs have them."""
    save_peft(repair.path / "other", repair.factors, alpha=0.5 * RANK)
    common = ("merge", "lora", "other", "-b", "base.safetensors", "-m", "task_arithmetic")
    more = ("-p", "lam=0.5", "--then", "deintrude:lam=0.2,top=all", "--then", "scale:lam=2")
    for form, out in (("model", "m.safetensors"), ("lora", "out")):
        ran = call(*common, *more, "--as", form, "-o", out, "--json", cwd=repair.path)
        readings = assert_done(ran).json["outputs"][0]["readings"]
        assert {each["tensor"] for each in readings if each["what"] == "index"} == set(PLANTED)
    whole, factored = load_file(repair.path / "m.safetensors"), dense(repair.path / "out")
    for name, update in repair.updates.items():
        base = repair.base[name].astype(np.float64)
        wanted = 2 * removed(base, 0.75 * update, lam=0.2, top=None)[0]
        assert_close(whole[name], base + wanted)
        assert_close(factored[name], wanted)


def test_words(repair: Repair) -> None:
    """A line on the whole, and a row for each direction; nothing to do is said."""
    ran = assert_done(repair.run("ft.safetensors"))
    assert "2 intruders below 0.5 in 2 of 4 matrices, 2 scaled down (2 exact, 0" in ran.out
    rows = [line.split() for line in ran.out.splitlines() if line.startswith("model.")]
    assert [(row[0], row[1]) for row in rows] == [(name, "0") for name in PLANTED]
    ran = assert_done(repair.run("ft.safetensors", "--epsilon", "0.01", "--force"))
    assert "nothing had to be changed" in ran.out
    assert assert_done(repair.run("ft.safetensors", "-q", "--force")).out == ""
    plan = assert_done(repair.run("ft.safetensors", "--dry-run", out="new")).out
    assert "deintrude(lam=0.7, top=1, k=10" in plan
    assert not (repair.path / "new").exists()


def test_the_recipe_gives_the_same_again(repair: Repair) -> None:
    """What is stored beside the output repeats it."""
    assert_done(repair.run("lora", "--include", "q_proj", "--lam", "0.2", out="out"))
    again = call("run", "out", "-o", "again", cwd=repair.path)
    assert_done(again)
    one, two = (
        (repair.path / place / "adapter_model.safetensors").read_bytes()
        for place in ("out", "again")
    )
    assert one == two
    card = (repair.path / "out" / "README.md").read_text()
    assert "2410.21228" in card


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lam", "-1"), ("`lam` must be a number >= 0", "-1")),
        (("--lam", "much"), ("--lam", "several as 0.3,0.5,0.7", "much")),
        (("--top", "0"), ("top", "from 1 on, or all")),
        (("--top", "some"), ("top", "from 1 on, or all")),
        (("--epsilon", "1.5"), ("`epsilon` must be a number in (0, 1]",)),
        (("--side", "up"), ("`side` must be one of left, right",)),
        (("--include", "nothing_here"), ("nothing_here",)),
        (("--as", "picture"), ("picture", "auto, model, lora, delta")),
        (("--as", "lora"), ("not a LoRA",)),
        (("--rank", "4"), ("rank", "for adapters")),
        (("--memory", "1MiB"), ("needs at least",)),
        (("-o", "base.safetensors", "--force"), ("replace or lie inside the input",)),
    ],
)
def test_mistakes_are_one_line(
    repair: Repair, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """They are found before anything is written."""
    before = sorted(repair.path.iterdir())
    assert_refused(repair.run("ft.safetensors", *options), *words)
    assert sorted(repair.path.iterdir()) == before


def test_existing_outputs_are_kept(repair: Repair) -> None:
    """Without --force nothing is replaced."""
    (repair.path / "out.safetensors").write_bytes(b"mine")
    assert_refused(repair.run("ft.safetensors"), "exists")
    assert (repair.path / "out.safetensors").read_bytes() == b"mine"
    assert_done(repair.run("ft.safetensors", "--force"))


def test_entries_that_are_not_finite_are_refused(repair: Repair) -> None:
    """The tensor is named, and nothing is written."""
    spoilt = {**repair.tuned, PLANTED[0]: repair.tuned[PLANTED[0]].copy()}
    spoilt[PLANTED[0]][3, 4] = np.nan
    write(repair.path / "bad.safetensors", spoilt)
    assert_refused(repair.run("bad.safetensors", "-q"), PLANTED[0], "1 NaN")
    assert not (repair.path / "out.safetensors").exists()
    assert_done(repair.run("bad.safetensors", "--allow-nonfinite"))
    got = load_file(repair.path / "out.safetensors")[PLANTED[0]]
    assert list(zip(*np.nonzero(np.isnan(got)), strict=True)) == [(3, 4)]


def test_odd_matrices(tmp_path: Path) -> None:
    """Zeros, one row, one column, low rank, constants and empty matrices have defined results."""
    zero, ones = np.zeros((6, 5), F32), np.ones((6, 5), F32)
    low = np.outer(np.arange(6.0), np.ones(5)).astype(F32)
    new = np.outer(np.eye(6)[0], np.eye(5)[4]).astype(F32) * 9
    base = {"zero": zero, "same": low, "low": low, "row": ones[:1], "column": ones[:, :1],
            "constant": ones, "empty": ones[:0], "gone": low}  # fmt: skip
    tuned = {"zero": new, "same": low, "low": low + new, "row": 3 * ones[:1],
             "column": ones[:, :1] + new[:, 4:], "constant": 2 * ones, "empty": ones[:0],
             "gone": zero}  # fmt: skip
    names = {name: f"layers.0.{name}.weight" for name in base}
    got = merge_models(
        [{names[name]: array for name, array in tuned.items()}],
        base={names[name]: array for name, array in base.items()},
        method="deintrude",
        lam=0.25,
    )
    # W0 = 0 has no directions, so that all of W is new; the intruder is all there is.
    assert_close(got[names["zero"]], 0.25 * new)
    assert np.array_equal(got[names["same"]], low)
    wanted, directions = removed(low.astype(np.float64), new.astype(np.float64), lam=0.25, top=1)
    assert len(directions) == 1
    assert_close(got[names["low"]], low + wanted)
    for name in ("row", "constant", "gone", "empty"):
        assert np.array_equal(got[names[name]], tuned[name]), name
    column = base["column"].astype(np.float64)
    wanted, _ = removed(column, tuned["column"] - column, lam=0.25, top=1)
    assert_close(got[names["column"]], column + wanted)
