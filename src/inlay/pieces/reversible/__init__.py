"""Blocks that are run as two streams, from whose end their start is computed again."""
