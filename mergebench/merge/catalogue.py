"""All merge methods as one table, from the registry alone."""

from __future__ import annotations

from collections.abc import Sequence

from mergebench.core.params import Param
from mergebench.merge.chains import collects_of, granularity_of, needs_base
from mergebench.merge.method import METHODS, Method
from mergebench.merge.op import OPS, OpSpec

_HEAD = """\
# Methods

Made by `mergebench methods --markdown` from the registry. *Space*: task vectors (`delta`, needs a
base unless the inputs are task vectors), whole weights (`weight`), or either. *Passes*: how often
the inputs are read with default parameters. *Presets* (`--compat`) supply the defaults of another
implementation. `mergebench methods NAME` has the formula, every parameter and the deviations.

*Needs*: a base, or its values too where they decide; whole rows or matrices at a time, where
pieces would not do; statistics of every model's data (`mergebench fit statistics`).

*Checked against*: recorded outputs of other implementations (`tests/parity`, `tests/adapters`),
with their preset where there is one. *8 roundings*: entry by entry, what differs is at most one
unit in the last place of the stored dtype, or 8 float32 roundings, or a tie, and nothing is
unexplained. *Moments*: what is drawn at random differs, how what stays is rescaled is equal, and
moments lie within five standard deviations. A number is the largest difference relative to the
largest entry of a tensor's task vector (of PEFT's updates, to their norm). Beside that **every**
method is held against an independent float64 oracle (`tests/oracle`) and hand-worked numbers
(`tests/golden`).

"""


_OPS = """
## Ops

What methods are made of, and what `--then` appends to one. *After*: updates, where it means nothing
for whole weights; several, where it combines task vectors and so follows a method that gives every
model a result of its own. `mergebench methods --ops NAME` has the rest.

"""


def markdown() -> str:
    """The page, as Markdown."""
    head = ("method", "what", "paper", "space", "needs", "models", "passes", "parameters",
            "presets", "checked against")  # fmt: skip
    rows = [
        (
            f"`{name}`",
            method.summary,
            _link(method.paper),
            method.space,
            _needs(method),
            _count(method.models),
            _passes(method),
            ", ".join(_param(each) for each in method.params.values()),
            ", ".join(f"`{preset}`" for preset in method.compat),
            _checked(method),
        )
        for name, method in ((name, METHODS[name]) for name in METHODS)
    ]
    ops = [
        (f"`{name}`", op.summary, _after(op), ", ".join(_param(p) for p in op.params.values()),
         _checked(op))
        for name, op in ((name, OPS[name]) for name in OPS)
    ]  # fmt: skip
    second = _table(("op", "what", "after", "parameters", "checked against"), ops)
    return _HEAD + _table(head, rows) + _OPS + second


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "".join(
            "| " + " | ".join(cell.replace("|", "\\|") or "–" for cell in line) + " |\n"
            for line in lines
        )
        .replace("| --- ", "|---")
        .replace("|--- |", "|---|")
    )


def _checked(entry: Method | OpSpec) -> str:
    return ", ".join(f"{what} ({how})" for what, how in entry.checked.items())


def _after(op: OpSpec) -> str:
    several = op.reduces or op.apart == "each"
    return "several" if several else "updates" if op.of_updates else "any"


def _needs(method: Method) -> str:
    if any(param.required for param in method.params.values()):
        return ""
    chain = method()
    found = {"delta": ["base"], "either": ["base or none"]}.get(method.space, [])
    if needs_base(chain):
        found = ["base and its values"]
    if any(op.spec.workspace is not None for op in chain):
        found.append("matrices")
    elif granularity_of(chain) == "row":
        found.append("rows")
    if (wanted := collects_of(chain)) is not None:
        found.append(f"statistics ({wanted.kind})")
    return ", ".join(found)


def _link(paper: str) -> str:
    kind, _, rest = paper.partition(":")
    match kind:
        case "arXiv":
            return f"[{rest}](https://arxiv.org/abs/{rest})"
        case "doi":
            return f"[{rest}](https://doi.org/{rest})"
        case "https":
            return f"[source]({paper})"
    return paper


def _count(models: tuple[int, int | None]) -> str:
    least, most = models
    if most is None:
        return f"{least}+"
    return str(least) if least == most else f"{least}–{most}"


def _passes(method: Method) -> str:
    if any(param.required for param in method.params.values()):
        return "–"
    chain = method()
    return str(1 + sum(op.statistic is not None for op in chain))


def _param(param: Param) -> str:
    if param.required:
        return f"`{param.name}` (required)"
    default = "–" if param.default == "" else str(param.default)
    return f"`{param.name}={default}`"
