"""Diagnostics of what fine-tuning did (none yet)."""
