"""Models on disk: opened without reading their weights, written so that they appear whole."""
