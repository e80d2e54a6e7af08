from dataclasses import replace
from pathlib import Path

import pytest
from digits_demo.data import DOMAINS, UPRIGHT
from digits_demo.evaluate import Score
from digits_demo.findings import findings, show
from digits_demo.merges import Merge, arguments, merges, outputs
from digits_demo.report import cells, header, markdown
from digits_demo.settings import Settings, quick
from digits_demo.summary import Measure, summarise


def score(title, name, role, accuracy, reference="full", chosen="", upright=0.9, **domains):
    test = dict.fromkeys(DOMAINS, accuracy) | domains | {UPRIGHT: upright}
    return Score(title, name, role, reference, test, chosen, {"0.1": accuracy, "0.2": 0.1})


def seed_scores(shift=0.0):
    return [
        score("Base", "base", "base", 0.3),
        score("Experts, full", "experts-full", "experts", 0.8),
        score("Experts, LoRA r=1", "experts-lora1", "experts", 0.5),
        score("Best single expert", "single", "single", 0.42, chosen="noisy"),
        score("Uniform soup", "linear-full", "merge", 0.4 + shift),
        score("Task arithmetic", "task_arithmetic-full", "merge", 0.5, chosen="0.1", upright=0.8),
        score("TIES", "ties-full", "merge", 0.5 + shift, chosen="0.2", noisy=0.2),
        score("TA, LoRA r=1", "task_arithmetic-lora1", "merge", 0.4, "lora1", "0.1"),
    ]


@pytest.fixture
def rows():
    return summarise({0: seed_scores(), 1: seed_scores(0.1)})


def test_rows_average_seeds_and_normalise_by_their_own_experts(rows):
    by_name = {row.name: row for row in rows}
    assert [row.name for row in rows] == [each.name for each in seed_scores()]
    soup = by_name["linear-full"]
    assert soup.average.values == pytest.approx((40, 50))
    assert soup.average.mean == pytest.approx(45)
    assert soup.average.spread == pytest.approx(50**0.5)
    assert soup.normalised.values == pytest.approx((50, 62.5))
    assert by_name["task_arithmetic-lora1"].normalised.mean == pytest.approx(80)
    ties = by_name["ties-full"]
    assert ties.domains["noisy"].mean == pytest.approx(20)
    assert ties.average.values == pytest.approx((45, 100 * (5 * 0.6 + 0.2) / 6))
    assert ties.normalised.values == pytest.approx((56.25, 100 * (5 * 0.6 + 0.2) / 6 / 0.8))
    assert ties.upright.mean == pytest.approx(90)
    assert ties.curve["0.1"].mean == pytest.approx(55)


def test_many_comparisons_are_told_together(rows):
    more = [replace(rows[4], title=f"Soup {n}", name=f"linear+{n}-full") for n in range(12)]
    found = findings([*rows, *more])
    assert len(found) == 7
    soups = "; ".join(f"Soup {n} -5.0" for n in range(12))
    assert soups in found[6]
    assert found[6].startswith("Against task arithmetic (LoRAs: of their rank, and that of full), ")


def test_a_single_seed_has_no_spread():
    assert Measure((50.0,)).spread is None
    assert show(Measure((50.0,))) == "50.0"
    assert show(Measure((1.0, 3.0)), "+") == "+2.0 ± 1.4"


def test_a_table_row_shows_lambda_domains_and_averages(rows):
    assert len(header()) == 11
    by_name = {row.name: cells(row) for row in rows}
    assert by_name["task_arithmetic-full"] == [
        "Task arithmetic", "0.1", *["50.0"] * 6, "50.0 ± 0.0", "62.5 ± 0.0", "80.0 ± 0.0",
    ]  # fmt: skip
    assert by_name["linear-full"][1] == by_name["single"][1] == ""
    written = markdown(rows).splitlines()
    assert written[0].startswith("| model | λ | rotated |")
    assert sum(line.startswith("| ") for line in written[: 2 + len(rows)]) == 2 + len(rows)
    assert written[2 + len(rows)] == ""
    (claim,) = [line for line in written if "arxiv.org" in line]
    assert claim.endswith("| TIES above Task arithmetic | -0.8 ± 5.9 | 1 of 2 seeds |")
    assert "https://arxiv.org/abs/2306.01708" in claim


def test_findings_name_what_does_not_help(rows):
    found = findings(rows)
    assert found[0].startswith("The best merge is Task arithmetic with 50.0 ± 0.0 %")
    assert "closes 40 % of that gap" in found[0]
    assert found[1] == "No better than the best single expert (42.0 ± 0.0 %): TA, LoRA r=1."
    assert found[2] == "Worse than the unmerged base on noisy: TIES -10.0."
    assert found[3].startswith("Upright digits change by +0.0 (Uniform soup) to -10.0 points")
    assert found[4] == (
        "At an end of the grid of λ with some seed: Task arithmetic (0.1); TIES (0.2); "
        "TA, LoRA r=1 (0.1)."
    )
    assert found[5].endswith("-5.0 ± 7.1 points; does not help with any seed.")
    assert found[6].endswith("points; helps with some seeds only.")
    assert found[7] == (
        "TA, LoRA r=1 against Task arithmetic: -10.0 ± 0.0 points; does not help with any seed."
    )
    assert len(found) == 8


def test_the_command_lines_are_the_documented_ones():
    experts, base, out = [Path("a"), Path("b")], Path("base"), Path("out")
    lines = {
        merge.name: " ".join(arguments(merge, experts, base, out))
        for merge in merges(quick(Settings()))
    }
    swept, trimmed = "-p lam=0.2,0.4", "-p density=0.2 -p lam=0.4,0.8"
    assert lines == {
        "linear-full": "merge a b --method linear -o out --quiet",
        "task_arithmetic-full": (
            f"merge a b --method task_arithmetic --base base {swept} -o out --quiet"
        ),
        "ties-full": f"merge a b --method ties --base base {trimmed} -o out --quiet",
        "breadcrumbs-full": f"merge a b --method breadcrumbs --base base {swept} -o out --quiet",
        "task_arithmetic-lora4": (
            f"merge a b --method task_arithmetic --base base {swept} --as model -o out --quiet"
        ),
        "ties-lora4": f"merge a b --method ties --base base {trimmed} --as model -o out --quiet",
    }


def test_the_grids_are_those_of_the_table():
    grids = {merge.name: merge.grid for merge in merges(Settings())}
    assert grids["linear-full"] == ()
    tenths = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")
    assert grids["task_arithmetic-full"] == grids["breadcrumbs-full"] == tenths
    assert grids["ties-lora16"] == ("0.2", "0.4", "0.6", "0.8", "1", "1.2", "1.4", "1.6")
    assert len(grids) == 10


def test_each_lambda_has_a_folder_of_its_own():
    swept = Merge("TIES", "ties", ("0.4", "1"))
    assert outputs(swept, [], Path("o")) == {"0.4": Path("o/lam=0.4"), "1": Path("o/lam=1")}
    assert outputs(Merge("Soup", "linear"), [], Path("o")) == {"": Path("o")}
    apart = Merge("EMR", "emr", based=True, apart=True)
    found = outputs(apart, [Path("x/ft-a"), Path("x/ft-b")], Path("o"))
    assert found == {"ft-a": Path("o/ft-a"), "ft-b": Path("o/ft-b")}
