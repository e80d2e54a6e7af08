"""Pretraining, full fine-tuning with a frozen head, and LoRA fine-tuning."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .data import Split, in_domain
from .lora import add_lora, factors
from .model import DigitViT, ViTConfig
from .settings import Settings, TrainSettings

# The training noise must differ from the noise of val (0) and test (1), and between epochs.
_FIRST_TRAIN_STREAM = 2


def pretrain(settings: Settings, seed: int, train: Split) -> DigitViT:
    """Train a new model on upright digits."""
    torch.manual_seed(seed)
    model = DigitViT(settings.vit)
    fit(model, settings.pretrain, seed, lambda _epoch: train)
    return model


def fine_tune(
    base: dict[str, Tensor], settings: Settings, seed: int, domain: str, train: Split
) -> DigitViT:
    """Continue from ``base`` on ``domain`` with every parameter but the head."""
    model = _from_state(base, settings.vit)
    model.head.requires_grad_(requires_grad=False)
    fit(model, settings.full, seed, _epochs_of(train, domain, seed))
    return model


def fine_tune_lora(
    base: dict[str, Tensor], settings: Settings, seed: int, domain: str, train: Split, rank: int
) -> dict[str, Tensor]:
    """Train adapters of ``rank`` on top of the frozen ``base`` and return their factors."""
    torch.manual_seed(seed)
    model = _from_state(base, settings.vit)
    add_lora(model, settings.lora_targets, rank, settings.lora_alpha_per_rank * rank)
    fit(model, settings.lora, seed, _epochs_of(train, domain, seed))
    return factors(model)


def fit(
    model: nn.Module, settings: TrainSettings, seed: int, epoch_data: Callable[[int], Split]
) -> None:
    """Minimise the cross-entropy of the trainable parameters, in place.

    ``epoch_data`` gives the training split of an epoch; all have the same length. ``seed``
    decides the order of the samples and the augmentations.
    """
    rng = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=settings.lr,
        betas=(0.9, 0.99),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    steps = settings.epochs * -(-len(epoch_data(0).labels) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.lr, total_steps=steps, pct_start=0.15
    )
    for epoch in range(settings.epochs):
        split = epoch_data(epoch)
        images = torch.from_numpy(split.images)
        if settings.shift:
            images = _shifted(images, rng)
        labels = torch.from_numpy(split.labels)
        order = torch.randperm(len(labels), generator=rng)
        for rows in torch.split(order, settings.batch_size):
            loss = nn.functional.cross_entropy(
                model(images[rows]), labels[rows], label_smoothing=settings.label_smoothing
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()


def _epochs_of(train: Split, domain: str, seed: int) -> Callable[[int], Split]:
    """Return the training data of each epoch: noise is drawn anew, the rest repeats."""
    return lambda epoch: in_domain(train, domain, (seed, _FIRST_TRAIN_STREAM + epoch))


def _from_state(state: dict[str, Tensor], config: ViTConfig) -> DigitViT:
    model = DigitViT(config)
    model.load_state_dict(state)
    return model


def _shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Move half of the images ``[n, 8, 8]`` by up to one pixel in each direction."""
    n, size = len(images), images.shape[-1]
    offset = torch.randint(0, 3, (n, 2), generator=rng)
    offset[torch.rand(n, generator=rng) < 0.5] = 1
    rows = (offset[:, :1] + torch.arange(size))[:, :, None]
    columns = (offset[:, 1:] + torch.arange(size))[:, None, :]
    return nn.functional.pad(images, (1, 1, 1, 1))[torch.arange(n)[:, None, None], rows, columns]
