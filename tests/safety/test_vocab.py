"""Vocabularies of different size or order: rows of embeddings and heads, matched by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mergebench.checkpoints.rows import MeanRows, Rows
from mergebench.checkpoints.tokenizers import read_vocabulary
from mergebench.core.errors import FormatError
from mergebench.core.tensor import ArrayTensor
from mergebench.merge.planning import make_plan
from mergebench.merge.resume import resume_key
from mergebench.recipe import ModelRef, Recipe
from tests.helpers.files import BF16, F32, F64, Array, listing, read
from tests.helpers.models import save_folder
from tests.helpers.running import assert_done, assert_refused, call

EMBED, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.w.weight"


def model(seed: int, rows: int) -> dict[str, Array]:
    """An embedding, a head with a bias, positions and one more matrix."""
    random = np.random.default_rng(seed)
    shapes = {
        EMBED: (rows, 3),
        HEAD: (rows, 3),
        "lm_head.bias": (rows,),
        "model.embed_positions.weight": (rows, 3),
        OTHER: (3, 3),
    }
    if rows != 4:
        shapes["model.embed_positions.weight"] = (4, 3)
    return {name: random.standard_normal(shape).astype(F32) for name, shape in shapes.items()}


def save(
    folder: Path,
    arrays: Mapping[str, Array],
    tokens: Sequence[str] | None,
    added: Sequence[str] = (),
    rows: int | None = None,
) -> None:
    """A model folder with a tokenizer, or without one."""
    size = arrays[EMBED].shape[0] if rows is None else rows
    save_folder(folder, arrays, {"vocab_size": size})
    if tokens is None:
        return
    vocab = {token: row for row, token in enumerate(tokens)}
    more = [
        {"id": len(tokens) + place, "content": token, "special": token.startswith("<"),
         "single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
        for place, token in enumerate(added)
    ]  # fmt: skip
    data = {
        "version": "1.0",
        "added_tokens": more,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[0]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))


def ids(folder: Path) -> dict[str, int]:
    """Tokens of an output's tokenizer."""
    found = read_vocabulary(folder)
    assert found is not None
    return dict(found.ids)


def merged(path: Path, policy: str, *models: str, method: str = "task_arithmetic") -> Path:
    """Models on the base with λ = 1."""
    arguments = ("merge", *models, "-b", "base", "-m", method, "--vocab", policy)
    assert_done(call(*arguments, "-o", "out", "--force", cwd=path))
    return path / "out"


def assert_rows(found: Array, expected: Sequence[Any]) -> None:
    """Row by row, to float32 rounding."""
    assert found.shape[0] == len(expected)
    for row, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(mine.astype(F64), theirs, atol=2e-6, err_msg=f"row {row}")


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, dict[str, dict[str, Array]]]:
    """A base of 4 tokens; one model adds two tokens, another adds one of them and one more."""
    models = {"base": model(0, 4), "one": model(1, 6), "two": model(2, 6)}
    save(tmp_path / "base", models["base"], "abcd")
    save(tmp_path / "one", models["one"], "abcd", ["<x>", "y"])
    save(tmp_path / "two", models["two"], "abcd", ["y", "z"])
    return tmp_path, models


def test_the_default_refuses(place: Any) -> None:
    """It says how the vocabularies differ and which options there are, and writes nothing."""
    path, _ = place
    before = listing(path)
    ran = call("merge", "one", "-b", "base", "-m", "ties", "-o", "x", cwd=path)
    assert_refused(ran, "one: its vocabulary is not that of base", "6 rows in one, 4 in base",
                   "2 tokens are new ('<x>', 'y')", "--vocab intersect", "--vocab pad")  # fmt: skip
    assert listing(path) == before


def test_equal_sizes_with_other_tokens_are_refused(tmp_path: Path) -> None:
    """What other tools merge silently into nonsense."""
    save(tmp_path / "base", model(0, 4), "abcd")
    save(tmp_path / "ft", model(1, 4), "abdc")
    ran = call("merge", "ft", "-b", "base", "-m", "ties", "-o", "x", cwd=tmp_path)
    assert_refused(ran, "2 rows mean other tokens, such as row 2: 'd' there and 'c' here")


def test_tokens_in_padding_rows_are_no_difference(tmp_path: Path) -> None:
    """The same size, and a token where the base has none: rows mean the same."""
    save(tmp_path / "base", model(0, 6), "abcd")
    save(tmp_path / "ft", model(1, 6), "abcd", ["e"])
    assert_done(call("merge", "ft", "-b", "base", "-m", "linear", "-o", "x", cwd=tmp_path))


