"""``spectral``: what it finds, says, keeps and refuses."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.spectral.diagnostic import DIAGNOSTICS
from mergebench.spectral.measures import power_law
from tests.helpers.adapters import save_peft
from tests.helpers.files import F32, listing, read, tree, write
from tests.helpers.models import save_folder
from tests.helpers.running import Ran, assert_done, assert_refused, call
from tests.helpers.scene import Scene

MATRICES = [
    f"model.layers.{layer}.{module}.weight"
    for layer in range(2)
    for module in ("self_attn.q_proj", "mlp.up_proj")
]
SINGLE = {"intruders", "spectra", "rotation", "heavy_tail", "allocation", "contribution"}
PAIRED = {"cosine", "angles", "crosstalk", "signs", "overlap"}
TOGETHER = {"alignment", "interference"}


def beside(scene: Scene, name: str) -> Path:
    """A place of this test alone, outside of the folder it looks at."""
    return scene.path.with_name(f"{scene.path.name}-{name}")


def spectral(scene: Scene, *args: Any, env: dict[str, str] | None = None) -> Ran:
    """Run the command; its cache is ``beside(scene, "cache")``."""
    return call("spectral", *args, cwd=scene.path, env=env)


def report(scene: Scene, *args: Any, env: dict[str, str] | None = None) -> Any:
    """The JSON of a run."""
    ran = assert_done(spectral(scene, *args, "--json", env=env))
    assert ran.err == ""
    return ran.json


def rows(data: Any, name: str, model: int | None = 0, other: int | None = None) -> dict[str, Any]:
    """Rows of a diagnostic by tensor."""
    found = data["diagnostics"][name]["rows"]
    return {e["tensor"]: e for e in found if (e["model"], e["other"]) == (model, other)}


def whole(data: Any, name: str, model: int | None = 0, other: int | None = None) -> Any:
    """The total of a diagnostic."""
    every = data["diagnostics"][name]["totals"]["all"]
    (found,) = [e for e in every if (e["model"], e["other"]) == (model, other)]
    return found


def largest_cosines(base: np.ndarray, tuned: np.ndarray, k: int) -> np.ndarray:
    """The definition of the intruder test, with numpy."""
    old = np.linalg.svd(base.astype(np.float64), full_matrices=False)[0]
    new = np.linalg.svd(tuned.astype(np.float64), full_matrices=False)[0]
    found: np.ndarray = abs(old.T @ new[:, :k]).max(axis=0)
    return found


def assert_same_numbers(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    """Equal but for rounding, wherever numbers stand."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_numbers(one[key], other[key], tolerance)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same_numbers(first, second, tolerance)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=tolerance, abs=tolerance)
    else:
        assert one == other


def test_intruders_of_a_checkpoint(scene: Scene) -> None:
    """Cosines, singular values and counts are those of the definition, matrix by matrix."""
    data = report(
        scene, "ft1", "-b", "base", "--only", "intruders", "-k", 5, "--epsilon", "0.9,0.97"
    )

    found = rows(data, "intruders")
    assert list(found) == MATRICES
    counts = np.zeros(2, int)
    for name, row in found.items():
        expected = largest_cosines(scene.base[name], scene.tuned[0][name], 5)
        sigma = np.linalg.svd(scene.tuned[0][name].astype(np.float64))[1]
        np.testing.assert_allclose([e["cosine"] for e in row["directions"]], expected, atol=1e-6)
        np.testing.assert_allclose([e["sigma"] for e in row["directions"]], sigma[:5], rtol=1e-6)
        for place, epsilon in enumerate((0.9, 0.97)):
            below = expected < epsilon
            counts[place] += below.sum()
            share = (sigma[:5][below] ** 2).sum() / (sigma**2).sum()
            assert row["thresholds"][place]["count"] == below.sum()
            assert row["thresholds"][place]["energy"] == pytest.approx(share, abs=1e-6)
    total = whole(data, "intruders")
    assert [each["count"] for each in total["thresholds"]] == counts.tolist()
    assert (total["matrices"], total["looked"], total["exact"]) == (4, 20, 20)
    assert counts[1] > counts[0] > 0


def test_what_stands_on_the_base_gives_the_same(scene: Scene) -> None:
    """An adapter, the same on the base, its merge, and its saved task vector agree."""
    update = scene.updates[0]
    merged = {k: (v + update[k]).astype(F32) if k in update else v for k, v in scene.base.items()}
    save_folder(scene.path / "merged", merged)
    only = ("-b", "base", "--only", "intruders,spectra")

    alone = report(scene, "lora1", *only)
    for other in ("base+lora1", "merged"):
        again = report(scene, other, *only)
        for name in ("intruders", "spectra"):
            one, two = rows(alone, name), rows(again, name)
            assert list(one) == list(two) == MATRICES
        for name in MATRICES:
            left, right = (
                [e["cosine"] for e in rows(each, "intruders")[name]["directions"]]
                for each in (alone, again)
            )
            np.testing.assert_allclose(left, right, atol=2e-5)
            left, right = (rows(each, "spectra")[name]["delta"] for each in (alone, again))
            assert_same_numbers(left["norm"], right["norm"])
            assert left["rank90"] == right["rank90"]


