"""One merge method per file; all are discovered."""
