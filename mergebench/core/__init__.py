"""Words as types: no files, no network, no printing, no torch."""
