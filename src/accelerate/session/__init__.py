"""One training run in this process: what was prepared, and what one does with it."""
