"""aTLAS: anisotropic scaling of task vectors (arXiv:2407.02880).

``θ_j = θ0_j + Σ_i λ_ij τ_ij`` with one coefficient for every task vector i and parameter tensor j,
from zero and without bounds, by AdamW on a few labels or, at test time, on predictions. × K: one
for each of K random parts of every tensor. The gradient of λ_ij is ⟨∂L/∂θ_j, τ_ij⟩ behind an
ordinary backward pass, which is what differentiating through the mixture gives.

Deviations: the last epoch is taken unless a split is named to choose one on, where the authors
choose by labels also at test time, and learn from the test inputs. For negation they tune rate and
epochs by data set (2e-3 to 1e-2, 2 to 20); here it is the middle. Few-shot learning lets the rate
fall along a cosine as their code does. Of × K see the method ``atlas``, of test time
:class:`~mergebench.merge.fit.fixmatch.FixMatch`.
"""

from __future__ import annotations

from mergebench.merge.fit.settings import Settings

#: What the paper trains with (its appendix, and the authors' code).
SETTINGS = {
    "addition": Settings(epochs=20, rate=1e-3),
    "negation": Settings(epochs=10, rate=5e-3),
    "few-shot": Settings(epochs=10, rate=1e-1, cosine=True),
    "test-time": Settings(objective="ufm", epochs=10, rate=1e-3, cosine=True),
}
#: Share of the control tasks' scores of the base that negation keeps.
CONTROL = 0.95
