"""Fits: soups, searches, learned coefficients."""
