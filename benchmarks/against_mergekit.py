"""What the same merges cost in mergekit, as processes of their own: CPU and peak memory.

``python benchmarks/against_mergekit.py --size 1GB``. mergekit is run through its command line, in
the environment that ``make bench`` and ``make parity`` make (``--mergekit`` names another one).
Both tools start up, read, merge and write; memory is the peak of anonymous memory (RssAnon) of the
process, libraries included. Between them the floor reads and writes the same bytes by a bare loop.
They take turns, and medians of several rounds count: the system's part of the same merge changes
from one minute to the next where pages come from a host, so what is left without it is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))

from measured import floor

from mergebench.checkpoints.sizes import parse_size

HERE = Path(__file__).parent
VOCAB, WIDTH, INNER = 8192, 2048, 5632
MODELS = ("ft0", "ft1", "ft2")
#: mergekit's method, parameters and models; the same for mergebench; and how many times less CPU
#: it must take, and is to.
CASES: dict[str, tuple[dict[str, Any], list[str], tuple[int, int]]] = {
    "linear": ({"method": "linear", "each": {"weight": 1.0}}, ["-m", "linear"], (8, 12)),
    "task arithmetic": (
        {"method": "task_arithmetic", "each": {"weight": 0.4}, "base": True},
        ["-m", "task_arithmetic", "-p", "lam=0.4"],
        (8, 12),
    ),
    "TIES": (
        {"method": "ties", "each": {"weight": 1.0, "density": 0.2}, "base": True},
        ["-m", "ties", "--compat", "mergekit-0.1.5", "-p", "density=0.2"],
        (25, 50),
    ),
    "Breadcrumbs": (
        {
            "method": "breadcrumbs",
            "each": {"weight": 1.0, "density": 0.9, "gamma": 0.01},
            "base": True,
        },
        ["-m", "breadcrumbs", "--compat", "mergekit-0.1.5", "-p", "density=0.9"],
        (25, 50),
    ),
    "SLERP": ({"method": "slerp", "all": {"t": 0.5}, "two": True}, ["-m", "slerp"], (10, 10)),
}


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a LLaMA."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{k}_proj.weight": (WIDTH, WIDTH) for k in "qkvo"}
        found |= {f"{at}.mlp.{k}_proj.weight": (INNER, WIDTH) for k in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (WIDTH, INNER)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{norm}.weight"] = (WIDTH,)
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def build(folder: Path, size: int) -> None:
    """A base and fine-tunes of about ``size`` bytes each, as model folders."""
    block = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER
    layers = max(round((size / 2 - 2 * VOCAB * WIDTH) / block), 1)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": VOCAB, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    for model, name in enumerate(("base", *MODELS)):
        arrays = {}
        for number, (tensor, shape) in enumerate(tensors(layers).items()):
            values = np.random.default_rng(number).standard_normal(shape, np.float32) * 0.02
            if model:
                random = np.random.default_rng((number, model))
                values += random.standard_normal(shape, np.float32) * 1e-3
            arrays[tensor] = values.astype(ml_dtypes.bfloat16)
        (folder / name).mkdir(parents=True)
        save_file(arrays, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(config))
    (folder / "built").touch()


def measured(command: list[str], folder: Path) -> tuple[float, float, int]:
    """CPU seconds, those not the system's, and the peak of anonymous memory, of a process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while True:
        done, code, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    if code:
        raise SystemExit(f"{command}\n{said[-3000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_utime, peak


def yaml_of(case: dict[str, Any]) -> str:
    """The configuration that mergekit reads; JSON is YAML."""
    used = MODELS[:2] if case.get("two") else MODELS
    document = {
        "merge_method": case["method"],
        "models": [{"model": name, "parameters": case.get("each", {})} for name in used],
        "dtype": "bfloat16",
        "parameters": case.get("all", {}),
    }
    if case.get("base") or case.get("two"):
        document["base_model"] = "base" if case.get("base") else used[0]
    return json.dumps(document)


def main() -> None:
    """Measure both, print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1GB", help="bytes of one checkpoint")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3, help="of which medians are given")
    parser.add_argument("--keep", action="store_true", help="keep the synthetic checkpoints")
    parser.add_argument("--json", action="store_true")
    root = HERE.parent / ".parity-venv" / "bin" / "mergekit-yaml"
    parser.add_argument("--mergekit", type=Path, default=root)
    # `make bench` hands on what it was given for all of them.
    args, _ = parser.parse_known_args()
    folder = args.data.absolute() / f"mergekit-{args.size}"
    if not (folder / "built").exists():
        build(folder, parse_size(args.size))
    found = {
        name: medians(
            [compare(folder, args.mergekit.absolute(), *CASES[name][:2])
             for _ in range(args.rounds)]
        )
        for name in args.only
    }  # fmt: skip
    if not args.keep:
        shutil.rmtree(folder)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    table = Table(title=f"base + {len(MODELS)} × {args.size} in bf16, start-up included")
    for heading in ("", "mergekit CPU s", "CPU s", "÷", "must", "aim", "without the system's",
                    "÷", "floor CPU s", "mergekit MiB", "MiB", "÷"):  # fmt: skip
        table.add_column(heading, justify="left" if not heading else "right")
    for name, each in found.items():
        (theirs, their_user, their_peak), (own, user, peak) = each["mergekit"], each["mergebench"]
        must, aim = CASES[name][2]
        cells = (
            f"{theirs:.1f}", f"{own:.1f}", f"{theirs / own:.1f}", str(must), str(aim),
            f"{their_user:.1f}, {user:.1f}", f"{their_user / user:.1f}", f"{each['floor']:.1f}",
            f"{their_peak / 2**20:.0f}", f"{peak / 2**20:.0f}", f"{their_peak / peak:.1f}",
        )  # fmt: skip
        table.add_row(name, *cells)
    Console(width=140).print(table)


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of every number of some rounds."""
    return {name: np.median([each[name] for each in rounds], axis=0).tolist() for name in rounds[0]}


def compare(
    folder: Path, mergekit: Path, theirs: dict[str, Any], ours: list[str]
) -> dict[str, Any]:
    """CPU seconds and peak memory of one merge by both, and CPU seconds of the floor."""
    used = MODELS[:2] if theirs.get("two") else MODELS
    inputs = [*used, *(["--base", "base"] if theirs.get("base") else [])]
    read = [*used, *(["base"] if theirs.get("base") else [])]
    options = ["--quiet", "--no-copy-tokenizer", "--no-write-model-card"]
    start = "from mergebench.cli.start import main; main()"
    (folder / "case.yml").write_text(yaml_of(theirs))
    other = measured([str(mergekit), "case.yml", "out", *options], folder)
    shutil.rmtree(folder / "out")
    began = time.process_time()
    floor([str(folder / name / "model.safetensors") for name in read], str(folder / "floor"))
    least = time.process_time() - began
    (folder / "floor").unlink()
    merge = ["merge", *inputs, *ours, "-o", "out", "--workers", "1", "-q"]
    own = measured([sys.executable, "-c", start, *merge], folder)
    shutil.rmtree(folder / "out")
    print(theirs["method"], other, own, least, file=sys.stderr, flush=True)
    return {"mergekit": other, "mergebench": own, "floor": least}


if __name__ == "__main__":
    main()
