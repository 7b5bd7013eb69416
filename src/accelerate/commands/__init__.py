"""The command line: one module per command. Parsers only; the work is done in the layers below."""
