"""Whether LoRAs show more intruder dimensions than full fine-tunes here: measured, not assumed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import correlation, fmean, stdev
from time import perf_counter
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from .data import DOMAINS, UPRIGHT
from .evaluate import score_experts
from .experts import Expert, expert_folders, family, ranks_with_full
from .merges import find_command
from .pipeline import train_all, workers
from .settings import Settings

RANKS = (1, 4, 16, 64)
EPSILONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: The threshold that tables and sentences are about, as in the paper.
EPSILON = 0.5
_EXPLAINED = (
    "Mean ± standard deviation over {seeds} seed(s) of what the mean of six domains is. Looked at "
    "are the {looked} leading directions of {matrices} matrices, the linear layers that LoRAs "
    "adapt. *intruders*: how many of these directions have no cosine of {epsilon:g} or more with "
    "any direction of the base; *energy*: Σσ² of those over ‖W‖²; *least cos*: of the direction "
    "that is least like the base, where a random one has {random:.2f}; *eff. rank* and "
    "*‖ΔW‖/‖W0‖*: of the update; *own* and *upright*: test accuracy in % on its own domain, and "
    "on the digits of pretraining."
)


@dataclass(frozen=True)
class Seen:
    """What one kind of experts showed with one seed, a mean over the domains.

    ``counts`` and ``energies`` are by threshold, as text.
    """

    counts: dict[str, float]
    energies: dict[str, float]
    least: float
    rank: float
    relative: float
    own: float
    upright: float
    looked: int
    matrices: int
    random: float


def compare(settings: Settings, work: Path, out: Path) -> None:
    """Train what is missing; leave ``digits_spectra.json``, ``.md`` and ``.png`` in ``out``."""
    console = Console()
    find_command()
    started = perf_counter()
    with workers() as pool:
        trained = train_all(pool, settings, work, lambda n, of: None)
    console.print(f"trained {trained} models, {perf_counter() - started:.0f} s")
    seen = {
        family(rank): [look(settings, work, seed, rank) for seed in settings.seeds]
        for rank in ranks_with_full(settings)
    }
    out.mkdir(parents=True, exist_ok=True)
    plain = {name: [asdict(each) for each in several] for name, several in seen.items()}
    about = {"settings": asdict(settings), "seen": plain, "findings": findings(seen)}
    (out / "digits_spectra.json").write_text(json.dumps(about, indent=1) + "\n")
    (out / "digits_spectra.md").write_text(markdown(seen))
    draw(seen, out / "digits_spectra.png")
    console.print(markdown(seen), highlight=False, soft_wrap=True, markup=False)
    console.print(f"wrote {out}, {perf_counter() - started:.0f} s in all", soft_wrap=True)


def with_ranks(settings: Settings) -> Settings:
    """The settings with all the ranks that are compared."""
    return replace(settings, ranks=RANKS)


def arguments(experts: Sequence[Path], base: Path, targets: Sequence[str]) -> list[str]:
    """Return the command line that looks at experts of one kind, without the program's name."""
    return [
        "spectral", *map(str, experts), "--base", str(base),
        "--only", "intruders,spectra,contribution",
        "--epsilon", ",".join(map(str, EPSILONS)),
        "--include", rf"\.({'|'.join(targets)})\.weight$",
        "--no-cache", "--json", "--quiet",
    ]  # fmt: skip


