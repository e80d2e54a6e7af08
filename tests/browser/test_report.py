"""``spectral --html`` in Chromium: quiet, fitting, accessible, sorted, opened, printed."""

from __future__ import annotations

from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from mergebench.core.text import UNSAFE, cell, written
from mergebench.spectral.diagnostic import DIAGNOSTICS
from tests.browser.conftest import HOSTILE, Page
from tests.browser.looking import View

Pages = dict[str, Page]
SIZES = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]
OPENED = "return document.getElementById('detail').open"
PLACE = "const e = document.activeElement; return [e.parentNode.sectionRowIndex, e.cellIndex]"


def rows(page: Page, name: str, model: int = 0) -> dict[str, Any]:
    """Rows of a diagnostic by tensor."""
    found = page.data["diagnostics"][name]["rows"]
    return {each["tensor"]: each for each in found if each["model"] == model}


def column(view: View, heading: str) -> list[str]:
    """A column of the table of every matrix, top to bottom."""
    heads = view.texts("#every thead th")
    return view.texts(f"#every tbody tr > :nth-child({heads.index(heading) + 1})")


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_quiet_fitting_and_accessible(view: View, pages: Pages, width: int, scheme: str) -> None:
    """All of it open, and with a matrix open: no errors, no requests, no overflow, no barriers."""
    view.open(pages["models"].path, width, scheme)
    view.assert_quiet()
    view.assert_fits()
    view.unfold()
    view.assert_fits()
    view.assert_accessible()

    view.find("#every tbody button").click()

    assert view.run(OPENED)
    view.assert_fits()
    view.assert_accessible()
    assert view.logs("browser") == []


def test_checks_can_fail(view: View, pages: Pages) -> None:
    """A page with a wide box, pale text, a blocked script and image does not pass."""
    view.open(pages["models"].path, 390)
    view.run("""
        const box = document.createElement("p");
        box.textContent = "wide";
        box.style.width = "900px";
        box.style.color = "#ddd";
        const script = document.createElement("script");
        script.textContent = "window.ran = 1";
        const image = document.createElement("img");
        image.src = "https://localhost/x.png";
        document.body.prepend(box, script, image);
    """)

    with pytest.raises(AssertionError, match="wide"):
        view.assert_fits()
    with pytest.raises(AssertionError, match="color-contrast"):
        view.assert_accessible()
    with pytest.raises(AssertionError, match="Content Security Policy"):
        view.assert_quiet()
    assert view.run("return window.ran") is None


def test_words_come_first(view: View, pages: Pages) -> None:
    """The order of the page, and every sentence of the report in it."""
    page = pages["models"]
    view.open(page.path)

    assert view.texts("main h2") == [
        "In words", "Layer by layer", "Singular values", "Between models", "Tables",
    ]  # fmt: skip
    said = " ".join(view.texts("section:first-of-type li"))
    for sentence in page.data["summary"]:
        assert sentence.partition(": ")[2] in said


def test_tables_sort(view: View, pages: Pages) -> None:
    """A heading sorts, largest first, then smallest; names by their letters; none is lost."""
    page = pages["models"]
    view.open(page.path)
    view.find("#matrices summary").click()
    before = sorted(column(view, "tensor"))
    head = view.find("#every thead th:nth-child(6) button")
    assert head.text.startswith("eff. rank ΔW")

    for direction, falling in (("descending", True), ("ascending", False)):
        head.click()
        texts = column(view, "eff. rank ΔW")
        numbers = [float(text) for text in texts if text != "–"]
        assert numbers == sorted(numbers, reverse=falling)
        assert "–" in texts
        assert texts == [*(text for text in texts if text != "–"), *["–"] * texts.count("–")]
        sorted_by = view.all("#every th[aria-sort]")
        assert [each.get_attribute("aria-sort") for each in sorted_by] == [direction]
        assert sorted_by[0].text.startswith("eff. rank ΔW")
    expected = [
        written(row["delta"]["effective_rank"])
        for model in (0, 1)
        for row in rows(page, "spectra", model).values()
    ]
    assert sorted(expected) == sorted(text for text in texts if text != "–")
    view.find("#every thead th:first-child button").click()
    assert column(view, "tensor") == before


def test_names_are_found(view: View, pages: Pages) -> None:
    """The field leaves the rows whose names hold what it says."""
    view.open(pages["models"].path)
    view.find("#matrices summary").click()
    every = column(view, "tensor")

    view.find("#filter").send_keys("LAYERS.1.self")

    shown = [each.text for each in view.all("#every tbody tr:not([hidden]) th")]
    assert shown == [name for name in every if "layers.1.self" in name]
    assert 0 < len(shown) < len(every)
    assert view.find("#found").text == f"{len(shown)} rows"


