"""One op per file; all are discovered."""
