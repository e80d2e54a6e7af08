"""What is learned so far, on disk, so that a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from mergebench.checkpoints.documents import write_bytes
from mergebench.core.errors import FormatError, MergebenchError, ParameterError

if TYPE_CHECKING:
    import torch

#: Numbers and lists of a state, which stand in the file's header.
_PLAIN = (
    "epoch", "turn", "losses", "count", "history", "scores", "best_value", "best_epoch", "scaler",
)  # fmt: skip


@dataclass(eq=False)
class State:
    """Where a descent is.

    Attributes
    ----------
    epoch, turn : int
        Epochs, and steps of the next one, that are done.
    losses, count : float, int
        Sum and number of the losses of that epoch so far.
    history, scores : list
        As in :class:`~mergebench.merge.fit.learn.Learned`.
    best, best_value, best_epoch
        What was learned when the score was highest.
    began : torch tensor or None
        What was learned when the epoch began.
    tensors : mapping of name to torch tensor
        What is learned, and the optimizer's moments.
    scaler : mapping
        Of the scale of losses in float16.
    """

    epoch: int = 0
    turn: int = 0
    losses: float = 0.0
    count: int = 0
    history: list[float] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    best: torch.Tensor | None = None
    best_value: float = -inf
    best_epoch: int = 0
    began: Any = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean loss of the epoch so far."""
        return self.losses / max(self.count, 1)


class Kept:
    """A file with a :class:`State`, written whole or not at all.

    Parameters
    ----------
    path : Path
    about : str
        All that decides what is learned; a state of anything else is not gone on with.
    every : float, default 30.0
        Seconds between two writes within an epoch.
    """

    def __init__(self, path: Path, about: str, every: float = 30.0) -> None:
        self.path, self.every = path, every
        self.key = hashlib.blake2b(about.encode(), digest_size=16).hexdigest()
        self._written = monotonic()

    def is_due(self) -> bool:
        """Whether the last write lies far enough back."""
        return monotonic() - self._written >= self.every

    def save(self, state: State) -> None:
        """Write a state in place of the one before it."""
        from safetensors.torch import save

        tensors = dict(state.tensors)
        for name in ("best", "began"):
            if (value := getattr(state, name)) is not None:
                tensors[name] = value
        plain = {name: getattr(state, name) for name in _PLAIN}
        metadata = {"mergebench_fit": self.key, "state": json.dumps(plain)}
        write_bytes(self.path, save({n: t.contiguous() for n, t in tensors.items()}, metadata))
        self._written = monotonic()

    def load(self) -> State | None:
        """The state of an earlier run; ``None`` if there is none.

        Raises
        ------
        ParameterError
            If it is one of another fit.
        FormatError
            If it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        fix = f"remove {self.path}, or give another -o"
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("mergebench_fit") != self.key:
                    raise ParameterError(f"{self.path} is of another fit that did not end", fix=fix)
                found = State(**json.loads(about["state"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise FormatError(
                f"{self.path}: cannot be gone on with", got=str(error), fix=fix
            ) from None
        found.best, found.began = tensors.pop("best", None), tensors.pop("began", None)
        found.tensors = tensors
        return found

    def is_own(self) -> bool:
        """Whether what is there, if anything is, is a state of this fit."""
        try:
            self.load()
        except MergebenchError:
            return False
        return True

    def remove(self) -> None:
        """The fit has ended."""
        self.path.unlink(missing_ok=True)
