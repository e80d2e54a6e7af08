"""One file per adapter kind; each registers itself in ``adapter.KINDS`` when imported."""
