"""Which models there are, where each is cached, and how one of them is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .checkpoints import load_state, save_adapter, save_model
from .data import DOMAINS, load_splits
from .settings import Settings, base_key, expert_key
from .train import fine_tune, fine_tune_lora, pretrain


@dataclass(frozen=True)
class Expert:
    """One model to train: the base (``domain`` None), a full fine-tune (``rank`` None), a LoRA."""

    seed: int
    domain: str | None = None
    rank: int | None = None

    def folder(self, settings: Settings, work: Path) -> Path:
        """Return where the model is cached; the name ends with the key of its settings."""
        if self.domain is None:
            name = f"base-{base_key(settings, self.seed)}"
        else:
            key = expert_key(settings, self.seed, self.domain, self.rank)
            name = f"{self.domain}-{family(self.rank)}-{key}"
        return work / "trained" / f"seed{self.seed}" / name


def family(rank: int | None) -> str:
    """Name a kind of expert: ``full`` or ``lora<rank>``."""
    return "full" if rank is None else f"lora{rank}"


def ranks_with_full(settings: Settings) -> tuple[int | None, ...]:
    """List the kinds of experts: None for full fine-tuning, then the LoRA ranks."""
    return (None, *settings.ranks)


def bases(settings: Settings) -> list[Expert]:
    """List the pretrained models, one per seed."""
    return [Expert(seed) for seed in settings.seeds]


def experts(settings: Settings) -> list[Expert]:
    """List the fine-tuned models of every seed, kind and domain."""
    return [
        Expert(seed, domain, rank)
        for seed in settings.seeds
        for rank in ranks_with_full(settings)
        for domain in DOMAINS
    ]


def expert_folders(settings: Settings, work: Path, seed: int, rank: int | None) -> dict[str, Path]:
    """Map each domain to the folder of its expert of one kind."""
    return {domain: Expert(seed, domain, rank).folder(settings, work) for domain in DOMAINS}


def make(expert: Expert, settings: Settings, work: Path) -> bool:
    """Train and save ``expert`` unless it is cached; say whether it had to be trained.

    An expert needs the base of its seed to be there already.
    """
    folder = expert.folder(settings, work)
    if folder.exists():
        return False
    train = load_splits(expert.seed)["train"]
    if expert.domain is None:
        save_model(folder, pretrain(settings, expert.seed, train).state_dict(), settings.vit)
        return True
    base_folder = Expert(expert.seed).folder(settings, work)
    base = load_state(base_folder)
    if expert.rank is None:
        model = fine_tune(base, settings, expert.seed, expert.domain, train)
        save_model(folder, model.state_dict(), settings.vit)
        return True
    lora = fine_tune_lora(base, settings, expert.seed, expert.domain, train, expert.rank)
    alpha = settings.lora_alpha_per_rank * expert.rank
    save_adapter(folder, lora, expert.rank, alpha, settings.lora_targets, str(base_folder))
    return True
