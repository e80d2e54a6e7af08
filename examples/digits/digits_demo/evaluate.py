"""Accuracies: of experts, and of merges whose λ is chosen on validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch

from .checkpoints import load_expert, load_model
from .data import DOMAINS, UPRIGHT, Split, in_domain, load_splits
from .experts import Expert, expert_folders, family
from .merges import Merge, run_merge
from .model import DigitViT
from .settings import Settings

# Each split has noise of its own; the streams from 2 on belong to training.
_NOISE_STREAM = {"val": 0, "test": 1}

Accuracies = dict[str, float]


@dataclass(frozen=True)
class Score:
    """What one row of the table reached with one seed.

    ``test`` maps the six domains and ``upright`` to accuracies in [0, 1]. ``reference`` names
    the experts that count as 100 % when normalising. ``validation`` maps each candidate (a λ, or
    the domain of a single expert) to its mean accuracy over the six domains, and ``chosen`` is
    the best of them. ``matrix`` maps each expert's domain to its ``test``.
    """

    title: str
    name: str
    role: str
    reference: str
    test: Accuracies
    chosen: str = ""
    validation: Accuracies = field(default_factory=dict)
    matrix: dict[str, Accuracies] = field(default_factory=dict)


def evaluation_sets(seed: int, part: str) -> dict[str, Split]:
    """Return the ``val`` or ``test`` images in all six domains, and ``test`` upright too.

    Nothing is chosen by upright accuracy, so that validation does not spend time on it.
    """
    split = load_splits(seed)[part]
    noise = (seed, _NOISE_STREAM[part])
    domains = [*DOMAINS, UPRIGHT] if part == "test" else DOMAINS
    return {domain: in_domain(split, domain, noise) for domain in domains}


@torch.inference_mode()
def accuracies(model: DigitViT, sets: Mapping[str, Split]) -> Accuracies:
    """Return the share of correct labels in each set."""
    return {
        domain: float(
            (model(torch.from_numpy(s.images)).argmax(1) == torch.from_numpy(s.labels))
            .double()
            .mean()
        )
        for domain, s in sets.items()
    }


def domain_mean(scores: Mapping[str, float]) -> float:
    """Average over the six domains, without ``upright``."""
    return fmean(scores[domain] for domain in DOMAINS)


def best(scores: Mapping[str, float]) -> str:
    """Return the first key with the highest score."""
    return max(scores, key=lambda key: scores[key])


def score_base(settings: Settings, work: Path, seed: int) -> Score:
    """Test the pretrained model on every domain; its validation accuracy has λ = 0."""
    model = load_model(Expert(seed).folder(settings, work))
    test = accuracies(model, evaluation_sets(seed, "test"))
    validation = {"0": domain_mean(accuracies(model, evaluation_sets(seed, "val")))}
    return Score("Base", "base", "base", family(None), test, "", validation)


def score_experts(settings: Settings, work: Path, seed: int, rank: int | None) -> Score:
    """Test one kind of experts, each on its own domain; upright is the mean over the six."""
    models = _load_experts(settings, work, seed, rank)
    sets = evaluation_sets(seed, "test")
    matrix = {domain: accuracies(model, sets) for domain, model in models.items()}
    own = {domain: matrix[domain][domain] for domain in DOMAINS}
    own[UPRIGHT] = fmean(row[UPRIGHT] for row in matrix.values())
    name = family(rank)
    title = "Experts, full" if rank is None else f"Experts, LoRA r={rank}"
    return Score(title, f"experts-{name}", "experts", name, own, matrix=matrix)


def score_single(settings: Settings, work: Path, seed: int) -> Score:
    """Test the one full expert that serves all six domains best on validation."""
    models = _load_experts(settings, work, seed, None)
    val = evaluation_sets(seed, "val")
    validation = {domain: domain_mean(accuracies(m, val)) for domain, m in models.items()}
    chosen = best(validation)
    test = accuracies(models[chosen], evaluation_sets(seed, "test"))
    return Score("Best single expert", "single", "single", family(None), test, chosen, validation)


def score_merge(settings: Settings, work: Path, seed: int, merge: Merge) -> Score:
    """Merge, choose λ by the mean validation accuracy of the six domains, and test that one."""
    base = Expert(seed).folder(settings, work)
    experts = expert_folders(settings, work, seed, merge.rank)
    out = work / "merged" / f"seed{seed}" / merge.name
    made = run_merge(merge, list(experts.values()), base, out)
    if merge.apart:
        return _score_apart(merge, seed, {d: made[path.name] for d, path in experts.items()})
    models = {lam: load_model(folder) for lam, folder in made.items()}
    val = evaluation_sets(seed, "val")
    validation = {lam: domain_mean(accuracies(model, val)) for lam, model in models.items()}
    lam = best(validation)
    test = accuracies(models[lam], evaluation_sets(seed, "test"))
    reference = family(merge.rank)
    return Score(merge.title, merge.name, "merge", reference, test, lam, validation)


def _score_apart(merge: Merge, seed: int, folders: Mapping[str, Path]) -> Score:
    """Test each domain's own model on that domain; upright is the mean over them."""
    sets = evaluation_sets(seed, "test")
    matrix = {domain: accuracies(load_model(each), sets) for domain, each in folders.items()}
    own = {domain: matrix[domain][domain] for domain in DOMAINS}
    own[UPRIGHT] = fmean(row[UPRIGHT] for row in matrix.values())
    return Score(merge.title, merge.name, "apart", family(merge.rank), own, matrix=matrix)


def _load_experts(
    settings: Settings, work: Path, seed: int, rank: int | None
) -> dict[str, DigitViT]:
    base = Expert(seed).folder(settings, work)
    folders = expert_folders(settings, work, seed, rank)
    return {domain: load_expert(folder, base) for domain, folder in folders.items()}
