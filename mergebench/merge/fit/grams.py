"""Inputs of linear layers as ``XᵀX``, taken while data run through a model (arXiv:2212.09849)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from mergebench.merge.fit.batches import batches_of, check_learnable, on, outputs_of
from mergebench.merge.fit.memory import STATISTICS, check_fits
from mergebench.merge.fit.task import Task

if TYPE_CHECKING:
    import torch

Tell = Callable[[str, int, int], None]


@dataclass(eq=False)
class Inputs:
    """What has been seen of the inputs of one weight.

    Attributes
    ----------
    gram : float64 torch tensor, (in, in), or (rows,) counts of an embedding; None before any
    rows : int
        Inputs seen: tokens, or places of a kernel.
    """

    gram: torch.Tensor | None = None
    rows: int = 0

    def add(self, product: torch.Tensor, rows: int) -> None:
        """Add the product of some more inputs."""
        product = product.double().cpu()
        self.gram = product if self.gram is None else self.gram.add_(product)
        self.rows += rows

    def mean(self) -> torch.Tensor:
        """``XᵀX`` per input."""
        assert self.gram is not None
        return self.gram / max(self.rows, 1)


@dataclass(eq=False)
class _Now:
    """What hooks have to know of the batch that is running."""

    mask: Any = None
    held: dict[str, Inputs] = field(default_factory=dict)


def linear_weights(
    module: torch.nn.Module, *, embeddings: bool = False
) -> dict[torch.nn.Module, str]:
    """Modules that multiply inputs by a weight, and the name of that weight.

    Linear layers, transformers' ``Conv1D`` and convolutions of one group; embeddings, whose inputs
    are one-hot, where they are asked for. A weight that is both, a tied head, is left out: what it
    does to either of its inputs says nothing of the other.
    """
    import torch

    names = {id(each): name for name, each in module.named_parameters()}
    found: dict[torch.nn.Module, str] = {}
    uses: dict[str, set[bool]] = {}
    for each in module.modules():
        weight = getattr(each, "weight", None)
        if id(weight) not in names:
            continue
        name = names[id(weight)]
        looked_up = isinstance(each, torch.nn.Embedding)
        if looked_up or _multiplies(each):
            uses.setdefault(name, set()).add(looked_up)
            found[each] = name
    return {
        each: name
        for each, name in found.items()
        if len(uses[name]) == 1 and (embeddings or uses[name] == {False})
    }


def _multiplies(module: Any) -> bool:
    import torch

    if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
        return getattr(module, "groups", 1) == 1 and _pads_with_zeros(module)
    return _is_conv1d(module)


def _pads_with_zeros(module: Any) -> bool:
    return getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(
        getattr(module, "padding", 0), str
    )


def _is_conv1d(module: Any) -> bool:
    """Whether it is transformers' linear layer that is stored input × output."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@contextmanager
def watched(
    modules: Mapping[torch.nn.Module, str],
    held: dict[str, Inputs],
    called: Callable[[Any], None] | None = None,
) -> Iterator[_Now]:
    """Add up the inputs of some modules for as long as data run.

    Parameters
    ----------
    modules : mapping of module to name of its weight
    held : dict of name to Inputs
        Added to.
    called : callable, optional
        Told of every module before it runs.
    """
    now = _Now(held=held)
    hooks = [
        each.register_forward_pre_hook(partial(_seen, name=name, now=now, called=called))
        for each, name in modules.items()
    ]
    try:
        yield now
    finally:
        for hook in hooks:
            hook.remove()


def _seen(module: Any, args: Any, *, name: str, now: _Now, called: Any) -> None:
    import torch

    if called is not None:
        called(module)
    inputs = args[0].detach()
    if isinstance(module, torch.nn.Embedding):
        tokens = _kept(inputs[..., None], now.mask)[:, 0]
        counts = torch.bincount(tokens, minlength=module.num_embeddings)
        now.held.setdefault(name, Inputs()).add(counts, len(tokens))
        return
    if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d)):
        rows = _unfolded(module, inputs)
    else:
        rows = _kept(inputs, now.mask)
    # Single precision would lose the small directions that decide the inverse.
    wide = rows.double() if rows.device.type == "cpu" else rows.float()
    now.held.setdefault(name, Inputs()).add(wide.T @ wide, len(wide))


