"""Built-in kinds of tasks, one to a file."""
