"""The tiny model, rows and runs that these tests share."""

from train.tiny_runs import make_run, rows, tiny_model

__all__ = ["make_run", "rows", "tiny_model"]
