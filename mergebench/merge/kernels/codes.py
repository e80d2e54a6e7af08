"""Numbers for what the compiled pass can do; apart, so that none of it must be compiled first."""

from __future__ import annotations

from mergebench.compute.gram import BLOCK, LANES

__all__ = ["BLOCK", "LANES"]

#: Entries that go through all stages before the next ones are loaded.
STRETCH = 2048
#: Entries that are compared with thresholds at once.
SOME = 64
#: Rows so short that each entry is compared with every other; bins of a radix sort.
FEW, DIGITS = 8, 1 << 11
#: Rows of the workspace beside those of the models: base, and two for sums.
SPARE = 3
#: Dtypes as they are stored; ZEROS stands for a model that does not touch the tensor.
ZEROS, BF16, F16, F32 = range(4)
KINDS = {"": ZEROS, "BF16": BF16, "F16": F16, "F32": F32}
#: What a stage does. GATHER is ADD of displacements, or STEP, without any rows in between.
WINDOW, DRAW, MULTIPLY, DIVIDE, ELECT, ADD, STEP, DISJOINT, GATHER = range(9)
#: The same with rows, which are never cut.
ROW_WINDOW, ROW_DRAW = 9, 10
#: Divisors of DISJOINT.
NONE, COUNT, WEIGHTS = range(3)
#: What is measured.
SURVEY, PRODUCTS, BALLOT = range(3)
#: Onto the base: not at all; so that zeros leave its bits; as a plain sum.
NOWHERE, EXACTLY, PLAINLY = range(3)
#: What came of it.
DONE, BAD_INPUT, BAD_OUTPUT = range(3)
