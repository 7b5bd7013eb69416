"""The one process-wide object, and the functions that use it."""
