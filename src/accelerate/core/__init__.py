"""Vocabulary that every other layer shares. Imports nothing of ours, and no torch."""