def test_spectra_of_an_adapter(scene: Scene) -> None:
    """Values of ΔW from its factors are those of the product; ranks and energies follow."""
    data = report(scene, "lora1", "-b", "base", "--only", "spectra", "-p", "spectra.points=0")

    for name, row in rows(data, "spectra").items():
        parts = {
            "base": scene.base[name].astype(np.float64),
            "delta": scene.updates[0][name],
            "tuned": scene.base[name] + scene.updates[0][name],
        }
        for part, matrix in parts.items():
            values = np.linalg.svd(matrix)[1]
            got = [each["sigma"] for each in row[f"{part}_curve"]]
            np.testing.assert_allclose(got, values[: len(got)], rtol=1e-6)
            share = values / values.sum()
            share = share[share > 1e-12]
            entropy = np.exp(-(share * np.log(share)).sum())
            assert row[part]["effective_rank"] == pytest.approx(entropy, rel=1e-6)
            assert row[part]["norm"] == pytest.approx(np.linalg.norm(matrix), rel=1e-6)
        assert row["delta"]["rank"] == 4
        assert len(row["delta_curve"]) == 4


def test_pairs_of_models(scene: Scene) -> None:
    """Cosines, sign conflicts and crosstalk are those of the definitions."""
    data = report(scene, "ft1", "ft2", "-b", "base")
    one, other = scene.taus

    flat = [np.concatenate([tau[name].ravel() for name in one]) for tau in (one, other)]
    expected = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    assert whole(data, "cosine", 0, 1)["cosine"] == pytest.approx(expected, abs=1e-6)
    product = np.sign(flat[0]) * np.sign(flat[1])
    rate = (product < 0).sum() / (product != 0).sum()
    assert whole(data, "signs", 0, 1)["rate"] == pytest.approx(rate)
    assert set(rows(data, "cosine", 0, 1)) == set(one)
    for name, row in rows(data, "crosstalk", 0, 1).items():
        norms = np.linalg.norm(one[name]) * np.linalg.norm(other[name])
        found = np.linalg.norm(one[name] @ other[name].T) / norms
        assert row["crosstalk"] == pytest.approx(found, abs=1e-6)
    for layer in data["diagnostics"]["cosine"]["totals"]["layers"]:
        names = [e["tensor"] for e in data["tensors"] if e["layer"] == layer["where"]]
        inner, a, b = (
            sum((x[n] * y[n]).sum() for n in names)
            for x, y in ((one, other), (one, one), (other, other))
        )
        assert layer["cosine"] == pytest.approx(inner / np.sqrt(a * b), abs=1e-6)


def test_signs_of_entries_that_both_change(scene: Scene) -> None:
    """Entries that one of two leaves alone neither agree nor conflict."""
    base = {"a.weight": np.zeros((2, 3), F32)}
    one = {"a.weight": np.array([[1, 2, -3], [0, 0, 4]], F32)}
    other = {"a.weight": np.array([[5, -1, -1], [0, 2, 0]], F32)}
    for name, arrays in (("zero", base), ("one", one), ("other", other)):
        write(scene.path / f"{name}.safetensors", arrays)

    data = report(
        scene, "one.safetensors", "other.safetensors", "-b", "zero.safetensors", "--only", "signs"
    )

    (row,) = rows(data, "signs", 0, 1).values()
    assert (row["conflicts"], row["entries"], row["rate"]) == (1, 3, pytest.approx(1 / 3))


def test_contribution_of_all_tensors_together(scene: Scene) -> None:
    """‖ΔW‖ / (‖W0‖ + ‖ΔW‖), and ‖ΔW‖ / ‖W0‖, over every floating-point tensor."""
    data = report(scene, "ft1", "-b", "base", "--only", "contribution")

    tau, base = scene.taus[0], scene.base
    moved, stayed = (
        np.sqrt(sum((each[name].astype(np.float64) ** 2).sum() for name in tau))
        for each in (tau, base)
    )
    found = whole(data, "contribution")
    assert found["tensors"] == 9
    assert found["proxy"] == pytest.approx(moved / (stayed + moved))
    assert found["relative"] == pytest.approx(moved / stayed)


def test_interference_of_the_leading_halves(scene: Scene) -> None:
    """Of two tasks each keeps ⌊r / 2⌋ triplets, and the sum is that of the definition."""
    data = report(scene, "ft1", "ft2", "-b", "base", "--only", "interference")

    for name, row in rows(data, "interference", None).items():
        kept = min(scene.base[name].shape) // 2
        parts = [np.linalg.svd(tau[name], full_matrices=False) for tau in scene.taus]
        U = np.concatenate([p[0][:, :kept] for p in parts], axis=1)
        S = np.diag(np.concatenate([p[1][:kept] for p in parts]))
        V = np.concatenate([p[2][:kept].T for p in parts], axis=1)
        eye = np.eye(2 * kept)
        expected = abs((U.T @ U - eye) @ S @ (V.T @ V - eye)).sum()
        assert row["kept"] == kept
        assert row["interference"] == pytest.approx(expected, rel=1e-5)


