"""One merge by many processes: the bytes of one, whoever dies."""
