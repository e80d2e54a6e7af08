"""Model cards for the Hub: what an output knows of itself, merged with what people wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergebench.card import card, hub_ids
from mergebench.checkpoints.hub import is_hub, parse_hub
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.plain import parse_yaml
from mergebench.merge.method import METHODS
from mergebench.recipe.reading import recipe_from_dict
from mergebench.ship.packing import Packing
from mergebench.sources import Source

_START, _END = "<!-- mergebench: how to load it -->", "<!-- mergebench: end -->"
_SECTION = re.compile(re.escape(_START) + ".*?" + re.escape(_END), re.DOTALL)
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_RELATIONS = {"model": "merge", "delta": "merge", "lora": "adapter"}


def push_card(
    repo: str,
    written: str | None,
    made: Mapping[str, Any] | None,
    source: Source | None,
    packed: Packing | None = None,
) -> str:
    """The card that is pushed.

    What people wrote stays: front matter is only completed, and of the text only the section on
    loading is ours.

    Parameters
    ----------
    repo : str
        Where to.
    written : str or None
        The README there is.
    made : mapping or None
        The manifest of the output.
    source : Source or None
        What is pushed, where it can be opened.
    packed : Packing, optional
        How it was packed.

    Raises
    ------
    FormatError
        If the README has front matter that is not YAML.
    """
    import yaml

    text = written if written is not None else _generated(repo, made)
    front, body = _split(text)
    front = _completed(front, made, source, packed)
    body = _with_section(body, _section(repo, front, source, packed))
    head = (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n" if front else ""
    )
    return head + body


def _split(text: str) -> tuple[dict[str, Any], str]:
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    try:
        data = parse_yaml(found[1])
    except ValueError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FormatError(
            "README.md: its front matter is not YAML", got=reason, fix="correct it"
        ) from None
    if data is not None and not isinstance(data, dict):
        raise FormatError("README.md: its front matter is not a mapping", fix="correct it")
    return dict(data or {}), text[found.end() :]


def _completed(
    front: dict[str, Any],
    made: Mapping[str, Any] | None,
    source: Source | None,
    packed: Packing | None,
) -> dict[str, Any]:
    found = dict(front)
    if not found.get("base_model"):
        # The Hub takes an empty list for an error.
        found.pop("base_model", None)
        if bases := _bases(made, source):
            found["base_model"] = bases
    if "base_model" in found and (kind := _kind(made, source)) in _RELATIONS:
        whole = kind == "model" and made is None
        found.setdefault("base_model_relation", "finetune" if whole else _RELATIONS[kind])
    if "base_model" not in found:
        found.pop("base_model_relation", None)
    # PEFT does not read packed files.
    if packed is None and (library := _library(source)):
        found.setdefault("library_name", library)
    if made is not None:
        tags = found.get("tags") or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        found["tags"] = list(dict.fromkeys([*tags, "merge", "mergebench"]))
    return found


def _bases(made: Mapping[str, Any] | None, source: Source | None) -> list[str]:
    names: list[Any] = []
    for each in () if made is None else made.get("inputs", ()):
        names += [parse_hub(part).repo for part in str(each["path"]).split("+") if _sound(part)]
        names.append((each.get("origin") or {}).get("repo"))
    if source is not None:
        names.append(source.config.get("base_model_name_or_path"))
    return hub_ids([name for name in names if isinstance(name, str)])


def _sound(reference: str) -> bool:
    try:
        return is_hub(reference) and bool(parse_hub(reference))
    except MergebenchError:
        return False


def _kind(made: Mapping[str, Any] | None, source: Source | None) -> str:
    if made is not None and made.get("kind") in _RELATIONS:
        return str(made["kind"])
    if source is None:
        return ""
    return "model" if source.checkpoint is not None else "lora"


def _library(source: Source | None) -> str | None:
    if source is None:
        return None
    if source.checkpoint is None:
        return "peft" if source.config.get("peft_type") else None
    config = source.checkpoint.config or {}
    if "_class_name" in config:
        return "diffusers"
    return "transformers" if "model_type" in config else None


def _generated(repo: str, made: Mapping[str, Any] | None) -> str:
    import yaml

    title = repo.rsplit("/", maxsplit=1)[-1]
    if made is None:
        return f"# {title}\n"
    recipe = made["recipe"]
    try:
        method = recipe_from_dict(recipe).method
    except MergebenchError:
        method = ""
    paper = METHODS[method].paper if method in list(METHODS) else ""
    return card(
        title=title,
        kind=str(made["kind"]) if made.get("kind") in _RELATIONS else "model",
        recipe_yaml=str(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)),
        method=method,
        paper=paper,
        inputs=made["inputs"],
        origins=(),
    )


def _with_section(body: str, section: str) -> str:
    if _SECTION.search(body):
        return _SECTION.sub(lambda _: section, body, count=1)
    return f"{body.rstrip()}\n\n{section}\n"


def _section(
    repo: str, front: Mapping[str, Any], source: Source | None, packed: Packing | None
) -> str:
    lines, language = _loading(repo, front, source, packed)
    text = f"{_START}\n## How to load it\n\n```{language}\n" + "\n".join(lines) + "\n```\n"
    if packed is not None:
        text += "\n## Size and error\n\n| | |\n|---|---|\n"
        text += "".join(f"| {key} | {value} |\n" for key, value in packed.rows())
    return text + _END


def _loading(
    repo: str, front: Mapping[str, Any], source: Source | None, packed: Packing | None
) -> tuple[Sequence[str], str]:
    bases = front.get("base_model") or ["BASE"]
    base = bases if isinstance(bases, str) else str(bases[0])
    library = _library(source)
    config = {} if source is None or source.checkpoint is None else source.checkpoint.config or {}
    if library == "transformers":
        listed = config.get("architectures")
        name = listed[0] if isinstance(listed, list) and listed else "AutoModel"
        return (
            f"from transformers import {name}, AutoTokenizer",
            f'model = {name}.from_pretrained("{repo}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        ), "python"
    if library == "diffusers":
        name = config["_class_name"]
        return (
            f"from diffusers import {name}",
            f'model = {name}.from_pretrained("{repo}")',
        ), "python"
    if library == "peft" and packed is None:
        return (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f'model = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(model, "{repo}")',
        ), "python"
    if source is not None and source.checkpoint is not None:
        return (f"mergebench pull {repo}",), "sh"
    under = base if base == "BASE" else f"hf://{base}"
    return (
        "pip install mergebench",
        f"mergebench merge hf://{repo} --base {under} --method task_arithmetic -o model",
    ), "sh"
