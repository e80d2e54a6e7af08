"""Small models on disk, ways to run the command, and comparisons."""
