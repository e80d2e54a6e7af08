"""Going on where an interrupted run of the same merge has stopped."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash

from mergebench.checkpoints.documents import is_file
from mergebench.checkpoints.tokenizers import FILES as TOKENS
from mergebench.checkpoints.writer import Output
from mergebench.compute.cut import Cut
from mergebench.core.tensor import Tensor, size_of
from mergebench.core.version import own_version
from mergebench.merge.at import Reading
from mergebench.merge.notation import Notation
from mergebench.merge.op import Chain
from mergebench.merge.plan import Plan
from mergebench.merge.shared import Measured, Shared
from mergebench.merge.variants import Variant
from mergebench.sources import Source

_PIECE = 1 << 22
#: How journals hold what was measured.
NOTATION = Notation({"cut": Cut})


def resume_key(plan: Plan, variant: Variant) -> str:
    """Names everything that decides the bytes of one output, 32 hex digits.

    That is the recipe with every parameter at its value, the inputs, the layout and the version
    of mergebench; not threads, memory, or the place of the output. Inputs are known by names,
    sizes, modification times and headers of their files; those in memory by their content.
    """
    text = json.dumps(decides(plan, variant), sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def decides(plan: Plan, variant: Variant) -> dict[str, Any]:
    """What :func:`resume_key` names, by kind, as plain data."""
    sources = [*plan.models, *([plan.base] if plan.base is not None else [])]
    if variant.recipe.vocab == "error":
        sources = []
    about = {
        "mergebench": own_version(),
        "recipe": variant.stored.to_dict(),
        "ops": [[str(op) for op in ops] for ops in variant.distinct],
        "form": plan.form,
        "base": None if plan.base is None else _identity(plan.base),
        "models": [_identity(model) for model in plan.models],
        "weights": [str(weight) for weight in plan.weights],
        "tokenizers": [_tokenizers(each) for each in sources],
        "layout": plan.package.layout_of(variant).to_json(),
    }
    if plan.device is not None:
        about["device"] = plan.device.title
    if plan.collected:
        about["statistics"] = [
            _identity(each.source)
            | ({} if each.source.identity else {"all": _content(each.tensors)})
            for each in plan.collected
        ]
    return about


def _tokenizers(source: Source) -> dict[str, str]:
    """Digests of the files that say which row is which token."""
    folder = None if source.checkpoint is None else source.checkpoint.folder
    paths = [folder / name for name in TOKENS] if folder is not None else []
    return {
        path.name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for path in paths
        if is_file(path)
    }


def _identity(source: Source) -> dict[str, Any]:
    found = {
        "label": source.label,
        "fingerprint": source.fingerprint,
        "config": dict(source.config),
        "files": [dict(each) for each in source.identity],
    }
    if not source.identity and source.checkpoint is not None:
        # The fingerprint samples; a state dict may have changed between the samples.
        found["content"] = _content(source.checkpoint.tensors)
    return found


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        size = size_of(tensor.shape)
        for start in range(0, size, _PIECE):
            piece = np.ascontiguousarray(tensor.read(start, min(start + _PIECE, size)))
            digest.update(piece.view(np.uint8).data)
    return digest.hexdigest()


def _statistic(ops: Chain, name: str) -> str:
    return json.dumps(["statistic", [str(op) for op in ops], name])


def _residual(name: str) -> str:
    return json.dumps(["residual", name])


def _report(name: str) -> str:
    return json.dumps(["report", name])


def _passed(name: str) -> str:
    return json.dumps(["nonfinite", name])


class _Known(dict[tuple[Chain, str], Any]):
    """Measured values by (ops up to the one that asked, tensor or part); new ones are noted."""

    def __init__(
        self, outputs: Sequence[tuple[Variant, Output]], shared: Measured | None = None
    ) -> None:
        super().__init__()
        self._outputs, self._shared = outputs, shared

    def __setitem__(self, key: tuple[Chain, str], value: Any) -> None:
        super().__setitem__(key, value)
        if self._shared is not None:
            self._shared.add(key, value)
        if not self._outputs:
            return
        ops, name = key
        try:
            data = NOTATION.encode(value)
        except TypeError:
            return
        for variant, output in self._outputs:
            asked = ops[-1].statistic
            whole = asked is not None and asked.scope == "model"
            chains = variant.distinct if whole else (variant.at(name),)
            if any(chain[: len(ops)] == ops for chain in chains):
                output.settle(_statistic(ops, name), data)

    def recall(self, key: tuple[Chain, str], value: Any) -> None:
        """Take over what an earlier run, or another merge, has measured."""
        super().__setitem__(key, value)


class Ledger:
    """What earlier runs have done of a merge, and what this one adds.

    Parameters
    ----------
    plan : Plan
    outputs : sequence of Output
        Open, in the order of ``plan.variants``; none for a merge in memory.
    shared : Shared, optional
        What other merges of this process have measured, and what this one adds.

    Attributes
    ----------
    known : mapping of (ops, tensor name) to value
        For :class:`~mergebench.merge.stream.Evaluator`.
    swept : int
        Entries that need not be read again to measure them.
    """

    def __init__(
        self, plan: Plan, outputs: Sequence[Output] = (), shared: Shared | None = None
    ) -> None:
        self._plan, self._outputs = plan, tuple(outputs)
        pairs = list(zip(plan.variants, outputs, strict=True)) if outputs else []
        common = None if shared is None else shared.of(plan, decides(plan, plan.variants[0]))
        self.known = _Known(pairs, common)
        self.swept = 0
        for variant in plan.variants if common is not None else ():
            for ops, name, size in _asked(plan, variant):
                if common is not None and (ops, name) in common and (ops, name) not in self.known:
                    self.known.recall((ops, name), common[ops, name])
                    self.swept += size
        for variant, output in pairs:
            for ops, name, size in _asked(plan, variant):
                data = output.settled.get(_statistic(ops, name))
                if data is not None and (ops, name) not in self.known:
                    self.known.recall((ops, name), NOTATION.decode(data))
                    self.swept += size

    def is_finished(self, names: Sequence[str]) -> bool:
        """Whether every output has all these tensors."""
        return bool(self._outputs) and all(
            name in output.finished for output in self._outputs for name in names
        )

    def lose(self, index: int, name: str, residual: float) -> None:
        """Note what truncation has cost a tensor of output ``index``; before it is finished."""
        if self._outputs:
            self._outputs[index].settle(_residual(name), NOTATION.encode(residual))

    def lost(self, index: int, name: str) -> float | None:
        """What an earlier run has noted; ``None`` where nothing was truncated."""
        data = self._outputs[index].settled.get(_residual(name))
        return None if data is None else float(NOTATION.decode(data))

    def report(self, index: int, name: str, readings: Sequence[Reading]) -> None:
        """Note what ops have said of a tensor of output ``index``; before it is finished."""
        if self._outputs:
            data = [(one.what, one.models, one.value) for one in readings]
            self._outputs[index].settle(_report(name), NOTATION.encode(data))

    def reported(self, index: int, name: str) -> tuple[Reading, ...]:
        """What an earlier run has noted."""
        data = self._outputs[index].settled.get(_report(name))
        return () if data is None else tuple(Reading(*each) for each in NOTATION.decode(data))

    def pass_through(self, name: str, counts: Mapping[str, int]) -> None:
        """Note how many entries of a tensor are not finite, by model; before it is finished."""
        for output in self._outputs[:1]:
            output.settle(_passed(name), NOTATION.encode(dict(counts)))

    def passed(self, name: str) -> dict[str, dict[str, int]]:
        """What an earlier run has noted, by the tensor's name; empty if nothing."""
        data = self._outputs[0].settled.get(_passed(name)) if self._outputs else None
        return {} if data is None else {name: NOTATION.decode(data)}

    def notes(self) -> Iterator[str]:
        """What the user should know about earlier runs."""
        for output in self._outputs:
            if output.restarted:
                yield (
                    f"{output.destination}: an interrupted run had other inputs, parameters or "
                    "another version, or its files are damaged; starting over"
                )
        if any(output.finished or output.settled for output in self._outputs):
            names = self._plan.package.layout.places
            done = sum(self.is_finished([name]) for name in names)
            measured = f" and {len(self.known)} measurements" if self.known else ""
            yield (
                f"resuming an interrupted run: {done} of {len(names)} tensors{measured} are "
                "done already"
            )


def _asked(plan: Plan, variant: Variant) -> Iterator[tuple[Chain, str, int]]:
    """Every statistic that a variant needs: ops, tensor or part, entries it reads."""
    whole: set[tuple[Chain, str]] = set()
    sizes: Counter[str] = Counter()
    for item in plan.aligned.items.values():
        sizes[item.part] += item.site.size
    for name, item in plan.aligned.items.items():
        chain = variant.at(name)
        for end, op in enumerate(chain, start=1):
            ops = chain[:end]
            if op.statistic is None:
                continue
            if op.statistic.scope == "tensor":
                yield ops, name, item.site.size
            elif (ops, item.part) not in whole:
                whole.add((ops, item.part))
                yield ops, item.part, sizes[item.part]
