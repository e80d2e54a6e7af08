"""Fine-tuning of an encoder under a frozen head: all of its layers, or a LoRA on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from .data import Row, TextTask
from .encoder import embed, frozen_head, load_encoder, load_tokenizer, tokens_of
from .settings import Settings, TrainSettings

_WARM_UP = 0.1


def fine_tune(base: Path, task: TextTask, settings: Settings) -> nn.Module:
    """Train everything but the embeddings, which a few hundred texts would only wear out."""
    torch.manual_seed(settings.seed)
    model = load_encoder(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings." not in f".{name}")
    _fit(model, base, task, settings, settings.full)
    return model


def fine_tune_lora(base: Path, task: TextTask, settings: Settings) -> Any:
    """Train a LoRA on every linear layer; return the model of PEFT that holds it."""
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear"
    )
    model = peft.get_peft_model(load_encoder(base), config)
    _fit(model, base, task, settings, settings.lora)
    return model


def _fit(
    model: nn.Module, base: Path, task: TextTask, settings: Settings, chosen: TrainSettings
) -> None:
    """Minimise the cross-entropy of the trainable parameters, in place; dropout stays off."""
    tokenizer = load_tokenizer(base)
    device = settings.device
    head = frozen_head(load_encoder(base), tokenizer, task.prompts, settings.max_length).to(device)
    model.to(device)
    rows = list(task.splits["train"])
    trainable = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=chosen.lr, weight_decay=chosen.weight_decay)
    steps = chosen.epochs * math.ceil(len(rows) / chosen.batch_size)
    warm = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / (steps - warm)))
        if steps > warm
        else 1.0,
    )  # fmt: skip
    order = torch.Generator().manual_seed(settings.seed)
    for _ in range(chosen.epochs):
        for batch in torch.randperm(len(rows), generator=order).split(chosen.batch_size):
            some: list[Row] = [rows[index] for index in batch.tolist()]
            tokens = tokens_of(tokenizer, [text for text, _ in some], settings.max_length)
            labels = torch.tensor([label for _, label in some], device=device)
            moved = {name: each.to(device) for name, each in tokens.items()}
            logits = settings.scale * embed(model, moved) @ head.T
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
    model.to("cpu")
