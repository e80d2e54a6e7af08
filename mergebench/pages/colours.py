"""Colours for values: perceptually uniform scales that colour-blind people can read."""

from __future__ import annotations

from functools import cache
from typing import Any

LEVELS = 33
#: From the smallest to the largest value; and for cosines, pale at 0.
SEQUENTIAL, DIVERGING = "viridis", "blue-orange"
# In OKLab (lightness, green–red, blue–yellow). Blue and orange stay apart for all kinds of colour
# blindness, and straight lines from pale to them are even steps.
_PALE = (0.97, 0.0, 0.0)
_ENDS = ((0.45, -0.035, -0.125), (0.5, 0.075, 0.1))
#: Above this relative luminance black has the larger contrast, below it white.
_BLACK = 0.179


@cache
def colours(name: str) -> tuple[tuple[str, str], ...]:
    """Background and ink of each level of a scale.

    The better of black and white has a contrast of at least 4.58 on any background, above the 4.5
    that WCAG 2.2 asks of small text.
    """
    from matplotlib.colors import to_hex

    steps = colour_map(name)(range(LEVELS))
    return tuple(
        (to_hex(rgb), "#000" if luminance(rgb) > _BLACK else "#fff") for rgb in steps[:, :3]
    )


def colour_map(name: str) -> Any:
    """A colour map of matplotlib, with as many levels as pages have."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    if name != DIVERGING:
        return colormaps[name].resampled(LEVELS)
    steps = []
    for number in range(LEVELS):
        at = 2 * number / (LEVELS - 1) - 1
        end = _ENDS[at > 0]
        lab = [pale + abs(at) * (far - pale) for pale, far in zip(_PALE, end, strict=True)]
        steps.append(_srgb(*lab))
    return ListedColormap(steps, name)


def luminance(rgb: Any) -> float:
    """Relative luminance of sRGB values in [0, 1] (WCAG 2.2)."""
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in rgb]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])


def level(value: float, low: float, high: float) -> int:
    """The level of a value between two others; the lowest where they are equal."""
    if high <= low:
        return 0
    return min(max(int((value - low) / (high - low) * LEVELS), 0), LEVELS - 1)


def _srgb(lightness: float, a: float, b: float) -> tuple[float, ...]:
    """OKLab (Ottosson 2020) as sRGB in [0, 1]."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    held = (min(max(each, 0.0), 1.0) for each in linear)
    return tuple(v * 12.92 if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in held)
