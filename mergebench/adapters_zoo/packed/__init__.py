"""Codecs of packed tensors, one per file."""
