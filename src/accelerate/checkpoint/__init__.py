"""Bytes in folders: what a run has to keep, and how it gets to the disk whole."""
