"""Chains on an accelerator: the same ops, on tiles that torch holds there."""
