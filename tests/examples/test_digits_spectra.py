"""The comparison of spectra: what is asked, what is said, and a quick run of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from digits_demo.experts import Expert
from digits_demo.settings import Settings, quick
from digits_demo.spectra import EPSILONS, Seen, findings, markdown, with_ranks

from tests.helpers.running import assert_done, call

SCRIPT = Path(__file__).parents[2] / "examples" / "digits" / "run.py"


def seen(count, relative=0.2, upright=80.0):
    numbers = {str(epsilon): count * epsilon / 0.5 for epsilon in EPSILONS}
    return Seen(numbers, {key: 0.01 * value for key, value in numbers.items()}, 0.4, 3.0, relative,
                90.0, upright, 160, 16, 0.27)  # fmt: skip


def test_more_intruders_are_said_to_be_more():
    several = {
        "full": [seen(1.0), seen(2.0)],
        "lora1": [seen(3.0, 0.4, 70.0), seen(1.0, 0.4, 70.0)],
        "lora64": [seen(9.0, 0.6, 60.0), seen(9.0, 0.6, 60.0)],
    }
    said = findings(several)
    assert said[0] == (
        "LoRA r=1 shows more intruders than full fine-tuning at ε = 0.5: 2.0 against 1.5 of 160 "
        "directions, in 1 of 2 seeds."
    )
    assert "9.0 against 1.5" in said[1]
    assert "in 2 of 2 seeds" in said[1]
    assert said[2].startswith("Every rank")
    assert said[2].endswith("most has LoRA r=64.")
    assert "2.0 to 3.0 times as long" in said[3]
    assert said[4].endswith("a rank correlation of -1.00.")
    table = markdown(several).splitlines()
    assert table[2].startswith("| full fine-tune | 1.5 ± 0.7 | 1.50 ± 0.71 | 0.40 ± 0.00 |")


def test_fewer_and_as_many_are_said_too():
    several = {"full": [seen(5.0)], "lora4": [seen(2.0)], "lora16": [seen(5.0)]}
    said = findings(several)
    assert "LoRA r=4 shows fewer intruders than full fine-tuning" in said[0]
    assert "LoRA r=16 shows as many intruders as full fine-tuning" in said[1]
    assert said[2].startswith("Not every rank")
    assert said[4].endswith("0.00.")


def test_all_ranks_are_compared():
    assert with_ranks(replace(Settings(), ranks=(4,))).ranks == (1, 4, 16, 64)


@pytest.fixture(scope="module")
def folders(quick_run, tmp_path_factory):
    """A quick run of the script, on models that are trained already."""
    work, out = quick_run[0], tmp_path_factory.mktemp("out")
    line = [sys.executable, "-W", "error", SCRIPT, "--spectra", "--quick"]
    line += ["--seeds", "0", "--work", work, "--out", out]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return work, out, done.stdout


def test_the_run_leaves_what_the_command_says(folders):
    """Counts are those of a call of the command on one expert after the other."""
    work, out, printed = folders
    names = ["digits_spectra.json", "digits_spectra.md", "digits_spectra.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / names[2]).read_bytes().startswith(b"\x89PNG")
    collected = json.loads((out / names[0]).read_text())
    assert all(sentence in printed for sentence in collected["findings"])
    settings = quick(Settings(seeds=(0,)))
    counts = []
    for domain in ("rotated", "inverted", "mirrored", "shuffled", "noisy", "downscaled"):
        base, expert = (e.folder(settings, work) for e in (Expert(0), Expert(0, domain, 4)))
        line = ["spectral", expert, "-b", base, "--only", "intruders", "--json", "--no-cache"]
        found = assert_done(call(*line, cwd=out)).json
        (total,) = found["diagnostics"]["intruders"]["totals"]["all"]
        assert (total["matrices"], total["looked"]) == (16, 160)
        counts.append(total["thresholds"][0]["count"])
    (only,) = collected["seen"]["lora4"]
    assert only["counts"]["0.5"] == pytest.approx(sum(counts) / 6)
    assert (only["looked"], only["matrices"]) == (160, 16)
