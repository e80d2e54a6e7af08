"""How coefficients are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Objective = Literal["labels", "entropy", "ufm"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Settings:
    """How coefficients are learned; the defaults are those of aTLAS for task addition.

    Attributes
    ----------
    objective : labels, entropy or ufm
        The tasks' own losses; or, without labels, the entropy of predictions, or the unsupervised
        FixMatch of aTLAS.
    compat : "" or official
        ``official``: FixMatch as the authors' code does it.
    epochs : int
        Passes over the longest split.
    steps : int or None
        Steps in all, in place of ``epochs``.
    rate, decay, clip : float
        Of AdamW; ``clip`` bounds the norm of the gradient (0: not at all).
    cosine : bool
        Let the rate fall to zero along half a cosine.
    start : float
        Of every coefficient; before the softmax where there is one.
    low, high : float or None
        Coefficients are put back between them after every step.
    shared : bool
        One coefficient per model, rather than per model and tensor.
    softmax : bool
        What is learned goes through a softmax over the models.
    temperature : bool
        Learn a factor of each task's logits too, from 1; it is no part of the model.
    l1, l2 : float
        Added: ``l1 · Σ|c| + l2 · Σc²``.
    precision : float32, bfloat16 or float16
        Of the forward and backward passes; values, gradients and coefficients stay in float32.
    patience : int
        Stop after so many epochs without a better score, or loss where there is none (0: never).
    shots : int or None
        Examples of each class that are learned from; all by default.
    seed : int
        Of the order of batches, and what else is drawn.
    """

    objective: Objective = "labels"
    compat: Literal["", "official"] = ""
    epochs: int = 20
    steps: int | None = None
    rate: float = 1e-3
    decay: float = 0.1
    clip: float = 1.0
    cosine: bool = False
    start: float = 0.0
    low: float | None = None
    high: float | None = None
    shared: bool = False
    softmax: bool = False
    temperature: bool = False
    l1: float = 0.0
    l2: float = 0.0
    precision: Precision = "float32"
    patience: int = 0
    shots: int | None = None
    seed: int = 0
