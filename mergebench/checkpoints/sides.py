"""The files of a model folder that a loader needs besides the weights."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from mergebench.checkpoints.descriptors import cannot
from mergebench.checkpoints.documents import is_file
from mergebench.checkpoints.shards import allowed_roots, stays_inside

_SIDE = (
    "config.json",
    "generation_config.json",
    "params.json",
    # Tokenizers.
    "tokenizer*",
    "tekken.json",
    "vocab*",
    "merges.txt",
    "bpe.codes",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "spiece*",
    "sentencepiece*",
    "chat_template*",
    # Images, sound, video.
    "*preprocessor_config.json",
    "*processor_config.json",
    "*image_processor*.json",
    "*feature_extractor*.json",
    # sentence-transformers.
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    # Terms of use travel with the weights.
    "LICEN[CS]E*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
_WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.onnx",
)
# A sentence-transformers model keeps the parts after the transformer in numbered folders.
_PARTS = "[0-9]*_*"


def is_weights(name: str) -> bool:
    """Whether a file name is one of weights, in any format."""
    return any(fnmatchcase(name, pattern) for pattern in _WEIGHTS)


def is_side(name: str) -> bool:
    """Whether a file of this name belongs beside the weights and holds no code."""
    return (
        not name.endswith(".py")
        and not is_weights(name)
        and any(fnmatchcase(name, pattern) for pattern in _SIDE)
    )


def find_sides(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Side files, and files that are left out on purpose, both sorted by path.

    Left out are Python files, which a loader would execute; weights in the numbered folders of
    sentence-transformers, which are no part of the checkpoint; and side files that are links out
    of the folder, so that a downloaded model cannot have a private file copied.

    Raises
    ------
    MergebenchError
        If the system does not list the folder.
    """
    roots = allowed_roots(folder)
    taken: list[Path] = []
    left: list[Path] = []
    try:
        paths = (*folder.iterdir(), *_in_folders(folder))
    except OSError as error:
        raise cannot("listed", folder, error) from error
    for path in paths:
        if not is_file(path):
            continue
        nested = path.parent != folder
        if path.name.endswith(".py") or (nested and is_weights(path.name)):
            left.append(path)
        elif nested or is_side(path.name):
            (taken if stays_inside(path, roots) else left).append(path)
    return tuple(sorted(taken)), tuple(sorted(left))


def _in_folders(folder: Path) -> list[Path]:
    found = [*folder.glob("additional_chat_templates/*.jinja")]
    for part in folder.glob(_PARTS):
        found += [
            path
            for path in part.glob("*")
            if path.name == "config.json" or path.name.endswith(".py") or is_weights(path.name)
        ]
    return found
