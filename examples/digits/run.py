"""Train digit experts, merge them with the installed command, and report the result."""

from __future__ import annotations

import argparse
from pathlib import Path

HERE = Path(__file__).resolve().parent


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="one split, base and set of experts each (default: 0 1 2)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE / "work",
        help="where trained models are cached and merges written (default: work/ beside this file)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "out",
        help="where picture, table and JSON go (default: out/ beside this file)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the first seed, one LoRA rank and few epochs: shows that everything runs",
    )
    parser.add_argument(
        "--every",
        action="store_true",
        help="every data-free method, and what papers claim of them (some minutes more)",
    )
    parser.add_argument(
        "--spectra",
        action="store_true",
        help="compare the spectra of full fine-tunes and LoRAs of rank 1 to 64, and merge nothing",
    )
    parser.add_argument(
        "--sizes",
        action="store_true",
        help="pack full fine-tunes and LoRAs in every way: accuracy against size, no merges",
    )
    parser.add_argument(
        "--fitted",
        action="store_true",
        help="merges chosen and learned with data beside those without, by `compare` and `fit`",
    )
    return parser.parse_args()


# Worker processes import this file too, and --help should not wait for torch.
if __name__ == "__main__":
    options = parse()

    from digits_demo.demo import run
    from digits_demo.settings import Settings, quick

    settings = Settings(seeds=tuple(dict.fromkeys(options.seeds)), every=options.every)
    if options.spectra:
        from digits_demo.spectra import compare, with_ranks

        chosen = quick(settings) if options.quick else with_ranks(settings)
        compare(chosen, options.work, options.out)
        raise SystemExit
    if options.sizes:
        from digits_demo import sizes

        chosen = quick(settings) if options.quick else settings
        sizes.compare(chosen, options.work, options.out, few=options.quick)
        raise SystemExit
    if options.fitted:
        from dataclasses import replace

        from digits_demo import fitted

        chosen = replace(quick(settings) if options.quick else settings, ranks=())
        fitted.compare(chosen, options.work, options.out, few=options.quick)
        raise SystemExit
    run(quick(settings) if options.quick else settings, options.work, options.out)
