"""What a comparison comes to: shares, averages, tables, costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.fit import tables
from mergebench.merge.fit.compare import Comparison, Fitted, compare
from mergebench.merge.fit.entries import entries_of, entry_of
from mergebench.merge.fit.scores import Scores
from mergebench.merge.fit.task import Task
from mergebench.recipe import Recipe
from tests.fit.support import Scored, make, recipe_of, save_model


@pytest.fixture
def models(tmp_path: Path) -> Recipe:
    """Experts of ``red`` (first entry 4) and ``blue`` (second entry 2)."""
    base = save_model(tmp_path / "base", np.zeros(2))
    places = [save_model(tmp_path / name, w) for name, w in (("red", [4.0, 0.0]), ("blue", [0, 2]))]
    return recipe_of(*places, base=str(base), method="linear")


def task(name: str, function: Any, **about: Any) -> Task:
    """A task of a function of ``w``."""
    return Task(name, Scored(function, **about), name)


def red(w: Any) -> dict[str, float]:
    """The first entry: more is better."""
    return {"level": float(w[0])}


def blue(w: Any) -> dict[str, float]:
    """Like a perplexity of the second entry: less is better."""
    return {"ppl": 8.0 / (1.0 + float(w[1]))}


def run(
    models: Recipe, lines: list[str], tasks: list[Task], grid: Any = None, **options: Any
) -> Any:
    """Compare, and the same as plain data."""
    scores = Scores(tasks, on_error=options.pop("on_error", "stop"))
    found = compare(entries_of(lines, models, grid or {}), models, scores,
                    select="val", report="test", make=make, **options)  # fmt: skip
    return found, found.to_json()


def line_of(found: Comparison, title: str) -> Any:
    """A line by its title."""
    return next(each for each in found.lines if each.title == title)


def test_shares_of_the_experts(models: Recipe) -> None:
    """By each task's own model; of metrics of which less is better, the other way round."""
    found, data = run(models, ["linear"], [task("red", red), task("blue", blue)])

    assert dict(found.experts) == {
        "red": models.models[0].path, "blue": models.models[1].path,
    }  # fmt: skip
    merged = line_of(found, "linear")
    assert merged.values == {"red": pytest.approx(2.0), "blue": pytest.approx(-4.0)}
    # 2 of 4, and 8/3 over 8/2.
    assert found.shares(merged) == {"red": pytest.approx(1 / 2), "blue": pytest.approx(2 / 3)}
    assert found.normalised(merged) == pytest.approx((1 / 2 + 2 / 3) / 2)
    own = line_of(found, models.models[0].path)
    assert found.shares(own) == {"red": 1.0, "blue": pytest.approx(1 / 3)}
    # The base has 0 on red, which is no share of anything.
    assert found.shares(line_of(found, "base")) == {"blue": pytest.approx(1 / 3)}
    assert found.normalised(line_of(found, "base")) is None
    assert data["lower_is_better"] == ["blue"]
    plain = {each["model"]: each for each in data["lines"]}
    # A mean of what is to be large and what is to be small says nothing.
    assert tables.average(data, plain["linear"]) is None
    row = dict(zip(tables.overview(data).titles, tables.overview(data).rows[3], strict=True))
    assert (row["model"], row["red"], row["blue"], row["average"]) == ("linear", "2", "4", "–")
    assert row["normalised"] == "0.5833"
    assert tables.scores(data).titles[2:4] == ("red (level)", "blue (ppl)")
    assert tables.shares(data).rows[3] == ("linear", "0.5", "0.6667", "0.5833")


def test_the_best_model_where_no_name_says_whose_task_it_is(models: Recipe) -> None:
    """Also where less is better."""
    found, data = run(models, ["linear"], [task("a", red), task("b", blue)])
    assert list(found.experts.values()) == [each.path for each in models.models]
    found, data = run(models, ["linear"], [task("b", blue), task("c", blue)])
    assert set(found.experts.values()) == {models.models[1].path}
    assert tables.average(data, data["lines"][0]) == pytest.approx(8.0)
    assert tables.scores(data).rows[0][2:] == ("8", "8", "8", "0.3333")


