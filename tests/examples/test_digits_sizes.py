"""Accuracy against size: what is chosen, what is said, and a quick run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from digits_demo.experts import Expert
from digits_demo.settings import Settings, quick
from digits_demo.sizes import packings
from digits_demo.sizes_report import HALF, PLAIN, Measured, findings, markdown, smallest, summed

from tests.helpers.running import assert_done, call

SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "run.py"


def one(curve, size, accuracy, label=""):
    return Measured(curve, label, size, accuracy, 0.5, {})


def seeds(*losses):
    """Two seeds of two experts: as trained, bf16, and a file per curve of so much loss."""
    return [
        [
            [one(PLAIN, 2000, 90.0 + seed + at), one(HALF, 1000, 90.0 + seed + at)]
            + [one(curve, size, 90.0 + seed + at - loss - 0.2 * seed, label)
               for curve, label, size, loss in losses]
            for at in range(2)
        ]
        for seed in range(2)
    ]  # fmt: skip


LOSSES = (
    ("ternary", "density 0.1", 100, 3.0),
    ("ternary", "density 0.5", 250, 0.8),
    ("2 bits", "", 200, 0.98),
)


def test_the_smallest_that_loses_less_than_a_point_is_named():
    """2 bits lose 0.98 and 1.18, which is more on average; ternary 0.8 and 1.0."""
    rows = summed(seeds(*LOSSES))
    assert [row.size for row in rows] == [2000, 1000, 100, 250, 200]
    assert rows[4].losses == pytest.approx((0.98, 1.18))
    assert rows[3].lost == pytest.approx(0.9)
    assert rows[3].smaller == pytest.approx(4.0)
    best = smallest(rows)
    assert best is not None
    assert best.name == "ternary, density 0.5"
    said = findings({"lora16": rows})
    assert "LoRAs r=16 that loses less than 1 point: ternary, density 0.5**" in said[0]
    assert "0.2 kB, 4.0 times smaller than bf16: 90.1 % against 91.0 %" in said[0]
    assert said[1].endswith("ternary: density 0.5 0.2 kB; 2 bits: none.")
    table = markdown({"full": rows}, 2).splitlines()
    assert "| **ternary, density 0.5** | 0.2 | 4.0 | 0.500 | 90.1 | 0.9 ± 0.1 |" in table
    assert "| 2 bits | 0.2 | 5.0 | 0.500 | 89.9 | 1.1 ± 0.1 |" in table


def test_where_all_lose_more_nothing_packed_is_named():
    rows = summed(seeds(*LOSSES[:1]))
    assert smallest(rows) is rows[1]
    assert smallest(rows[2:]) is None
    assert "point: bf16, not packed**" in findings({"full": rows})[0]


def test_every_scheme_is_compared():
    """With α and several densities; a quick run has one of each."""
    ways = packings()
    schemes = {"ternary", "one-bit", "two-bit", "sparse", "lowrank", "lowrank+ternary"}
    assert {way.scheme for way in ways} >= schemes
    assert len({(way.curve, way.label) for way in ways}) == len(ways)
    few = packings(few=True)
    assert {way.curve for way in few} == {way.curve for way in ways}
    assert len(few) == len({way.curve for way in few})


@pytest.fixture(scope="module")
def folders(quick_run, tmp_path_factory):
    """A quick run of the script, on models that are trained already."""
    work, out = quick_run[0], tmp_path_factory.mktemp("out")
    line = [sys.executable, "-W", "error", SCRIPT, "--sizes", "--quick"]
    line += ["--seeds", "0", "--work", work, "--out", out]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work, out, done.stdout


def test_the_run_leaves_what_the_command_says(folders, tmp_path):
    """Sizes, errors and accuracies are those of a file that the command packs and unpacks."""
    import torch
    from digits_demo.checkpoints import load_model
    from digits_demo.evaluate import accuracies, evaluation_sets

    work, out, printed = folders
    names = ["digits_sizes.json", "digits_sizes.md", "digits_sizes.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / names[2]).read_bytes().startswith(b"\x89PNG")
    collected = json.loads((out / names[0]).read_text())
    assert all(sentence in printed for sentence in collected["findings"])
    settings = quick(Settings(seeds=(0,)))
    base = Expert(0).folder(settings, work)
    sets = {"mirrored": evaluation_sets(0, "test")["mirrored"]}
    for kind, rank in (("full", None), ("lora4", 4)):
        # The experts stand in the order of the domains, of which this is the third.
        found = {each["curve"]: each for each in collected["seen"][kind][0][2]}
        expert = Expert(0, "mirrored", rank).folder(settings, work)
        weights = "model.safetensors" if rank is None else "adapter_model.safetensors"
        assert found[PLAIN]["size"] == (expert / weights).stat().st_size
        assert 0.5 < found[HALF]["size"] / found[PLAIN]["size"] < 0.55
        packed = tmp_path / f"{kind}.mbz.safetensors"
        for line in (
            ("compress", expert, "-b", base, "-o", packed, "-s", "two-bit"),
            ("decompress", packed, "-b", base, "-o", tmp_path / kind),
        ):
            assert_done(call(*line, cwd=tmp_path))
        assert found["2 bits"]["size"] == packed.stat().st_size
        torch.set_num_threads(1)
        scored = accuracies(load_model(tmp_path / kind), sets)["mirrored"]
        assert found["2 bits"]["accuracy"] == pytest.approx(100 * scored)
        assert found["ternary, α by validation"]["params"]["alpha"] == 2
