"""Fine-tune one sentence encoder on several text classification files, and merge the results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="one per task: .csv or .tsv with columns text and label, or .jsonl "
        "(default: three small tasks made of templates)",
    )
    parser.add_argument(
        "--base",
        help="folder or Hub id of an encoder (default: sentence-transformers/all-MiniLM-L6-v2)",
    )
    parser.add_argument(
        "--template",
        help="describes a label, with {label} in it (default: This text is about {label}.)",
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=("full", "lora"), default=["full", "lora"], metavar="KIND",
        help="experts to train and merge: full, lora (default: both)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of splits and training (default: 0)")
    parser.add_argument("--rank", type=int, help="of LoRAs (default: 16)")
    parser.add_argument("--epochs", type=int, help="of training (default: 4)")
    parser.add_argument("--limit", type=int, help="most texts of a split, 0: all (default: 1500)")
    parser.add_argument("--max-length", type=int, help="tokens of a text (default: 64)")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE / "work",
        help="where trained models are cached (default: work/ beside this file)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "out",
        help="where tables, JSON and recipes go (default: out/ beside this file)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few texts, epochs and rows: shows that all runs"
    )
    return parser.parse_args()


# --help should not wait for torch.
if __name__ == "__main__":
    options = parse()

    from text_demo.data import DataError
    from text_demo.demo import run
    from text_demo.sample import write_sample
    from text_demo.settings import DEFAULT_BASE, TEMPLATE, chosen

    settings = chosen(
        quick=options.quick, seed=options.seed, device=options.device, rank=options.rank,
        limit=options.limit, max_length=options.max_length, epochs=options.epochs,
        template=options.template or TEMPLATE, threads=options.threads,
    )  # fmt: skip
    files = options.files or write_sample(options.work / "sample")
    base = options.base or DEFAULT_BASE
    try:
        run(files, base, settings, options.work, options.out, options.kinds)
    except DataError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
