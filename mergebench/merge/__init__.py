"""Recipes become plans, plans become outputs; ops and methods live in leaf folders."""