def test_choices_of_every_line(models: Recipe) -> None:
    """A grid for all that have the parameter; what a line says itself comes first."""

    def target(w: Any) -> dict[str, float]:
        return {"near": -abs(float(w[0]) - 2.0)}

    lines = ["linear", "task_arithmetic", "task_arithmetic:lam=0.75", "ties+scale:lam=1/2"]
    tasks = [task("red", target)]
    _found, data = run(models, lines, tasks, {"lam": "0.25:1:0.25"})

    plain = {each["model"]: each for each in data["lines"]}
    assert (plain["task_arithmetic"]["chosen"], plain["task_arithmetic"]["trials"]) == (
        "lam=0.5",
        4,
    )
    assert plain["task_arithmetic:lam=0.75"]["chosen"] == ""
    assert plain["task_arithmetic:lam=0.75"]["recipe"]["params"]["lam"] == "0.75"
    assert plain["ties+scale:lam=1/2"]["trials"] == 8
    assert plain["linear"]["trials"] == 1
    assert [each["label"] for each in plain["task_arithmetic"]["selection"]] == [
        "lam=0.25", "lam=0.5", "lam=0.75", "lam=1",
    ]  # fmt: skip
    values = [each["value"] for each in plain["task_arithmetic"]["selection"]]
    assert values == pytest.approx([-1.0, 0.0, -1.0, -2.0])
    # Chosen on one split and reported on the other; what has no choice is not scored on the first.
    calls = tasks[0].scorer.calls
    assert "linear test" in calls
    assert "linear val" not in calls
    assert "lam=0.25 test" not in calls
    with pytest.raises(ParameterError, match=r"no line has a parameter 'lamda'.*lam"):
        run(models, lines, tasks, {"lamda": "1"})
    with pytest.raises(ParameterError, match="'linear' is given twice"):
        run(models, ["linear", "linear"], tasks)


def test_recipes_and_fits_are_lines(models: Recipe, tmp_path: Path) -> None:
    """A recipe as it stands in a file, and what a fit makes of the models."""
    file = tmp_path / "half.yaml"
    file.write_text(
        f"method: linear\nmodels: [{models.models[0].path}]\nparams: {{normalize: false}}\n"
    )
    asked: list[tuple[str, ...]] = []

    def fit(entry: Any) -> Fitted:
        asked.append(entry.fit)
        return Fitted(entry.recipe, "the models", 3.0, (("one", 0.5), ("two", None)))

    _found, data = run(
        models, [str(file), "fit soup --accept '>='"], [task("red", red)], {}, fit=fit
    )

    assert asked == [("soup", "--accept", ">=")]
    plain = {each["model"]: each for each in data["lines"]}
    assert plain[str(file)]["values"] == {"red": pytest.approx(4.0)}
    fitted = plain["fit soup --accept '>='"]
    assert (fitted["chosen"], fitted["trials"], fitted["cost"]["choosing"]) == (
        "the models",
        2,
        3.0,
    )
    assert fitted["values"] == {"red": pytest.approx(2.0)}
    with pytest.raises(MergebenchError, match="no such recipe"):
        entry_of("none.yaml", models)
    with pytest.raises(ParameterError, match="is no fit"):
        entry_of("fit soup 'x", models)
    with pytest.raises(ParameterError, match="no merge method 'tees'"):
        entry_of("tees:lam=1", models)


def test_costs(models: Recipe) -> None:
    """Bytes are those of the inputs and of the output; choosing is all that was tried."""
    found, data = run(models, ["task_arithmetic:lam=0.5/1"], [task("red", red)])

    cost = data["lines"][-1]["cost"]
    # Three models of two float32 tensors with two entries each; nothing but values is read.
    assert (cost["read"], cost["written"] > 16) == (3 * 16, True)
    assert cost["memory"] > 0
    line = found.lines[-1]
    assert line.cost.merging > 0
    assert line.cost.choosing > 0
    kept = {each.task: each for each in line.outcomes}
    assert line.cost.merging == kept["red"].merging


def test_what_cannot_be_measured(models: Recipe) -> None:
    """A line without numbers and with the reason; the others are measured. Or the end."""

    def odd(w: Any) -> dict[str, float]:
        if float(w[0]) == 2.0:
            raise ValueError("lost the data")
        return red(w)

    lines = ["linear", "emr", "task_arithmetic"]
    found, data = run(models, lines, [task("red", odd), task("blue", blue)], on_error="skip")

    plain = {each["model"]: each for each in data["lines"]}
    assert "gives 2 models" in plain["emr"]["problem"]
    assert plain["linear"]["average"] is None
    assert plain["linear"]["values"] == {"blue": pytest.approx(-4.0)}
    assert ["lost the data" in text for text in line_of(found, "linear").problems] == [True]
    assert plain["task_arithmetic"]["normalised"] is not None
    rows = {row[0]: row for row in tables.overview(data).rows}
    assert rows["emr"][2:] == ("–",) * 4 + ("",) * 3
    with pytest.raises(MergebenchError, match="lost the data"):
        run(models, lines, [task("red", odd)])
    with pytest.raises(MergebenchError, match="gives 2 models"):
        run(models, ["emr"], [task("red", red)])


def test_markdown_is_one_table() -> None:
    """Bars and line ends within names do not break it."""
    made = tables.Table(("model", "a|b"), 1, (("x\ny", "1"), ("p|q", "2"))).markdown()
    assert made.splitlines() == [
        "| model | a\\|b |", "| --- | ---: |", "| x\\x0ay | 1 |", "| p\\|q | 2 |",
    ]  # fmt: skip
