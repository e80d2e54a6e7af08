"""Other libraries asked whether they can load what was written; the only place that imports them.

No weights are read into memory, and no code from a model's folder is ever run.
"""