def test_power_laws_of_eigenvalues(scene: Scene) -> None:
    """α is that of λ = σ² above 1e-5, of W and of W0, and means are over matrices."""
    data = report(scene, "ft1", "-b", "base", "--only", "heavy_tail")

    found = rows(data, "heavy_tail")
    for name, row in found.items():
        for part, matrix in (("base", scene.base[name]), ("tuned", scene.tuned[0][name])):
            law = power_law(np.linalg.svd(matrix.astype(np.float64))[1] ** 2)
            assert law is not None
            assert row[part]["alpha"] == pytest.approx(law.alpha, rel=1e-6)
            assert row[part]["weighted"] == pytest.approx(law.alpha * np.log10(law.largest))
    alphas = [row["tuned"]["alpha"] for row in found.values()]
    assert whole(data, "heavy_tail")["tuned"]["alpha"] == pytest.approx(np.mean(alphas))
    few = report(scene, "ft1", "-b", "base", "--only", "heavy_tail", "-p", "heavy_tail.fewest=17")
    assert all(row["tuned"]["alpha"] is None for row in rows(few, "heavy_tail").values())
    assert few["summary"] == ["ft1: too few eigenvalues for a power law"]


def test_a_model_and_itself(scene: Scene) -> None:
    """Everything of one is in the other."""
    data = report(scene, "ft1", "ft1.safetensors", "-b", "base")

    assert whole(data, "cosine", 0, 1)["cosine"] == pytest.approx(1.0)
    assert whole(data, "signs", 0, 1)["rate"] == 0
    assert whole(data, "overlap", 0, 1)["overlap"] == 1.0
    angles = whole(data, "angles", 0, 1)
    assert angles["row"]["overlap"] == pytest.approx(1.0, abs=1e-5)
    assert angles["column"]["smallest_angle"] == pytest.approx(0.0, abs=0.1)
    assert whole(data, "alignment", 0)["ratio"] == pytest.approx(1.0, abs=0.01)


def test_alignment_with_a_merge(scene: Scene) -> None:
    """--merged takes the place of the sum, and is compared like any model."""
    summed = report(scene, "lora1", "lora2", "-b", "base", "--only", "alignment,cosine")
    given = report(
        scene, "lora1", "lora2", "-b", "base", "--merged", "lora2", "--only", "alignment,cosine"
    )

    assert whole(summed, "alignment", 0)["merge"] == "sum"
    assert whole(summed, "alignment", 0)["ratio"] > 0.9
    assert whole(given, "alignment", 1)["ratio"] == pytest.approx(1.0, abs=5e-3)
    assert whole(given, "alignment", 0)["ratio"] < 0.9
    assert [each["merged"] for each in given["models"]] == [False, False, True]
    assert whole(given, "cosine", 1, 2)["cosine"] == pytest.approx(1.0)
    assert {row["model"] for row in given["diagnostics"]["alignment"]["rows"]} == {0, 1}


def test_the_sum_of_tasks_in_factors_and_in_full(scene: Scene) -> None:
    """Adapters and the checkpoints made of them align alike."""
    for number, update in enumerate(scene.updates, 1):
        arrays = {k: (v + update.get(k, 0)).astype(v.dtype) for k, v in scene.base.items()}
        save_folder(scene.path / f"full{number}", arrays)
    only = ("-b", "base", "--only", "alignment,interference,crosstalk")

    thin = report(scene, "lora1", "lora2", *only, "-p", "interference.k=3")
    full = report(scene, "full1", "full2", *only, "-p", "interference.k=3")

    for name, found in thin["diagnostics"].items():
        other = full["diagnostics"][name]
        assert_same_numbers(found["totals"], other["totals"], 1e-3)
        assert_same_numbers(found["rows"], other["rows"], 1e-3)


def test_without_a_base(scene: Scene) -> None:
    """Adapters can be compared without one; what needs it is named."""
    ran = assert_done(spectral(scene, "lora1", "lora2"))
    data = report(scene, "lora1", "lora2")

    assert set(data["diagnostics"]) == {"spectra", "allocation", *PAIRED, *TOGETHER}
    assert ran.err.splitlines() == [
        "note: without --base there is no contribution, heavy_tail, intruders, rotation"
    ]
    assert data["base"] is None
    assert "base" not in rows(data, "spectra")[MATRICES[0]]


def test_every_diagnostic_takes_part(scene: Scene) -> None:
    """With a base and two models all of them run, and each says something."""
    data = report(scene, "ft1", "lora1", "-b", "base")

    assert set(data["diagnostics"]) == set(DIAGNOSTICS) == SINGLE | PAIRED | TOGETHER
    for name, found in data["diagnostics"].items():
        assert found["rows"], name
        assert found["sentences"], name
        assert found["totals"]["all"], name
        assert found["about"] == DIAGNOSTICS[name].summary
        assert set(found["params"]) == set(DIAGNOSTICS[name].params)
    assert data["summary"] == [s for f in data["diagnostics"].values() for s in f["sentences"]]
    assert set(report(scene, "ft1", "-b", "base")["diagnostics"]) == SINGLE


