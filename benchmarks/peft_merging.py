"""How far merges of LoRA adapters are from Σ wᵢ ΔWᵢ, by PEFT and by mergebench.

``python benchmarks/peft_merging.py [--markdown]``. Random adapters with both factors drawn, saved
by PEFT, on a base of a few linear layers; the exact sum is taken in float64. The error of an
update is ‖got - exact‖ / ‖exact‖ over all layers. Needs the ``peft`` extra.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import mergebench
from mergebench.adapters_zoo.adapter import ReadOptions
from mergebench.core.delta import Replacement, tile
from mergebench.sources.opening import open_source, with_base

SIZES = {"up": (96, 64), "down": (64, 96), "out": (48, 64)}
RANK, ALPHA = 8, 16
Update = dict[str, torch.Tensor]
Row = tuple[str, str, str, str]


class Net(nn.Module):
    """Linear layers, none of them square."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, (rows, columns) in SIZES.items():
            self.add_module(name, nn.Linear(columns, rows))
        self.to(dtype)


class Scene:
    """A base, and adapters on it, in a folder."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.folder, self.dtype = folder, dtype
        folder.mkdir()
        self.net = Net(dtype)
        self.base = folder / "base.safetensors"
        save_file(self.net.state_dict(), self.base, {"format": "pt"})
        self.names: list[str] = []

    def copy(self) -> Net:
        """The base once more."""
        net = Net(self.dtype)
        net.load_state_dict(self.net.state_dict())
        return net

    def add(self, **entries: Any) -> Path:
        """Save one more adapter with random parameters."""
        name = f"adapter{len(self.names)}"
        config = peft.LoraConfig(
            **{"r": RANK, "lora_alpha": ALPHA, "target_modules": list(SIZES), **entries}
        )
        model = peft.get_peft_model(self.copy(), config)
        generator = torch.Generator().manual_seed(10 + len(self.names))
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
                # Magnitudes of DoRA stay near those of the weights.
                drawn = parameter.data * (1 + drawn) if "magnitude" in key else drawn
                parameter.data = drawn.to(parameter.dtype)
        model.save_pretrained(self.folder / name)
        self.names.append(name)
        return self.folder / name

    def exact(self, weights: Sequence[float]) -> Update:
        """The weighted sum of what each adapter adds alone, merged in float64 by PEFT."""
        total: Update = {}
        for name, weight in zip(self.names, weights, strict=True):
            for key, change in self.loaded(self.folder / name).items():
                total[key] = total.get(key, 0) + weight * change
        return total

    def by_peft(self, weights: Sequence[float], **options: Any) -> Update:
        """``add_weighted_adapter``, then what the result adds."""
        # As they are stored, not in float32.
        kept = {"autocast_adapter_dtype": self.dtype != torch.bfloat16}
        first = self.names[0]
        model = peft.PeftModel.from_pretrained(self.copy(), self.folder / first, first, **kept)
        for name in self.names[1:]:
            model.load_adapter(self.folder / name, name, **kept)
        model.add_weighted_adapter(self.names, list(weights), "merged", **options)
        model.set_adapter("merged")
        model.save_pretrained(self.folder / "by-peft", selected_adapters=["merged"])
        return self.loaded(self.folder / "by-peft" / "merged")

    def loaded(self, adapter: Path) -> Update:
        """What an adapter adds when PEFT loads it."""
        net = self.copy().double()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        model = peft.PeftModel.from_pretrained(net, adapter).double()
        after = model.merge_and_unload().state_dict()
        return {key: after[key] - value for key, value in before.items()}

    def by_mergebench(self, weights: Sequence[float]) -> Update:
        """A task vector made of the adapters."""
        out = self.folder / "by-mergebench.safetensors"
        options: dict[str, Any] = {"method": "task_arithmetic", "force": True, "out": str(out)}
        models = [(str(self.folder / name), w) for name, w in zip(self.names, weights, strict=True)]
        mergebench.merge_models(models, base=str(self.base), form="delta", **options)
        under = open_source(str(self.base), ReadOptions()).checkpoint
        assert under is not None
        deltas = open_source(str(out), with_base(ReadOptions(), under)).deltas
        assert deltas is not None
        wide = np.dtype(np.float64)
        return {
            name: torch.from_numpy(
                tile(delta, 0, int(np.prod(delta.shape)), wide).reshape(delta.shape)
            )
            for name, delta in deltas.items()
            if not isinstance(delta, Replacement)
        }

    def as_adapter(self, weights: Sequence[float]) -> Update:
        """An adapter that mergebench makes of the adapters, loaded by PEFT."""
        out = self.folder / "by-mergebench"
        models = [(str(self.folder / name), w) for name, w in zip(self.names, weights, strict=True)]
        mergebench.merge_models(
            models, base=str(self.base), method="task_arithmetic", form="lora", dtype="f32",
            out=str(out), force=True,
        )  # fmt: skip
        return self.loaded(out)


def error(got: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor]) -> float:
    """‖got - exact‖ / ‖exact‖; a tensor that is not there counts as zero."""
    off = sum(float(((got.get(key, 0 * e) - e) ** 2).sum()) for key, e in exact.items())
    return (off / sum(float((each**2).sum()) for each in exact.values())) ** 0.5


def measured(work: Callable[[], float]) -> str:
    """An error, or what was raised instead."""
    try:
        value = work()
    except Exception as failure:
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:110]}"
    return "exact" if value < 1e-6 else f"{100 * value:.3g} %"


def compared(
    title: str, scene: Scene, weights: Sequence[float], **options: Any
) -> Row:  # fmt: skip
    """One case: the same adapters and weights for both."""
    exact = scene.exact(weights)
    return (
        title,
        measured(lambda: error(scene.by_peft(weights, **options), exact)),
        measured(lambda: error(scene.by_mergebench(weights), exact)),
        measured(lambda: error(scene.as_adapter(weights), exact)),
    )


def combinations(folder: Path) -> list[Row]:
    """Every ``combination_type`` that claims to be the sum, at density 1 where there is one."""
    scene = Scene(folder / "plain")
    scene.add()
    scene.add()
    rows = []
    for kind in ("cat", "linear", "svd", "dare_linear", "dare_linear_svd", "magnitude_prune",
                 "magnitude_prune_svd"):  # fmt: skip
        options: dict[str, Any] = {"combination_type": kind}
        if "_" in kind:
            options["density"] = 1.0
        if "svd" in kind:
            options["svd_rank"] = 2 * RANK
        rows.append(compared(f"{kind}, 0.7 and 0.3", scene, (0.7, 0.3), **options))
    return rows


def features(folder: Path) -> list[Row]:
    """Adapters that are not all alike."""
    rows = []
    first_rslora = Scene(folder / "rslora")
    first_rslora.add(use_rslora=True)
    first_rslora.add()
    rows.append(compared("cat, the first is rsLoRA", first_rslora, (1, 1), combination_type="cat"))
    patterns = Scene(folder / "patterns")
    patterns.add(rank_pattern={"up": 4})
    patterns.add(rank_pattern={"up": 4})
    rows.append(compared("linear, rank_pattern", patterns, (1, 1), combination_type="linear"))
    excluded = Scene(folder / "excluded")
    excluded.add(exclude_modules=["out"])
    excluded.add()
    title = "cat, the first excludes a layer"
    rows.append(compared(title, excluded, (1, 1), combination_type="cat"))
    dora = Scene(folder / "dora")
    dora.add(use_dora=True)
    dora.add(use_dora=True)
    rows.append(compared("cat, DoRA", dora, (1, 1), combination_type="cat"))
    biased = Scene(folder / "biased")
    biased.add(lora_bias=True)
    biased.add(lora_bias=True)
    rows.append(compared("cat, lora_bias", biased, (1, 1), combination_type="cat"))
    few = Scene(folder / "few")
    few.add()
    few.add()
    exact = few.exact((1, 1))
    rows.append(
        (
            "cat, one weight for two adapters",
            measured(lambda: error(few.by_peft((1,), combination_type="cat"), exact)),
            "a weight belongs to its input",
            "",
        )
    )
    half = Scene(folder / "half", torch.bfloat16)
    half.add()
    half.add()
    options = {"combination_type": "svd", "svd_rank": 2 * RANK}
    rows.append(compared("svd, bfloat16", half, (1, 1), **options))
    return rows


def rotated(folder: Path) -> Row:
    """How far the merge moves when one adapter is written in another basis of its ranks."""
    scene = Scene(folder / "rotated")
    scene.add()
    scene.add()
    options = {"combination_type": "ties", "density": 0.5}

    def moved(work: Callable[[], Update]) -> float:
        file = scene.folder / scene.names[0] / "adapter_model.safetensors"
        tensors = load_file(file)
        before = work()
        generator = torch.Generator().manual_seed(5)
        turn, _ = torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.double))
        turned = {
            key: ((turn @ each.double()) if "lora_A" in key else (each.double() @ turn.T)).float()
            for key, each in tensors.items()
        }
        save_file(turned, file, {"format": "pt"})
        after = work()
        save_file(tensors, file, {"format": "pt"})
        return error(after, before)

    def ties() -> Update:
        out = scene.folder / "ties.safetensors"
        models = [str(scene.folder / name) for name in scene.names]
        mergebench.merge_models(
            models, base=str(scene.base), method="ties", density=0.5, form="delta",
            out=str(out), force=True,
        )  # fmt: skip
        return {key: each.double() for key, each in load_file(out).items()}

    return (
        "ties, one adapter in another basis (moved by)",
        measured(lambda: moved(lambda: scene.by_peft((1, 1), **options))),
        measured(lambda: moved(ties)),
        "",
    )


def folded(folder: Path) -> list[Row]:
    """Four adapters folded into a bfloat16 model, one after the other and at once."""
    scene = Scene(folder / "folded", torch.bfloat16)
    for _ in range(4):
        scene.add(lora_alpha=1)
    exact = scene.exact((1, 1, 1, 1))
    base = {key: each.double() for key, each in scene.copy().state_dict().items()}

    def by_peft() -> float:
        net = scene.copy()
        for name in scene.names:
            net = peft.PeftModel.from_pretrained(net, scene.folder / name).merge_and_unload()
        return error({k: v.double() - base[k] for k, v in net.state_dict().items()}, exact)

    def by_mergebench() -> float:
        out = scene.folder / "model.safetensors"
        models = [str(scene.folder / name) for name in scene.names]
        mergebench.merge_models(
            models, base=str(scene.base), method="task_arithmetic", form="model", out=str(out)
        )
        return error({k: v.double() - base[k] for k, v in load_file(out).items()}, exact)

    rounded = {k: (base[k] + e).bfloat16().double() - base[k] for k, e in exact.items()}
    return [
        ("four into a bfloat16 model", measured(by_peft), measured(by_mergebench), ""),
        ("the same, exact sum rounded once", measured(lambda: error(rounded, exact)), "", ""),
    ]


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="a table for the docs")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as place,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        folder = Path(place)
        rows = [*combinations(folder), *features(folder), rotated(folder), *folded(folder)]
    headings = ("case", f"PEFT {peft.__version__}", "mergebench", "mergebench, as an adapter")
    if args.markdown:
        for row in (headings, ("---",) * 4, *rows):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(title="error against Σ wᵢ ΔWᵢ")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
