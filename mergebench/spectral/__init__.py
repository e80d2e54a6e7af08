"""Looking at task vectors through their singular values and vectors; nothing here draws."""
