"""Configurations of mergekit, read as recipes.

Written from mergekit's public description and from what version 0.1.5 was seen to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergebench.checkpoints.documents import read_bounded
from mergebench.core.errors import FormatError
from mergebench.core.plain import parse_yaml
from mergebench.mergekit.document import is_mergekit, parse
from mergebench.mergekit.translate import Translation, translate
from mergebench.recipe.reading import LARGEST, read_recipe

__all__ = ["Translation", "is_mergekit", "parse", "read_either", "translate"]


def read_either(path: Path, methods: Any) -> Translation:
    """Read a recipe, or a configuration of mergekit as a recipe.

    Parameters
    ----------
    path : Path
    methods : mapping of name to method
        The merge methods that there are.

    Raises
    ------
    FormatError
        If the file is neither, or holds something that cannot be done.
    """
    try:
        text = read_bounded(path, LARGEST).decode("utf-8")
        data = parse_yaml(text)
    except (OSError, ValueError):
        # What is wrong with the file is said where recipes are read.
        return Translation(read_recipe(path))
    if not is_mergekit(data):
        # Large ones are not held twice.
        del text, data
        return Translation(read_recipe(path))
    found = translate(parse(text, str(path)), methods)
    if (size := len(found.recipe.to_yaml().encode(errors="replace"))) > LARGEST:
        raise FormatError(
            f"{path}: asks for different values in too many layers",
            got=f"a recipe of {size} bytes",
            expected=f"at most {LARGEST}",
        )
    return found