def test_report_describes_tensors(scene: Scene) -> None:
    """Place, type of module, shape and state of every tensor; version and identities."""
    data = report(scene, "lora1", "-b", "base", "--only", "spectra")

    assert (data["kind"], data["version"]) == ("mergebench spectral", 1)
    assert data["base"]["label"] == "base"
    assert len(data["base"]["fingerprint"]) == 32
    (model,) = data["models"]
    assert (model["label"], model["kind"]) == ("lora1", "adapter")
    first = data["tensors"][0]
    assert first["tensor"] == MATRICES[0]
    assert (first["stack"], first["block"], first["layer"]) == ("model.layers", 0, "model.layers.0")
    assert (first["module"], first["kind"]) == ("self_attn.q_proj", "linear")
    assert first["shape"] == [16, 16]
    assert first["models"][0]["state"] == "changed"
    update = np.linalg.norm(scene.updates[0][MATRICES[0]])
    assert first["models"][0]["norm"] == pytest.approx(update)
    assert first["base_norm"] == pytest.approx(np.linalg.norm(scene.base[MATRICES[0]]))


def test_selection(scene: Scene) -> None:
    """--include and --exclude take names, classes and blocks; embeddings only if asked for."""
    only = ("ft1", "-b", "base", "--only", "spectra")
    named = report(scene, *only, "--include", "q_proj")
    block = report(scene, *only, "--include", "block=1", "--exclude", "mlp")
    embedding = report(scene, *only, "--include", "class=embedding")
    ran = assert_done(spectral(scene, *only))

    assert list(rows(named, "spectra")) == [MATRICES[0], MATRICES[2]]
    assert list(rows(block, "spectra")) == [MATRICES[2]]
    assert list(rows(embedding, "spectra")) == ["model.embed_tokens.weight"]
    assert "2 embeddings, heads and norms" in ran.err


def test_words_and_tables(scene: Scene) -> None:
    """Sentences come first, then tables with a line over the layers."""
    ran = assert_done(spectral(scene, "ft1", "ft2", "lora1", "-b", "base"))
    lines = ran.out.splitlines()

    assert lines[0].startswith("ft1: of 40 leading directions in 4 matrices")
    assert any(line.startswith("intruders: Leading directions") for line in lines)
    headings = [line for line in lines if line.startswith("model ")]
    assert "<0.5" in headings[0]
    total = lines[lines.index(headings[0]) + 3].split()
    assert total[:4] == ["ft1", "all", "0", "40"]
    assert total[-1] == "▁▁"
    headings = [line for line in lines if line.split() == ["cosine", "ft1", "ft2", "lora1"]]
    matrix = lines.index(headings[0])
    assert [line.split()[0] for line in lines[matrix + 1 : matrix + 4]] == ["ft1", "ft2", "lora1"]
    assert spectral(scene, "ft1", "-b", "base", "-q").out == ""


@pytest.mark.parametrize("names", [("intruders",), ("spectra", "rotation")])
def test_workers_change_nothing(scene: Scene, names: tuple[str, ...]) -> None:
    """One worker, four, and a budget for one at a time give the same report."""
    only = ("ft1", "ft2", "-b", "base", "--no-cache", "--only", ",".join(names))
    one = report(scene, *only, "-j", 1)

    assert report(scene, *only, "-j", 4) == one
    assert report(scene, *only, "-j", 4, "--memory", "17MiB") == one


def test_kept_decompositions_are_found_again(scene: Scene) -> None:
    """The second model reads the base's decompositions, and a copy of the base does too."""
    env = {"MERGEBENCH_CACHE": str(beside(scene, "kept"))}
    place = beside(scene, "kept") / "spectra"
    only = ("--only", "intruders,rotation")
    cold = report(scene, "ft1", "-b", "base", *only, env=env)
    first = tree(place)
    times = {path.name: path.stat().st_ino for path in place.iterdir()}

    warm = report(scene, "ft1", "-b", "base", *only, env=env)
    copied = report(scene, "ft2", "-b", "base.safetensors", *only, env=env)
    none = report(scene, "ft1", "-b", "base", *only, "--no-cache", env=env)

    assert warm == cold == none
    assert copied["base"]["fingerprint"] == cold["base"]["fingerprint"]
    assert len(first) == 4
    assert tree(place) == first
    assert {path.name: path.stat().st_ino for path in place.iterdir()} == times


