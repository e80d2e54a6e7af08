"""Which token stands at which row: read from the files of a tokenizer, nothing is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import is_file, read_bounded, read_object
from mergebench.core.errors import FormatError

FAST = "tokenizer.json"
#: Every file that is read.
FILES = (FAST, "vocab.json", "vocab.txt", "added_tokens.json")
#: Largest id that is believed.
_MOST = 1 << 26


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens of a tokenizer.

    Attributes
    ----------
    ids : mapping of token to row
    file : str
        Where they stand, for messages.
    added : mapping of token to JSON object
        How ``tokenizer.json`` describes added tokens.
    """

    ids: Mapping[str, int]
    file: str
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def by_row(self) -> dict[int, str]:
        """Row -> token; of several tokens of one row the first in the file."""
        found: dict[int, str] = {}
        for token, row in self.ids.items():
            found.setdefault(row, token)
        return found


def read_vocabulary(folder: Path | None) -> Vocabulary | None:
    """The tokens of a model folder; ``None`` where no file that we read has them.

    Read are ``tokenizer.json``, else ``vocab.json`` or ``vocab.txt`` with ``added_tokens.json``.
    SentencePiece models alone are not.

    Raises
    ------
    FormatError
        If a file is larger than 100 MB or not what its name says.
    MergebenchError
        If the system cannot read it.
    """
    if folder is None:
        return None
    if is_file(path := folder / FAST):
        return _fast(path)
    for name in ("vocab.json", "vocab.txt"):
        if is_file(path := folder / name):
            ids = _table(path) if name.endswith(".json") else _lines(path)
            if is_file(more := folder / "added_tokens.json"):
                ids |= _table(more)
            return Vocabulary(ids, name)
    return None


def _fast(path: Path) -> Vocabulary | None:
    data = read_object(path)
    model = data.get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, dict):
        ids = _checked(path, listed)
    elif isinstance(listed, list):
        # Unigram: [token, score] by rank.
        if not all(isinstance(each, list) and each and isinstance(each[0], str) for each in listed):
            raise FormatError(f"{path}: its Unigram vocabulary is no list of [token, score]")
        ids = {each[0]: row for row, each in reversed(list(enumerate(listed)))}
    else:
        return None
    added: dict[str, Mapping[str, Any]] = {}
    listed_more = data.get("added_tokens") or []
    if not isinstance(listed_more, list):
        raise FormatError(f"{path}: `added_tokens` is no list", got=repr(listed_more)[:100])
    for each in listed_more:
        if not isinstance(each, dict) or not isinstance(each.get("content"), str):
            raise FormatError(f"{path}: an added token has no content", got=repr(each)[:100])
        added[each["content"]] = each
    ids |= _checked(path, {token: each.get("id") for token, each in added.items()})
    return Vocabulary(ids, path.name, added)


def _table(path: Path) -> dict[str, int]:
    return _checked(path, read_object(path))


def _checked(path: Path, table: Mapping[Any, Any]) -> dict[str, int]:
    for token, row in table.items():
        if not isinstance(row, int) or isinstance(row, bool) or not 0 <= row < _MOST:
            raise FormatError(f"{path}: the row of token {token!r}", got=repr(row)[:100])
    return dict(table)


def _lines(path: Path) -> dict[str, int]:
    try:
        text = read_bounded(path).decode("utf-8", errors="surrogateescape")
    except OSError as error:
        raise cannot("read", path, error) from error
    # As WordPiece tokenizers read it: a line without its end is a token.
    return {
        token.rstrip("\r"): row for row, token in enumerate(text.removesuffix("\n").split("\n"))
    }
