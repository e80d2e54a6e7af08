"""Run FusionBench's merging algorithms on models in a folder; needs nothing of this package.

    python run.py MODELS OUT

MODELS holds ``base.safetensors`` and the fine-tunes beside it; every case is written to
``OUT/CASE.safetensors``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def module(parameters: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module with parameters of these dotted names."""
    root = nn.Module()
    for name, values in parameters.items():
        place = root
        *parts, last = name.split(".")
        for part in parts:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, nn.Parameter(values.clone(), requires_grad=False))
    return root


class OneTask:
    """EMR-Merging, switched to one task."""

    def __init__(self, task: str) -> None:
        self.task = task

    def run(self, pool: Any) -> nn.Module:
        """The base with the task's modulator applied."""
        from fusion_bench.method.emr_merging.emr_merging import EMRMerging

        merged = EMRMerging().run(pool)
        merged.modulators[self.task].apply(merged)
        backbone: nn.Module = merged.backbone
        return backbone


class OfTwo:
    """An algorithm on the first two models alone."""

    def __init__(self, algorithm: Any) -> None:
        self.algorithm = algorithm

    def run(self, pool: Any) -> nn.Module:
        """What it makes of them."""
        from fusion_bench import BaseModelPool

        names = ["_pretrained_", *pool.model_names[:2]]
        merged: nn.Module = self.algorithm.run(
            BaseModelPool({n: pool.load_model(n) for n in names})
        )
        return merged


def cases() -> dict[str, Callable[[], Any]]:
    """The algorithm of every case."""
    from fusion_bench.method import (
        ISO_C_Merge,
        ISO_CTS_Merge,
        ModelStock,
        TaskArithmeticAlgorithm,
        TaskSingularVectorMerging,
        TiesMergingAlgorithm,
    )
    from fusion_bench.method.singular_value_calibration.task_arithmetic import (
        SingularValueCalibrationArithmeticTask,
    )
    from fusion_bench.method.wudi.wudi import WUDIMerging

    ties = {"threshold": 20, "remove_keys": [], "scaling_factor": 0.3}
    return {
        "task-arithmetic": lambda: TaskArithmeticAlgorithm(scaling_factor=0.3),
        "ties-sum": lambda: TiesMergingAlgorithm(merge_func="sum", **ties),
        "ties-mean": lambda: TiesMergingAlgorithm(merge_func="mean", **ties),
        "tsv-merge": lambda: TaskSingularVectorMerging(alpha=1),
        "iso-c": lambda: ISO_C_Merge(scaling_factor=1.5),
        "iso-cts": lambda: ISO_CTS_Merge(scaling_factor=1.5, common_space_fraction=0.8),
        "iso-cts-half": lambda: ISO_CTS_Merge(scaling_factor=1.0, common_space_fraction=0.5),
        "wudi": lambda: WUDIMerging(iter_num=400),
        "emr-a": lambda: OneTask("ft-a"),
        "emr-b": lambda: OneTask("ft-b"),
        "model-stock-two": lambda: OfTwo(ModelStock()),
        "svc": lambda: SingularValueCalibrationArithmeticTask(scaling_factor=0.3, alpha=0.1),
    }


def main(models: Path, out: Path) -> None:
    """Write what every algorithm makes of the models."""
    from fusion_bench import BaseModelPool

    tables = {path.stem: load_file(path) for path in sorted(models.glob("*.safetensors"))}
    for name, algorithm in cases().items():
        pool = {"_pretrained_" if key == "base" else key: module(t) for key, t in tables.items()}
        merged = algorithm().run(BaseModelPool(pool))
        parameters = {
            key: value.detach().contiguous() for key, value in merged.state_dict().items()
        }
        save_file(parameters, out / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
