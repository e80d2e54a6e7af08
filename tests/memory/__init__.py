"""Memory is set by ``--memory``, not by the size of the models."""
