"""``spectral --html`` and ``--png``: what is refused, written and drawn, without a browser."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mergebench.core.errors import MergebenchError
from mergebench.core.text import written
from mergebench.pages.colours import DIVERGING, SEQUENTIAL, colours, level, luminance
from mergebench.spectral import html
from mergebench.spectral.html import page as pages
from mergebench.spectral.html.details import ROWS
from mergebench.spectral.html.page import page
from mergebench.spectral.html.quantities import quantities
from mergebench.spectral.report import Report, gather
from tests.helpers.files import F32, listing, write
from tests.helpers.running import assert_done, assert_refused, call
from tests.helpers.scene import Scene

#: A page of so many rows as it holds at most stays below this.
LARGEST = 8_000_000


class Reader(HTMLParser):
    """Texts of cells, by table; elements with what they load; scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loads: list[tuple[str, str]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.policy, self.stack = "", [""]
        self.styled = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        given = dict(attributes)
        self.loads += [(tag, given[key]) for key in ("src", "href", "xlink:href") if key in given]
        self.styled += "style" in given
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in self.inside:
            self.inside[tag].append("")
        if tag in ("td", "th", "script", "style"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == self.stack[-1]:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.stack[-1]:
            self.inside[self.stack[-1]][-1] += data


def run(scene: Scene, *args: Any) -> Any:
    """The JSON of a run."""
    return assert_done(call("spectral", *args, "--json", cwd=scene.path)).json


def digest(text: str) -> str:
    """As policies have it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@pytest.fixture(scope="module")
def large() -> Any:
    """A report of two models with more matrices than a page lists: 100 layers of 14 modules."""
    random = np.random.default_rng(0)
    names = [f"m.{layer}.part{module}.weight" for layer in range(100) for module in range(14)]
    curve = [{"index": n, "sigma": 3.0 / (n + 1), "energy": 0.5} for n in range(64)]
    ranks = {"effective_rank": 9.0, "stable_rank": 2.0, "rank": 64, "norm": 1.0, "largest": 3.0,
             "rank90": 5, "rank95": 6, "rank99": 7}  # fmt: skip
    direction = {"index": 0, "sigma": 1.2345, "cosine": 0.4321, "status": "exact",
                 "bound": 0.4321, "gap": 0.1234, "intruder": {"0.5": True}}  # fmt: skip
    parts = ("base", "delta", "tuned")
    values: dict[str, Any] = {
        "intruders": {
            "looked": 10, "exact": 10, "certified": 0, "loose": 0, "squared": 1.0,
            "least_cosine": 0.4, "baseline": 0.3, "directions": [direction] * 10,
            "thresholds": [{"epsilon": 0.5, "count": 10, "energy": 0.5}],
        },
        "spectra": {"full": 64, **dict.fromkeys(parts, ranks),
                    **{f"{part}_curve": curve for part in parts}},
    }  # fmt: skip
    tensors: list[Any] = []
    rows: dict[str, list[Any]] = {name: [] for name in values}
    for name in names:
        _, block, module, _ = name.split(".")
        place = {"tensor": name, "layer": f"m.{block}", "module": module, "shape": [64, 64]}
        norms = random.uniform(1, 2, 2)
        models = [{"model": n, "state": "changed", "norm": norms[n]} for n in (0, 1)]
        tensors.append(place | {"stack": "m", "block": int(block), "decomposed": True,
                                "base_norm": 10.0, "models": models})  # fmt: skip
        for model in (0, 1):
            for kind, numbers in values.items():
                rows[kind].append(place | {"model": model, "other": None, "values": numbers})
    found = {kind: gather(kind, {"k": 10}, rows[kind], "ab") for kind in rows}
    models = [{"label": label, "kind": "checkpoint", "merged": False} for label in "ab"]
    return Report({"label": "base"}, models, {}, tensors, found).to_json()


def test_numbers_of_a_page(scene: Scene) -> None:
    """Maps have the numbers of the report in their cells, and so has the matrix of models."""
    data = run(scene, "ft1", "ft2", "-b", "base", "--html", "report.html")
    text = (scene.path / "report.html").read_text()
    tables = Reader(text).tables

    by_name = {row["tensor"]: row for row in data["diagnostics"]["spectra"]["rows"]
               if row["model"] == 0}  # fmt: skip
    heads, *rows = tables[[each.key for each in quantities(data)].index("effective-rank") * 2]
    modules = [each.split(".")[-1] for each in heads[1:]]
    assert sorted(modules) == ["q_proj", "up_proj"]
    for layer, row in enumerate(rows):
        for short, shown in zip(modules, row[1:], strict=True):
            (name,) = (each for each in by_name if f".{layer}." in each and short in each)
            assert float(shown) == pytest.approx(by_name[name]["delta"]["effective_rank"], rel=5e-3)
    relative = tables[2][1][1]
    first = next(each for each in data["tensors"] if each["module"].endswith(modules[0]))
    assert float(relative) == pytest.approx(
        first["models"][0]["norm"] / first["base_norm"], rel=5e-2
    )
    cosine = data["diagnostics"]["cosine"]["totals"]["all"][0]["cosine"]
    matrix = next(each for each in tables if each[0] == ["model", "ft1", "ft2"])
    assert matrix[1][:2] == ["ft1", "1"]
    assert float(matrix[1][2]) == float(matrix[2][1]) == pytest.approx(cosine, rel=0.05, abs=5e-4)
    every = next(each for each in tables if each[0][0] == "tensor")
    assert {row[0] for row in every[1:]} == {each["tensor"] for each in data["tensors"]}
    norms = {
        (each["tensor"], data["models"][own["model"]]["label"]): own["norm"] / each["base_norm"]
        for each in data["tensors"]
        for own in each["models"]
        if own["state"] == "changed"
    }
    column = every[0].index("‖ΔW‖ / ‖W0‖")
    assert {(row[0], row[1]): row[column] for row in every[1:]} == {
        key: written(value) for key, value in norms.items()
    }


def test_a_page_loads_nothing(scene: Scene) -> None:
    """No address but places within; the policy allows its one style and one script by digest."""
    run(scene, "ft1", "ft2", "-b", "base", "--html", "report.html")

    found = Reader((scene.path / "report.html").read_text())

    assert {(tag, value) for tag, value in found.loads if not value.startswith("#")} == {
        ("link", "data:,")
    }
    assert found.styled == 0
    (style,) = found.inside["style"]
    data, script = found.inside["script"]
    json.loads(data)
    assert found.policy == (
        f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    assert not re.search(r"https?:|@import|url\((?!#)", style + script.replace(
        "http://www.w3.org/2000/svg", ""))  # fmt: skip


def test_the_same_report_gives_the_same_bytes(scene: Scene) -> None:
    """Whatever settings of matplotlib somebody has."""
    options = ("ft1", "-b", "base", "--only", "spectra")
    run(scene, *options, "--html", "1.html", "--png", "1")
    (scene.path / "matplotlibrc").write_text("xtick.major.size: 20\nfont.family: monospace\n")
    import matplotlib as mpl

    with mpl.rc_context(fname=scene.path / "matplotlibrc"):
        run(scene, *options, "--html", "2.html", "--png", "2")

    assert (scene.path / "1.html").read_bytes() == (scene.path / "2.html").read_bytes()
    assert listing(scene.path / "1") == listing(scene.path / "2")
    for file in (scene.path / "1").iterdir():
        assert file.read_bytes() == (scene.path / "2" / file.name).read_bytes()


def test_pictures(scene: Scene) -> None:
    """One for each number, for singular values and for pairs, at 300 dots per inch, in viridis."""
    options = ("ft1", "ft2", "-b", "base", "--only", "intruders,spectra,heavy_tail,cosine")
    ran = assert_done(call("spectral", *options, "--png", "png", cwd=scene.path))

    names = ["alpha", "effective-rank", "intruder-energy-0.5", "intruders-0.5", "models-cosine",
             "norm", "singular-values"]  # fmt: skip
    assert listing(scene.path / "png") == [f"{name}.png" for name in names]
    assert all(f"note: wrote png/{name}.png" in ran.err for name in names)
    for name in names:
        with Image.open(scene.path / "png" / f"{name}.png") as image:
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
            assert min(image.size) > 300
            dots = np.asarray(image.convert("RGB"), np.uint32) @ np.array([1 << 16, 1 << 8, 1])
            seen = {f"#{each:06x}" for each in np.unique(dots).tolist()}
        scale = {"singular-values": None, "models-cosine": DIVERGING}.get(name, SEQUENTIAL)
        if scale is not None:
            assert colours(scale)[-1][0] in seen


def test_nothing_to_draw(scene: Scene) -> None:
    """Without a matrix or a pair there are words and tables, no pictures, and a note of it."""
    options = ("ft1", "-b", "base", "--only", "contribution", "--include", "class=norm")
    ran = assert_done(
        call("spectral", *options, "--png", "png", "--html", "r.html", cwd=scene.path)
    )

    assert "note: there is nothing to draw" in ran.err
    assert not (scene.path / "png").exists()
    assert "In words" in (scene.path / "r.html").read_text()


@pytest.mark.parametrize(
    "args",
    [
        ("lora1",),
        ("lora1", "lora2"),
        ("ft1", "ft2", "-b", "base", "--merged", "ft1.safetensors"),
        ("ft1", "ft2", "-b", "base", "--only", "cosine"),
        ("ft1", "ft2", "-b", "base", "--only", "interference"),
        ("ft1", "-b", "base", "--include", "class=embedding", "--include", "class=head"),
        ("ft1", "-b", "base", "--only", "spectra", "-p", "spectra.points=0"),
        ("odd", "-b", "odd-base"),
    ],
)
def test_every_kind_of_report(scene: Scene, args: tuple[str, ...]) -> None:
    """Adapters, merges, pairs alone, zeros, single values, NaN and none of a number are drawn."""
    shapes = {"zero": (4, 4), "one": (1, 1), "wide": (1, 40), "broken": (3, 3), "same": (2, 2)}
    for file, value in (("odd-base", 0.5), ("odd", 1.0)):
        arrays = {f"layers.0.{k}.weight": np.full(s, value, F32) for k, s in shapes.items()}
        arrays["layers.0.same.weight"][:] = 0
        if file == "odd":
            arrays["layers.0.broken.weight"][0, 0] = np.nan
        else:
            arrays["layers.0.zero.weight"][:] = 0
        (scene.path / file).mkdir()
        write(scene.path / file / "model.safetensors", arrays)

    data = run(scene, *args, "--html", "r.html", "--png", "png")

    text = (scene.path / "r.html").read_text()
    for sentence in data["summary"]:
        assert sentence.partition(": ")[2].replace("'", "&#39;").replace("<", "&lt;") in text
    assert (scene.path / "png" / "norm.png").exists()


def test_changes_are_listed(scene: Scene) -> None:
    """What --against finds stands in the page."""
    only = ("-b", "base", "--only", "spectra")
    (scene.path / "before.json").write_text(json.dumps(run(scene, "ft1", *only)))

    data = run(scene, "ft2", *only, "--against", "before.json", "--html", "r.html")

    found = Reader((scene.path / "r.html").read_text())
    (table,) = (each for each in found.tables if each[0][0] == "diagnostic")
    rows = [c for c in data["against"]["changes"] if c["scope"] in ("all", "rows")]
    assert len(table) - 1 == len(rows) > 10
    one = rows[0]
    assert table[1][3:6] == [one["quantity"], written(one["before"]), written(one["after"])]


@pytest.mark.parametrize("option", ["--html", "--png"])
def test_a_missing_extra_is_told_first(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """Before anything is opened, with the command that helps."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    ran = call("spectral", "no-such-model", option, "r.html", cwd=scene.path)

    assert_refused(ran, f"{option} needs matplotlib", "pip install 'mergebench[report]'")


def test_places_that_do_not_do(scene: Scene) -> None:
    """Nothing is replaced unasked, and a page never takes the place of a model; told first."""
    (scene.path / "there.html").write_text("mine")
    (scene.path / "folder.html").mkdir()
    (scene.path / "pictures").mkdir()
    (scene.path / "pictures" / "a.png").write_text("mine")
    for options, words in (
        (("--html", "there.html"), ("there.html: exists", "--force")),
        (("--html", "a.safetensors", "--force"), ("a.safetensors", "ends in .html")),
        (("--html", "folder.html", "--force"), ("is a folder",)),
        (("--html", "no/r.html"), ("no is no folder",)),
        (("--png", "pictures"), ("a.png exists", "--force")),
        (("--png", "a.safetensors"), ("is a file",)),
        (("--png", "no/pictures"), ("no is no folder",)),
    ):
        assert_refused(call("spectral", "no-such-model", *options, cwd=scene.path), *words)
    assert (scene.path / "there.html").read_text() == "mine"

    options = ("--html", "there.html", "--png", "pictures", "--force")
    assert_done(
        call("spectral", "ft1", "-b", "base", "--only", "spectra", *options, cwd=scene.path)
    )

    assert (scene.path / "there.html").read_text().startswith("<!DOCTYPE html>")
    assert (scene.path / "pictures" / "a.png").read_text() == "mine"
    assert not [name for name in listing(scene.path) if name.endswith(".tmp")]


def test_a_page_appears_whole_or_not_at_all(
    tmp_path: Path, large: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the disk is full the old page stays, and nothing else is left."""
    place = tmp_path / "r.html"
    place.write_text("old")
    monkeypatch.setattr(pages, "page", lambda _: "x" * 10_000_000)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.umask", full)

    with pytest.raises(MergebenchError, match="No space left"):
        html.write_page(large, place)

    assert place.read_text() == "old"
    assert listing(tmp_path) == ["r.html"]


def test_a_large_report_stays_small(large: Any) -> None:
    """Of more matrices than fit those that moved most are listed, and the page says so."""
    text = page(large)

    assert len(text.encode()) < LARGEST
    found = Reader(text)
    (every,) = (each for each in found.tables if each[0][0] == "tensor")
    assert len(every) - 1 == ROWS
    assert f"{1400 - ROWS // 2} tensors are not listed" in text
    moved = {each["tensor"]: max(m["norm"] for m in each["models"]) for each in large["tensors"]}
    listed = {row[0] for row in every[1:]}
    assert min(moved[name] for name in listed) >= max(
        value for name, value in moved.items() if name not in listed
    )


def test_endless_names_stay_short(large: Any) -> None:
    """Names are anybody's: a page does not grow with them."""
    data = copy.deepcopy(large)
    data["tensors"] = data["tensors"][:5]
    for kind in data["diagnostics"].values():
        kind["rows"] = kind["rows"][:10]
    for record in (*data["tensors"], *(r for k in data["diagnostics"].values() for r in k["rows"])):
        record["tensor"] += "x" * 1_000_000
        record["module"] += "y" * 1_000_000

    assert len(page(data)) < 500_000


@pytest.mark.parametrize("name", [SEQUENTIAL, DIVERGING])
def test_colours(name: str) -> None:
    """Text on every level can be read; lightness only rises, or falls on both sides of 0."""
    found = colours(name)
    lights = []
    for paper, ink in found:
        light = luminance([int(paper[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        dark = 1.0 if ink == "#fff" else 0.0
        low, high = sorted((light, dark))
        assert (high + 0.05) / (low + 0.05) >= 4.5
        lights.append(light)
    middle = len(lights) // 2
    if name == DIVERGING:
        assert np.all(np.diff(lights[: middle + 1]) > 0)
        assert np.all(np.diff(lights[middle:]) < 0)
        assert found[middle][0] == "#f5f5f5"
    else:
        assert np.all(np.diff(lights) > 0)


def test_the_diverging_scale_without_red_or_green_cones() -> None:
    """Its ends stay apart, and pale stays between, as deuteranopes see it (Machado et al. 2009)."""
    seen = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]])  # fmt: skip
    rgb = [[int(paper[i : i + 2], 16) / 255 for i in (1, 3, 5)] for paper, _ in colours(DIVERGING)]
    linear = np.array(rgb) ** 2.2
    blue = linear @ seen[2] - linear @ seen[1]

    middle = len(blue) // 2
    assert blue[middle] == pytest.approx(0, abs=1e-3)
    assert blue[:middle].min() > 0
    assert blue[middle + 1 :].max() < 0
    assert blue[0] > 0.1
    assert blue[-1] < -0.1


def test_levels() -> None:
    """Ends, middle, and what is constant or beyond."""
    last = len(colours(SEQUENTIAL)) - 1
    assert [level(value, -1.0, 1.0) for value in (-1.0, 0.0, 1.0, 2.0, -3.0)] == [
        0, last // 2, last, last, 0,
    ]  # fmt: skip
    assert level(3.0, 3.0, 3.0) == 0
