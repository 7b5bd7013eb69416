"""Self tests that are shipped, so that they run on the user's own machines."""