def test_intersect(place: Any) -> None:
    """Rows that all have are merged; the output has the base's size, config and tokenizer."""
    path, models = place
    save(path / "moved", models["two"], "bacq", ["y", "z"])
    out = merged(path, "intersect", "one", "moved")
    found, base, one, two = read(out / "model.safetensors"), *models.values()
    for name in (EMBED, HEAD, "lm_head.bias"):
        b, o, t = (each[name].astype(F64) for each in (base, one, two))
        expected = [o[0] + t[1] - b[0], o[1] + t[0] - b[1], o[2] + t[2] - b[2], b[3]]
        assert_rows(found[name], expected)
    o, t, b = (each[OTHER].astype(F64) for each in (one, two, base))
    assert_rows(found[OTHER], o + t - b)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 4
    assert (out / "tokenizer.json").read_bytes() == (path / "base/tokenizer.json").read_bytes()


def test_pad(place: Any) -> None:
    """New tokens follow; who lacks one does not move it, and a single holder gives its own row."""
    path, models = place
    out = merged(path, "pad", "one", "two")
    found, base, one, two = read(out / "model.safetensors"), *models.values()
    # `two` has y at row 4, which is <x>'s; tokens are numbered as they are added.
    assert ids(out) == {"a": 0, "b": 1, "c": 2, "d": 3, "<x>": 4, "y": 5, "z": 6}
    for name in (EMBED, HEAD, "lm_head.bias"):
        b, o, t = (each[name].astype(F64) for each in (base, one, two))
        both = (o[5] + t[4]) / 2
        expected = [o[r] + t[r] - b[r] for r in range(4)]
        expected += [o[4], both + (o[5] - both) + (t[4] - both), t[5]]
        assert_rows(found[name], expected)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 7
    added = {each["content"]: each for each in
             json.loads((out / "tokenizer.json").read_text())["added_tokens"]}  # fmt: skip
    assert [each["id"] for each in added.values()] == [4, 5, 6]
    assert added["<x>"]["special"]
    assert added["<x>"]["lstrip"]
    assert not added["z"]["special"]


def test_pad_takes_a_tokenizer_that_fits(place: Any) -> None:
    """Files of the model that has exactly the tokens of the output replace the base's."""
    path, models = place
    (path / "base" / "vocab.txt").write_text("a\nb\nc\nd\n")
    (path / "one" / "tokenizer_config.json").write_text('{"mine": 1}')
    out = merged(path, "pad", "one")
    assert (out / "tokenizer.json").read_bytes() == (path / "one/tokenizer.json").read_bytes()
    assert (out / "tokenizer_config.json").read_text() == '{"mine": 1}'
    assert not (out / "vocab.txt").exists()
    assert_rows(read(out / "model.safetensors")[EMBED], models["one"][EMBED])


def test_pad_uses_rows_that_round_a_size_up(tmp_path: Path) -> None:
    """A token may stand in a padding row of the base, whose row then means nothing."""
    base, ft = model(0, 6), model(1, 7)
    save(tmp_path / "base", base, "abcd")
    save(tmp_path / "ft", ft, "abcd", ["e"])
    out = merged(tmp_path, "pad", "ft")
    found = read(out / "model.safetensors")[EMBED]
    assert_rows(found, ft[EMBED])
    assert ids(out)["e"] == 4
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 7


@pytest.mark.parametrize("policy", ["pad", "intersect"])
def test_rows_are_matched_by_index_without_tokenizers(tmp_path: Path, policy: str) -> None:
    """And that is said."""
    base, ft = model(0, 4), model(1, 6)
    save(tmp_path / "base", base, None)
    save(tmp_path / "ft", ft, "abcdef")
    arguments = ("merge", "ft:0.5", "-b", "base", "-m", "task_arithmetic", "-o", "out")
    ran = assert_done(call(*arguments, "--vocab", policy, cwd=tmp_path))
    assert "rows are matched by index, as not every input has a tokenizer" in ran.err
    b, f = base[EMBED].astype(F64), ft[EMBED].astype(F64)
    expected = [*(b + 0.5 * (f[:4] - b)), *(f[4:] if policy == "pad" else [])]
    assert_rows(read(tmp_path / "out" / "model.safetensors")[EMBED], expected)


