"""Record the power laws that WeightWatcher fits, or check that it still fits the same.

It is only ever run, in an environment of its own, and of it the fit alone, since the package
imports much that a fit does not need::

    python tests/parity/record_weightwatcher.py               # .parity-venv-weightwatcher/
    python tests/parity/record_weightwatcher.py --python PATH # of another environment that has it
    python tests/parity/record_weightwatcher.py --check       # compare, write nothing
"""

# ruff: noqa: T201  a script reports by printing

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from math import isclose
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.parity.spectra import eigenvalues

REPOSITORY = Path(__file__).resolve().parents[2]
VERSION = "0.7.7"
RECORDED = Path(__file__).parent / "recorded" / f"weightwatcher-{VERSION}.json"
_CODE = """
import importlib.metadata, importlib.util, json, sys, types
from pathlib import Path
assert importlib.metadata.version("weightwatcher") == sys.argv[1]
package = types.ModuleType("weightwatcher")
package.__path__ = list(importlib.util.find_spec("weightwatcher").submodule_search_locations)
sys.modules["weightwatcher"] = package
from weightwatcher.WW_powerlaw import WWFit
import numpy as np
found = {}
for name, values in json.load(sys.stdin).items():
    fit = WWFit(np.sort(np.array(values)))
    found[name] = {key: float(getattr(fit, key)) for key in ("alpha", "D", "sigma", "xmin")}
print(json.dumps(found))
"""


def create_environment() -> Path:
    """Return the Python of ``.parity-venv-weightwatcher/``, created where it is missing."""
    folder = REPOSITORY / ".parity-venv-weightwatcher"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install"]
        subprocess.run([*install, "--no-deps", f"weightwatcher=={VERSION}"], check=True)
        subprocess.run([*install, "powerlaw", "numpy", "scipy"], check=True)
    return python


def main() -> None:
    """Record or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    values = {name: each.tolist() for name, each in eigenvalues().items()}
    done = subprocess.run(
        [given.python or create_environment(), "-c", _CODE, VERSION],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if not given.check:
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {RECORDED}")
        return
    recorded = json.loads(RECORDED.read_text())
    odd = [
        (name, key)
        for name, each in recorded.items()
        for key in each
        if not isclose(found[name][key], each[key], rel_tol=1e-9)
    ]
    print(f"{len(odd)} of {4 * len(recorded)} numbers differ: {odd}")
    sys.exit(bool(odd))


if __name__ == "__main__":
    main()
