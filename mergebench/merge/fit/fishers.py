"""The diagonal of the Fisher information of a model (arXiv:2111.09832, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergebench.core.errors import MergebenchError, ParameterError
from mergebench.merge.fit.batches import batches_of, check_learnable, examples_in, on, outputs_of
from mergebench.merge.fit.memory import STATISTICS, check_fits
from mergebench.merge.fit.task import Task

if TYPE_CHECKING:
    import torch

Labels = Literal["expected", "sampled", "true"]
#: Whose labels the gradients are for.
LABELS: tuple[Labels, ...] = ("expected", "sampled", "true")
#: Classes less likely are left out of expectations, to which they add next to nothing.
_LEAST = 1e-6
Tell = Callable[[str, int, int], None]


def fisher_of(
    module: torch.nn.Module,
    tasks: Sequence[Task],
    split: str,
    *,
    labels: Labels = "expected",
    most: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    tell: Tell | None = None,
    only: Collection[str] | None = None,
) -> tuple[dict[str, torch.Tensor], int]:
    """``mean_x Σ_y p(y|x) (∂ log p(y|x) / ∂θ)²`` by parameter, and how many examples there were.

    Gradients are those of single examples, whatever the size of batches.

    Parameters
    ----------
    module : torch module
        With the values that are asked about.
    tasks : sequence of Task
        Each with ``logits``, or for true labels with ``loss``.
    split : str
    labels : expected, sampled or true
        The expectation over all classes, as the paper has it; one class drawn from the model's
        own distribution, without bias at a fraction of the cost; or the labels of the data, which
        gives the *empirical* Fisher of ``loss``.
    most : int, optional
        Most batches of each task.
    seed : int
        Of the classes that are drawn.
    device : str
    tell : callable, optional
        Told ``(what, batches done, batches in all)``.
    only : collection of str, optional
        Parameters that are asked about; all by default.

    Returns
    -------
    mapping of the module's parameter name to float32 tensor on the CPU, int

    Raises
    ------
    ParameterError
        If a task has no data for it.
    MergebenchError
        If a gradient is not finite.
    """
    import torch

    for task in tasks:
        check_learnable(task, *([] if labels == "true" else ["logits"]))
    module.to(device).eval()
    module.requires_grad_(False)
    held = {
        name: each.requires_grad_(True)
        for name, each in module.named_parameters()
        if each.is_floating_point() and (only is None or name in only)
    }
    # Values of all, and of what is asked about a gradient, its square and their sum.
    check_fits(
        sum(each.nbytes for each in module.parameters())
        + 3 * sum(each.nbytes for each in held.values()),
        device, "collecting a Fisher", STATISTICS,
    )  # fmt: skip
    sums = {name: torch.zeros_like(each, dtype=torch.float32) for name, each in held.items()}
    random = torch.Generator().manual_seed(seed)
    work = [(task, batch) for task in tasks for batch in batches_of(task, split, most)]
    count = 0
    for done, (task, batch) in enumerate(work, start=1):
        for example in examples_in(on(batch, device)):
            for share, value in _terms(task, module, example, labels, random):
                _add(sums, held, value, share, task.name)
            count += 1
        if tell is not None:
            tell(task.name, done, len(work))
    module.requires_grad_(False)
    return {name: (each / count).cpu() for name, each in sums.items()}, count


def _terms(
    task: Task, module: Any, example: Any, labels: Labels, random: torch.Generator
) -> list[tuple[float, torch.Tensor]]:
    """Log-likelihoods of one example, and how much the square of each gradient counts."""
    import torch

    outputs = outputs_of(task, module, example)
    if labels == "true":
        return [(1.0, task.scorer.loss(outputs, example))]
    logs = torch.log_softmax(task.scorer.logits(outputs, example), dim=-1)
    found = []
    for line in logs:
        shares = line.detach().exp().double().cpu()
        if labels == "sampled":
            drawn = int(torch.multinomial(shares, 1, generator=random))
            found.append((1.0 / len(logs), line[drawn]))
            continue
        found += [
            (float(share) / len(logs), line[place])
            for place, share in enumerate(shares)
            if share > _LEAST
        ]
    return found


def _add(
    sums: Mapping[str, torch.Tensor],
    held: Mapping[str, torch.Tensor],
    value: torch.Tensor,
    share: float,
    task: str,
) -> None:
    import torch

    if not value.requires_grad:
        raise ParameterError(f"task {task}: its loss depends on no parameter of its module")
    slopes: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
        value, list(held.values()), retain_graph=True, allow_unused=True
    )
    for name, slope in zip(held, slopes, strict=True):
        if slope is None:
            continue
        if not bool(torch.isfinite(slope).all()):
            raise MergebenchError(
                f"task {task}: the gradient of {name!r} is not finite",
                fix="look at the model: `mergebench inspect` lists NaN",
            )
        sums[name].addcmul_(slope.float(), slope.float(), value=share)