def test_filters_leave_vocabularies_alone(place: Any) -> None:
    """Where embeddings and heads are not selected, their vocabulary does not matter."""
    path, models = place
    chosen = ("--include", "layers", "-o", "out", "-m", "task_arithmetic")
    assert_done(call("merge", "one", "-b", "base", *chosen, cwd=path))
    found = read(path / "out" / "model.safetensors")
    assert found[EMBED].tobytes() == models["base"][EMBED].tobytes()


def loaded(folder: Path) -> dict[str, int]:
    """Tokens as the library that reads ``tokenizer.json`` numbers them."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def test_added_tokens_are_loaded_at_their_rows(tmp_path: Path) -> None:
    """A padded base, and a model whose own tokenizer puts a token elsewhere."""
    words = [f"x{n}" for n in range(40)]
    save(tmp_path / "base", model(0, 48), [*words[:39], "z"])
    save(tmp_path / "ft", model(1, 48), words, ["n0", "n1"])
    out = merged(tmp_path, "pad", "ft")
    assert loaded(out) == ids(out)
    assert {t: r for t, r in ids(out).items() if r > 39} == {"x39": 40, "n0": 41, "n1": 42}
    found = read(out / "model.safetensors")[EMBED]
    assert_rows(found[40:43], model(1, 48)[EMBED][[39, 40, 41]])


def test_tokenizers_that_would_be_loaded_otherwise_are_refused(tmp_path: Path) -> None:
    """Ids with gaps, twice the same, or beyond the last row."""
    save(tmp_path / "ft", model(1, 6), "abcde")
    for name, tokens in (("gap", {"a": 0, "b": 2}), ("twice", {"a": 0, "b": 0, "c": 1}),
                         ("beyond", {"b": 0, "a": 1, "c": 3_000_000})):  # fmt: skip
        save(tmp_path / name, model(0, 4), "ab")
        text = json.dumps({"model": {"type": "WordLevel", "vocab": tokens}})
        (tmp_path / name / "tokenizer.json").write_text(text)
        arguments = ("merge", "ft", "-b", name, "-m", "ties", "--vocab", "pad", "-o", "x")
        ran = call(*arguments, cwd=tmp_path)
        assert_refused(ran, f"{name}: the ids of its tokenizer are not 0 to", "--vocab intersect")


def test_models_that_name_a_row_differently(tmp_path: Path) -> None:
    """In rows that the base does not name two models may still contradict each other."""
    base, one, two = (model(seed, 6) for seed in range(3))
    save(tmp_path / "base", base, "abcd")
    save(tmp_path / "one", one, "abcd", ["<tool>"])
    save(tmp_path / "two", two, "abcd", ["<image>"])
    arguments = ("merge", "one", "two", "-b", "base", "-m", "task_arithmetic", "-o", "x")
    ran = call(*arguments, cwd=tmp_path)
    assert_refused(ran, "row 4 means", "'<tool>' in one", "'<image>' in two", "--vocab pad")
    found = read(merged(tmp_path, "pad", "one", "two") / "model.safetensors")[EMBED]
    assert_rows(found[4:], [one[EMBED][4], two[EMBED][4]])
    assert ids(tmp_path / "out")["<image>"] == 5
    found = read(merged(tmp_path, "intersect", "one", "two") / "model.safetensors")[EMBED]
    assert_rows(found[4:5], base[EMBED][4:5])


def test_filters_that_split_the_matrices(tmp_path: Path) -> None:
    """What is left out has the base's bytes, and no matrix grows alone."""
    base, ft, large = model(0, 4), model(1, 4), model(2, 6)
    save(tmp_path / "base", base, "abcd")
    save(tmp_path / "ft", ft, "dcba")
    save(tmp_path / "large", large, "abcdef")
    common = ("-b", "base", "-m", "task_arithmetic", "--vocab")
    for left, moved in ((EMBED, HEAD), (HEAD, EMBED)):
        filters = ("--exclude", left.split(".")[-2], "-o", "out", "--force")
        for name, own in (("ft", ft), ("large", large)):
            assert_done(call("merge", name, *common, "intersect", *filters, cwd=tmp_path))
            found = read(tmp_path / "out" / "model.safetensors")
            assert found[left].tobytes() == base[left].tobytes()
            assert_rows(found[moved], own[moved][::-1] if name == "ft" else own[moved][:4])
        ran = call("merge", "large", *common, "pad", *filters, cwd=tmp_path)
        assert_refused(ran, f"{left}: gets rows for new tokens", "--vocab intersect")


