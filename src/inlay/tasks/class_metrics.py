"""Scores of predicted classes, sets of classes, and numbers."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def single_label_scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """accuracy, macro_f1 (mean over the classes that occur) and mcc (Matthews correlation) of class numbers (rows,)."""
    several = len(np.union1d(true, predicted)) > 1  # with one class alone it is 0 by convention, and sklearn warns
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0)),
        "mcc": float(matthews_corrcoef(true, predicted)) if several else 0.0,
    }


def multi_label_scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """micro_f1, macro_f1 and exact (share of rows whose whole set is right) of 0/1 matrices (rows, classes)."""
    return {
        "micro_f1": float(f1_score(true, predicted, average="micro", zero_division=0)),
        "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0)),
        "exact": float((true == predicted).all(-1).mean()),
    }


def regression_scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """mse, and the Pearson and Spearman correlations of (rows,), which are 0 where either side is constant."""
    mse = float(((predicted - true) ** 2).mean())
    spearman = correlation(ranks(predicted), ranks(true))
    return {"loss": mse, "mse": mse, "pearson": correlation(predicted, true), "spearman": spearman}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two series; 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / spread if spread > 0 else 0.0


def ranks(series: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(series, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
