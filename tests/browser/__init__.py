"""Reports as people see them: in a real browser."""