def test_task_vectors_cannot_grow(place: Any) -> None:
    """A difference to the base has the base's rows."""
    path, _ = place
    arguments = ("merge", "one", "-b", "base", "-m", "ties", "--as", "delta", "-o", "x")
    assert_refused(call(*arguments, "--vocab", "pad", cwd=path), "no task vector on base")


def test_many_new_tokens(tmp_path: Path) -> None:
    """Two foreign vocabularies of 40,000 tokens are joined without looking at all pairs."""
    count = 40_000
    for name, letter in (("base", "b"), ("ft", "f")):
        arrays = {EMBED: np.ones((count, 1), F32)}
        save(tmp_path / name, arrays, [f"{letter}{n}" for n in range(count)])
    out = merged(tmp_path, "pad", "ft")
    assert read(out / "model.safetensors")[EMBED].shape == (2 * count, 1)


def test_nonfinite_rows_of_a_single_model(place: Any) -> None:
    """A NaN in a row that the base lacks is named, or passed through where that is asked for."""
    path, models = place
    bad = {**models["one"], EMBED: models["one"][EMBED].copy()}
    bad[EMBED][4, 1] = np.nan
    save(path / "bad", bad, "abcd", ["<x>", "y"])
    arguments = ("merge", "bad", "-b", "base", "-m", "task_arithmetic", "--vocab", "pad")
    ran = call(*arguments, "-o", "x", cwd=path)
    assert ran.code == 2
    assert f"error: bad: tensor {EMBED!r} has 1 NaN" in ran.err
    assert_done(call(*arguments, "--allow-nonfinite", "-o", "x", cwd=path))
    found = read(path / "x" / "model.safetensors")[EMBED]
    assert np.argwhere(np.isnan(found)).tolist() == [[4, 1]]


def test_a_changed_tokenizer_is_another_merge(place: Any) -> None:
    """What an interrupted run has done does not count once rows mean other tokens."""
    path, _ = place
    recipe = Recipe((ModelRef(str(path / "one")),), base=str(path / "base"), vocab="intersect",
                    method="task_arithmetic", out=str(path / "out"))  # fmt: skip

    def key() -> str:
        plan = make_plan(recipe)
        return resume_key(plan, plan.variants[0])

    before = key()
    assert key() == before
    save(path / "one", model(1, 6), "abdc", ["<x>", "y"])
    assert key() != before


def test_averages_without_a_base(tmp_path: Path) -> None:
    """The first model plays its part."""
    first, second = model(0, 6), model(1, 4)
    save(tmp_path / "first", first, "abcdef")
    save(tmp_path / "second", second, "dcba")
    arguments = ("merge", "first", "second", "-m", "linear", "--vocab", "intersect", "-o", "out")
    assert_done(call(*arguments, cwd=tmp_path))
    one, two = first[EMBED].astype(F64), second[EMBED].astype(F64)
    expected = [*((one[row] + two[3 - row]) / 2 for row in range(4)), one[4], one[5]]
    assert_rows(read(tmp_path / "out" / "model.safetensors")[EMBED], expected)


def test_pad_needs_a_tokenizer_that_can_be_written(place: Any) -> None:
    """A vocabulary of lines alone has no place for added tokens."""
    path, _ = place
    (path / "base" / "tokenizer.json").unlink()
    (path / "base" / "vocab.txt").write_text("a\nb\nc\nd\n")
    arguments = ("merge", "one", "two", "-b", "base", "-m", "ties", "--vocab", "pad", "-o", "x")
    assert_refused(call(*arguments, cwd=path), "has no tokenizer.json", "--vocab intersect")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": "0"}}}'),
        ("tokenizer.json", '{"model": {"vocab": [["a", 0.0], 3]}}'),
        ("tokenizer.json", '{"model": {"vocab": {}}, "added_tokens": [{"id": 3}]}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": 99999999999}}}'),
        ("tokenizer.json", "[]"),
        ("vocab.json", "{"),
    ],
)
def test_unsound_tokenizers_are_refused(tmp_path: Path, name: str, content: str) -> None:
    """By the name of the file."""
    (tmp_path / name).write_text(content)
    with pytest.raises(FormatError, match=name):
        read_vocabulary(tmp_path)


