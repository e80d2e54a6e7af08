"""Coverage-guided fuzzing of one target with atheris: ``make fuzz ARGS="--target header"``.

Every input is a call of one function of ``targets.py`` in a folder in memory. A finding (any
exception but ``MergebenchError``, a hang, too much memory) stops the run and is written to
``--findings``; with ``--keep-going`` exceptions are written once per place in the code, and the
run goes on.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import atheris

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
_MEMORY = Path("/dev/shm")  # noqa: S108
_INSTRUMENTED = ["mergebench", "yaml", "torch._weights_only_unpickler"]
# Loaded when first needed, which must be while atheris looks.
_MODULES = (
    *("checkpoints.distributed", "checkpoints.gguf", "checkpoints.journal", "checkpoints.pickled"),
    "checkpoints.sft",
    *("describe", "recipe"),
)


def main() -> None:
    """Run one target for some time, from its seeds and what earlier runs have found."""
    given = _arguments()
    with atheris.instrument_imports(include=_INSTRUMENTED):
        import targets

        for name in _MODULES:
            import_module(f"mergebench.{name}")
        # It takes seconds, which must not count for the first input that needs it.
        import_module("torch")
        from mergebench.adapters_zoo.adapter import KINDS
        from mergebench.adapters_zoo.packing import CODECS

        list(KINDS)
        list(CODECS)
    findings, grown = given.findings / given.target, given.running / given.target
    for folder in (findings, grown):
        folder.mkdir(parents=True, exist_ok=True)
    place = Path(
        tempfile.mkdtemp(prefix="mergebench-fuzz-", dir=_MEMORY if _MEMORY.is_dir() else None)
    )
    one = _Target(targets.TARGETS[given.target], place, findings, keep_going=given.keep_going)
    options = [
        f"-max_total_time={given.seconds}",
        f"-rss_limit_mb={given.rss}",
        f"-timeout={given.timeout}",
        f"-max_len={given.max_len}",
        f"-artifact_prefix={findings}/",
        "-print_final_stats=1",
    ]
    if (words := HERE / "words" / f"{given.target}.dict").is_file():
        options.append(f"-dict={words}")
    atheris.Setup([sys.argv[0], str(grown), str(HERE / "corpus" / given.target), *options], one)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--findings", type=Path, default=HERE / "findings")
    parser.add_argument(
        "--running", type=Path, default=HERE / "running", help="where the corpus grows"
    )
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--rss", type=int, default=3072, help="MiB of the process")
    parser.add_argument("--max-len", type=int, default=4096, help="bytes of an input")
    parser.add_argument("--timeout", type=int, default=20, help="seconds for one input")
    return parser.parse_args()


class _Target:
    """Calls the target, in an empty folder each time, and counts."""

    def __init__(
        self,
        function: Callable[[bytes, Path], bool],
        place: Path,
        findings: Path,
        *,
        keep_going: bool,
    ) -> None:
        self.function, self.place, self.findings = function, place, findings
        self.keep_going = keep_going
        self.count = self.accepted = 0
        self.seen: set[str] = set()

    def __call__(self, data: bytes) -> None:
        self.count += 1
        for old in self.place.iterdir():
            old.unlink()
        try:
            self.accepted += self.function(data, self.place)
        except Exception as error:
            if not self.keep_going:
                raise
            self._keep(data, error)
        if self.count % 5000 == 0:
            print(f"{self.count} executions, {self.accepted} accepted", flush=True)

    def _keep(self, data: bytes, error: Exception) -> None:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "mergebench" in f.filename]
        place = f"{Path(ours[-1].filename).stem}-{ours[-1].lineno}" if ours else "elsewhere"
        key = f"{type(error).__name__}-{place}"
        if key not in self.seen:
            self.seen.add(key)
            (self.findings / key).write_bytes(data)
            print(f"FINDING {key}: {str(error)[:200]}", flush=True)


if __name__ == "__main__":
    main()
