"""Outputs on their way to others: compressed, pushed, pulled, put on a shelf."""
