"""The chat template of an output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergebench.checkpoints.documents import read_object
from mergebench.core.errors import FormatError, ParameterError
from mergebench.sources import Source

TEMPLATE, TOKENIZER = "chat_template.jinja", "tokenizer_config.json"
#: As a template: the one that most inputs have.
AUTO = "auto"


def with_template(
    companions: Mapping[str, Path | bytes],
    template: str | None,
    reference: Source | None,
    models: Sequence[Source],
) -> dict[str, Path | bytes]:
    """The files beside the weights, with a chat template among them.

    Parameters
    ----------
    companions : mapping of file name to file or content
    template : str or None
        Text of the template; ``auto`` for the one that most inputs have, of equally many the
        reference's; ``None`` to change nothing.
    reference : Source or None
        Whose files the companions are; ``None`` where the output has none.
    models : sequence of Source

    Raises
    ------
    ParameterError
        If the output is not the folder of a model, or no input has a template.
    """
    found = dict(companions)
    if template is None:
        return found
    if reference is None or reference.checkpoint is None:
        raise ParameterError(
            "a chat template belongs to the folder of a model",
            fix="give a folder with -o, or leave `chat_template` out",
        )
    if template == AUTO:
        sources = {id(each): each for each in (reference, *models)}.values()
        known = [text for each in sources if (text := _template_of(each)) is not None]
        if not known:
            raise ParameterError(
                "chat_template: auto, and no input has one", fix="give the template itself"
            )
        template = max(known, key=known.count)
    found[TEMPLATE] = template.encode()
    if TOKENIZER in found and "chat_template" in (config := _object(found[TOKENIZER])):
        # Two templates that contradict each other would be left to loaders.
        del config["chat_template"]
        found[TOKENIZER] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return found


def _object(content: Path | bytes) -> dict[str, Any]:
    return read_object(content) if isinstance(content, Path) else dict(json.loads(content))


def _template_of(source: Source) -> str | None:
    """The chat template of a model folder."""
    sides = {} if source.checkpoint is None else source.checkpoint.sides()
    if TEMPLATE in sides:
        try:
            return sides[TEMPLATE].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{sides[TEMPLATE]}: cannot be read as text ({error})") from None
    if TOKENIZER not in sides:
        return None
    text = read_object(sides[TOKENIZER]).get("chat_template")
    return text if isinstance(text, str) else None
