"""GLUE's metrics, by their names, of predictions and labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def accuracy(predicted: Floats, labels: Floats) -> float:
    return float((predicted == labels).mean())


def f1(predicted: Floats, labels: Floats) -> float:
    """Of label 1; 0 where nothing is of it."""
    both = float(((predicted == 1) & (labels == 1)).sum())
    either = float((predicted == 1).sum() + (labels == 1).sum())
    return 2 * both / either if either else 0.0


def matthews(predicted: Floats, labels: Floats) -> float:
    """Matthews' correlation of two classes; 0 where one side has but one of them."""
    return _correlation(predicted, labels)


def pearson(predicted: Floats, labels: Floats) -> float:
    """0 where one side is constant."""
    return _correlation(predicted, labels)


def spearman(predicted: Floats, labels: Floats) -> float:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs."""
    return _correlation(_ranks(predicted), _ranks(labels))


METRICS: dict[str, Callable[[Floats, Floats], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def _correlation(x: Floats, y: Floats) -> float:
    """Of two binary variables this is Matthews' (the phi coefficient)."""
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0


def _ranks(values: Floats) -> Floats:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]
