"""AdaMerging: coefficients that minimise the entropy of predictions (arXiv:2310.02575).

Per task vector and tensor (layer-wise) or per task vector (task-wise), from 0.3 and within
[0, 1], on batches without labels; AdaMerging++ does so for task vectors that TIES has trimmed and
in which one sign per entry was elected. The authors use Adam without weight decay for 500 steps and
learn from the test inputs themselves; here the split is named, and it is not the one reported on.
"""

from __future__ import annotations

from mergebench.merge.fit.settings import Settings

_PUBLISHED = Settings(
    objective="entropy", steps=500, rate=1e-3, decay=0.0, clip=0.0, start=0.3, low=0.0, high=1.0
)
#: By what coefficients differ.
SETTINGS = {
    "tensor": _PUBLISHED,
    "task": Settings(**{**vars(_PUBLISHED), "shared": True}),
}
#: The merge whose weights are learned, as options of the command line: its TIES sums what agrees.
METHOD, PLUS = ("task_arithmetic", ["lam=1"]), ("ties", ["lam=1", "divisor=none"])
