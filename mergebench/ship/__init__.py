"""Outputs on their way to others: pushed, pulled, put on a shelf."""
