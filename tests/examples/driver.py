"""A script whose calls of the installed command are forked from one that has imported torch.

``python driver.py SCRIPT ARGUMENTS``: the first call is of the command itself, as users run it. The
others do what it does, with the same arguments, folder and environment, but need not import
torch and transformers again, which takes longer than the rest of them.
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.helpers.forked import forked
from tests.helpers.running import COMMAND, MAIN

_READY = """
import sklearn.datasets, sklearn.model_selection
import scipy.optimize, scipy.stats, torch, torch.func, transformers
from transformers import AutoModel, AutoTokenizer, BertModel, BertTokenizerFast
import mergebench.merge.engine, mergebench.merge.fit.compare, mergebench.merge.fit.learn
import mergebench.merge.fit.soups, mergebench.merge.fit.statistics, mergebench.merge.many.where
"""
_run, _called = subprocess.run, []


def _forked(line, **options):
    if Path(line[0]) != COMMAND:
        return _run(line, **options)
    _called.append(line)
    if len(_called) == 1:
        return _run(line, **options)
    known = {"capture_output": True, "text": True, "check": False}
    assert {key: value for key, value in options.items() if key != "env"} == known
    ran = forked(_READY)(MAIN, *line[1:], cwd=Path.cwd(), env=options.get("env"))
    return subprocess.CompletedProcess(line, ran.code, ran.out, ran.err)


if __name__ == "__main__":
    # Both examples give the command one thread, which is settled as torch is imported.
    os.environ["OMP_NUM_THREADS"] = "1"
    subprocess.run = _forked
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
