"""Saves that are cut off, and what a fresh process finds afterwards.

`program` is what is saved and loaded, through the public interface only, so the same checks run on Accelerate 1.x.
`processes` forks it into real processes. `tracing` (strace) and `watching` (no tool) say what a save did to the disk,
`power` turns that into the folders a power cut could leave, `lint` looks at the order alone. `checks` puts it
together; `suite.py` is the command line of the long forms.
"""
