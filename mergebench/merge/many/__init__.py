"""One merge on many machines: the same bytes, whoever computes what."""