def look(settings: Settings, work: Path, seed: int, rank: int | None) -> Seen:
    """Ask the command about the experts of one seed and kind."""
    base = Expert(seed).folder(settings, work)
    experts = list(expert_folders(settings, work, seed, rank).values())
    line = [find_command(), *arguments(experts, base, settings.lora_targets)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\nexited {done.returncode}:\n{done.stderr}")
    accuracy = score_experts(settings, work, seed, rank).test
    return read(json.loads(done.stdout)["diagnostics"], accuracy)


def read(found: Mapping[str, Any], accuracy: Mapping[str, float]) -> Seen:
    """Take the totals of several models from what the command printed."""
    intruders, spectra, contribution = (
        found[name]["totals"]["all"] for name in ("intruders", "spectra", "contribution")
    )
    counts, energies = (
        {
            str(EPSILONS[place]): fmean(each["thresholds"][place][key] for each in intruders)
            for place in range(len(EPSILONS))
        }
        for key in ("count", "energy")
    )
    return Seen(
        counts,
        energies,
        fmean(each["least_cosine"] for each in intruders),
        fmean(each["delta"]["effective_rank"] for each in spectra),
        fmean(each["relative"] for each in contribution),
        100 * fmean(accuracy[domain] for domain in DOMAINS),
        100 * accuracy[UPRIGHT],
        intruders[0]["looked"],
        intruders[0]["matrices"],
        intruders[0]["baseline"],
    )


def title(name: str) -> str:
    """Name a kind of experts for readers."""
    return "full fine-tune" if name == "full" else f"LoRA r={name.removeprefix('lora')}"


def findings(seen: Mapping[str, Sequence[Seen]]) -> list[str]:
    """Say for each rank whether it shows more intruders than full fine-tuning, seed by seed."""
    found = []
    full = [each.counts[str(EPSILON)] for each in seen["full"]]
    for name, several in seen.items():
        if name == "full":
            continue
        own = [each.counts[str(EPSILON)] for each in several]
        more = sum(one > other for one, other in zip(own, full, strict=True))
        fewer = sum(one < other for one, other in zip(own, full, strict=True))
        word = (
            "more"
            if fmean(own) > fmean(full)
            else "fewer"
            if fmean(own) < fmean(full)
            else "as many"
        )
        seeds = {"more": more, "fewer": fewer, "as many": len(own) - more - fewer}[word]
        than = "as" if word == "as many" else "than"
        found.append(
            f"{title(name)} shows {word} intruders {than} full fine-tuning at ε = {EPSILON:g}: "
            f"{fmean(own):.1f} against {fmean(full):.1f} of {several[0].looked} directions, in "
            f"{seeds} of {len(own)} seeds."
        )
    adapters = [name for name in seen if name != "full"]
    means = {name: fmean(each.counts[str(EPSILON)] for each in seen[name]) for name in seen}
    every = all(means[name] > means["full"] for name in adapters)
    found.append(
        f"{'Every' if every else 'Not every'} rank of LoRA shows more intruders than full "
        f"fine-tuning here; most has {title(max(adapters, key=lambda name: means[name]))}."
    )
    lengths = {name: fmean(each.relative for each in several) for name, several in seen.items()}
    ratios = [lengths[name] / lengths["full"] for name in adapters]
    found.append(
        f"Updates of LoRAs are {min(ratios):.1f} to {max(ratios):.1f} times as long as those of "
        "full fine-tuning, each kind being trained at a learning rate of its own, so that not all "
        "of this is the form of the update."
    )
    upright = {name: fmean(each.upright for each in several) for name, several in seen.items()}
    found.append(
        f"Over the {len(seen)} kinds, intruders and accuracy on upright digits have a rank "
        f"correlation of {_ranked(list(means.values()), list(upright.values())):.2f}."
    )
    return found


def _ranked(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where one of them is constant."""
    ranks = [[fmean(i for i, v in enumerate(sorted(each)) if v == x) for x in each]
             for each in (one, other)]  # fmt: skip
    if any(len(set(each)) == 1 for each in ranks):
        return 0.0
    return correlation(*ranks)


def markdown(seen: Mapping[str, Sequence[Seen]]) -> str:
    """Write the table, what it means, and the sentences."""
    columns = (
        ("intruders", 1, lambda each: each.counts[str(EPSILON)]),
        ("energy %", 2, lambda each: 100 * each.energies[str(EPSILON)]),
        ("least cos", 2, lambda each: each.least),
        ("eff. rank ΔW", 1, lambda each: each.rank),
        ("‖ΔW‖/‖W0‖", 2, lambda each: each.relative),
        ("own", 1, lambda each: each.own),
        ("upright", 1, lambda each: each.upright),
    )
    lines = [
        "| | " + " | ".join(name for name, *_ in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, several in seen.items():
        cells = [_shown([value(each) for each in several], digits) for _, digits, value in columns]
        lines.append(f"| {title(name)} | " + " | ".join(cells) + " |")
    first = seen["full"][0]
    explained = _EXPLAINED.format(
        seeds=len(seen["full"]),
        looked=first.looked,
        matrices=first.matrices,
        epsilon=EPSILON,
        random=first.random,
    )
    return "\n".join([*lines, "", explained, "", *(f"- {each}" for each in findings(seen)), ""])


def _shown(values: Sequence[float], digits: int) -> str:
    text = f"{fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):.{digits}f}"


def draw(seen: Mapping[str, Sequence[Seen]], path: Path) -> None:
    """Save intruders and their energy over the threshold as PNG."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    looked = seen["full"][0].looked
    for ax, label, value in (
        (left, f"intruders of {looked} leading directions", lambda each: each.counts),
        (right, "share of ‖W‖² that they hold (%)",
         lambda each: {key: 100 * energy for key, energy in each.energies.items()}),
    ):  # fmt: skip
        for name, several in seen.items():
            tables = [value(each) for each in several]
            means = [fmean(each[str(epsilon)] for each in tables) for epsilon in EPSILONS]
            style = "k-" if name == "full" else "--"
            ax.plot(EPSILONS, means, style, marker=".", label=title(name))
        ax.axvline(seen["full"][0].random, color="#999999", linewidth=1, linestyle=":",
                   label="random direction")  # fmt: skip
        ax.set_xlabel("ε")
        ax.set_ylabel(label)
    left.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
