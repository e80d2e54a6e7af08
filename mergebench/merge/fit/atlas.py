"""aTLAS: anisotropic scaling of task vectors (arXiv:2407.02880).

``θ_j = θ0_j + Σ_i λ_ij τ_ij`` with one coefficient for every task vector i and parameter tensor j,
from zero and without bounds, by AdamW on a few labels or, at test time, on predictions.

Deviations: the gradient of λ_ij is taken as ⟨∂L/∂θ_j, τ_ij⟩ behind an ordinary backward pass, which
is what differentiating through the mixture gives. ``test-time`` minimises the entropy of
predictions; the unsupervised FixMatch of the paper, partitions of tensors (×K) and the choice of
the most informative blocks are not offered yet. The last epoch is taken, where the authors choose
one by labels.
"""

from __future__ import annotations

from mergebench.merge.fit.learn import Settings

#: What the paper trains with (its appendix, and the authors' code).
SETTINGS = {
    "addition": Settings(epochs=20, rate=1e-3),
    "few-shot": Settings(epochs=10, rate=1e-1),
    "test-time": Settings(objective="entropy", epochs=10, rate=1e-3, cosine=True),
}