def test_what_is_kept_is_used(scene: Scene) -> None:
    """A kept decomposition that says something else is believed: nothing was computed again."""
    only = ("ft1", "-b", "base", "--only", "intruders", "--include", "layers.0.*q_proj")
    place = beside(scene, "cache") / "mergebench" / "spectra"
    sound = report(scene, *only)
    (path,) = place.iterdir()
    with np.load(path) as held:
        arrays = dict(held)
    np.savez(path, U=np.roll(arrays["U"], 3, axis=0), S=arrays["S"], Vt=arrays["Vt"])

    assert report(scene, *only)["diagnostics"] != sound["diagnostics"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_damaged_files_are_made_again(scene: Scene, damage: bytes | None) -> None:
    """A kept file that is cut, foreign or flipped is replaced."""
    only = ("ft1", "-b", "base", "--only", "intruders", "--include", "layers.0.*q_proj")
    place = beside(scene, "cache") / "mergebench" / "spectra"
    sound = report(scene, *only)
    (path,) = place.iterdir()
    original = path.read_bytes()
    flipped = bytearray(original)
    flipped[len(flipped) // 3] ^= 0xFF
    path.write_bytes(bytes(flipped) if damage is None else damage)

    assert report(scene, *only) == sound
    assert path.read_bytes() == original


def test_the_cache_stays_within_its_size(scene: Scene) -> None:
    """What an earlier run used goes; what this run has used stays."""
    env = {"MERGEBENCH_CACHE_SIZE": "17kB", "MERGEBENCH_CACHE": str(beside(scene, "kept"))}
    place = beside(scene, "kept") / "spectra"
    only = ("--only", "intruders")
    report(scene, "ft1", "-b", "base", *only, "--include", "layers.0", env=env)
    before = {path.name for path in place.iterdir()}
    for path in place.iterdir():
        os.utime(path, (1, 1))

    report(scene, "ft1", "-b", "base", *only, "--include", "layers.1", env=env)

    after = {path.name for path in place.iterdir()}
    assert len(before) == 2
    assert sum(path.stat().st_size for path in place.iterdir()) <= 17_000
    assert len(after - before) == 2
    tiny = env | {"MERGEBENCH_CACHE_SIZE": "1kB", "MERGEBENCH_CACHE": str(scene.path / "tiny")}
    report(scene, "ft1", "-b", "base", *only, env=tiny)
    assert not (scene.path / "tiny").exists()


def test_a_cache_that_cannot_be_written(scene: Scene) -> None:
    """Work goes on, and a note says why the next run will cost the same."""
    (scene.path / "file").write_text("")
    ran = assert_done(
        spectral(scene, "ft1", "-b", "base", "--cache", "file", "--only", "intruders")
    )

    assert "note: decompositions are not kept: file/spectra: Not a directory" in ran.err


def test_before_and_after(scene: Scene) -> None:
    """--against lists the totals that changed, and --json every number that did."""
    only = ("-b", "base", "--only", "spectra,contribution")
    earlier = report(scene, "ft1", *only)
    (scene.path / "earlier.json").write_text(json.dumps(earlier))

    same = report(scene, "ft1", *only, "--against", "earlier.json")
    now = report(scene, "lora1", *only, "--against", "earlier.json")
    ran = assert_done(spectral(scene, "lora1", *only, "--against", "earlier.json"))

    assert same["against"] == {"path": "earlier.json", "changes": [], "notes": []}
    (change,) = [
        e
        for e in now["against"]["changes"]
        if (e["diagnostic"], e["scope"], e["quantity"]) == ("spectra", "all", "eff. rank ΔW")
    ]
    assert change["before"] == whole(earlier, "spectra")["delta"]["effective_rank"]
    assert change["after"] == whole(now, "spectra")["delta"]["effective_rank"]
    by_tensor = [e for e in now["against"]["changes"] if e["scope"] == "rows"]
    assert {e["where"] for e in by_tensor if e["diagnostic"] == "spectra"} == set(MATRICES)
    assert "against earlier.json:" in ran.out
    assert "eff. rank ΔW" in ran.out.split("against earlier.json:")[1]


def test_against_notes_what_does_not_compare(scene: Scene) -> None:
    """Other parameters, diagnostics and models are named."""
    earlier = report(scene, "ft1", "ft2", "-b", "base", "--only", "spectra,overlap")
    (scene.path / "earlier.json").write_text(json.dumps(earlier))

    now = report(
        scene, "ft2", "lora1", "lora2", "-b", "base", "--only", "spectra,signs",
        "-p", "spectra.points=3", "--against", "earlier.json",
    )["against"]  # fmt: skip

    assert set(now["notes"]) == {
        "the earlier report has no counterpart of lora1",
        "the earlier report has no counterpart of lora2",
        "spectra had other parameters in the earlier report",
        "the earlier report has no signs",
    }
    assert now["changes"] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", ("is no spectral report", "spectral --json")),
        ('{"kind": "mergebench spectral", "version": 99}', ("another version", "99")),
        ('{"kind": "mergebench spectral", "version": 1}', ("damaged",)),
        ('{"kind": "mergebench spectral", "version": 1, "models": [1], "diagnostics": {}}',
         ("damaged",)),
        ("[", ("not sound JSON",)),
    ],
)  # fmt: skip
def test_against_something_else(scene: Scene, content: str, words: tuple[str, ...]) -> None:
    """What is no report is refused before any work."""
    (scene.path / "odd.json").write_text(content)
    assert_refused(spectral(scene, "nowhere", "--against", "odd.json"), "odd.json", *words)


def test_tables(scene: Scene) -> None:
    """A folder gets one table per diagnostic and list, a .csv file one long table."""
    only = ("lora1", "lora2", "-b", "base", "--only", "intruders,cosine", "-k", 3)
    data = report(scene, *only, "--csv", "tables")
    ran = assert_done(spectral(scene, *only, "--csv", "long.csv"))

    assert listing(scene.path / "tables") == [
        "cosine.csv",
        "intruders.csv",
        "intruders.directions.csv",
    ]
    assert "note: wrote long.csv" in ran.err
    with (scene.path / "tables" / "intruders.directions.csv").open(newline="") as file:
        directions = list(csv.DictReader(file))
    expected = [
        (row["tensor"], data["models"][row["model"]]["label"], str(each["cosine"]))
        for row in data["diagnostics"]["intruders"]["rows"]
        for each in row["directions"]
    ]
    assert [(e["tensor"], e["model"], e["cosine"]) for e in directions] == expected
    with (scene.path / "long.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = {e["tensor"]: e["value"] for e in lines
             if (e["diagnostic"], e["quantity"]) == ("cosine", "cosine")}  # fmt: skip
    assert found == {name: str(row["cosine"]) for name, row in rows(data, "cosine", 0, 1).items()}


