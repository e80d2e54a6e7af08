"""Whole configurations: what mergekit and `mergebench run` make of the very same file.

``python tests/parity/configs.py`` runs mergekit as ``record.py`` does and stores what it writes;
``--mergekit`` and ``--check`` are those of ``record.py``. The models have four layers and a
tokenizer; ``wide`` is ``ft-b`` with two tokens exchanged, one that the others lack, and without one
that they have.
"""

# ruff: noqa: T201  a script reports by printing

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

# As a script this file has its own folder on the path, and not the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.parity.cases import HERE, RECORDED
from tests.parity.models import NAMES, VOCAB, build, tensors
from tests.parity.record import create_environment, versions

CONFIGS = HERE / "configs"
STORED = RECORDED / "configs"
LAYERS = 4
OPTIONS = ("--quiet", "--no-write-model-card")
WIDE = "wide"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
TOKENS = ["<unk>", "<s>", "</s>", *(f"t{row}" for row in range(3, VOCAB))]
#: Row by row; the last token is new.
WIDE_TOKENS = [*TOKENS[:5], "t6", "t5", *TOKENS[7:20], *TOKENS[21:], "new"]


def wide() -> dict[str, np.ndarray]:
    """The tensors of ``wide``: as many rows as tokens, each with its token's values."""
    model = tensors("ft-b", layers=LAYERS)
    for name in EMBEDDINGS:
        place = {token: row for row, token in enumerate(TOKENS)}
        rows = [model[name][place[token]] if token in place else None for token in WIDE_TOKENS]
        fresh = np.linspace(-0.5, 0.5, model[name].shape[1], dtype=np.float32)
        model[name] = np.stack([fresh if row is None else row for row in rows])
    return model


def _tokenizer(folder: Path, tokens: Sequence[str]) -> None:
    special = [
        {"id": row, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for row, token in enumerate(tokens[:3])
    ]  # fmt: skip
    data = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {t: row for row, t in enumerate(tokens)},
                  "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>",
              "bos_token": "<s>", "eos_token": "</s>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def build_all(folder: Path) -> None:
    """Write the models, with their tokenizers."""
    for name in NAMES:
        _tokenizer(build(folder, name, layers=LAYERS), TOKENS)
    target = folder / WIDE
    target.mkdir()
    save_file(wide(), target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "base/config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": len(WIDE_TOKENS)}))
    _tokenizer(target, WIDE_TOKENS)


def by_token(model: Mapping[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The tensors with the rows of embeddings in the order of their tokens' names."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    ids |= {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    order = [ids[token] for token in sorted(ids)]
    return {n: (a[order] if n in EMBEDDINGS else a) for n, a in model.items()}


def written(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder."""
    found: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found.update(load_file(shard))
    return by_token(found, folder) if (folder / "tokenizer.json").exists() else found


def sides(folder: Path) -> dict[str, Any]:
    """What stands beside the weights and must be alike."""
    config = json.loads((folder / "config.json").read_text())
    template = folder / "chat_template.jinja"
    return {
        "layers": config["num_hidden_layers"],
        "vocabulary": config["vocab_size"],
        "template": template.read_text() if template.exists() else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or check every configuration; return 1 if a check found a difference."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml executable to run")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)
    executable = (options.mergekit or create_environment()).absolute()
    about: dict[str, Any] = {**versions(executable), "sides": {}}
    different = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        build_all(path)
        STORED.mkdir(parents=True, exist_ok=True)
        for config in sorted(CONFIGS.glob("*.yml")):
            name = config.stem
            (path / config.name).write_text(config.read_text())
            out = path / f"out-{name}"
            done = subprocess.run(
                [str(executable), config.name, out.name, *OPTIONS],
                cwd=path,
                # Tokens that are new come in the order of a set.
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise SystemExit(f"mergekit failed on {name}:\n{done.stderr}")
            found, place = written(out), STORED / f"{name}.safetensors"
            about["sides"][name] = sides(out)
            if not options.check:
                save_file({n: np.ascontiguousarray(a) for n, a in found.items()}, place)
            elif any(a.tobytes() != found[n].tobytes() for n, a in load_file(place).items()):
                different.append(name)
            print(name, flush=True)
    text = json.dumps(about, indent=2) + "\n"
    if not options.check:
        (STORED / "sides.json").write_text(text)
    elif (STORED / "sides.json").read_text() != text:
        different.append("sides.json")
    if different:
        print(f"differs from what was recorded: {', '.join(different)}", file=sys.stderr)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
