"""Six digit domains, one frozen head: train experts, merge them, and report what happened."""
