"""Record what mergekit makes of the small models, or check that it still makes the same.

mergekit is only ever run through its command line, in an environment of its own::

    python tests/parity/record.py                 # creates .parity-venv/ and uses that
    python tests/parity/record.py --mergekit PATH # the mergekit-yaml of another environment
    python tests/parity/record.py --check         # compare with the recorded files, write nothing
    python tests/parity/record.py --install       # only create .parity-venv/, for `make bench`
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

# As a script this file has its own folder on the path, and not the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.parity.cases import MERGEKIT_VERSION, RECORDED, TORCH_VERSION, Case, every_case
from tests.parity.models import DTYPES, NAMES, build, digest, tensors

REPOSITORY = Path(__file__).resolve().parents[2]
SEED = ("--random-seed", "7")
OPTIONS = ("--quiet", "--no-copy-tokenizer", "--no-write-model-card")


def create_environment() -> Path:
    """Return the mergekit-yaml of ``.parity-venv/``, which is created where it is missing."""
    folder = REPOSITORY / ".parity-venv"
    executable = folder / "bin" / "mergekit-yaml"
    if not executable.exists():
        venv.create(folder, with_pip=True, clear=True)
        command = [str(folder / "bin" / "python"), "-m", "pip", "install"]
        command += ["-c", str(REPOSITORY / "constraints.txt")]
        command += [f"mergekit=={MERGEKIT_VERSION}", f"torch=={TORCH_VERSION}"]
        subprocess.run(command, check=True)
    return executable


def versions(executable: Path) -> dict[str, str]:
    """Return the versions of mergekit and torch in the environment of ``executable``.

    Anything but the pinned ones is refused: the recorded files are named after them.
    """
    script = "import importlib.metadata as m; print(m.version('mergekit'), m.version('torch'))"
    python = executable.parent / "python"
    answer = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    mergekit, torch = answer.stdout.split()
    if (mergekit, torch.partition("+")[0]) != (MERGEKIT_VERSION, TORCH_VERSION):
        raise SystemExit(
            f"{executable} is mergekit {mergekit} with torch {torch}; "
            f"the recorded files need mergekit {MERGEKIT_VERSION} with torch {TORCH_VERSION}"
        )
    return {"mergekit": mergekit, "torch": TORCH_VERSION}


def run(executable: Path, case: Case, models: Path) -> dict[str, np.ndarray]:
    """Run mergekit on ``case`` in the folder with its models and return the tensors it wrote."""
    output = models / "merged" / case.name
    config = models / f"{Path(case.name).name}.yml"
    config.write_text(case.text)
    # The configurations name the models by relative path, and nothing may be looked up online.
    options = OPTIONS + (SEED if case.name.startswith("random/") else ())
    command = [str(executable), config.name, str(output.relative_to(models)), *options]
    done = subprocess.run(
        command,
        cwd=models,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"mergekit failed on {case.label}:\n{done.stderr}")
    merged: dict[str, np.ndarray] = {}
    for shard in sorted(output.glob("*.safetensors")):
        merged.update(load_file(shard))
    expected = tensors("base", case.dtype)
    if {k: (v.shape, v.dtype) for k, v in merged.items()} != {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }:
        raise SystemExit(f"mergekit's output for {case.label} is not shaped like its models")
    return {name: merged[name] for name in expected}


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or check every case; return 1 if a check found a difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--mergekit", type=Path, help="the mergekit-yaml executable to run")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--output", type=Path, default=RECORDED, help="default: %(default)s")
    parser.add_argument("--install", action="store_true", help="make the environment, and stop")
    options = parser.parse_args(arguments)
    if options.install:
        print(create_environment())
        return 0

    # Absolute but not resolved: following its link would lead out of a virtual environment.
    executable = (options.mergekit or create_environment()).absolute()
    folder: Path = options.output
    manifest: dict[str, object] = {
        **versions(executable),
        "command": " ".join(["mergekit-yaml", "CASE.yml", "OUT", *OPTIONS]),
        "models": {d: {name: digest(tensors(name, d)) for name in NAMES} for d in DTYPES},
    }
    outputs: dict[str, str] = {}
    different: list[str] = []
    if not options.check:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in DTYPES:
            for name in NAMES:
                build(Path(scratch) / dtype, name, dtype)
        for case in every_case():
            merged = run(executable, case, Path(scratch) / case.dtype)
            outputs[case.label] = digest(merged)
            if not options.check:
                target = folder / f"{case.label}.safetensors"
                target.parent.mkdir(parents=True, exist_ok=True)
                save_file(merged, target)
            elif digest(case.recorded(folder)) != outputs[case.label]:
                different.append(case.label)
            print(f"{case.label}  {outputs[case.label][:12]}", flush=True)
    manifest["outputs"] = outputs
    text = json.dumps(manifest, indent=2) + "\n"
    path = folder / "manifest.json"
    if not options.check:
        path.write_text(text)
    elif path.read_text() != text:
        different.append(path.name)
    if different:
        print(f"differs from what was recorded: {', '.join(different)}", file=sys.stderr)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
