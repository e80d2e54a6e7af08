"""Pages of ``compare``, ``fit search`` and ``fit grid`` in Chromium: quiet, fitting, accessible."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from mergebench.core.text import UNSAFE, cell
from mergebench.merge.fit.tables import number
from tests.browser.conftest import Page
from tests.browser.looking import View
from tests.fit.support import save_model, task_file
from tests.helpers.running import assert_done, call

Pages = dict[str, Page]
NAMES = ("compare", "search", "grid")
SIZES = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]
#: Names that would run, close an element or be a formula if they were not text.
HOSTILE = "<img src=x onerror=window.ran=1>$\\frac{1}{2}$\u202egnp"
LINES = ("linear", "task_arithmetic:lam=0.25/0.5/1", "ties:lam=0.5/1+lines", "fit soup", "emr")


@pytest.fixture(scope="session")
def fit_pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """A comparison, a search and a grid of two models and tasks, one with a hostile name."""
    folder = tmp_path_factory.mktemp("fits")
    save_model(folder / "base", np.zeros((2, 2)))
    save_model(folder / "one", [[3.0, 0.0], [0.0, 0.0]])
    save_model(folder / HOSTILE, [[0.0, 0.0], [0.5, 2.0]])
    task_file(folder / "near.py", [[1.5, 0.0], [0.25, 1.0]])
    task_file(folder / "far.py", [[3.0, 0.0], [0.0, 0.5]])
    shared = ("one", HOSTILE, "-b", "base", "--task", "near.py", "--task", "far.py", "--json")
    found = {}
    lines = [word for line in LINES for word in ("-m", line)]
    search = ("fit", "search", *shared, "-m", "ties", "-p", "density=0.05:1:log", "-p", "lam=0:2",
              "-n", "25", "-o", "a.yaml")  # fmt: skip
    grid = ("fit", "grid", *shared, "-m", "ties", "-p", "density=0.5,1", "-p", "scope=row,tensor",
            "--then", "lines:beta=0.5/1", "-o", "b.yaml")  # fmt: skip
    for name, words in zip(NAMES, (("compare", *shared, *lines), search, grid), strict=True):
        page = folder / f"{name}.html"
        env = {"XDG_CACHE_HOME": str(folder / "cache")}
        ran = assert_done(call(*words, "--html", str(page), cwd=folder, env=env))
        found[name] = Page(page, ran.json)
    shutil.rmtree(folder / "cache")
    return found


@pytest.mark.parametrize(("width", "scheme"), SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_quiet_fitting_and_accessible(
    view: View, fit_pages: Pages, name: str, width: int, scheme: str
) -> None:
    """All of it open: no errors, no requests, no overflow, no barriers; names are only text."""
    view.open(fit_pages[name].path, width, scheme)
    view.assert_quiet()
    view.assert_fits()
    view.unfold()
    view.assert_fits()
    view.assert_accessible()
    assert view.run("return window.ran") is None
    assert view.all("img") == []
    assert not UNSAFE.search(fit_pages[name].path.read_text().replace("\n", ""))


def column(view: View, table: str, heading: str) -> list[str]:
    """A column of a table, top to bottom."""
    heads = view.texts(f"#{table} thead th")
    return view.texts(f"#{table} tbody tr > :nth-child({heads.index(heading) + 1})")


def test_the_comparison_is_all_there(view: View, fit_pages: Pages) -> None:
    """Every number of the JSON, in words, tables and recipes, and a picture of each kind."""
    data = fit_pages["compare"].data
    view.open(fit_pages["compare"].path)

    assert view.texts("main h2") == ["In words", "Beside each other", "Tables", "How each was made"]
    assert view.texts("figcaption") == ["Scores", "Normalised", "Cost"]
    assert column(view, "scores", "model") == [cell(each["model"]) for each in data]
    assert column(view, "scores", "chosen") == [each["chosen"] for each in data]
    for table, heading, key in (
        ("scores", "average", "average"), ("scores", "normalised", "normalised"),
        ("normalised", "mean", "normalised"),
    ):  # fmt: skip
        assert column(view, table, heading) == [number(each[key]) for each in data]
    assert column(view, "scores", "near") == [number(each["values"].get("near")) for each in data]
    assert column(view, "normalised", "far") == [number(each["shares"].get("far")) for each in data]
    assert column(view, "cost", "trials") == [str(each["trials"]) for each in data]
    merges = [each for each in data if each["role"] == "merge" and each["average"] is not None]
    best = max(merges, key=lambda each: each["average"])
    said = view.texts("section:first-of-type ul:not(.notes ul) li")
    assert said[0].startswith(f"{best['model']} ({best['chosen']}) is the best merge")
    assert "emr gives 2 models" in view.find(".notes").text
    recipes = view.texts("pre")
    assert len(recipes) == len(LINES)
    assert "method: task_arithmetic\nparams:\n  lam: 0.5\n" in recipes[1]
    tried = view.texts("details:nth-of-type(2) table tbody th")
    assert tried == ["lam=0.25", "lam=0.5", "lam=1"]
    shown = [each.get_attribute("role") for each in view.all("figure svg")]
    assert shown == ["img"] * 3
    # A mark for each line with a score, in the ink of its task, and text in the ink of the page.
    drawn = view.run("return document.querySelectorAll('figure:first-of-type svg .f-s0').length")
    assert drawn >= 6


def test_tables_sort(view: View, fit_pages: Pages) -> None:
    """A heading sorts, largest first, then smallest; what has no number comes last."""
    view.open(fit_pages["compare"].path)
    head = view.all("#scores thead th button")[-2]
    assert head.text.startswith("average")

    for falling in (True, False):
        head.click()
        texts = column(view, "scores", "average")
        numbers = [float(text) for text in texts if text != "–"]
        assert numbers == sorted(numbers, reverse=falling)
        assert texts[-1] == "–"
        assert len(numbers) == len(texts) - 1


def test_the_search_is_all_there(view: View, fit_pages: Pages) -> None:
    """Every trial with its values, and a picture of the history and of each parameter."""
    data = fit_pages["search"].data
    view.open(fit_pages["search"].path)

    trials = data["val"]
    assert len(trials) == 25
    assert view.texts("figcaption") == ["By trial", "density", "lam"]
    assert column(view, "trials", "mean") == [number(each["value"]) for each in trials]
    assert column(view, "trials", "lam") == [str(each["values"]["lam"]) for each in trials]
    states = column(view, "trials", "state")
    assert states.count("best") == 1
    assert states.count("pruned") == sum(each["state"] == "pruned" for each in trials) > 0
    assert trials[states.index("best")]["label"] == data["chosen"]
    assert view.texts("main li")[0].startswith(f"The best is trial {states.index('best') + 1}: ")
    (recipe,) = view.texts("pre")
    assert f"lam: {trials[states.index('best')]['values']['lam']}\n" in recipe


def test_the_grid_is_all_there(view: View, fit_pages: Pages) -> None:
    """Every combination in its row; values that are no numbers have a column and no picture."""
    data = fit_pages["grid"].data
    view.open(fit_pages["grid"].path)

    trials = data["val"]
    assert len(trials) == 8
    assert view.find("h1").text == "Grid of ties: 8 trials"
    assert view.texts("figcaption") == ["By trial", "density", "lines.beta"]
    assert column(view, "trials", "mean") == [number(each["value"]) for each in trials]
    said = [dict(pair.split("=") for pair in each["label"].split(",")) for each in trials]
    for name in ("density", "scope", "lines.beta"):
        shown = column(view, "trials", name)
        assert [text.removesuffix(".0") for text in shown] == [each[name] for each in said]
    states = column(view, "trials", "state")
    assert [each["label"] for each, state in zip(trials, states, strict=True)
            if state == "best"] == [data["chosen"]]  # fmt: skip
    (recipe,) = view.texts("pre")
    assert "scope: " in recipe


@pytest.mark.parametrize("name", NAMES)
def test_without_scripts_everything_is_there(view: View, fit_pages: Pages, name: str) -> None:
    """Tables and pictures are plain HTML; what would do nothing is hidden."""
    view.open(fit_pages[name].path)
    view.scripts(False)
    view.driver.refresh()

    assert view.all("th button") == []
    assert not view.find(".only-js").is_displayed()
    assert len(view.all("table.sortable")) >= 1
    assert all(each.is_displayed() for each in view.all("figure svg"))
    view.scripts(True)


@pytest.mark.parametrize("name", NAMES)
def test_on_paper(view: View, fit_pages: Pages, name: str) -> None:
    """Light, and no wider than A4."""
    view.open(fit_pages[name].path, 700, "dark", media="print")

    view.assert_fits()
    assert view.run("return getComputedStyle(document.documentElement).backgroundColor") == (
        "rgb(255, 255, 255)"
    )


def test_the_same_data_gives_the_same_page(fit_pages: Pages, tmp_path: Path) -> None:
    """And the same picture."""
    from mergebench.merge.fit.html import write_comparison

    data = {
        "mergebench": "0", "tasks": ["near"], "metrics": ["near"], "select": "val",
        "report": "test", "lower_is_better": [], "experts": {"near": "one"},
        "lines": [each for each in fit_pages["compare"].data if "near" in each["values"]],
    }  # fmt: skip
    for place in ("1", "2"):
        write_comparison(data, tmp_path / f"{place}.html", tmp_path / f"{place}.png")
    for end in ("html", "png"):
        one, other = (tmp_path / f"{place}.{end}" for place in ("1", "2"))
        assert one.read_bytes() == other.read_bytes()
