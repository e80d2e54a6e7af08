"""The base and the experts: which there are, where each is cached, how one is made."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .data import TextTask
from .encoder import load_encoder, load_tokenizer
from .settings import Settings, cache_key
from .train import fine_tune, fine_tune_lora

#: Kinds of experts, in the order of the tables.
KINDS = ("full", "lora")


@dataclass(frozen=True)
class Base:
    """What everything is fine-tuned from: a local folder, or an id on the Hub.

    ``key`` follows the reference, and the sizes and times of a local folder's files.
    """

    source: str

    @property
    def key(self) -> str:
        """The cache key."""
        folder = Path(self.source)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
        return cache_key({"source": str(folder.resolve()) if seen else self.source, "files": seen})

    def folder(self, work: Path) -> Path:
        """Where the encoder is kept, as the experts are: without pooling layers and heads."""
        return work / f"base-{self.key}"

    def make(self, work: Path) -> Path:
        """Fetch or copy the encoder and its tokenizer, unless that was done before."""

        def save(place: Path) -> None:
            load_encoder(self.source).save_pretrained(place)  # type: ignore[operator]
            load_tokenizer(self.source).save_pretrained(place)

        return once(self.folder(work), save)


@dataclass(frozen=True)
class Expert:
    """One fine-tune of a base on a task: ``kind`` is full or lora."""

    base: Base
    task: TextTask
    kind: str

    def folder(self, settings: Settings, work: Path) -> Path:
        """Where it is cached; the name ends with the key of all that made it."""
        made_of: dict[str, Any] = {
            "base": self.base.key,
            "prompts": self.task.prompts,
            "train": self.task.splits["train"],
            "seed": settings.seed,
            "length": settings.max_length,
            "scale": settings.scale,
            "device": settings.device.partition(":")[0],
        }
        if self.kind == "full":
            made_of["settings"] = asdict(settings.full)
        else:
            made_of |= {"settings": asdict(settings.lora), "rank": settings.rank}
        return work / self.kind / f"{self.task.name}-{cache_key(made_of)}"

    def make(self, settings: Settings, work: Path) -> bool:
        """Train and save it unless it is cached; say whether it had to be trained."""
        folder, base = self.folder(settings, work), self.base.make(work)
        if folder.exists():
            return False

        def save(place: Path) -> None:
            train = fine_tune if self.kind == "full" else fine_tune_lora
            made: Any = train(base, self.task, settings)
            made.save_pretrained(place)
            if self.kind == "full":
                load_tokenizer(base).save_pretrained(place)

        with warnings.catch_warnings():
            # What PEFT asks of transformers by an old name is not the user's to mend.
            warnings.simplefilter("ignore", FutureWarning)
            once(folder, save)
        return True


def once(folder: Path, save: Callable[[Path], None]) -> Path:
    """Let ``save`` fill a folder beside and rename it, so that one that exists is complete."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(partial)
        partial.rename(folder)
    return folder
