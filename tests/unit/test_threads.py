"""Limiting threads of linear algebra, with libraries that come later."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json
import numpy.linalg
from threadpoolctl import threadpool_info, threadpool_limits
from mergebench.compute.threads import one_thread

def counts():
    return {each["filepath"]: each["num_threads"] for each in threadpool_info()}

with threadpool_limits(2):
    with one_thread():
        first = counts()
    import scipy.linalg
    threadpool_limits(2)
    with one_thread():
        second = counts()
    after = counts()
print(json.dumps([first, second, after]))
"""


def test_every_library_has_one_thread() -> None:
    """Those that were imported since the last time too; all of them have theirs back after it."""
    line = [sys.executable, "-c", CODE]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    first, second, after = json.loads(done.stdout)

    assert set(first.values()) == set(second.values()) == {1}
    assert set(after.values()) == {2}
    assert first.keys() < second.keys()
