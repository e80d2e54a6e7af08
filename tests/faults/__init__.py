"""Killed, without power, out of disk, interrupted: an output is whole or absent, and resumes."""