def _kept(inputs: torch.Tensor, mask: Any) -> torch.Tensor:
    """Inputs as rows, without those at the places of padding."""
    if mask is not None and inputs.ndim == 3 and tuple(inputs.shape[:2]) == tuple(mask.shape):
        return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1])


def _unfolded(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What a kernel sees at each of its places: (places, in · ∏ kernel)."""
    import torch

    flat = isinstance(module, torch.nn.Conv1d)
    inputs = inputs[:, :, None, :] if flat else inputs

    def both(values: Any, one: int) -> tuple[int, int]:
        return (one, values[0]) if flat else (values[0], values[1])

    columns = torch.nn.functional.unfold(
        inputs,
        both(module.kernel_size, 1),
        dilation=both(module.dilation, 1),
        padding=both(module.padding, 0),
        stride=both(module.stride, 1),
    )
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def grams_of(
    module: torch.nn.Module,
    tasks: Sequence[Task],
    split: str,
    *,
    embeddings: bool = False,
    most: int | None = None,
    device: str = "cpu",
    tell: Tell | None = None,
    only: Collection[str] | None = None,
) -> tuple[dict[str, Inputs], int]:
    """``XᵀX`` of every linear layer's inputs by parameter, and how many batches there were.

    Padding, where a batch has an ``attention_mask``, is left out.

    Parameters
    ----------
    module : torch module
        With the values that are asked about.
    tasks : sequence of Task
    split : str
    embeddings : bool
        Also how often each row of an embedding is asked for.
    most : int, optional
        Most batches of each task.
    device : str
    tell : callable, optional
        Told ``(what, batches done, batches in all)``.
    only : collection of str, optional
        Weights that are asked about; all by default.

    Returns
    -------
    mapping of the module's parameter name to Inputs, int
        Without layers that no data reach.
    """
    for task in tasks:
        check_learnable(task)
    module.to(device).eval()
    held: dict[str, Inputs] = {}
    weights = {
        each: name
        for each, name in linear_weights(module, embeddings=embeddings).items()
        if only is None or name in only
    }
    check_grams(module, weights)
    work = [(task, batch) for task in tasks for batch in batches_of(task, split, most)]
    with watched(weights, held) as now:
        for done, (task, batch) in enumerate(work, start=1):
            run(task, module, on(batch, device), now)
            if tell is not None:
                tell(task.name, done, len(work))
    return held, len(work)


def check_grams(
    module: torch.nn.Module, weights: Mapping[torch.nn.Module, str], models: int = 1
) -> None:
    """Refuse Gram matrices that memory cannot hold: they are kept in float64, on the CPU.

    Parameters
    ----------
    module : torch module
    weights : mapping of module to name of its weight
    models : int, default 1
        How many have such matrices at the same time.

    Raises
    ------
    RoomError
        Naming the largest.
    """
    sizes = {name: _gram_bytes(each) for each, name in weights.items()}
    largest = max(sizes, key=lambda name: sizes[name], default="")
    check_fits(
        sum(each.nbytes for each in module.parameters()) + models * sum(sizes.values()),
        "cpu",
        f"collecting {models * len(sizes)} Gram matrices, the largest that of {largest!r} with "
        f"{sizes.get(largest, 0) / 1e9:.3g} GB,",
        STATISTICS,
    )


def _gram_bytes(module: Any) -> int:
    """What the Gram matrix of a layer's inputs takes, or the counts of an embedding."""
    import torch

    if isinstance(module, torch.nn.Embedding):
        return 8 * module.num_embeddings
    shape = module.weight.shape
    return 8 * int(shape[0] if _is_conv1d(module) else shape[1:].numel()) ** 2


def run(task: Task, module: Any, batch: Any, now: _Now) -> None:
    """Let a batch run, with its padding known."""
    import torch

    now.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    with torch.inference_mode():
        outputs_of(task, module, batch)
