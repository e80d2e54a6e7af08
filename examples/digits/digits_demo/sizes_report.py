"""What the comparison of sizes says: rows, sentences, tables and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Points of accuracy that the smallest file may lose.
ALLOWED = 1.0
PLAIN, HALF = "float32, as trained", "bf16, not packed"
_EXPLAINED = (
    "Mean over {seeds} seed(s) and the domains, each expert on test digits of its own domain. "
    "*kB*: thousands of bytes of the file on disk, header and all; *× bf16*: how many times "
    "smaller than the same {what} stored as bf16; *error*: ‖ΔW − ΔŴ‖ / ‖ΔW‖; *lost*: points of "
    "accuracy less than as trained, ± standard deviation over seeds. One test set has 359 digits, "
    "so that differences of a few tenths of a point say nothing."
)


@dataclass(frozen=True)
class Measured:
    """One file of one expert: bytes on disk, test accuracy in %, relative error of the update."""

    curve: str
    label: str
    size: int
    accuracy: float
    error: float
    params: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One way, over seeds and domains; ``accuracies`` and ``losses`` are by seed."""

    curve: str
    label: str
    size: float
    smaller: float
    error: float
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def name(self) -> str:
        """The way in one phrase."""
        return f"{self.curve}, {self.label}" if self.label else self.curve

    @property
    def lost(self) -> float:
        """Points lost on average."""
        return fmean(self.losses)


def summed(seeds: Sequence[Sequence[Sequence[Measured]]]) -> list[Row]:
    """One row per way, from what every expert of every seed has shown."""
    found = []
    count = len(seeds[0][0])
    plain, half = (
        [fmean(getattr(each[at], what) for each in experts) for experts in seeds]
        for at, what in ((0, "accuracy"), (1, "size"))
    )
    for at in range(count):
        first = seeds[0][0][at]
        size = fmean(each[at].size for experts in seeds for each in experts)
        own = [fmean(each[at].accuracy for each in experts) for experts in seeds]
        error = fmean(each[at].error for experts in seeds for each in experts)
        losses = tuple(before - after for before, after in zip(plain, own, strict=True))
        found.append(
            Row(first.curve, first.label, size, fmean(half) / size, error, tuple(own), losses)
        )
    return found


def smallest(rows: Sequence[Row]) -> Row | None:
    """The smallest file that loses less than is allowed on average."""
    return min((row for row in rows if row.lost < ALLOWED), key=lambda row: row.size, default=None)


def title(kind: str) -> str:
    """Name a kind of experts for readers."""
    return "full fine-tunes" if kind == "full" else f"LoRAs r={kind.removeprefix('lora')}"


def findings(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Name for each kind the smallest file that loses less than a point, and of each scheme."""
    found = []
    for kind, several in rows.items():
        best = smallest(several)
        assert best is not None, "as trained loses nothing"
        found.append(
            f"**The smallest file of {title(kind)} that loses less than {ALLOWED:g} point: "
            f"{best.name}**, {best.size / 1000:.1f} kB, {best.smaller:.1f} times smaller than "
            f"bf16: {fmean(best.accuracies):.1f} % against {fmean(several[0].accuracies):.1f} %."
        )
        others = []
        for curve in dict.fromkeys(row.curve for row in several[2:]):
            row = smallest([each for each in several if each.curve == curve])
            what = "none" if row is None else f"{row.label} {row.size / 1000:.1f} kB".strip()
            others.append(f"{curve}: {what}")
        found.append(f"Of each scheme of {title(kind)}: {'; '.join(others)}.")
    return found


def markdown(rows: Mapping[str, Sequence[Row]], seeds: int) -> str:
    """Write the sentences, the tables, and what they mean."""
    lines = [f"- {each}" for each in findings(rows)]
    for kind, several in rows.items():
        best = smallest(several)
        lines += ["", f"## {title(kind)[0].upper()}{title(kind)[1:]}", ""]
        lines += ["| | kB | × bf16 | error | accuracy | lost |", "| --- |" + " ---: |" * 5]
        for row in several:
            name = f"**{row.name}**" if row is best else row.name
            # Without the sign of a zero.
            lost = f"{round(row.lost, 1) + 0.0:.1f}" + (
                f" ± {stdev(row.losses):.1f}" if seeds > 1 else ""
            )
            lines.append(
                f"| {name} | {row.size / 1000:.1f} | {row.smaller:.1f} | {row.error:.3f} | "
                f"{fmean(row.accuracies):.1f} | {lost} |"
            )
        what = "weights" if kind == "full" else "factors"
        lines += ["", _EXPLAINED.format(seeds=seeds, what=what)]
    return "\n".join([*lines, ""])


def draw(rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Save accuracy over size as PNG, one panel per kind of experts."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (kind, several) in zip(figure.subplots(1, len(rows)), rows.items(), strict=True):
        for curve in dict.fromkeys(row.curve for row in several[1:]):
            own = sorted((r for r in several if r.curve == curve), key=lambda row: row.size)
            style = "k^" if curve == HALF else "o-" if len(own) > 1 else "s"
            ax.plot([row.size / 1000 for row in own], [fmean(row.accuracies) for row in own],
                    style, markersize=4, linewidth=1, label=curve)  # fmt: skip
        plain = fmean(several[0].accuracies)
        ax.axhline(plain, color="#999999", linewidth=1, label="as trained")
        ax.axhline(plain - ALLOWED, color="#999999", linewidth=1, linestyle=":",
                   label=f"{ALLOWED:g} point less")  # fmt: skip
        if (best := smallest(several)) is not None:
            ax.plot(best.size / 1000, fmean(best.accuracies), "*", color="#e45756", markersize=14,
                    label=f"smallest: {best.size / 1000:.1f} kB", zorder=3)  # fmt: skip
        ax.set_xscale("log")
        ax.set_title(title(kind))
        ax.set_xlabel("kB on disk")
        ax.set_ylabel("accuracy on the own domain (%)")
        ax.legend(fontsize="small", loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
