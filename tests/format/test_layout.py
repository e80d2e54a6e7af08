"""What a path holds: files, indexes, folders, and attacks on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergebench.checkpoints import ties
from mergebench.checkpoints.layout import Checkpoint, open_checkpoint
from mergebench.core.errors import FormatError, MergebenchError
from mergebench.core.tensor import Array

from .helpers import assert_array, assert_tensors, build, entry, put, random_array, save

ARRAYS = {
    "model.embed_tokens.weight": random_array("BF16", (8, 4), 1),
    "model.layers.0.mlp.up_proj.weight": random_array("BF16", (6, 4), 2),
    "model.norm.weight": random_array("F32", (4,), 3),
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def put_json(path: Path, value: Any) -> Path:
    """Write a JSON file."""
    return put(path, json.dumps(value).encode())


def put_index(folder: Path, weight_map: Mapping[str, Any], **metadata: Any) -> Path:
    """Write an index."""
    document = {"metadata": metadata, "weight_map": weight_map}
    return put_json(folder / "model.safetensors.index.json", document)


def two_shards(folder: Path) -> Path:
    """A model in two shards, ``a`` in the first and ``b`` in the second."""
    save(folder / "one.safetensors", {"a": np.arange(2, dtype=np.float32)})
    save(folder / "two.safetensors", {"b": np.arange(3, dtype=np.float32)})
    return put_index(folder, {"a": "one.safetensors", "b": "two.safetensors"}, total_size=20)


def assert_says(path: Path, *words: str) -> None:
    """The path is refused in one message that names it and holds the words."""
    with pytest.raises(MergebenchError) as caught:
        open_checkpoint(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert caught.value.fix


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "anything.safetensors"]
)
def test_a_folder_with_one_file_is_that_file(tmp_path: Path, name: str) -> None:
    """Of a known name, or of any name if it is the only one."""
    save(tmp_path / name, ARRAYS, metadata={"format": "pt", "x": "y"})
    put_json(tmp_path / "config.json", {"model_type": "llama"})

    checkpoint = open_checkpoint(tmp_path)

    assert checkpoint.label == str(tmp_path)
    assert checkpoint.path == tmp_path
    assert checkpoint.config == {"model_type": "llama"}
    assert dict(checkpoint.metadata) == {"format": "pt", "x": "y"}
    assert checkpoint.shard_of == dict.fromkeys(ARRAYS, name)
    assert checkpoint.notes == ()
    assert_tensors(checkpoint.tensors, ARRAYS)


def test_shards_are_opened_in_the_order_of_their_names(tmp_path: Path) -> None:
    """As a folder and as an index; every shard is identified."""
    save(tmp_path / "out", ARRAYS, shard_size=70)
    expected = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]

    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert_tensors(checkpoint.tensors, ARRAYS)
        assert sorted(set(checkpoint.shard_of.values())) == expected
        assert [about["name"] for about in checkpoint.identity] == expected
        for about in checkpoint.identity:
            stat = (tmp_path / "out" / about["name"]).stat()
            assert (about["size"], about["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
            assert len(about["header_hash"]) == 32
        assert checkpoint.notes == ()


def test_a_named_file_stands_alone_and_a_model_file_for_its_folder(tmp_path: Path) -> None:
    """A config beside ``model.safetensors`` is its config; beside any other file it is not."""
    put_json(tmp_path / "config.json", {"model_type": "llama"})
    save(tmp_path / "model.safetensors", ARRAYS)
    save(tmp_path / "other.safetensors", ARRAYS)

    assert open_checkpoint(tmp_path / "model.safetensors").config == {"model_type": "llama"}
    other = open_checkpoint(tmp_path / "other.safetensors")
    assert other.config is None
    assert other.folder is None
    assert other.side_files == ()
    assert other.sides() == {}


def test_a_shard_given_by_name_is_noted(tmp_path: Path) -> None:
    """It may be meant; it is not silent."""
    path = save(tmp_path / "model-00001-of-00003.safetensors", ARRAYS)

    assert open_checkpoint(path).notes == (
        "model-00001-of-00003.safetensors is one shard of several; the others are not opened",
    )


def test_the_plain_name_wins_over_variants_and_other_files(tmp_path: Path) -> None:
    """As diffusers and transformers choose."""
    save(tmp_path / "model.safetensors", ARRAYS)
    save(tmp_path / "model.fp16.safetensors", {"a": np.zeros(1, np.float16)})
    save(tmp_path / "consolidated.safetensors", {"b": np.zeros(1, np.float16)})

    assert sorted(open_checkpoint(tmp_path).tensors) == sorted(ARRAYS)


def test_an_index_wins_over_a_consolidated_copy(tmp_path: Path) -> None:
    """Mistral ships both; loaders follow the index."""
    two_shards(tmp_path)
    save(tmp_path / "consolidated.safetensors", ARRAYS)

    assert sorted(open_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_metadata_of_the_first_shard_wins(tmp_path: Path) -> None:
    """And what only a later one says is kept."""
    for name, about in (("one", {"x": "1", "y": "1"}), ("two", {"y": "2", "z": "2"})):
        arrays = {name: np.zeros(1, np.float32)}
        save(tmp_path / f"{name}.safetensors", arrays, metadata=about)
    put_index(tmp_path, {"one": "one.safetensors", "two": "two.safetensors"})

    assert dict(open_checkpoint(tmp_path).metadata) == {"x": "1", "y": "1", "z": "2"}


def test_shards_may_lie_in_folders_below(tmp_path: Path) -> None:
    """A relative name that stays inside."""
    save(tmp_path / "parts" / "one.safetensors", {"a": np.zeros(1, np.float32)})
    put_index(tmp_path, {"a": "parts/one.safetensors"})

    assert open_checkpoint(tmp_path).shard_of == {"a": "parts/one.safetensors"}


def test_a_wrong_total_size_is_noted(tmp_path: Path) -> None:
    """Tools count tied weights differently, so it is no error."""
    two_shards(tmp_path)
    put_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, total_size=28)

    assert open_checkpoint(tmp_path).notes == (
        "model.safetensors.index.json states total_size 28, its tensors take 20 bytes",
    )


def test_an_index_without_metadata_is_taken(tmp_path: Path) -> None:
    """Only the weight map is needed."""
    index = two_shards(tmp_path)
    put_json(index, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})

    assert open_checkpoint(tmp_path).notes == ()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, ("no safetensors file", "got nothing")),
        (
            lambda folder: put(folder / "pytorch_model.bin", b"x"),
            ("pytorch_model.bin", "convert the model to safetensors"),
        ),
        (
            lambda folder: put_json(folder / "adapter_config.json", {}),
            ("is an adapter, not a checkpoint",),
        ),
        (lambda folder: save(folder / "adapter_model.safetensors", ARRAYS), ("is an adapter",)),
        (lambda folder: put(folder / "notes.txt", b"x"), ("notes.txt", "folder of the model")),
        (
            lambda folder: [save(folder / f"{n}.safetensors", ARRAYS) for n in "ab"],
            ("a.safetensors, b.safetensors", "pass the file"),
        ),
        (
            lambda folder: save(folder / "model-00001-of-00002.safetensors", ARRAYS),
            ("a part of one", "model-00001-of-00002.safetensors"),
        ),
        (
            lambda folder: [save(folder / "model.safetensors", ARRAYS), two_shards(folder)],
            ("model.safetensors, model.safetensors.index.json",),
        ),
        (
            lambda folder: [
                put_json(folder / "model_index.json", {}),
                save(folder / "unet" / "diffusion_pytorch_model.safetensors", ARRAYS),
                save(folder / "vae" / "diffusion_pytorch_model.safetensors", ARRAYS),
                put(folder / "scheduler" / "scheduler_config.json", b"{}"),
            ],
            ("diffusers pipeline", "got unet, vae"),
        ),
    ],
)
def test_other_folders_are_refused_saying_what_is_there(
    tmp_path: Path, make: Callable[[Path], Any], words: tuple[str, ...]
) -> None:
    """Adapters, pipelines, other formats, several checkpoints, none."""
    make(tmp_path)

    assert_says(tmp_path, *words)


def test_paths_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    """Nothing there, an adapter, a torch file."""
    assert_says(tmp_path / "none", "no such file or folder")
    assert_says(tmp_path / ("x" * 300), "cannot be opened", "too long")
    assert_says(save(tmp_path / "adapter_model.safetensors", ARRAYS), "is an adapter")
    assert_says(put(tmp_path / "x.bin", b"PK\3\4" + b"\xff" * 9), "zip archive", "convert it")


# --- indexes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors",
     "a/../ok.safetensors", "..", "", ".",
     "..\\evil.safetensors", "sub\\evil.safetensors", "C:evil.safetensors", "C:/evil.safetensors",
     "//host/share/evil.safetensors", "evil\0.safetensors"],
)  # fmt: skip
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """Even where the file exists and is sound."""
    save(tmp_path / "evil.safetensors", {"a": np.zeros(1, np.float32)})
    save(tmp_path / "model" / "ok.safetensors", {"b": np.zeros(1, np.float32)})
    (tmp_path / "model" / "a").mkdir()
    put_index(tmp_path / "model", {"a": name, "b": "ok.safetensors"})

    with pytest.raises(FormatError, match="names a file outside of the model folder"):
        open_checkpoint(tmp_path / "model")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    """A shard, or a folder of shards, that is really elsewhere."""
    save(tmp_path / "private" / "x.safetensors", {"a": np.zeros(1, np.float32)})
    for name, target in (("one", "../private/x.safetensors"), ("two", "../private")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "link").symlink_to(target)
        put_index(folder, {"a": "link" if name == "one" else "link/x.safetensors"})

        with pytest.raises(FormatError, match="outside of the model folder"):
            open_checkpoint(folder)


def test_links_that_turn_in_a_circle_are_refused(tmp_path: Path) -> None:
    """Following them would never end."""
    (tmp_path / "a.safetensors").symlink_to("b.safetensors")
    (tmp_path / "b.safetensors").symlink_to("a.safetensors")
    put_index(tmp_path, {"a": "a.safetensors"})

    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


def in_cache(root: Path) -> Path:
    """A snapshot as a Hugging Face cache holds it: links into the blobs of its repository."""
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    two_shards(repository / "blobs")
    put_json(repository / "blobs" / "cafe", {"model_type": "llama"})
    put_json(repository / "blobs" / "beef", {"version": "1.0"})
    for name, blob in {
        "model.safetensors.index.json": "model.safetensors.index.json",
        "one.safetensors": "one.safetensors",
        "two.safetensors": "two.safetensors",
        "config.json": "cafe",
        "tokenizer.json": "beef",
    }.items():
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_snapshot_of_the_hub_cache_is_opened(tmp_path: Path, monkeypatch: Any) -> None:
    """Its files are links into the same repository, by absolute and by relative path."""
    snapshot = in_cache(tmp_path)
    assert sorted(open_checkpoint(snapshot).tensors) == ["a", "b"]

    monkeypatch.chdir(snapshot)
    checkpoint = open_checkpoint(Path())
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.config == {"model_type": "llama"}
    assert sorted(checkpoint.sides()) == ["config.json", "tokenizer.json"]
    assert checkpoint.left_out == ()


def test_a_snapshot_may_not_link_to_another_repository(tmp_path: Path) -> None:
    """Only to its own blobs."""
    snapshot = in_cache(tmp_path)
    other = save(tmp_path / "models--org--other" / "x.safetensors", {"a": np.zeros(1, np.float32)})
    (snapshot / "one.safetensors").unlink()
    (snapshot / "one.safetensors").symlink_to(other)

    with pytest.raises(FormatError, match="outside of the model folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: (folder / "two.safetensors").unlink(),
            ("shard two.safetensors is missing", "expected 2 shards", "got 1"),
        ),
        (
            lambda folder: put_index(folder, {"a": "one.safetensors", "b": "one.safetensors"}),
            ("places tensor 'b' in one.safetensors, which does not hold it",),
        ),
        (
            lambda folder: save(
                folder / "one.safetensors",
                {"a": np.zeros(2, np.float32), "x": np.zeros(1)},
                force=True,
            ),
            ("one.safetensors holds tensor 'x', which the index does not name",),
        ),
        (
            lambda folder: save(
                folder / "two.safetensors",
                {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.float32)},
                force=True,
            ),
            ("tensor 'a' is in two shards", "one.safetensors and two.safetensors"),
        ),
        (
            lambda folder: (folder / "two.safetensors").write_bytes(LFS),
            ("two.safetensors: is a Git-LFS pointer",),
        ),
        (
            lambda folder: (folder / "two.safetensors").write_bytes(
                (folder / "two.safetensors").read_bytes()[:-1]
            ),
            ("two.safetensors: the file is truncated",),
        ),
        (lambda folder: put_index(folder, {}), ("`weight_map` does not map",)),
        (lambda folder: put_index(folder, {"a": 1}), ("`weight_map` does not map",)),
        (
            lambda folder: put_json(folder / "model.safetensors.index.json", {"weight_map": []}),
            ("`weight_map` does not map",),
        ),
        (
            lambda folder: put_json(folder / "model.safetensors.index.json", []),
            ("does not hold a JSON object",),
        ),
        (
            lambda folder: put(folder / "model.safetensors.index.json", b"{"),
            ("model.safetensors.index.json: is not sound JSON",),
        ),
        (
            lambda folder: put(folder / "model.safetensors.index.json", b"\xff"),
            ("is not sound JSON",),
        ),
        (
            lambda folder: put(folder / "model.safetensors.index.json", LFS),
            ("is a Git-LFS pointer", "run `git lfs pull`"),
        ),
        (
            lambda folder: put(
                folder / "model.safetensors.index.json",
                b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}',
            ),
            ("the key 'a' twice",),
        ),
        (
            lambda folder: put_index(folder, {"a": "pytorch_model-00001-of-00002.bin"}),
            ("which is not a safetensors file", "convert the model"),
        ),
        (lambda folder: put_index(folder, {"a": "x" * 300 + ".safetensors"}), ("is missing",)),
        (
            lambda folder: put_index(folder, {"a": str(put(folder / "x.bin", b"x").name)}),
            ("x.bin, which is not a safetensors file",),
        ),
    ],
)  # fmt: skip
def test_unsound_indexes_are_refused(
    tmp_path: Path, change: Callable[[Path], Any], words: tuple[str, ...]
) -> None:
    """Index and shards must hold the same tensors, each once."""
    two_shards(tmp_path)
    change(tmp_path)

    with pytest.raises(FormatError) as caught:
        open_checkpoint(tmp_path)
    for word in (str(tmp_path), *words):
        assert word in str(caught.value)
    assert caught.value.fix


# --- configs and side files ----------------------------------------------------------------------


def test_side_files_are_those_a_loader_needs(tmp_path: Path) -> None:
    """Tokenizer, processor, templates, terms; no code, no weights, no notes."""
    taken = [
        "1_Pooling/config.json", "2_Dense/config.json", "LICENSE", "LICENSE.txt", "NOTICE",
        "added_tokens.json", "additional_chat_templates/tools.jinja", "chat_template.jinja",
        "config.json", "config_sentence_transformers.json", "generation_config.json",
        "merges.txt", "modules.json", "preprocessor_config.json", "processor_config.json",
        "sentence_bert_config.json", "special_tokens_map.json", "spiece.model",
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "video_preprocessor_config.json", "vocab.json", "vocab.txt",
    ]  # fmt: skip
    left = ["2_Dense/model.safetensors", "modeling_x.py", "tokenizer_x.py"]
    ignored = ["README.md", "pytorch_model.bin", "notes.txt", "training_args.bin"]
    save(tmp_path / "model.safetensors", ARRAYS)
    for name in (*taken, *left, *ignored):
        put(tmp_path / name, b"{}")

    checkpoint = open_checkpoint(tmp_path)

    assert checkpoint.sides() == {name: tmp_path / name for name in taken}
    assert checkpoint.side_files == tuple(tmp_path / name for name in sorted(taken))
    assert checkpoint.left_out == tuple(tmp_path / name for name in left)
    assert checkpoint.notes == tuple(f"{tmp_path / name} is not copied" for name in left)


def test_a_side_file_that_links_out_is_left_out(tmp_path: Path) -> None:
    """A downloaded model must not have a private file copied into an output."""
    secret = put(tmp_path / "private" / "key", b"secret")
    save(tmp_path / "model" / "model.safetensors", ARRAYS)
    (tmp_path / "model" / "tokenizer.json").symlink_to(secret)

    checkpoint = open_checkpoint(tmp_path / "model")

    assert checkpoint.side_files == ()
    assert checkpoint.left_out == (tmp_path / "model" / "tokenizer.json",)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", LFS])
def test_an_unsound_config_is_refused(tmp_path: Path, content: bytes) -> None:
    """It decides too much to be ignored."""
    save(tmp_path / "model.safetensors", ARRAYS)
    put(tmp_path / "config.json", content)

    assert_says(
        tmp_path,
        "config.json",
    )


@pytest.mark.parametrize("given", ["", "model.safetensors"])
def test_a_folder_that_cannot_be_listed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """The system's own words."""
    save(tmp_path / "model.safetensors", ARRAYS)

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(MergebenchError, match="cannot be listed, got Permission denied"):
        open_checkpoint(tmp_path / given)