def test_tables_replace_nothing_unasked(scene: Scene) -> None:
    """Existing tables are kept without --force, and a place that cannot be is refused at once."""
    only = ("lora1", "--only", "spectra")
    assert_done(spectral(scene, *only, "--csv", "t.csv"))
    before = (scene.path / "t.csv").read_bytes()

    assert_refused(spectral(scene, *only, "--csv", "t.csv"), "t.csv exists", "--force")
    assert (scene.path / "t.csv").read_bytes() == before
    assert_done(spectral(scene, *only, "--csv", "t.csv", "--force", "-p", "spectra.points=2"))
    assert (scene.path / "t.csv").read_bytes() != before
    assert_refused(spectral(scene, *only, "--csv", "no/t.csv"), "no is no folder")
    assert_refused(spectral(scene, *only, "--csv", "a.safetensors"), "is a file")
    assert_done(spectral(scene, *only, "--csv", "folder"))
    assert_refused(spectral(scene, *only, "--csv", "folder"), "exists", "--force")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ft1",), ("ft1: is a full checkpoint", "--base")),
        (("base+lora1",), ("is a full checkpoint", "--base")),
        (("ft1", "-b", "lora1"), ("lora1: the base must be a checkpoint",)),
        (("ft1", "-b", "base+lora1"), ("the base must be a checkpoint", "with an adapter")),
        (("ft3", "-b", "base"), ("ft3: no such file or folder",)),
        (("ft1", "-b", "base", "--only", "intruder"), ("'intruder'", "did you mean 'intruders'?")),
        (("ft1", "-b", "base", "--only", "cosine"), ("cosine: needs 2 models",)),
        (("lora1", "--only", "intruders"), ("intruders: needs --base",)),
        (("ft1", "-b", "base", "--epsilon", "0.5,2"), ("`epsilon`", "(0, 1]", "'2'")),
        (("ft1", "-b", "base", "--epsilon", "half"), ("`epsilon`", "'half'")),
        (("ft1", "-b", "base", "-k", "0"), ("`k`", ">= 1", "got 0")),
        (("ft1", "-b", "base", "--side", "up"), ("`side`", "left, right", "got up")),
        (("ft1", "-b", "base", "-p", "intruders"), ("diagnostic.name=value", "'intruders'")),
        (("ft1", "-b", "base", "-p", "spectra.pints=2"), ("no parameter `pints`", "'points'?")),
        (("ft1", "-b", "base", "-p", "spektra.points=2"), ("'spektra'", "'spectra'?")),
        (("ft1", "-b", "base", "-k", "2", "-p", "intruders.k=3"), ("intruders.k is given twice",)),
        (("ft1", "-b", "base", "-p", "overlap.density=0.1"), ("overlap:", "--only")),
        (("ft1", "-b", "base", "--include", "nothing"), ("--include nothing", "no tensor")),
        (("ft1", "-b", "base", "--include", "("), ("not a regular expression",)),
        (("ft1", "-b", "base", "--include", "block=0", "--exclude", "lay"), ("nothing to look",)),
        (("ft1", "-b", "base", "--include", "class=norm", "--only", "spectra"), ("no matrix",)),
        (("ft1", "-b", "base", "--memory", "1MiB"), ("decomposing", "--memory 17MiB")),
        (("ft1", "-b", "base", "--memory", "lots"), ("--memory", "'lots'")),
        (("ft1", "-b", "base", "--cache-size", "lots"), ("--cache-size", "'lots'")),
        (("ft1", "-b", "base", "-j", "0"), ("--workers",)),
        (("ft1", "-b", "base", "--against", "nowhere.json"), ("nowhere.json",)),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    scene: Scene, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """Wrong values and impossible combinations say what and what to do, and leave nothing."""
    before = listing(scene.path)

    assert_refused(spectral(scene, *arguments), *words)

    assert listing(scene.path) == before


def test_another_models_base(scene: Scene) -> None:
    """Tensors without counterpart are left out and named; a base that is none is questioned."""
    odd = {k: v for k, v in scene.tuned[0].items() if "q_proj" not in k}
    odd["model.layers.0.extra.weight"] = np.ones((3, 3), F32)
    write(scene.path / "odd.safetensors", odd)
    strange = {k: (-3 * v).astype(v.dtype) for k, v in scene.base.items()}
    write(scene.path / "strange.safetensors", strange)

    ran = assert_done(spectral(scene, "odd.safetensors", "-b", "base"))
    far = assert_done(spectral(scene, "strange.safetensors", "-b", "base"))

    assert "1 tensor has no counterpart in the base and are left out" in ran.err
    assert "is this the base it was fine-tuned from?" in far.err
    assert "is this the base" not in ran.err


