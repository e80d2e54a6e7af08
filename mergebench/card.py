"""The model card of an output folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

#: Longest recipe and weight that a card shows, in characters.
_SHOWN, _CELL = 1 << 16, 1000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_ids(names: Sequence[str | None]) -> list[str]:
    """Those names that look like repositories on the Hub, without repetition."""
    return list(dict.fromkeys(name for name in names if name and _HUB_ID.fullmatch(name)))


def card(
    title: str,
    kind: str,
    recipe_yaml: str,
    method: str,
    paper: str,
    inputs: Sequence[Mapping[str, Any]],
    origins: Sequence[str | None],
    library: str | None = None,
    parts: Sequence[tuple[str, str, str]] = (),
    recipe_file: str = "",
) -> str:
    """Markdown with the front matter the Hub reads.

    Parameters
    ----------
    title : str
    kind : model, lora or delta
    recipe_yaml : str
        The recipe, shown in full unless it is of a size that nobody reads.
    method, paper : str
        ``""`` for the method where ``parts`` say everything.
    inputs : sequence of mappings
        ``role``, ``path`` and ``weight`` of every input.
    origins : sequence of str or None
        Names that the inputs' configs give; those that are Hub ids become ``base_model``.
    library : str, optional
        ``library_name``, such as ``transformers`` or ``peft``.
    parts : sequence of (selection, method, paper)
        Tensors that are merged by methods of their own.
    recipe_file : str, optional
        Name of the file beside the card that has the recipe, for those that are not shown.
    """
    import yaml

    front: dict[str, Any] = {}
    if found := hub_ids(origins):
        front["base_model"] = found
        front["base_model_relation"] = "adapter" if kind == "lora" else "merge"
    if library:
        front["library_name"] = library
    front["tags"] = ["merge", "mergebench"]
    rows = "\n".join(
        f"| {each['role']} | `{each['path']}` | {_weight(each.get('weight', ''))} |"
        for each in inputs
    )
    what = {"model": "model", "lora": "LoRA adapter", "delta": "task vector"}[kind]
    how = f" with **{method}**{_link(paper)}" if method else ""
    listed = "".join(
        f"- `{' '.join(select.split())}` with **{name}**{_link(about)}\n"
        for select, name, about in parts
    )
    if parts:
        listed = f"Tensors with methods of their own, of which the first fits:\n\n{listed}\n"
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"A merged {what}, made by mergebench{how}.\n\n"
        f"{listed}| role | input | weight |\n|---|---|---|\n{rows}\n\n"
        f"## Recipe\n\n{_shown(recipe_yaml, recipe_file)}"
    )


def _weight(weight: Any) -> str:
    text = str(weight)
    return text if len(text) <= _CELL else "see the recipe"


def _shown(recipe: str, file: str) -> str:
    if len(recipe) <= _SHOWN or not file:
        return f"```yaml\n{recipe}```\n"
    return f"`{file}` beside this file, {len(recipe):,} characters.\n"


def _link(paper: str) -> str:
    return f" ([{paper}]({_address(paper)}))" if paper else ""


def _address(paper: str) -> str:
    """Where a paper is found that is named ``arXiv:…``, ``doi:…`` or by its address."""
    for mark, place in (("arXiv:", "https://arxiv.org/abs/"), ("doi:", "https://doi.org/")):
        if paper.startswith(mark):
            return place + paper.removeprefix(mark)
    return paper
