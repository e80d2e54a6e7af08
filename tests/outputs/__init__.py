"""What merges write, opened by the programs that will open it."""