def test_tokenizer_files(tmp_path: Path) -> None:
    """Unigram lists, tables and lines; the first that is there counts."""
    assert read_vocabulary(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("a\r\nb\n\n")
    assert read_vocabulary(tmp_path).ids == {"a": 0, "b": 1, "": 2}  # type: ignore[union-attr]
    (tmp_path / "vocab.json").write_text('{"u": 1, "v": 0}')
    (tmp_path / "added_tokens.json").write_text('{"w": 5}')
    assert read_vocabulary(tmp_path).ids == {"u": 1, "v": 0, "w": 5}  # type: ignore[union-attr]
    unigram = {"model": {"type": "Unigram", "vocab": [["x", 0.0], ["y", -1.5], ["x", -2]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert read_vocabulary(tmp_path).ids == {"x": 0, "y": 1}  # type: ignore[union-attr]


@given(data=st.data())
def test_rows_in_another_order(data: st.DataObject) -> None:
    """Any index, any range, any width: what numpy gathers."""
    rows, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    wanted = data.draw(st.lists(st.integers(-1, rows - 1), min_size=1, max_size=9))
    index = np.array(wanted, np.int64)
    own = np.arange(rows * width, dtype=F32).reshape(rows, width)
    fallback = -np.arange(1, index.size * width + 1, dtype=F32).reshape(index.size, width)
    view = Rows(ArrayTensor(own), index, ArrayTensor(fallback))
    expected = np.where((index >= 0)[:, None], own[index], fallback).reshape(-1)
    start = data.draw(st.integers(0, expected.size))
    stop = data.draw(st.integers(start, expected.size))
    assert view.shape == (index.size, width)
    assert view.read(start, stop).tolist() == expected[start:stop].tolist()
    other = np.array(data.draw(st.permutations(wanted)), np.int64)
    mean = MeanRows([ArrayTensor(own)] * 2, [index, other], "F32")
    have = np.stack([index >= 0, other >= 0])[:, :, None]
    parts = np.stack([own[index], own[other]]) * have
    average = (parts.sum(0) / np.maximum(have.sum(0), 1)).astype(F32).reshape(-1)
    assert mean.read(start, stop).tolist() == average[start:stop].tolist()


def test_rows_of_other_dtypes() -> None:
    """A half-precision tensor beside a single-precision one is read as the wider."""
    own = ArrayTensor(np.ones((2, 2), BF16))
    view = Rows(own, np.array([0, -1]), ArrayTensor(np.full((2, 2), 3, F32)))
    assert view.dtype == "F32"
    assert view.read(1, 3).tolist() == [1, 3]


def llama(folder: Path, tokens: Sequence[str], extra: Sequence[str], seed: int) -> None:
    """A tiny Llama with a real tokenizer, resized for added tokens."""
    torch.manual_seed(seed)
    vocab = {token: row for row, token in enumerate(tokens)}
    backend = Tokenizer(WordLevel(vocab, unk_token=tokens[0]))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=tokens[0])
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    if extra:
        tokenizer.add_tokens(list(extra))
        network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_transformers_opens_the_result(tmp_path: Path) -> None:
    """Tokenizer, config and matrices agree, and a single holder's token has its own row."""
    words = ["<unk>", "the", "cat", "sat", "on"]
    llama(tmp_path / "base", words, (), 0)
    llama(tmp_path / "one", words, ("mat",), 1)
    llama(tmp_path / "two", words, ("hat", "mat"), 2)
    arguments = ("merge", "one", "two", "-b", "base", "-m", "task_arithmetic", "-p", "lam=0.5")
    allow = ("--vocab", "pad", "--allow-base-mismatch", "-o", "out")
    assert_done(call(*arguments, *allow, cwd=tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 7 == network.config.vocab_size
    assert network.get_input_embeddings().weight.shape == (7, 16)
    assert network.get_output_embeddings().weight.shape == (7, 16)
    (row,) = tokenizer("hat", add_special_tokens=False)["input_ids"]
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    (theirs,) = AutoTokenizer.from_pretrained(tmp_path / "two")(
        "hat", add_special_tokens=False
    )["input_ids"]  # fmt: skip
    torch.testing.assert_close(
        network.get_input_embeddings().weight[row], own.get_input_embeddings().weight[theirs]
    )
    assert tokenizer.decode(tokenizer("the hat sat on mat")["input_ids"]) == "the hat sat on mat"