def test_configs_may_hold_infinities(tmp_path: Path) -> None:
    """Python writes them, so real configs have them."""
    save(tmp_path / "model.safetensors", ARRAYS)
    put(tmp_path / "config.json", b'{"clip": Infinity}')

    config = open_checkpoint(tmp_path).config
    assert config == {"clip": float("inf")}


# --- tied weights --------------------------------------------------------------------------------


def tied(folder: Path, config: Any, head: Array, **more: Array) -> Checkpoint:
    """A model with an embedding and a head."""
    embedding = ARRAYS["model.embed_tokens.weight"]
    save(folder / "model.safetensors",
         {"model.embed_tokens.weight": embedding, "lm_head.weight": head} | more)  # fmt: skip
    put_json(folder / "config.json", config)
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    "config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}]
)
@pytest.mark.parametrize("piece", [2, 6, 8 << 20])
def test_a_stored_tie_is_an_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, piece: int
) -> None:
    """Compared in pieces of any size, down to one entry."""
    monkeypatch.setattr(ties, "PIECE", piece)
    checkpoint = tied(tmp_path, config, ARRAYS["model.embed_tokens.weight"])

    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert checkpoint.notes == ()
    assert_array(checkpoint.tensors["lm_head.weight"].read(0, 4),
                 ARRAYS["model.embed_tokens.weight"].reshape(-1)[:4])  # fmt: skip