def test_gpt2_layers_are_turned(scene: Scene) -> None:
    """Conv1D weights, stored input × output, are looked at from their output side."""
    random = np.random.default_rng(0)
    name = "transformer.h.0.attn.c_attn.weight"
    base, update = random.standard_normal((2, 6, 18)).astype(F32)
    tuned = base + np.outer(update[:, 0], np.ones(18)).astype(F32)
    config = {"model_type": "gpt2"}
    for folder, array in (("gpt", base), ("gpt-tuned", tuned)):
        save_folder(scene.path / folder, {name: array}, config)

    data = report(scene, "gpt-tuned", "-b", "gpt", "--only", "intruders", "-k", 2)

    row = rows(data, "intruders")[name]
    assert row["shape"] == [18, 6]
    assert row["dimension"] == 18
    found = [each["cosine"] for each in row["directions"]]
    np.testing.assert_allclose(found, largest_cosines(base.T, tuned.T, 2), atol=1e-6)


def test_layers_in_the_order_of_the_model(scene: Scene) -> None:
    """Layer 10 comes after layer 9, and classes outside of blocks come last, as do pairs."""
    names = ["body.weight", *(f"h.layers.{n}.proj.weight" for n in (10, 2, 9, 0))]
    for file, shift in (("many", 0.0), ("many1", 1.0), ("many2", 2.0)):
        arrays = {n: np.eye(3, dtype=F32) + np.float32(shift) for n in names}
        write(scene.path / f"{file}.safetensors", arrays)

    data = report(
        scene, "many1.safetensors", "many2.safetensors", "-b", "many.safetensors", "--only",
        "spectra,cosine",
    )  # fmt: skip

    order = [f"h.layers.{n}" for n in (0, 2, 9, 10)] + ["linear"]
    spectra = data["diagnostics"]["spectra"]["totals"]["layers"]
    assert [(e["model"], e["where"]) for e in spectra] == [(m, w) for m in (0, 1) for w in order]
    assert [e["where"] for e in data["diagnostics"]["cosine"]["totals"]["layers"]] == order
    assert {e["where"] for e in data["diagnostics"]["spectra"]["totals"]["modules"]} == {
        "body",
        "proj",
    }


def test_kernels_are_matrices(scene: Scene) -> None:
    """A convolution is output × (input · kernel)."""
    random = np.random.default_rng(1)
    base, update = random.standard_normal((2, 8, 3, 2, 2)).astype(F32)
    for name, array in (("c", base), ("c-tuned", base + update)):
        write(scene.path / f"{name}.safetensors", {"down.0.conv.weight": array})

    data = report(
        scene, "c-tuned.safetensors", "-b", "c.safetensors", "--only", "intruders,spectra"
    )

    row = rows(data, "intruders")["down.0.conv.weight"]
    expected = largest_cosines(base.reshape(8, 12), (base + update).reshape(8, 12), 8)
    np.testing.assert_allclose([e["cosine"] for e in row["directions"]], expected, atol=1e-6)


def odd_model(scene: Scene) -> tuple[dict[str, Any], dict[str, Any]]:
    """A base and a fine-tune with a matrix of every odd kind."""
    random = np.random.default_rng(2)
    base = {
        "layers.0.plain.weight": random.standard_normal((6, 5)),
        "layers.0.same.weight": random.standard_normal((6, 5)),
        "layers.0.zero.weight": np.zeros((4, 4)),
        "layers.0.constant.weight": np.full((4, 4), 2.0),
        "layers.0.wide.weight": random.standard_normal((1, 40)),
        "layers.0.tall.weight": random.standard_normal((300, 2)),
        "layers.0.low.weight": np.outer(np.arange(1, 9.0), np.arange(1, 8.0)),
        "layers.0.infinite.weight": random.standard_normal((3, 3)),
        "layers.0.empty.weight": np.zeros((0, 3)),
        "layers.0.one.weight": np.ones((1, 1)),
        "layers.0.bias": random.standard_normal(5),
    }
    tuned = {
        name: array + 0.1 * random.standard_normal(array.shape) if ".same." not in name else array
        for name, array in base.items()
    }
    tuned["layers.0.infinite.weight"][1, 1] = np.nan
    tuned["layers.0.constant.weight"] = np.zeros((4, 4))
    for folder, arrays in (("odd-base", base), ("odd", tuned)):
        write(
            scene.path / f"{folder}.safetensors",
            {name: array.astype(F32) for name, array in arrays.items()},
        )
    return base, tuned


def test_odd_matrices(scene: Scene) -> None:
    """Zero, constant, thin, low-rank, equal and broken matrices have defined results."""
    odd_model(scene)
    files = ("odd.safetensors", "-b", "odd-base.safetensors")
    data = report(scene, *files)
    ran = assert_done(spectral(scene, *files))

    found, spectra = rows(data, "intruders"), rows(data, "spectra")
    states = {e["tensor"][9:-7]: e["models"][0]["state"] for e in data["tensors"]}
    looked = {name[9:-7]: row for name, row in found.items()}
    assert states["infinite"] == "not finite"
    assert states["same"] == states["empty"] == "unchanged"
    assert set(looked) == {"plain", "zero", "constant", "wide", "tall", "low", "one"}
    assert (looked["zero"]["vectors"], looked["zero"]["thresholds"][0]["count"]) == (0, 4)
    assert (looked["constant"]["looked"], looked["constant"]["thresholds"][0]["energy"]) == (0, 0)
    assert looked["wide"]["directions"][0]["cosine"] == pytest.approx(1.0)
    assert (looked["low"]["vectors"], looked["low"]["looked"]) == (1, 7)
    zero = spectra["layers.0.constant.weight"]
    assert (zero["base"]["rank"], zero["tuned"]["rank"]) == (1, 0)
    assert zero["tuned"]["effective_rank"] == zero["tuned"]["stable_rank"] == 0
    assert "1 tensors hold entries that are not finite (layers.0.infinite.weight)" in ran.err
    assert "2 of 11 tensors are as in the base" in ran.err
    assert "NaN" not in json.dumps(data)


