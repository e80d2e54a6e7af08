"""Chains of ops fused into one pass over stored entries; the ops remain the definition."""
