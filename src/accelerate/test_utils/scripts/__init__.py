"""Scripts that are started through the launcher."""
