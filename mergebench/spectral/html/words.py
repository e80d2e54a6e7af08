"""What a report says in sentences, and how its rows and columns are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from mergebench.core.text import written
from mergebench.spectral.diagnostic import DIAGNOSTICS
from mergebench.spectral.html.quantities import Grid, Quantity
from mergebench.spectral.report import Record


@dataclass(frozen=True)
class Said:
    """Sentences about one model, one pair, or all together.

    Attributes
    ----------
    subject : str
    sentences : list of (diagnostic, sentence without its subject)
    """

    subject: str
    sentences: list[tuple[str, str]]


def lead(data: Record, labels: Sequence[str]) -> str:
    """The first sentence: what was looked at."""
    tensors = data["tensors"]
    matrices = sum(each["decomposed"] for each in tensors)
    changed = [
        sum(m["state"] == "changed" and m["model"] == n for each in tensors for m in each["models"])
        for n in range(len(labels))
    ]
    models = "1 model" if len(labels) == 1 else f"{len(labels)} models"
    base = f" against {data['base']['label']}" if data["base"] else ", without a base"
    others = len(tensors) - matrices
    what = f"{matrices:,} matrices" + (f" and {others:,} other tensors" if others else "")
    if len(set(changed)) == 1:
        moved = f"{changed[0]:,}"
    else:
        moved = "; ".join(f"{n:,} in {name}" for n, name in zip(changed, labels, strict=True))
    return f"{models}{base}: {what} were looked at, of which fine-tuning changed {moved}."


def said(data: Record, labels: Sequence[str]) -> dict[str, list[Said]]:
    """Sentences about single models (``alone``), all of them (``together``) and ``paired``."""
    groups: dict[tuple[int | None, int | None], list[tuple[str, str]]] = {}
    for name, found in data["diagnostics"].items():
        for total in found["totals"]["all"] if name in DIAGNOSTICS else ():
            if text := DIAGNOSTICS[name].say(total):
                groups.setdefault((total["model"], total["other"]), []).append((name, text))
    sorted_out: dict[str, list[Said]] = {"alone": [], "together": [], "paired": []}
    for one, other in sorted(groups, key=lambda pair: (pair[0] or 0, pair[1] or 0)):
        sentences = groups[one, other]
        if one is None:
            sorted_out["together"].append(Said("all models together", sentences))
        elif other is None:
            sorted_out["alone"].append(Said(labels[one], sentences))
        else:
            sorted_out["paired"].append(Said(f"{labels[one]} and {labels[other]}", sentences))
    return sorted_out


def extremes(quantity: Quantity, grid: Grid, labels: Sequence[str]) -> Iterator[tuple[str, str]]:
    """For each model where a quantity is smallest and largest, and its median."""
    for model in quantity.models:
        cells = [
            (value, layer, module)
            for layer in grid.layers
            for module in grid.modules
            if (value := quantity.cells.get((layer, module, model))) is not None
        ]
        label = "all models together" if model is None else labels[model]
        if not cells:
            continue
        values = [each[0] for each in cells]
        low, high = min(cells, key=lambda c: c[0]), max(cells, key=lambda c: c[0])
        if low[0] == high[0]:
            yield label, f"{written(low[0])} everywhere"
            continue
        count = values.count(high[0])
        more = f" and {count - 1} more" if count > 1 else ""
        yield (
            label,
            (
                f"{written(low[0])} to {written(high[0])}, median {written(median(values))}; "
                f"most in {high[1]} {high[2]}{more}"
            ),
        )


def short_modules(modules: Sequence[str]) -> list[str]:
    """The last parts of dotted names, as many as tell them apart."""
    for count in range(1, 8):
        found = [".".join(each.split(".")[-count:]) for each in modules]
        if len(set(found)) == len(modules):
            return found
    return list(modules)


def short_layers(layers: Sequence[str]) -> tuple[list[str], str]:
    """Numbers alone for blocks if there is one stack of them, and its name; else whole names."""
    stacks = {stack for each in layers if (stack := _stack(each))}
    if len(stacks) != 1:
        return list(layers), ""
    (stack,) = stacks
    return [each.rpartition(".")[2] if _stack(each) else each for each in layers], stack


def _stack(layer: str) -> str:
    stack, _, number = layer.rpartition(".")
    return stack if number.isdecimal() else ""
