"""Text classification with one frozen head per task: data, experts, merges, a table."""
