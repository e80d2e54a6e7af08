"""What matplotlib draws as SVG that fits into a page: its colours, no styles, its own ids."""

from __future__ import annotations

import re
from io import StringIO
from xml.etree import ElementTree as ET

from matplotlib.figure import Figure

from mergebench.pages.drawing import GRID, INK, SERIES

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_CLASSES = {INK: "ink", GRID: "grid", **{ink: f"s{n}" for n, ink in enumerate(SERIES)}}
_SIZE = re.compile(r"(?:^|\s)([\d.]+)px")
_USED = re.compile(r"url\(#([^)]+)\)")
_DROPPED = {f"{{{_SVG}}}metadata", f"{{{_SVG}}}style", f"{{{_SVG}}}title"}


def inline_svg(figure: Figure, key: str, title: str, words: str) -> str:
    """The SVG element of a figure.

    Parameters
    ----------
    figure : Figure
        Drawn in the inks and the style of :mod:`mergebench.pages.drawing`.
    key : str
        Goes in front of every id, so that several can stand on one page.
    title, words : str
        Its name, and what it shows to those who do not see it.

    Returns
    -------
    str
        Without style attributes, so that the page's policy can forbid them.
    """
    file = StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(file.getvalue())  # noqa: S314  made a line above
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in _DROPPED:
                parent.remove(child)
    used = {f"#{name}" for each in root.iter() for value in each.attrib.values()
            for name in _USED.findall(value)}  # fmt: skip
    used |= {each.attrib.get(f"{{{_LINK}}}href", "") for each in root.iter()}
    for each in root.iter():
        _restyle(each)
        _rename(each, key, used)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-words"}
    for place, (name, text) in enumerate((("title", title), ("desc", words))):
        element = ET.Element(f"{{{_SVG}}}{name}", {"id": f"{key}-{('title', 'words')[place]}"})
        element.text = text
        root.insert(place, element)
    text = ET.tostring(root, encoding="unicode")
    return re.sub(r"\bns\d+:|\sxmlns:ns\d+=\"[^\"]*\"", "", text)


def _restyle(element: ET.Element) -> None:
    """Style declarations as attributes; our inks as classes of the page."""
    style = element.attrib.pop("style", "")
    if element.tag == f"{{{_SVG}}}text":
        style = f"fill: {INK}; {style}"
    classes = []
    for part in style.split(";"):
        name, _, value = (each.strip() for each in part.partition(":"))
        if name in ("fill", "stroke") and value in _CLASSES:
            classes.append(f"{name[0]}-{_CLASSES[value]}")
        elif name == "font":
            if size := _SIZE.search(value):
                element.set("font-size", size[1])
        elif name:
            element.set(name, value)
    if classes:
        element.set("class", " ".join(dict.fromkeys(classes)))


def _rename(element: ET.Element, key: str, used: set[str]) -> None:
    name = element.attrib.get("id")
    if name is not None:
        if f"#{name}" in used:
            element.set("id", f"{key}-{name}")
        else:
            del element.attrib["id"]
    link = element.attrib.pop(f"{{{_LINK}}}href", None)
    if link is not None:
        element.set("href", f"#{key}-{link[1:]}")
    for attribute, value in element.attrib.items():
        if "url(#" in value:
            element.set(attribute, _USED.sub(rf"url(#{key}-\1)", value))