def test_pairs_of_odd_matrices(scene: Scene) -> None:
    """A model that left a tensor alone counts as zeros, and one with NaN there as absent."""
    odd_model(scene)
    write(scene.path / "second.safetensors", read(scene.path / "odd-base.safetensors") | {
        "layers.0.plain.weight": np.ones((6, 5), F32),
        "layers.0.infinite.weight": np.ones((3, 3), F32),
    })  # fmt: skip

    data = report(scene, "odd.safetensors", "second.safetensors", "-b", "odd-base.safetensors")

    cosines = rows(data, "cosine", 0, 1)
    assert cosines["layers.0.plain.weight"]["cosine"] is not None
    assert cosines["layers.0.wide.weight"]["cosine"] is None
    assert list(rows(data, "signs", 0, 1)) == ["layers.0.plain.weight"]
    one, other = (
        np.concatenate([(file[n].astype(np.float64) - base[n]).ravel() for n in base
                        if "infinite" not in n])
        for base in [read(scene.path / "odd-base.safetensors")]
        for file in (read(scene.path / "odd.safetensors"), read(scene.path / "second.safetensors"))
    )  # fmt: skip
    inner = one @ other
    assert whole(data, "cosine", 0, 1)["inner"] == pytest.approx(inner, rel=1e-6)
    assert whole(data, "cosine", 0, 1)["squared"] == pytest.approx(one @ one, rel=1e-6)


def test_adapter_with_saved_modules(scene: Scene) -> None:
    """A module saved in full is a difference to the base."""
    head = scene.base["lm_head.weight"] + 1
    save_peft(scene.path / "saving", scene.loras[0], extra={"lm_head.weight": head.astype(F32)})

    data = report(scene, "saving", "-b", "base", "--only", "spectra", "--include", "lm_head")

    row = rows(data, "spectra")["lm_head.weight"]
    assert row["delta"]["rank"] == 1
    assert row["delta"]["norm"] == pytest.approx(np.sqrt(head.size), rel=1e-5)


def test_inputs_are_not_written_to(scene: Scene) -> None:
    """Nothing in the folder changes."""
    before = tree(scene.path)
    assert_done(spectral(scene, "ft1", "lora1", "base+lora2", "-b", "base"))
    assert tree(scene.path) == before


def test_files_end_up_where_the_system_says(scene: Scene) -> None:
    """A relative XDG_CACHE_HOME does not count: the home's .cache does."""
    home = beside(scene, "home")
    env = {"XDG_CACHE_HOME": "relative", "HOME": str(home)}
    report(scene, "ft1", "-b", "base", "--only", "intruders", env=env)

    assert len(listing(Path(home) / ".cache" / "mergebench" / "spectra")) == 4
    assert not (scene.path / "relative").exists()


@pytest.mark.parametrize(("model", "more"), [("lora1", ()), ("ft1", ("-b", "base"))])
def test_packed_files_give_what_they_unpack_to(scene: Scene, model: str, more: Any) -> None:
    """Every diagnostic, alone and against another, to the last digit; and it did lose."""
    path = scene.path / "p.mbz.safetensors"
    line = ("p.mbz.safetensors", "lora2", "-b", "base", "--no-cache")
    assert_done(call("compress", model, *more, "-o", path, cwd=scene.path))
    assert_done(call("decompress", path, "-o", "plain.safetensors", cwd=scene.path))

    packed = report(scene, *line)
    # Under the same name, as sentences say it.
    (scene.path / "plain.safetensors").replace(path)
    plain = report(scene, *line)

    assert set(packed["diagnostics"]) >= SINGLE | PAIRED
    assert packed["diagnostics"] == plain["diagnostics"]
    before = report(scene, model, "-b", "base", "--no-cache", "--only", "spectra")
    assert rows(before, "spectra") != rows(packed, "spectra")


def test_a_folder_of_a_packed_adapter_is_looked_at(scene: Scene) -> None:
    """As it is pushed and pulled: the packed file beside its config, or on its base."""
    folder = scene.path / "packed"
    folder.mkdir()
    path = folder / "adapter.mbz.safetensors"
    assert_done(call("compress", "lora1", "-o", path, cwd=scene.path))
    config = (scene.path / "lora1" / "adapter_config.json").read_bytes()
    (folder / "adapter_config.json").write_bytes(config)

    only = ("-b", "base", "--only", "spectra,intruders")
    one = report(scene, path, *only)
    same = report(scene, folder, *only)
    pair = report(scene, "base+packed/adapter.mbz.safetensors", *only)
    for name in ("spectra", "intruders"):
        assert rows(same, name) == rows(one, name)
        assert whole(same, name) == whole(one, name)
        assert_same_numbers(rows(pair, name), rows(one, name), 1e-3)
