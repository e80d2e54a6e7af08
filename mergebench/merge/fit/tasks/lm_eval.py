"""Tasks of the language model evaluation harness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mergebench.core.errors import MergebenchError
from mergebench.loading.report import need
from mergebench.merge.fit.find import TASKS, Setting
from mergebench.merge.fit.task import UnderTest

_PREFERRED = ("acc_norm", "acc", "exact_match", "f1")


class Harness:
    """``lm_eval:arc_easy,piqa``: the mean over its tasks of the metric each is known by.

    Metrics are named ``task/metric``; ``mean`` is the one that counts. The harness has splits of
    its own: every split is what it evaluates on, so select on other tasks than are reported.
    """

    metric = "mean"
    lower_is_better = ()

    def __init__(self, names: str, setting: Setting) -> None:
        need("lm_eval", "transformers")
        self.names = [name.strip() for name in names.split(",") if name.strip()]
        self.setting = setting

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """See :class:`~mergebench.merge.fit.task.Scorer`."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        live = HFLM(pretrained=str(model.folder()), batch_size=self.setting.batch)
        found = lm_eval.simple_evaluate(
            model=live,
            tasks=self.names,
            limit=self.setting.limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        return collected(found["results"])


def collected(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Numbers of each task, and the mean of the preferred one of each.

    Raises
    ------
    MergebenchError
        If a task has no metric that more is better of.
    """
    found: dict[str, float] = {}
    chosen = []
    for name, metrics in results.items():
        plain = {
            key.partition(",")[0]: float(value)
            for key, value in metrics.items()
            if isinstance(value, (int, float)) and "stderr" not in key
        }
        best = next((key for key in _PREFERRED if key in plain), None)
        if best is None:
            raise MergebenchError(
                f"lm_eval: task {name} has no known metric", got=", ".join(plain) or "none",
                expected=" or ".join(_PREFERRED),
            )  # fmt: skip
        chosen.append(plain[best])
        found |= {f"{name}/{key}": value for key, value in plain.items()}
    return {"mean": sum(chosen) / len(chosen), **found}


TASKS.add("lm_eval", Harness)
