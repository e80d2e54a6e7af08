"""Tasks of the language model evaluation harness."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

from mergebench.core.errors import FormatError, MergebenchError, ParameterError
from mergebench.core.plain import parse_yaml
from mergebench.loading.report import need, silent
from mergebench.merge.fit.find import TASKS, Setting
from mergebench.merge.fit.live import fill
from mergebench.merge.fit.task import UnderTest

_PREFERRED = ("acc_norm", "acc", "exact_match", "f1")
#: Our splits by the names that the harness has for them.
_SPLITS = {
    "train": "training_split", "val": "validation_split", "validation": "validation_split",
    "test": "test_split",
}  # fmt: skip
#: Of examples for few-shot prompts; the harness's own.
_SEED = 1234
_OFFLINE = {"local_files_only": True, "trust_remote_code": False}


class Harness:
    """``lm_eval:arc_easy,piqa``: the mean over its tasks of the metric each is known by.

    A name that ends in ``.yaml`` is a task of one's own, in a file as the harness reads it.
    Metrics are named ``task/metric``; ``mean`` is the one that counts. The splits ``train``,
    ``val`` and ``test`` are those that a task declares. With a base, one model in memory takes the
    values of every candidate; without, each is written to a folder.

    Raises
    ------
    NotCheckedError
        If lm-eval is not installed.
    FormatError
        If a file is no task.
    """

    metric = "mean"
    lower_is_better = ()

    def __init__(self, names: str, setting: Setting) -> None:
        need("lm_eval", "transformers")
        given = [name.strip() for name in names.split(",") if name.strip()]
        if not given:
            raise ParameterError("task lm_eval: names no task", fix="such as lm_eval:arc_easy")
        files = [Path(name).expanduser() for name in given if name.endswith(".yaml")]
        self.folders = sorted({str(each.parent.resolve()) for each in files})
        self.names = [name for name in given if not name.endswith(".yaml")]
        self.listed = bool(self.names)
        self.names += [_name_in(each) for each in files]
        digest = hashlib.blake2b(digest_size=8)
        for each in files:
            digest.update(each.read_bytes())
        self.identity = digest.hexdigest() if files else ""
        self.setting = setting

    def score(self, model: UnderTest, split: str) -> Mapping[str, float]:
        """See :class:`~mergebench.merge.fit.task.Scorer`."""
        with _quiet():
            import lm_eval

        if (base := self.setting.base) is not None and (base / "config.json").is_file():
            fill(self._live.model, model.arrays())
            live = self._live
        else:
            live = _opened(model.folder(), self.setting.batch)
        with _quiet():
            found = lm_eval.evaluate(
                lm=live,
                task_dict=self._tasks(split),
                limit=self.setting.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        return collected(found["results"])

    @cached_property
    def _live(self) -> Any:
        assert self.setting.base is not None
        return _opened(self.setting.base, self.setting.batch)

    @cached_property
    def _manager(self) -> Any:
        with _quiet():
            from lm_eval.tasks import TaskManager

            # Thousands of files, which one's own tasks do without.
            return TaskManager(include_path=self.folders or None, include_defaults=self.listed)

    def _tasks(self, split: str) -> dict[str, Any]:
        """The tasks, which would evaluate on what they like best, on this split."""
        if split not in _SPLITS:
            raise ParameterError(f"no split {split!r}", expected=", ".join(_SPLITS))
        loaded: dict[str, Any] = self._manager.load(self.names)
        for name, task in loaded["tasks"].items():
            config = task.config
            there = getattr(config, _SPLITS[split], None)
            if there is None:
                known = [key for key, field in _SPLITS.items() if getattr(config, field, None)]
                raise ParameterError(
                    f"lm_eval: task {name} has no split {split!r}",
                    expected=", ".join(known) or "a task with splits",
                    fix="--select and --report-on name splits",
                )
            config.test_split = there
            task.set_fewshot_seed(seed=_SEED)
        return loaded


def _name_in(file: Path) -> str:
    try:
        # Tags such as !function are the harness's; it is only asked for its name.
        lines = file.read_text(encoding="utf-8").splitlines()
        data = parse_yaml("\n".join(line for line in lines if line.startswith("task:")))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise FormatError(f"{file}: cannot be read as a task", got=str(error)) from None
    if not isinstance(data, dict) or not isinstance(data.get("task"), str):
        raise FormatError(f"{file}: is no task", expected="a line such as `task: name`")
    return str(data["task"])


def _opened(folder: Path, batch: int) -> Any:
    import torch
    import transformers

    with _quiet():
        from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with silent(transformers.utils.logging), _quiet():
        module: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", **_OFFLINE
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_OFFLINE)
        return HFLM(
            pretrained=module.to(device), tokenizer=tokenizer, batch_size=batch, device=device
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and logs of the harness; what goes wrong is raised all the same."""
    from warnings import catch_warnings, simplefilter

    heard = io.StringIO()
    with catch_warnings(), redirect_stdout(heard), redirect_stderr(heard):
        simplefilter("ignore")
        yield


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
        # Metrics have the name of a filter behind a comma; what has none is told of the task.
        plain = {
            key.partition(",")[0]: float(value)
            for key, value in metrics.items()
            if "," in key and isinstance(value, (int, float)) and "stderr" not in key
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
