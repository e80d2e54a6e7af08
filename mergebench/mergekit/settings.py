"""What a configuration says beside models and parameters: dtype, vocabulary, chat template."""

from __future__ import annotations

from mergebench.mergekit.document import Document, Path
from mergebench.mergekit.models import reference_of
from mergebench.mergekit.table import CHATML, DTYPES


def dtype_of(document: Document, notes: list[str]) -> str:
    """The dtype of the output."""
    found = {}
    for key in ("dtype", "out_dtype"):
        value = document.data.get(key)
        if value is None:
            continue
        if value not in DTYPES:
            raise document.refuse((key,), "dtype", got=value, expected=", ".join(DTYPES))
        found[key] = DTYPES[value]
    if found.get("dtype", "f32") != "f32":
        notes.append(
            f"dtype: {document.data['dtype']} is what mergekit computes in; here it is float32 "
            "(float64 where an input is), rounded once"
        )
    return found.get("out_dtype", found.get("dtype", "keep"))


def vocab_of(document: Document, notes: list[str]) -> str:
    """What is done with different vocabularies."""
    if "tokenizer" in document.data and "tokenizer_source" in document.data:
        raise document.refuse(("tokenizer",), "stands beside `tokenizer_source`", fix="keep one")
    path: Path = ("tokenizer_source",)
    source = document.data.get("tokenizer_source")
    if document.data.get("tokenizer") is not None:
        path = ("tokenizer", "source")
        about = document.mapping(
            ("tokenizer",), document.data["tokenizer"], ("source", "tokens", "pad_to_multiple_of")
        )
        for key in ("tokens", "pad_to_multiple_of"):
            if about.get(key) not in (None, {}, []):
                raise document.refuse(("tokenizer", key), "is not offered")
        source = about.get("source", "union")
    if source is None:
        return "error"
    asked = source if source == "union" else reference_of(document, path, source)
    given = document.data.get("base_model")
    mine = None if given is None else reference_of(document, ("base_model",), given)
    if asked == "union":
        return "pad"
    if asked in ("base", mine):
        if mine is None:
            notes.append(
                "tokenizer_source: base without base_model: the vocabulary is the first model's"
            )
        return "base"
    raise document.refuse(
        path,
        "the vocabulary of a model that is not the base is not offered",
        got=source,
        expected="union or base",
    )


def template_of(document: Document) -> str | None:
    """The chat template of the output."""
    value = document.data.get("chat_template")
    if value is None:
        return None
    path: Path = ("chat_template",)
    text = document.text(path, value)
    if text == "chatml":
        return CHATML
    if text == "auto" or "{" in text:
        return text
    raise document.refuse(
        path, "no template of this name is known", got=text, expected="auto, chatml or a template",
        fix="write the template itself",
    )  # fmt: skip
