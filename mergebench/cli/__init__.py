"""The only place that knows typer and rich."""
