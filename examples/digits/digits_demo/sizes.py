"""Accuracy against size: every way of packing, on adapters and on full fine-tunes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import mergebench
from mergebench.merge.fit.scores import Scores
from mergebench.merge.fit.task import Task
from mergebench.ship.scored import compress_best

from .checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WEIGHTS, load_expert, load_model
from .data import DOMAINS
from .evaluate import accuracies, evaluation_sets
from .experts import Expert, family
from .model import DigitViT
from .pipeline import train_all, workers
from .settings import Settings
from .sizes_report import HALF, PLAIN, Measured, draw, findings, markdown, summed


@dataclass(frozen=True)
class Packing:
    """One way of packing; lists among its parameters are chosen from on validation digits."""

    curve: str
    label: str
    scheme: str
    params: dict[str, Any] = field(default_factory=dict)


def packings(few: bool = False) -> list[Packing]:
    """List what is compared; ``few`` leaves one or two of each kind."""
    some = partial(_some, few)
    found = [
        Packing("ternary, level=mse", f"density {k:g}", "ternary", {"density": k, "level": "mse"})
        for k in some(0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    ]
    found += [
        Packing("ternary, α by validation", f"density {k:g}", "ternary",
                {"density": k, "alpha": list(some(1, 2, 3, 4))})
        for k in some(0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    ]  # fmt: skip
    found += [Packing("1 bit", "", "one-bit"), Packing("2 bits", "", "two-bit")]
    found += [
        Packing(f"sparse, {values}", f"density {k:g}", "sparse", {"density": k, "values": values})
        for values in ("bf16", "int8")
        for k in some(0.02, 0.05, 0.1, 0.2, 0.5)
    ]
    found += [
        Packing("low rank", f"energy {energy:g}", "lowrank", {"energy": energy})
        for energy in some(0.5, 0.7, 0.9, 0.95, 0.99)
    ]
    found += [
        Packing("low rank + ternary", f"energy {energy:g}, density {k:g}", "lowrank+ternary",
                {"energy": energy, "density": k, "level": "mse"})
        for energy in some(0.7, 0.9, 0.99)
        for k in some(0.1, 0.2, 0.5)
    ]  # fmt: skip
    found += [
        Packing("low rank + 2 bits", f"energy {energy:g}", "lowrank+two-bit", {"energy": energy})
        for energy in some(0.9, 0.95, 0.99)
    ]
    return found


def _some(few: bool, *values: float) -> Sequence[float]:
    return values[1:2] if few else values


def compare(settings: Settings, work: Path, out: Path, few: bool = False) -> None:
    """Train what is missing; leave ``digits_sizes.json``, ``.md`` and ``.png`` in ``out``."""
    console = Console()
    started = perf_counter()
    settings = replace(settings, ranks=settings.ranks[-1:])
    kinds, domains = (settings.ranks[-1], None), [*DOMAINS][: 3 if few else None]
    with workers() as pool:
        trained = train_all(pool, settings, work, lambda n, of: None)
        console.print(f"trained {trained} models, {perf_counter() - started:.0f} s")
        ways = packings(few)
        jobs = {
            family(rank): [
                [pool.submit(measure, settings, work, Expert(seed, domain, rank), ways)
                 for domain in domains]
                for seed in settings.seeds
            ]
            for rank in kinds
        }  # fmt: skip
        seen = {
            kind: [[job.result() for job in each] for each in seeds]
            for kind, seeds in jobs.items()
        }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    plain = {
        kind: [[[asdict(one) for one in each] for each in seed] for seed in seeds]
        for kind, seeds in seen.items()
    }
    rows = {kind: summed(seeds) for kind, seeds in seen.items()}
    about = {"settings": asdict(settings), "seen": plain, "findings": findings(rows)}
    (out / "digits_sizes.json").write_text(json.dumps(about, indent=1) + "\n")
    text = markdown(rows, len(settings.seeds))
    (out / "digits_sizes.md").write_text(text)
    draw(rows, out / "digits_sizes.png")
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    console.print(f"wrote {out}, {perf_counter() - started:.0f} s in all", soft_wrap=True)


class OwnDomain:
    """A task of mergebench: accuracy on the digits of one domain."""

    metric = "accuracy"

    def __init__(self, like: DigitViT, seed: int, domain: str) -> None:
        self.like, self.seed, self.domain = like, seed, domain

    def score(self, model: Any, split: str) -> dict[str, float]:
        """Of a model's arrays."""
        return {"accuracy": self.accuracy(model.arrays(), split)}

    def accuracy(self, arrays: Mapping[str, Any], split: str) -> float:
        """In %, of named weights."""
        state = {name: torch.as_tensor(np.asarray(each)) for name, each in arrays.items()}
        self.like.load_state_dict(state)
        sets = {self.domain: evaluation_sets(self.seed, split)[self.domain]}
        return 100 * accuracies(self.like, sets)[self.domain]


def measure(
    settings: Settings, work: Path, expert: Expert, ways: Sequence[Packing]
) -> list[Measured]:
    """Store one expert in every way, and test what is read back."""
    assert expert.domain is not None
    base = Expert(expert.seed).folder(settings, work)
    folder = expert.folder(settings, work)
    weights = folder / (WEIGHTS if expert.rank is None else ADAPTER_WEIGHTS)
    task = OwnDomain(load_model(base), expert.seed, expert.domain)
    plain = task.accuracy(load_expert(folder, base).state_dict(), "test")
    found = [Measured(PLAIN, "", weights.stat().st_size, plain, 0.0, {})]
    with TemporaryDirectory(prefix="digits-sizes-") as scratch:
        found.append(_halved(folder, weights, base, task, Path(scratch)))
        path = Path(scratch) / "packed.mbz.safetensors"
        scores = Scores([Task("digits", task, "")])
        for way in ways:
            choice = compress_best(
                str(folder), path, base=str(base), scores=scores, scheme=way.scheme,
                params=way.params, force=True, workers=1,
            )  # fmt: skip
            report = choice.best.report
            arrays: Any = mergebench.merge_models([str(path)], base=str(base), method="linear",
                                                  form="model")  # fmt: skip
            accuracy = task.accuracy(arrays, "test")
            size, error = path.stat().st_size, report.error.relative
            given = dict(report.params)
            found.append(Measured(way.curve, way.label, size, accuracy, error, given))
    return found


def _halved(folder: Path, weights: Path, base: Path, task: OwnDomain, scratch: Path) -> Measured:
    """The tensors rounded to bf16, as an ordinary file."""
    place = scratch / "bf16"
    place.mkdir()
    rounded = {name: each.bfloat16() for name, each in load_file(weights).items()}
    save_file(rounded, place / weights.name, metadata={"format": "pt"})
    config = ADAPTER_CONFIG if weights.name == ADAPTER_WEIGHTS else "config.json"
    (place / config).write_bytes((folder / config).read_bytes())
    accuracy = task.accuracy(load_expert(place, base).state_dict(), "test")
    before, after = (load_expert(each, base).state_dict() for each in (folder, place))
    old = load_model(base).state_dict()
    gap = sum(float(((after[n] - before[n]).double() ** 2).sum()) for n in old)
    own = sum(float(((before[n] - old[n]).double() ** 2).sum()) for n in old)
    size = (place / weights.name).stat().st_size
    return Measured(HALF, "", size, accuracy, (gap / own) ** 0.5, {})
