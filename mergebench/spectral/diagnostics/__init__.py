"""One diagnostic per file; the file's function is found by being here."""
