"""Record what FusionBench makes of the small models, or check that it still makes the same.

FusionBench is only ever run, by ``fusionbench/run.py`` in an environment of its own::

    python tests/parity/record_fusionbench.py               # creates .parity-venv-fusionbench/
    python tests/parity/record_fusionbench.py --python PATH # of another environment that has it
    python tests/parity/record_fusionbench.py --check       # compare, write nothing
"""

# ruff: noqa: T201  a script reports by printing

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.parity.cases import TORCH_VERSION
from tests.parity.models import NAMES, digest, tensors

REPOSITORY = Path(__file__).resolve().parents[2]
VERSION = "0.2.33"
RECORDED = Path(__file__).parent / "recorded" / f"fusionbench-{VERSION}"
SCRIPT = Path(__file__).parent / "fusionbench" / "run.py"
#: LAPACKs differ in the last digits of float32.
TOLERANCE = 1e-4


def create_environment() -> Path:
    """Return the Python of ``.parity-venv-fusionbench/``, which is created where it is missing."""
    folder = REPOSITORY / ".parity-venv-fusionbench"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install"]
        command += ["-c", str(REPOSITORY / "constraints.txt")]
        command += [f"fusion-bench=={VERSION}", f"torch=={TORCH_VERSION}"]
        subprocess.run(command, check=True)
    return python


def check_versions(python: Path) -> None:
    """Refuse anything but the pinned versions: the recorded files are named after them."""
    script = "import importlib.metadata as m; print(m.version('fusion-bench'), m.version('torch'))"
    answer = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    own, torch = answer.stdout.split()
    if (own, torch.partition("+")[0]) != (VERSION, TORCH_VERSION):
        raise SystemExit(f"{python} has FusionBench {own} with torch {torch}")


def run(python: Path) -> dict[str, dict[str, np.ndarray]]:
    """Run every case and return the tensors that came out."""
    with tempfile.TemporaryDirectory() as scratch:
        models, out = Path(scratch) / "models", Path(scratch) / "out"
        models.mkdir()
        out.mkdir()
        for name in NAMES:
            save_file(tensors(name), models / f"{name}.safetensors")
        done = subprocess.run(
            [python, SCRIPT, models, out],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"FusionBench failed:\n{done.stderr}")
        return {path.stem: load_file(path) for path in sorted(out.glob("*.safetensors"))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or check every case; return 1 if a check found a difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--python", type=Path, help="the Python that has FusionBench")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)
    python = (options.python or create_environment()).absolute()
    check_versions(python)
    outputs = run(python)
    different = []
    for case, merged in outputs.items():
        path = RECORDED / f"{case}.safetensors"
        if options.check:
            recorded = load_file(path)
            worst = max(np.abs(recorded[name] - merged[name]).max() for name in recorded)
            different += [case] if worst > TOLERANCE else []
            print(f"{case}  off by {worst:.1e}", flush=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(merged, path)
            print(f"{case}  {digest(merged)[:12]}", flush=True)
    manifest = {
        "fusion-bench": VERSION,
        "torch": TORCH_VERSION,
        "models": {name: digest(tensors(name)) for name in NAMES},
        "cases": sorted(outputs),
    }
    text = json.dumps(manifest, indent=2) + "\n"
    if not options.check:
        (RECORDED / "manifest.json").write_text(text)
    elif (RECORDED / "manifest.json").read_text() != text:
        different.append("manifest.json")
    if different:
        print(f"differs from what was recorded: {', '.join(different)}", file=sys.stderr)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
