"""All merge methods as one table, from the registry alone."""

from __future__ import annotations

from mergebench.core.params import Param
from mergebench.merge.method import METHODS, Method

_HEAD = """\
# Methods

Made by `mergebench methods --markdown` from the registry. *Space*: task vectors (`delta`, needs a
base unless the inputs are task vectors), whole weights (`weight`), or either. *Passes*: how often
the inputs are read with default parameters. *Presets* (`--compat`) supply the defaults of another
implementation. `mergebench methods NAME` has the formula, every parameter and the deviations.

Every method is held against an independent float64 oracle (`tests/oracle`) and hand-worked numbers
(`tests/golden`). `mergekit-0.1.5` presets are compared with recorded outputs of mergekit entry by
entry (`tests/parity`): what differs is rounding (at most one unit in the last place of the stored
dtype, or 8 float32 roundings) or a tie, and nothing is unexplained. Methods that drop entries at
random are compared by how what stays is rescaled and by their moments.

"""


def markdown() -> str:
    """The page, as Markdown."""
    lines = ["| method | what | paper | space | models | passes | parameters | presets |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in METHODS:
        method = METHODS[name]
        cells = (
            f"`{name}`",
            method.summary.replace("|", "\\|"),
            _link(method.paper),
            method.space,
            _count(method.models),
            _passes(method),
            ", ".join(_param(each) for each in method.params.values()) or "–",
            ", ".join(f"`{preset}`" for preset in method.compat) or "–",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return _HEAD + "\n".join(lines) + "\n"


def _link(paper: str) -> str:
    kind, _, rest = paper.partition(":")
    match kind:
        case "arXiv":
            return f"[{rest}](https://arxiv.org/abs/{rest})"
        case "doi":
            return f"[{rest}](https://doi.org/{rest})"
        case "https":
            return f"[source]({paper})"
    return paper or "–"


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