def test_a_tie_that_is_none_is_noted(tmp_path: Path) -> None:
    """One different byte, the last one."""
    head = ARRAYS["model.embed_tokens.weight"].copy()
    head.view(np.uint8)[-1, -1] ^= 1
    checkpoint = tied(tmp_path, {"tie_word_embeddings": True}, head)

    assert checkpoint.aliases == {}
    assert checkpoint.notes == (
        (
            "the config ties the embeddings, but lm_head.weight differs from "
            "model.embed_tokens.weight: both are kept"
        ),
    )


@pytest.mark.parametrize(
    ("config", "head"),
    [
        ({"tie_word_embeddings": False}, ARRAYS["model.embed_tokens.weight"]),
        ({}, ARRAYS["model.embed_tokens.weight"]),
        ({"tie_word_embeddings": "yes", "text_config": 3}, ARRAYS["model.embed_tokens.weight"]),
        ({"tie_word_embeddings": True}, random_array("BF16", (4, 8))),
        ({"tie_word_embeddings": True}, random_array("F16", (8, 4))),
    ],
)
def test_no_tie_without_the_config_or_the_same_shape(
    tmp_path: Path, config: Any, head: Array
) -> None:
    """Equal bytes alone may be chance; other shapes are other tensors."""
    checkpoint = tied(tmp_path, config, head)

    assert checkpoint.aliases == {}
    assert checkpoint.notes == ()