def test_a_name_opens_everything_about_a_matrix(view: View, pages: Pages) -> None:
    """Numbers, curves and directions of one matrix; Escape goes back to where one was."""
    page = pages["models"]
    name = "model.layers.1.mlp.up_proj.weight"
    view.open(page.path)
    view.find("#matrices summary").click()
    button = next(each for each in view.all("#every .open") if each.text == name)

    button.click()

    assert view.find("#detail-title").text == name
    numbers = {
        row[0]: row[1:]
        for row in view.run(
            "return [...document.querySelectorAll('#detail-body table')].flatMap(t =>"
            "[...t.rows].map(r => [...r.cells].map(c => c.textContent)))"
        )
    }
    for kind in ("intruders", "spectra", "heavy_tail", "rotation"):
        spec = DIAGNOSTICS[kind]
        one, two = (spec.headline(rows(page, kind, model)[name]) for model in (0, 1))
        for head in one:
            assert numbers[f"{kind}: {head}"] == [written(one[head]), written(two[head])]
    assert "cosine" in numbers["models"]
    directions = rows(page, "intruders", 1)[name]["directions"]
    assert numbers["1"][:2] == [written(directions[0][key]) for key in ("sigma", "cosine")]
    assert len(view.all("#detail .chart polyline")) == 5
    assert "W0 from" in view.find("#detail .chart").get_attribute("aria-label")
    view.press(Keys.ESCAPE)
    assert not view.run(OPENED)
    assert view.driver.switch_to.active_element == button


def test_maps_are_reached_by_keys(view: View, pages: Pages) -> None:
    """Arrow keys move within a map and stop at its ends, Enter opens the matrix of a cell."""
    view.open(pages["models"].path)
    view.run("document.querySelector('.map[data-model] td').focus()")

    view.press(Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert view.run(PLACE) == [0, 1]
    view.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert view.run(PLACE) == [1, 2]
    assert len(view.all(".map[data-model='0'] td[tabindex='0']")) == len(
        view.all(".map[data-model='0']")
    )
    view.press(Keys.ENTER)

    heads = [each.get_attribute("title") for each in view.all(".map thead th[title]")]
    assert view.find("#detail-title").text == f"model.layers.1.{heads[1]}.weight"


def test_a_click_on_a_map_opens_its_matrix(view: View, pages: Pages) -> None:
    """The cell of a layer and a module, with the value of that matrix in it."""
    page = pages["models"]
    view.open(page.path)
    cell_of = view.find(".map[data-model='1'] tbody tr:first-child td")

    cell_of.click()

    name = view.find("#detail-title").text
    heads = [each.get_attribute("title") for each in view.all(".map thead th[title]")]
    assert name == f"model.layers.0.{heads[0]}.weight"
    assert view.run("return arguments[0].textContent", cell_of) == str(
        rows(page, "intruders", 1)[name]["thresholds"][0]["count"]
    )


@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_names_are_text(view: View, pages: Pages, width: int) -> None:
    """What would run, close an element or turn text around is shown as it is spelt."""
    view.open(pages["hostile"].path, width)
    view.unfold()
    names = [cell(name) for name in HOSTILE]

    assert sorted(column(view, "tensor")) == sorted(names)
    assert not UNSAFE.search(pages["hostile"].path.read_text().replace("\n", ""))
    for button in view.all("#every .open"):
        button.click()
        assert view.find("#detail-title").text == button.get_attribute("textContent")
        view.press(Keys.ESCAPE)

    assert view.run("return window.ran") is None
    assert view.all("img, b, script:not([id]):nth-of-type(n+3)") == []
    view.assert_quiet()
    view.assert_fits()
    view.assert_accessible()


def test_without_scripts_everything_is_there(view: View, pages: Pages) -> None:
    """Words, maps and the table of every matrix are plain HTML; what would do nothing is hidden."""
    page = pages["models"]
    view.open(page.path)
    view.scripts(False)
    view.driver.refresh()

    view.find("#matrices summary").click()

    assert view.all("#every button") == []
    assert not view.find("#filter").is_displayed()
    shown = view.find("#every tbody").text
    for name, row in rows(page, "spectra").items():
        assert name in shown
        assert written(row["delta"]["effective_rank"]) in shown
    view.scripts(True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper(view: View, pages: Pages, scheme: str) -> None:
    """On paper it is light, fits A4, and all maps are there, but not the long tables."""
    view.open(pages["models"].path, 700, scheme, media="print")

    view.assert_fits()
    assert view.run("return getComputedStyle(document.documentElement).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    shown = view.run(
        "return [...document.querySelectorAll('.map[data-model]')].map(e => e.checkVisibility())"
    )
    assert len(shown) > 10
    assert all(shown)
    assert view.run("return document.getElementById('every').checkVisibility()") is False
    assert view.protocol("Page.printToPDF")["data"].startswith("JVBERi0")