def test_positions_are_not_the_input_embedding(tmp_path: Path) -> None:
    """A head as large as the positions is not compared with them."""
    checkpoint = tied(
        tmp_path,
        {"tie_word_embeddings": True},
        random_array("BF16", (2, 4)),
        **{"model.embed_positions.weight": random_array("BF16", (2, 4))},
    )

    assert checkpoint.aliases == {}
    assert checkpoint.notes == ()


# --- quantized -----------------------------------------------------------------------------------

U8 = np.zeros((2, 2), np.uint8)
BF = random_array("BF16", (2, 2))


@pytest.mark.parametrize(
    ("config", "arrays", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {"a": BF}, ("with gptq", "config")),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            {"a": BF},
            ("with fp8", "text_config.quantization_config"),
        ),
        ({"quantization_config": {"load_in_4bit": True}}, {"a": BF}, ("with bitsandbytes",)),
        ({"quantization_config": {}}, {"a": BF}, ("a scheme it does not name",)),
        ({"quantization_config": "awq"}, {"a": BF}, ("a scheme it does not name",)),
        ({"compression_config": {"quant_method": "sparse"}}, {"a": BF}, ("with sparse",)),
        ({}, {"l.qweight": U8}, ("GPTQ or AWQ", "'l.qweight'")),
        ({}, {"l.qzeros": U8}, ("GPTQ or AWQ",)),
        ({}, {"l.scales": BF}, ("GPTQ or AWQ",)),
        ({}, {"l.g_idx": U8}, ("GPTQ or AWQ",)),
        ({}, {"l.weight.absmax": BF}, ("bitsandbytes 4-bit",)),
        ({}, {"l.weight.quant_map": BF}, ("bitsandbytes 4-bit",)),
        ({}, {"l.weight.quant_state.bitsandbytes__nf4": U8}, ("bitsandbytes 4-bit",)),
        ({}, {"l.SCB": BF}, ("bitsandbytes 8-bit",)),
        ({}, {"l.weight_packed": U8}, ("compressed-tensors",)),
        ({}, {"e.up_blocks": U8, "e.up_scales": U8}, ("MXFP4", "'e.up_blocks'")),
        ({}, {"l.weight_scale": BF}, ("scaled fp8",)),
        ({}, {"l.weight_scale_inv": BF}, ("scaled fp8",)),
        ({}, {"l.scale_weight": BF}, ("scaled fp8",)),
        ({}, {"scaled_fp8": BF}, ("scaled fp8",)),
        ({}, {"l.weight": U8}, ("integers in the weight 'l.weight'", "got U8")),
        ({}, {"l.weight": U8.astype(np.int32)}, ("integers in the weight", "got I32")),
    ],
)
def test_quantized_checkpoints_are_refused_by_scheme(
    tmp_path: Path, config: Any, arrays: dict[str, Array], words: tuple[str, ...]
) -> None:
    """From the config, from names, from dtypes; they can be opened to look at them."""
    save(tmp_path / "model.safetensors", arrays)
    put_json(tmp_path / "config.json", config)

    assert_says(tmp_path, *words, "dequantize it first")
    looked = open_checkpoint(tmp_path, allow_quantized=True)
    assert sorted(looked.tensors) == sorted(arrays)


def test_integers_and_plain_fp8_are_not_quantization(tmp_path: Path) -> None:
    """Positions, masks, counters, and fp8 weights without scales."""
    arrays = {
        "a.weight": random_array("F8_E4M3", (4, 4)),
        "b.weight": random_array("F8_E5M2", (4, 4)),
        "embeddings.position_ids": np.arange(8).reshape(1, 8),
        "attn.bias": np.ones((1, 1, 4, 4), np.uint8),
        "bn.num_batches_tracked": np.array(3),
        "logit_scale": np.ones((), np.float32),
        "conv_blocks": BF,
        "counts.weight": np.ones(3, np.int64),
    }
    save(tmp_path / "model.safetensors", arrays)
    put_json(tmp_path / "config.json", {"quantization_config": None})

    assert_tensors(open_checkpoint(tmp_path).tensors, arrays)


def test_a_dtype_that_cannot_be_read_names_its_tensor(tmp_path: Path) -> None:
    """Quantized files use dtypes that exist only there."""
    put(tmp_path / "model.safetensors", build({"w_scale": entry("F8_E8M0", [1], 0, 1)}, b"\0"))

    assert_says(tmp_path, "'w_scale'", "F8_E8M0", "before quantization")
